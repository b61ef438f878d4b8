"""Load and export official files of UniFormerV2, and start one from CLIP's image encoder.

The official names are those of OpenAI's CLIP, with new names for the parts that UniFormerV2 adds.
Files of classifiers have the prefix "backbone.". mmaction2 uses the same names except for the last
norm and the head, and normalises pixels as the authors do. Sizes and options come from names and
shapes. These do not show the number of heads and the layers after which global blocks stand.
"""

import torch
import torch.nn.functional as F

import uniformerv2
from weights.files import WeightsError, export
from weights.official import OfficialFile, as_kernel, as_matrix, key_map
from weights.runs import rebuild

# Our name -> UniFormerV2's name without "backbone.", in network order.
OFFICIAL = (
    (r"^embed\.", "conv1."),
    (r"^class_token$", "class_embedding"),
    (r"^positions$", "positional_embedding"),
    (r"^norm_pre\.", "ln_pre."),
    (r"^blocks\.", "transformer.resblocks."),
    (r"\.local\.0\.", ".lmhra1.pos_embed."),
    (r"\.local\.1\.", ".lmhra2.pos_embed."),
    (r"\.pos_embed\.norm\.", ".pos_embed.0."),
    (r"\.pos_embed\.reduce\.", ".pos_embed.1."),
    (r"\.pos_embed\.time\.", ".pos_embed.2."),
    (r"\.pos_embed\.expand\.", ".pos_embed.3."),
    (r"^global_token$", "transformer.temporal_cls_token"),
    (r"^global_blocks\.(\d+)\.near\.", r"transformer.dpe.\1."),
    (r"^global_blocks\.", "transformer.dec."),
    (r"\.norm_context\.", ".ln_3."),
    (r"^balance$", "transformer.balance"),
    (r"^norm\.", "transformer.proj.0."),
    (r"^head\.", "transformer.proj.2."),
    (r"\.norm([12])\.", r".ln_\1."),  # the rest is in every block of CLIP
    (r"\.attn\.qkv\.", ".attn.in_proj_"),
    (r"\.attn\.proj\.", ".attn.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
)
# UniFormerV2's name -> mmaction2's, without "backbone.". The head is not in mmaction2's backbone.
MMACTION = ((r"^transformer\.proj\.0\.", "transformer.norm."),)
MMACTION_HEAD = ((r"^(backbone\.)?transformer\.proj\.2\.", "cls_head.fc_cls."),)


def load(cls, source, *, heads=None, global_heads=None, global_layers=None, frames=None):
    """A UniFormerV2 from a published file or a run of ours, in eval mode.

    source         path or {name: tensor}; see weights.read
    heads, global_heads   not visible in shapes; default: width / 64, and the same for global blocks
    global_layers  layers after which global blocks stand; default: the last ones, as in all
                   published models
    frames         T, stored in the configuration; default 8, with temporal downsampling 16
    raises         WeightsError: another kind of file, or a tensor does not fit

    A file without `balance` belongs to a model whose image encoder was frozen. A file without a
    head gives a feature extractor.
    """
    file = UniFormerV2File(source)
    if file.config.get("model") == "UniFormerV2":
        return rebuild(cls.from_config, file.tensors, file.config, file.name)
    if file.config:
        raise WeightsError(f"{file.name}: holds {file.config.get('model')}, no UniFormerV2 "
                           "alone; give a run of `train.py classify` that trained one, such as "
                           "runs/default/multimodal")
    size, options = file.measures(heads, global_layers)
    frames = frames or (16 if options["temporal_downsample"] else 8)
    model = file.build(cls, size, frames=frames, global_heads=global_heads, **options)
    return file.fill(model, key_map(model, file.tables, conversions(model)))


def grow(cls, source, *, heads=None, image_size=None, **options):
    """A UniFormerV2 with the weights of CLIP's image encoder, in eval mode. New branches output 0.

    source      path or {name: tensor} with OpenAI's names. All of `visual.*` is used, except CLIP's
                last norm and projection, `visual.ln_post.*` and `visual.proj`
    heads       default: width / 64
    image_size  H = W in pixels; for another size than CLIP's, the position table is interpolated
    options     see uniformerv2.Options
    raises      WeightsError, as `load`
    """
    file = UniFormerV2File(source, image_prefix="visual.")
    size, plain = file.measures(heads, global_layers=())
    image_model = file.build(cls, size, **plain)
    file.fill(image_model, key_map(image_model, file.tables, conversions(image_model)))
    model = cls(size, image_size=image_size, **options)
    ours = image_model.state_dict()
    ours["positions"] = resize_positions(ours["positions"], image_model.grid, model.grid)
    kernel = ours["embed.weight"].unflatten(1, (-1, size.patch, size.patch))
    ours["embed.weight"] = uniformerv2.inflate(kernel, window_of(model.config)).flatten(1)
    model.load_state_dict({**model.state_dict(), **ours}, strict=True)
    return model.eval()


def resize_positions(table, old, new):
    """Interpolate a position table (1+h*w, D) from grid old (h, w) to grid new, bicubic. The
    position code of the class token does not change."""
    if tuple(old) == tuple(new):
        return table
    codes = table[1:].unflatten(0, old).permute(2, 0, 1)[None]               # (1, D, h, w)
    codes = F.interpolate(codes, size=tuple(new), mode="bicubic", align_corners=False)
    return torch.cat([table[:1], codes[0].flatten(1).T])


def to_official(model):
    """{official name: tensor}, as UniFormerV2's own code names them. ValueError if there are no
    global blocks, or if they do not stand after the last layers."""
    if not model.config["global_layers"]:
        raise ValueError("a model without global blocks is not a UniFormerV2: the official code "
                         "has no names for it")
    check_layers(model.config["global_layers"], model.config["size"]["depth"])
    tables = (OFFICIAL, ((r"^", "backbone."),))
    return export(model, key_map(model, tables, conversions(model)))


def check_layers(layers, depth):
    """ValueError unless global blocks stand after the last layers. Official names number the blocks
    and do not contain their layers."""
    if list(layers) != list(range(depth - len(layers), depth)):
        raise ValueError(f"global blocks after layers {list(layers)}; officially they stand after "
                         "the last ones")


def window_of(config):
    """Number of frames that the first convolution spans."""
    return 3 if config["temporal_downsample"] else 1


def conversions(model):
    """{our name: (official -> ours, ours -> official)} for convolutions, which are matrices here.

    A model without global blocks is CLIP's image encoder, whose first kernel has no time axis.
    """
    config = model.config
    patch = config["size"]["patch"]
    window = (window_of(config),) if config["global_layers"] else ()
    pairs = {"embed.weight": (as_matrix, as_kernel(config["channels"], *window, patch, patch))}
    for name in model.state_dict():
        if ".local." in name and name.endswith(("reduce.weight", "time.weight", "expand.weight")):
            frames = 3 if name.endswith("time.weight") else 1
            pairs[name] = (as_matrix, as_kernel(-1, frames, 1, 1))
    return pairs


class UniFormerV2File(OfficialFile):
    """An official file of UniFormerV2, or the image encoder in a file of CLIP.

    image_prefix  the prefix of the image encoder in a file of CLIP. Its last norm and projection,
                  and CLIP's text encoder, are not used
    """

    def __init__(self, source, image_prefix=""):
        super().__init__(source)
        self.image = bool(image_prefix)
        if self.config:
            return
        prefix = image_prefix
        if image_prefix:
            self.tensors = {key: value for key, value in self.tensors.items()
                            if key.startswith(image_prefix) and key != image_prefix + "proj"
                            and not key.startswith(image_prefix + "ln_post.")}
        elif any(key.startswith("backbone.") for key in self.tensors):
            prefix = "backbone."
        mmaction = not image_prefix and prefix + "transformer.norm.weight" in self.tensors
        self.tables = (OFFICIAL, MMACTION if mmaction else (), ((r"^", prefix),),
                       MMACTION_HEAD if mmaction else ())
        if not self.depth("blocks."):
            raise WeightsError(f"{self.name}: no {self.spell('blocks.')}*, so not the weights of a "
                               f"{'CLIP image encoder' if image_prefix else 'UniFormerV2'}")

    def measures(self, heads, global_layers):
        """(Size, options of UniFormerV2), from names and shapes."""
        width = self.size(*(f"blocks.#.norm{i}.{part}" for i in (1, 2)
                            for part in ("weight", "bias")))
        hidden = self.size("blocks.#.mlp.fc1.bias", "blocks.#.mlp.fc1.weight")
        kernel = self.shape("embed.weight", 4 if self.image else 5)
        window = kernel[2] if len(kernel) == 5 else 1
        if kernel[-1] != kernel[-2] or window not in (1, 3):
            raise WeightsError(f"{self.name}: wrong shape: {self.spell('embed.weight')} is "
                               f"{kernel}; expected square patches of 1 or 3 frames")
        size = uniformerv2.Size(width, self.depth("blocks."), self.heads(width, heads), hidden,
                                kernel[-1], self.side("positions") * kernel[-1])
        options = dict(channels=kernel[1], classes=self.classes(), balance=self.has("balance"),
                       temporal_downsample=window == 3)
        return size, options | self.local_units(size) | self.global_blocks(size, global_layers)

    def global_blocks(self, size, layers):
        """The layers of global blocks, by default the last ones, and the width of their MLPs."""
        count = self.depth("global_blocks.")
        count = max(count, max((i + 1 for i in range(size.depth)
                                if self.has(f"global_blocks.{i}.near.")), default=0))
        layers = tuple(range(size.depth - count, size.depth) if layers is None else layers)
        if len(layers) != count:
            raise WeightsError(f"{self.name}: holds {count} global blocks, global_layers names "
                               f"{len(layers)} layers")
        hidden = self.size("global_blocks.#.mlp.fc1.bias",
                           "global_blocks.#.mlp.fc1.weight") if count else size.mlp_width
        return dict(global_layers=layers,
                    global_mlp_width=None if hidden == size.mlp_width else hidden)

    def local_units(self, size):
        """The number of local units in a block, and the reduction of their width."""
        count = 2 if self.has("blocks.#.local.1.") else 1 if self.has("blocks.#.local.0.") else 0
        if not count:
            return dict(local_units=0, reduction=1.5)
        counters = [key for i in range(size.depth) for unit in range(count)
                    for key in self.keys(f"blocks.{i}.local.{unit}.norm.num_batches_tracked")]
        if not any(key in self.tensors for key in counters):  # no output depends on them
            self.tensors |= {key: torch.tensor(0) for key in counters}
        width = self.size(*(f"blocks.#.local.{unit}.{part}" for unit in range(count)
                            for part in ("reduce.bias", "reduce.weight", "time.bias")))
        usual = int(size.width // 1.5) == width
        return dict(local_units=count,  # + 0.5, so that rounding down gives this width again
                    reduction=1.5 if usual else size.width / (width + 0.5))

    def classes(self):
        """Y; 0 if the file has no head."""
        if not self.has("norm.", "head."):
            return 0
        return self.rows("head.weight", "head.bias") or self.size("head.weight", "head.bias")
