"""Load an encoder, masked or multimodal, as a classifier from any file that contains one."""

from engine.errors import UserError
from engine.frame_size import spelled
from weights import image_vit
from weights.families import class_of, describe
from weights.files import WeightsError, read
from weights.uniformerv2 import resize_positions


def load_encoder(source, classes=None, *, frames=None, image_size=None, drop=0.0, drop_path=0.0,
                 rows=None, positions="sinusoid"):
    """Load an encoder with a head for Y classes.

    source      a run of mae, clip or classify, or an official file: VideoMAE pretrained or
                fine-tuned, UniFormerV2, CLIP (extended to a video model), InternVideo-MM
    classes     Y; None = keep the head of the file; a file without a head then gets a new one of
                one class, which the caller replaces or ignores
    rows        the row of each class in the file's head, None = a new row; see `with_head` of the
                encoders
    positions   for official VideoMAE files, see mae.position_codes
    returns     mae.VideoClassifier or uniformerv2.UniFormerV2. A teacher or a feature extractor
                needs no head: use `tokens(video)`, before any last norm, or `feature(video)`
    raises      WeightsError: no such file, or no such encoder in it
    """
    kind = kind_of(source, *read(source))
    return ENCODERS[kind](class_of(kind), source, classes, rows, frames=frames,
                          image_size=image_size, drop=drop, drop_path=drop_path,
                          positions=positions)


def kind_of(source, tensors, config):
    """Name of the model in `tensors, config = read(source)`. WeightsError if it has no encoder."""
    kind = config.get("model") or (describe(tensors)[1] or ("VideoCLIP",))[0]
    if not isinstance(kind, str) or kind not in ENCODERS:
        raise WeightsError(f"{source}: holds {kind}, which has no encoder that can be loaded alone")
    return kind


def made_for(source):
    """The clips and the head for which the encoder in `source` was made.

    returns  (frames, size in pixels as --input-size, rows of the head; 0 = it has none)
    raises   WeightsError, as `load_encoder`
    """
    tensors, config = read(source)
    kind = kind_of(source, tensors, config)
    classes = config.get("classes", 0)
    if not config:  # build the whole model, because names and shapes of a file are not enough
        config = load_encoder(source).config
        has_head = kind in ("VideoClassifier", "UniFormerV2") and not image_vit.is_image(tensors)
        classes = config["classes"] if has_head else 0
    config = config.get("clip") or config.get("encoder") or config
    try:
        return int(config["frames"]), spelled(tuple(map(int, config["image_size"]))), int(classes)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise WeightsError(f"{source}: its configuration does not contain the size of its clips "
                           f"({type(error).__name__}: {error})") from None


def masked(cls, source, classes, rows, *, frames, image_size, drop, drop_path, positions):
    """The encoder of a VideoMAE or a VideoClassifier; see `load_encoder`."""
    model = cls.from_official(source, frames=frames, image_size=image_size, positions=positions)
    old = model.config.get("classes", 0)
    check_rows(source, old, classes, rows)
    return model.with_head(classes or old or 1, frames=frames or model.config["frames"],
                           image_size=image_size or model.config["image_size"],
                           drop=drop, drop_path=drop_path, rows=rows)


def multimodal(cls, source, classes, rows, *, frames, image_size, drop, drop_path, positions):
    """A UniFormerV2, whose frame size does not change; see `load_encoder`."""
    model = cls.from_official(source, frames=frames)
    old = model.config["classes"]
    check_rows(source, old, classes, rows)
    return model.with_head(classes or old or 1, head_dropout=drop, drop_path=drop_path, rows=rows)


def video_text(cls, source, classes, rows, *, frames, image_size, drop, drop_path, positions):
    """The visual encoder of a VideoCLIP. Official CLIP is extended to a UniFormerV2. See
    `load_encoder`."""
    check_rows(source, 0, classes, rows)
    grow = is_official_clip(*read(source))
    clip = class_of("VideoCLIP").from_official(source, frames=frames, grow=grow)
    if clip.kind == "joint":
        raise WeightsError(f"{source}: ViCLIP's joint encoder has no classifier here; use "
                           "UniFormerV2, InternVideo-MM or CLIP weights")
    return clip.visual.with_head(classes or 1, norm=clip.visual_norm, mean=clip.mean, std=clip.std,
                                 head_dropout=drop, drop_path=drop_path)


def attentive_probe(cls, source, classes, rows, *, frames, image_size, drop, drop_path, positions):
    """An AttentiveProbe with its encoder. The number and size of frames stay."""
    model = cls.from_run(source)
    old = model.config["classes"]
    check_rows(source, old, classes, rows)
    return model.with_head(classes or old, rows=rows)


# "model" in a configuration, or the model of an official file's family -> function that loads it
ENCODERS = {"VideoMAE": masked, "VideoClassifier": masked, "UniFormerV2": multimodal,
            "VideoCLIP": video_text, "VideoText": video_text, "AttentiveProbe": attentive_probe,
            "DividedVideoMAE": masked, "DividedVideoClassifier": masked}


def is_official_clip(tensors, config):
    """True if `tensors, config = read(...)` is OpenAI's or Hugging Face's CLIP, an image model."""
    return not config and (describe(tensors)[0] or "").startswith("CLIP,")


def check_rows(source, old, classes, rows):
    """WeightsError if `rows` is given and does not fit. It needs one entry for each class: None, or
    a row of the old head with `old` classes."""
    if rows is not None and (len(rows) != classes or not old or not all(
            row is None or 0 <= row < old for row in rows)):
        raise WeightsError(f"--head-rows: {len(rows)} rows for {classes} classes do not fit the "
                           f"head with {old} rows of {source}")


def load_several(**sources):
    """Load the encoders that the flags of `fuse` name: [encoder, ...], with their own heads.

    sources  masked, multimodal, second: a run of classify or an official file; second may be ""
    raises   UserError: one is missing, or of the other family; WeightsError
    """
    for name in ("masked", "multimodal"):
        if not sources[name]:
            raise UserError(f"--{name}: fuse needs both encoders; give a run of `classify` or an "
                            "official file")
    loaded = []
    for name, source in sources.items():
        if not source:
            continue
        loaded.append(load_encoder(source))
        if (loaded[-1].family == "masked") != (name == "masked"):
            kind = "VideoMAE; give it to --masked" if name != "masked" else \
                "UniFormerV2; give it to --multimodal"
            raise UserError(f"--{name} {source}: is a {kind}")
        if name != "masked" and loaded[-1].config["model"] == "AttentiveProbe":
            raise UserError(f"--{name} {source}: is an attentive probe, whose query takes the "
                            "place of the global token; give a linear one: --mode probe")
    return loaded


def load_clip(source, *, frames, image_size=None, usual_size=None, grow=True, grow_runs=True,
              layers=None):
    """Load a VideoCLIP for clips of a given length and size.

    source      a run of clip, InternVideo-MM, ViCLIP or CLIP
    frames      T
    image_size  (H, W); for another size than that of the weights, the position table is
                interpolated; None = that of the weights
    usual_size  the default of --input-size, if it is a size. If the weights have another size,
                this one is an error, because the user probably did not choose it
    grow        extend an image model (CLIP, or a frame-wise run of ours) to a video model with new
                global blocks
    grow_runs   False = do not extend runs of ours
    layers      the layers after which the new blocks stand; None = the last four, for a run only
                the last
    raises      WeightsError, UserError
    """
    tensors, config = read(source)
    config = config.get("clip", config)
    ours = config.get("kind") == "frames"
    grow = grow and (is_official_clip(tensors, config) or ours and grow_runs)
    if layers is not None and not grow:
        raise UserError(f"--global-layers: {source} already has its global blocks, or stays an "
                        "image model; leave it out")
    if grow and ours and layers is None:
        layers = (config["size"]["depth"] - 1,)
    model = class_of("VideoCLIP").from_official(source, frames=frames, grow=grow,
                                                global_layers=layers if grow else None)
    if grow:
        print(f"{source} is an image model; it is extended to a video model (--kind frames would "
              "leave it unchanged)")
    size = tuple(model.config["image_size"])
    if image_size in (None, size):
        return model
    if image_size == usual_size:
        raise UserError(
            f"--input-size {spelled(image_size)}: the weights are for {size[0]} x {size[1]} "
            f"pixels; pass --input-size {spelled(size)}, or another size, for which their position "
            "table is interpolated")
    return resized(model, image_size)


def resized(model, image_size):
    """A copy of a UniFormerV2 or VideoCLIP for frames of another size, H = W or (H, W) in pixels.

    Its position table is interpolated, as CLIP's was for 336 pixels, and a line says so. UserError
    if patches do not fit, and for a joint encoder, whose size cannot change.
    """
    flag = f"--input-size {spelled(image_size)}"
    if getattr(model, "kind", None) == "joint":
        raise UserError(f"{flag}: the size of a joint encoder cannot change; leave it out")
    try:
        new = type(model).from_config(model.config | {"image_size": image_size})
    except ValueError as error:
        raise UserError(f"{flag}: {error}") from None
    prefix = "visual." if hasattr(model, "visual") else ""
    old_grid, new_grid = (getattr(x, "visual", x).grid for x in (model, new))
    tensors = model.state_dict()
    name = prefix + "positions"
    tensors[name] = resize_positions(tensors[name], old_grid, new_grid)
    new.load_state_dict(tensors)
    height, width = model.config["image_size"]
    print(f"{flag}: the position table of the weights, for {height} x {width} pixels, is "
          "interpolated")
    return new.train(model.training)


def size_name(size, sizes):
    """The name of a model's size (a dict) in a table of sizes, or "of its own"."""
    return next((name for name, known in sizes.items()
                 if (known.width, known.depth) == (size["width"], size["depth"])), "of its own")


def from_config(config):
    """An untrained encoder from the configuration that a run saved (config.json)."""
    return class_of(config["model"]).from_config(config)
