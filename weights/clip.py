"""Load and export official files of OpenAI's CLIP, transformers' CLIP, InternVideo-MM and ViCLIP.

OpenAI's names are the starting point; the other layouts change them. The names in a file determine
its layout, and the layout determines the kind of VideoCLIP: plain CLIP is "frames", InternVideo-MM
"video", ViCLIP "joint". Sizes come from the shapes. The number of heads cannot be read from them.
"""

import itertools
import re

import torch.nn.functional as F

import clip_video
import uniformerv2
from weights.files import WeightsError, export
from weights.hub import hub_config, hub_pixels
from weights.official import OfficialFile, as_kernel, as_matrix, key_map, under
from weights.runs import rebuild
from weights.uniformerv2 import OFFICIAL as VISUAL, check_layers, conversions

# Our name -> OpenAI's name.
OFFICIAL = (
    (r"^visual\.times$", "visual.temporal_positional_embedding"),
    *under("visual.", VISUAL),
    (r"^visual_norm\.", "visual.ln_post."),
    (r"^visual_proj\.weight$", "visual.proj"),
    (r"^scale$", "logit_scale"),
    (r"^text\.embed\.", "token_embedding."),
    (r"^text\.positions$", "positional_embedding"),
    (r"^text\.blocks\.", "transformer.resblocks."),
    (r"^text\.norm\.", "ln_final."),
    (r"^text\.proj\.weight$", "text_projection"),
)

# OpenAI's name -> the name in another layout. Tensors in braces are stacked into one.
LAYOUTS = {
    "CLIP": (),
    "InternVideo-MM": (
        (r"^visual\.ln_post\.", "visual_ln_post."),
        (r"^visual\.proj$", "visual_proj"),
    ),
    "ViCLIP": (
        (r"^visual\.", "vision_encoder."),
        (r"^logit_scale$", "temp"),
        (r"^(transformer|token_embedding|positional_embedding|ln_final|text_projection)",
         r"text_encoder.\1"),
    ),
    "Hugging Face CLIP": (
        (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
        (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
        (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
        (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),  # spelled so in transformers
        (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
        (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
        (r"^visual\.proj$", "visual_projection.weight"),
        (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
        (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
        (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
        (r"^ln_final\.", "text_model.final_layer_norm."),
        (r"^text_projection$", "text_projection.weight"),
        (r"\.ln_([12])\.", r".layer_norm\1."),
        (r"\.attn\.in_proj_(weight|bias)$", r".self_attn.{q,k,v}_proj.\1"),
        (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
        (r"\.mlp\.c_fc\.", ".mlp.fc1."),
        (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    ),
}
# Prefixes of names that identify a layout; the first layout that fits is taken.
SIGNS = (
    ("ViCLIP", ("vision_encoder.", "text_encoder.")),
    ("Hugging Face CLIP", ("vision_model.", "text_model.")),
    ("InternVideo-MM", ("visual_proj", "visual_ln_post.", "visual.transformer.dec.",
                        "visual.transformer.dpe.", "visual.transformer.temporal_cls_token")),
    ("CLIP", ("visual.transformer.", "visual.proj")),
)
KIND = {"InternVideo-MM": "video", "ViCLIP": "joint",
        "CLIP": "frames", "Hugging Face CLIP": "frames"}
# Tensors that are not loaded: sizes that OpenAI stores as tensors, index tables of old transformers
# files, the embedding of masked words (for a loss that is not implemented here), and the caption
# decoder, which caption_decoder.py loads.
UNUSED = (r"^(input_resolution|context_length|vocab_size)$",
          r"^(text|vision)_model\.embeddings\.position_ids$",
          r"^(clip\.)?text_mask_embedding$", r"^caption_decoder\.")


def load(cls, source, *, heads=None, global_heads=None, global_layers=None, text_heads=None,
         frames=None, grow=False):
    """A VideoCLIP in eval mode from InternVideo-MM, ViCLIP, OpenAI's or transformers' CLIP weights,
    or from a run of ours. Its `unused` lists the tensors of the file that are not loaded.

    source        path or {name: tensor}; see weights.read. A Hugging Face folder also gives heads
                  and activation; an activation other than QuickGELU is refused
    heads, global_heads, text_heads   not visible in shapes; default: width / 64
    global_layers the layers after which InternVideo's global blocks stand; default: the last ones
    frames        T; default 8, for ViCLIP the length of its table of time positions. The table is
                  cut or interpolated for another T
    grow          extend plain CLIP, or a frame-wise run of ours, to a video model. Its new global
                  blocks add zero at first. The embedding is then CLIP's embedding of 0.5 * the mean
                  class token
    raises        WeightsError: another kind of file, or a tensor does not fit
    """
    file = CLIPFile(source)
    if file.config and file.config.get("model") != "VideoCLIP":
        raise WeightsError(f"{file.name}: holds {file.config.get('model')}, not VideoCLIP")
    kind = file.config.get("kind") if file.config else KIND[file.layout]
    if grow and kind != "frames":
        raise WeightsError(f"{file.name}: grow=True is for plain CLIP weights, these are "
                           f"{file.layout or f'of kind {kind!r}'}")
    if file.config:
        config = file.config | ({"frames": frames} if frames and kind != "joint" else {})
        model = rebuild(cls.from_config, file.tensors, config, file.name)
    else:
        heads, text_heads = file.hub_heads(source, heads, text_heads)
        config = file.measures(heads, text_heads)
        config["frames"] = frames or config["frames"]
        if kind == "video":
            config |= file.global_blocks(config["size"].depth, global_heads, global_layers)
        model = file.build(cls, **config)
        file.fill(model, rules(model, file.layout, file.prefix))
    if grow:
        grown = cls.from_config(model.config | dict(
            kind="video", global_heads=global_heads, global_layers=global_layers))
        grown.load_state_dict({**grown.state_dict(), **model.state_dict()}, strict=True)
        model = grown.eval()
    model.unused = file.unused
    return model


def to_official(model):
    """{official name: tensor} of a VideoCLIP, in the layout of its kind. ValueError if that layout
    cannot express an option or size."""
    config = model.config
    if config["local_units"] or config["temporal_downsample"]:
        raise ValueError("InternVideo's video-text models have no local units and no temporal "
                         "downsampling; train with --local-units 0 --no-temporal-downsample")
    if config["end"] not in (None, config["vocabulary"] - 1):
        raise ValueError(f"token {config['end']} ends a text; in the official code it is the last "
                         "token of the vocabulary")
    check_layers(config["global_layers"], config["size"]["depth"])
    layout = {"video": "InternVideo-MM", "frames": "CLIP", "joint": "ViCLIP"}[config["kind"]]
    return export(model, rules(model, layout))


def rules(model, layout, prefix=""):
    """The key map, in network order."""
    config = model.config
    if config["kind"] == "joint":
        tubelet, patch = config.get("tubelet", 1), config["size"]["patch"]
        times = config["frames"] // tubelet
        pairs = {"visual.embed.weight": (as_matrix, as_kernel(-1, tubelet, patch, patch)),
                 "visual.times": (lambda table: resize_times(table, times),
                                  lambda table: table[None])}
    else:
        pairs = {"visual." + name: pair for name, pair in conversions(model.visual).items()}
    if layout != "Hugging Face CLIP":  # the others store projections as (in, out)
        pairs |= dict.fromkeys(("visual_proj.weight", "text.proj.weight"), (transposed, transposed))
    return key_map(model, (OFFICIAL, LAYOUTS[layout], ((r"^", prefix),)), pairs)


def transposed(matrix):
    """Transpose a matrix; return any other tensor unchanged, for `fill` to report its shape."""
    return matrix.T if matrix.ndim == 2 else matrix


def resize_times(table, times):
    """ViCLIP's position codes of time (1, t, D) for another number of time steps: (times, D).

    For fewer steps the first codes are taken, as in the official helper. For more they are
    interpolated, which that helper intends but does not do."""
    if table.ndim != 3 or table.shape[1] >= times:
        return table[0, :times] if table.ndim == 3 else table
    table = F.interpolate(table.transpose(1, 2), size=times, mode="linear", align_corners=False)
    return table[0].T


def layout_of(names):
    """(layout, prefix) of a file with these names; the layout is None if none fits."""
    prefix = "clip." if any(key.startswith("clip.") for key in names) else ""
    return next((layout for layout, signs in SIGNS if any(
        key.startswith(tuple(prefix + sign for sign in signs)) for key in names)), None), prefix


class CLIPFile(OfficialFile):
    """An official file or a run. `layout` is None for runs; `unused` lists tensors not loaded."""

    def __init__(self, source):
        super().__init__(source, "clip")
        self.layout, self.prefix, self.unused = None, "", []
        if self.config:
            return
        self.layout, self.prefix = layout_of(self.tensors)
        if self.layout is None:
            raise WeightsError(f"{self.name}: not the weights of a CLIP, InternVideo-MM or ViCLIP "
                               f"model; its names are like {', '.join(list(self.tensors)[:3])}")
        self.tables = (OFFICIAL, LAYOUTS[self.layout], ((r"^", self.prefix),))
        self.unused = [key for key in self.tensors if not key.startswith(self.prefix)
                       or any(re.search(pattern, key) for pattern in UNUSED)]
        for key in self.unused:
            del self.tensors[key]

    def hub_heads(self, source, heads, text_heads):
        """(heads, text heads) as given, or from the config.json of a Hugging Face folder.
        WeightsError if that folder asks for another activation or pixel normalisation."""
        if self.layout != "Hugging Face CLIP":
            return heads, text_heads
        config, pixels = hub_config(source), hub_pixels(source)
        usual = (clip_video.CLIP_MEAN, clip_video.CLIP_STD)
        if pixels and any(abs(a - b) > 1e-6 for theirs, ours in zip(pixels, usual)
                          for a, b in itertools.zip_longest(theirs, ours, fillvalue=9)):
            raise WeightsError(f"{self.name}: normalises pixels with mean {pixels[0]} and "
                               f"deviation {pixels[1]}; only CLIP's own can be read here")
        visual, text = (config.get(part) or {} for part in ("vision_config", "text_config"))
        for part in (visual, text):
            self.activation(part, "quick_gelu")
        return (heads or visual.get("num_attention_heads"),
                text_heads or text.get("num_attention_heads"))

    def global_blocks(self, depth, heads, layers):
        """Options of InternVideo-MM's global blocks, by default after the last layers."""
        count = self.depth("visual.global_blocks.")
        layers = tuple(range(depth - count, depth)) if layers is None else layers
        return dict(global_heads=heads, global_layers=layers)

    def measures(self, heads, text_heads):
        """The arguments of VideoCLIP, from the shapes."""
        visual, text = "visual.blocks.#.", "text.blocks.#."
        width, text_width = self.width(visual), self.width(text)
        kernel = self.shape("visual.embed.weight", 4, 5)
        axis = 0 if self.layout == "Hugging Face CLIP" else 1
        spaces = [self.shape(name, 2)[axis] for name in ("visual_proj.weight", "text.proj.weight")]
        if spaces[0] != spaces[1]:
            names = [self.spell(name) for name in ("visual_proj.weight", "text.proj.weight")]
            raise WeightsError(f"{self.name}: wrong shape: {names[0]} and {names[1]} lead to "
                               f"spaces of {spaces[0]} and {spaces[1]}")
        size = uniformerv2.Size(
            width, self.depth("visual.blocks."), self.heads(width, heads),
            self.size(visual + "mlp.fc1.weight", visual + "mlp.fc1.bias"), kernel[-1],
            self.side("visual.positions") * kernel[-1])
        text_size = clip_video.TextSize(text_width, self.depth("text.blocks."),
                                        self.heads(text_width, text_heads, "text_heads"))
        options = dict(size=size, kind=KIND[self.layout], frames=8, embedding=spaces[0],
                       text_size=text_size, vocabulary=self.shape("text.embed.weight", 2)[0],
                       context=self.shape("text.positions", 2)[0])
        if options["kind"] == "joint":
            options["tubelet"] = kernel[2] if len(kernel) == 5 else 1
            options["frames"] = self.shape("visual.times", 3)[1] * options["tubelet"]
        return options
