"""Load either encoder of InternVideo, as a classifier, out of whatever holds it."""

from engine.errors import UserError
from engine.frame_size import spelled
from weights import image_vit
from weights.families import class_of, describe
from weights.files import WeightsError, read
from weights.uniformerv2 import resize_positions


def load_encoder(source, classes=None, *, frames=None, image_size=None, drop=0.0, drop_path=0.0,
                 rows=None, positions="sinusoid"):
    """An encoder with a head for Y classes.

    source      a run of mae, clip or classify, or an official file: VideoMAE pretrained or
                fine-tuned, UniFormerV2, CLIP (which grows), InternVideo-MM. Its names tell which
    classes     Y; None: the head that it has, or where it has none a fresh one of one class, to be
                replaced
    rows        which row of the file's head each class is, None = a new one; see `with_head` of the
                encoders
    positions   of official VideoMAE files: see mae.position_codes
    returns     mae.VideoClassifier or uniformerv2.UniFormerV2. A teacher or a feature extractor
                needs no head: take `tokens(video)`, before any last norm, or `feature(video)`
    raises      WeightsError: no such file, or one without such an encoder
    """
    kind = kind_of(source, *read(source))
    return ENCODERS[kind](class_of(kind), source, classes, rows, frames=frames,
                          image_size=image_size, drop=drop, drop_path=drop_path,
                          positions=positions)


def kind_of(source, tensors, config):
    """Name of the model with an encoder that `read(source)` gave. WeightsError where it has none.
    """
    kind = config.get("model") or (describe(tensors)[1] or ("VideoCLIP",))[0]
    if not isinstance(kind, str) or kind not in ENCODERS:
        raise WeightsError(f"{source}: holds a {kind}, which is no encoder that `classify` knows")
    return kind


def made_for(source):
    """For what clips and classes weights with an encoder were made.

    returns  (frames, size in pixels as --input-size, rows of the head; 0 = it has none)
    raises   WeightsError, as `load_encoder`
    """
    tensors, config = read(source)
    kind = kind_of(source, tensors, config)
    classes = config.get("classes", 0)
    if not config:  # of an official file the whole is built: its names do not tell all
        config = load_encoder(source).config
        has_head = kind in ("VideoClassifier", "UniFormerV2") and not image_vit.is_image(tensors)
        classes = config["classes"] if has_head else 0
    config = config.get("clip") or config.get("encoder") or config
    try:
        return int(config["frames"]), spelled(tuple(map(int, config["image_size"]))), int(classes)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise WeightsError(f"{source}: its configuration does not tell for what clips it was made "
                           f"({type(error).__name__}: {error})") from None


def masked(cls, source, classes, rows, *, frames, image_size, drop, drop_path, positions):
    """From a VideoMAE or a VideoClassifier."""
    model = cls.from_official(source, frames=frames, image_size=image_size, positions=positions)
    old = model.config.get("classes", 0)
    check_rows(source, old, classes, rows)
    return model.with_head(classes or old or 1, frames=frames or model.config["frames"],
                           image_size=image_size or model.config["image_size"],
                           drop=drop, drop_path=drop_path, rows=rows)


def multimodal(cls, source, classes, rows, *, frames, image_size, drop, drop_path, positions):
    """From a UniFormerV2. Its frames stay as large as they were."""
    model = cls.from_official(source, frames=frames)
    old = model.config["classes"]
    check_rows(source, old, classes, rows)
    return model.with_head(classes or old or 1, head_dropout=drop, drop_path=drop_path, rows=rows)


def video_text(cls, source, classes, rows, *, frames, image_size, drop, drop_path, positions):
    """From the visual encoder of a VideoCLIP; official CLIP grows into a UniFormerV2."""
    check_rows(source, 0, classes, rows)
    grow = is_official_clip(*read(source))
    clip = class_of("VideoCLIP").from_official(source, frames=frames, grow=grow)
    if clip.kind == "joint":
        raise WeightsError(f"{source}: ViCLIP's joint tower has no classifier here; use "
                           "UniFormerV2, InternVideo-MM or CLIP weights")
    return clip.visual.with_head(classes or 1, norm=clip.visual_norm, mean=clip.mean, std=clip.std,
                                 head_dropout=drop, drop_path=drop_path)


def attentive_probe(cls, source, classes, rows, *, frames, image_size, drop, drop_path, positions):
    """An AttentiveProbe with its encoder. Frames stay as many and as large as they were."""
    model = cls.from_run(source)
    old = model.config["classes"]
    check_rows(source, old, classes, rows)
    return model.with_head(classes or old, rows=rows)


# "model" of a configuration, or that of an official file's family -> who makes an encoder of it
ENCODERS = {"VideoMAE": masked, "VideoClassifier": masked, "UniFormerV2": multimodal,
            "VideoCLIP": video_text, "VideoText": video_text, "AttentiveProbe": attentive_probe,
            "DividedVideoMAE": masked, "DividedVideoClassifier": masked}


def is_official_clip(tensors, config):
    """True for what `read` gave of OpenAI's or Hugging Face's CLIP, an image model."""
    return not config and (describe(tensors)[0] or "").startswith("CLIP,")


def check_rows(source, old, classes, rows):
    """WeightsError unless `rows`, where given, names a row of a head of `old` classes, or None, for
    each."""
    if rows is not None and (len(rows) != classes or not old or not all(
            row is None or 0 <= row < old for row in rows)):
        raise WeightsError(f"--head-rows: {len(rows)} rows for {classes} classes out of a head "
                           f"with {old} of {source}")


def load_several(**sources):
    """[encoder, ...] with the heads that they have, out of the flags of `fuse`.

    sources  masked, multimodal, second: a run of classify or an official file; second may be ""
    raises   UserError: one is missing, or of the other family; WeightsError
    """
    for name in ("masked", "multimodal"):
        if not sources[name]:
            raise UserError(f"--{name}: fuse needs both encoders; give a run of `classify` or an "
                            "official file")
    found = []
    for name, source in sources.items():
        if not source:
            continue
        found.append(load_encoder(source))
        if (found[-1].family == "masked") != (name == "masked"):
            kind = "VideoMAE; that is for --masked" if name != "masked" else \
                "UniFormerV2; that is for --multimodal"
            raise UserError(f"--{name} {source}: is a {kind}")
        if name != "masked" and found[-1].config["model"] == "AttentiveProbe":
            raise UserError(f"--{name} {source}: is an attentive probe, whose query takes the "
                            "place of the global token; give a linear one: --mode probe")
    return found


def load_clip(source, *, frames, image_size, usual_size, grow=True, grow_runs=True, layers=None):
    """A VideoCLIP for clips of some length and size.

    source      a run of clip, InternVideo-MM, ViCLIP or CLIP
    image_size  (H, W); where the weights are for another, their position table is interpolated
    usual_size  the default of --input-size: that is refused, for nobody asked for it
    grow        an image model, CLIP's or a frame-wise run of ours, becomes a video model with fresh
                global blocks; grow_runs: False = not a run of ours
    layers      after which layers these blocks read; None = the last four, of a run the last alone
    raises      WeightsError, UserError
    """
    tensors, config = read(source)
    config = config.get("clip", config)
    ours = config.get("kind") == "frames"
    grow = grow and (is_official_clip(tensors, config) or ours and grow_runs)
    if layers is not None and not grow:
        raise UserError(f"--global-layers: {source} is no image model that grows; it keeps the "
                        "blocks it has")
    if grow and ours and layers is None:
        layers = (config["size"]["depth"] - 1,)
    model = class_of("VideoCLIP").from_official(source, frames=frames, grow=grow,
                                                global_layers=layers if grow else None)
    if grow:
        print(f"{source} is an image model: it grows into a video model (--kind frames leaves it "
              "as it is)")
    size = tuple(model.config["image_size"])
    if size == image_size:
        return model
    if image_size == usual_size:
        raise UserError(
            f"--input-size {spelled(image_size)}: the weights are for {size[0]} x {size[1]} "
            f"pixels; pass --input-size {spelled(size)}, or another, for which their table of "
            "places is interpolated")
    return resized(model, image_size)


def resized(model, image_size):
    """The same UniFormerV2 or VideoCLIP for frames of another size, H = W or (H, W) in pixels; its
    position table is interpolated, as CLIP's was for 336 pixels. Prints that it is. UserError where
    patches do not fit, and for a joint encoder, which stays at its size."""
    flag = f"--input-size {spelled(image_size)}"
    if getattr(model, "kind", None) == "joint":
        raise UserError(f"{flag}: a joint encoder stays at its size")
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
    print(f"{flag}: the weights' table of places, made for {height} x {width} "
          "pixels, is interpolated")
    return new.train(model.training)


def size_name(size, sizes):
    """The name, in a table of sizes, of a model's size (a dict)."""
    return next((name for name, known in sizes.items()
                 if (known.width, known.depth) == (size["width"], size["depth"])), "of its own")


def from_config(config):
    """Either encoder from the configuration that a run saved (config.json), untrained."""
    return class_of(config["model"]).from_config(config)
