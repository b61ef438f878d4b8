"""Load and export official files of VideoMAE, InternVideo, VideoMAE V2 and transformers' VideoMAE.

The authors' names of the pretraining model are nearly ours. A fine-tuned file has the encoder's
names without a prefix. transformers uses other names, in two versions, and stores queries, keys and
values separately. mmaction2 uses mmcv's names for the embedding and the MLPs. Sizes come from the
shapes. These do not show the numbers of heads and frames. Folders of transformers contain both, and
the normalisation of pixels. image_vit.py converts image ViTs for this file.
"""

import math
from dataclasses import replace

import torch

from mae import IMAGENET_MEAN, IMAGENET_STD, Size, VideoMAE, sinusoid_table
from weights import image_vit
from weights.files import WeightsError, export, print_once
from weights.hub import hub_clips, hub_config, hub_pixels
from weights.official import OfficialFile, as_kernel, as_matrix, key_map
from weights.runs import rebuild

# Our name -> the authors' name. Names that match SAME are equal in both.
OFFICIAL = (
    (r"^encoder\.embed\.", "encoder.patch_embed.proj."),
    (r"^encoder\.stored$", "pos_embed"),
    (r"\.attn\.temperature$", ".attn.scale"),
    (r"\.gamma([12])$", r".gamma_\1"),
)
SAME = (r"(encoder|decoder)\.blocks\.\d+\.(norm[12]|attn|mlp)\..*|(decoder\.)?head\..*"
        r"|(encoder\.|decoder\.|fc_)?norm\..*|encoder_to_decoder\.weight|mask_token")

# The authors' name -> the name in a fine-tuned file, where the encoder has no prefix.
FINE_TUNED = ((r"^encoder\.", ""),)

# The authors' name -> transformers' name, in network order.
HUGGING_FACE = (
    (r"^encoder\.patch_embed\.proj\.", "videomae.embeddings.patch_embeddings.projection."),
    (r"^encoder\.blocks\.", "videomae.encoder.layer."),
    (r"^encoder\.norm\.", "videomae.layernorm."),
    (r"^decoder\.blocks\.", "decoder.decoder_layers."),
    (r"norm1\.", "layernorm_before."),
    (r"attn\.qkv\.weight", "attention.attention.{query,key,value}.weight"),
    (r"attn\.([qv]_bias)", r"attention.attention.\1"),
    (r"attn\.proj\.", "attention.output.dense."),
    (r"norm2\.", "layernorm_after."),
    (r"mlp\.fc1\.", "intermediate.dense."),
    (r"mlp\.fc2\.", "output.dense."),
    (r"^head\.", "classifier."),
)
# transformers 5 names the two biases like those of any other layer.
HUGGING_FACE_5 = HUGGING_FACE + ((r"attention\.q_bias", "attention.query.bias"),
                                 (r"attention\.v_bias", "attention.value.bias"))

# The authors' name in a fine-tuned file -> mmaction2's, which normalises pixels as the authors do.
MMACTION = FINE_TUNED + (
    (r"^patch_embed\.proj\.", "patch_embed.projection."),
    (r"mlp\.fc1\.", "mlp.layers.0.0."),
    (r"mlp\.fc2\.", "mlp.layers.1."),
    (r"^", "backbone."),
    (r"^backbone\.head\.", "cls_head.fc_cls."),
)

# The authors' name in a fine-tuned file -> that of an image ViT in timm, and in transformers.
IMAGE = FINE_TUNED + ((r"^fc_norm\.", "norm."), (r"\.gamma_([12])$", r".ls\1.gamma"))
IMAGE_HUGGING_FACE = HUGGING_FACE_5 + (
    (r"^fc_norm\.", "videomae.layernorm."),
    (r"^pos_embed$", "videomae.embeddings.position_embeddings"),
    (r"^videomae\.", "vit."),
)

# Keys of transformers' config.json -> the fields of Size and Options that must agree with them.
HUB_SIZES = {"hidden_size": "width", "num_hidden_layers": "depth", "intermediate_size": "mlp_width",
             "patch_size": "patch", "tubelet_size": "tubelet", "num_channels": "channels"}
HUB_DECODER = {"decoder_hidden_size": "decoder_width", "decoder_num_hidden_layers": "decoder_depth",
               "decoder_intermediate_size": "decoder_mlp_width"}

# Width -> number of heads of the published models; for other widths it is width / 64.
USUAL_HEADS = {640: 8, 1280: 16, 1408: 16, 1664: 16}


def load_pretrained(cls, source, *, heads=None, decoder_heads=None, frames=None, image_size=None,
                    positions="sinusoid"):
    """A mae.VideoMAE in eval mode, from a pretraining file or a run of ours.

    source                 path or {name: tensor}; see weights.read
    heads, decoder_heads   not visible in shapes; default: those of the published models
    frames, image_size     T and H (or (H, W)) of the clips; default: as in the Hugging Face folder,
                           else 16 and 224
    positions              "resized" for InternVideo's ViT-H at 384 px, see mae.position_codes
    raises                 WeightsError: another kind of file, or a tensor does not fit

    Hugging Face files give models with Hugging Face's LayerNorm epsilons (1e-12; 1e-5 before the
    head). If the folder normalises pixels otherwise than with ImageNet's mean and deviation, the
    embedding is changed accordingly, see `take_over_pixels`.
    """
    file = VideoMAEFile(source)
    if file.config.get("model") == cls.model_name:
        return rebuild(cls.from_config, file.tensors, file.config, file.name)
    if not file.has("encoder_to_decoder.weight", "mask_token"):
        if file.config.get("model"):  # a run of this project
            raise WeightsError(f"{file.name}: holds {file.config['model']}, not {cls.model_name}; "
                               "give a run of stage 1, such as runs/default/mae")
        raise WeightsError(
            f"{file.name}: a masked autoencoder needs a decoder, and this file has none (no "
            "encoder_to_decoder.weight, no mask_token); load a fine-tuned file with "
            "VideoClassifier.from_official")
    size, options = file.encoder(heads)
    width = file.width("decoder.blocks.#.")
    hub = file.hub
    size = replace(
        size, decoder_width=width, decoder_depth=file.depth("decoder.blocks."),
        decoder_heads=file.heads(width, decoder_heads or hub.get("decoder_num_attention_heads"),
                                 "decoder_heads", USUAL_HEADS),
        decoder_mlp_width=file.mlp_width("decoder.blocks.#."))
    file.check_hub_sizes(HUB_DECODER, vars(size))
    options |= file.clip_options(frames, image_size, positions, options)
    model = file.build(cls, size, **options, normalised=hub.get("norm_pix_loss", True))
    return take_over_pixels(file.fill(model, rules(model, file.tables)), file)


def load_classifier(cls, source, *, heads=None, frames=None, image_size=None,
                    positions="sinusoid"):
    """A mae.VideoClassifier in eval mode, from a fine-tuned file or a run of ours.

    Arguments and errors as for `load_pretrained`. A file without a head gives a feature extractor
    (classes = 0). So does an image ViT of timm or transformers, see image_vit.py.
    """
    file = VideoMAEFile(source, FINE_TUNED)
    if file.config.get("model") == cls.model_name:
        return rebuild(cls.from_config, file.tensors, file.config, file.name)
    if file.image:
        clips = hub_clips(source)
        frames, image_size = image_vit.inflate(file, frames or clips.get("num_frames"),
                                               image_size or clips.get("input_size"))
    if file.has("encoder_to_decoder.weight", "mask_token"):
        raise WeightsError(f"{file.name}: a pretraining file, without a classifier; load it with "
                           "VideoMAE.from_official")
    if file.has("encoder.norm.") and not file.has("fc_norm."):
        raise WeightsError(
            f"{file.name}: has {file.spell('encoder.norm.weight')} and no fc_norm.weight, so it "
            "classifies by the first token; only classifiers by the mean of all tokens can be read")
    size, options = file.encoder(heads)
    options |= file.clip_options(frames, image_size, positions, options)
    model = file.build(cls, size, classes=file.rows("head.weight", "head.bias"), **options)
    model.unused = file.unused
    return take_over_pixels(file.fill(model, rules(model, file.tables)), file)


def to_official(model):
    """{official name: tensor} of a VideoMAE or VideoClassifier, as VideoMAE's own code names them.
    ValueError for position codes that the official code does not have."""
    tables = (OFFICIAL,) if isinstance(model, VideoMAE) else (OFFICIAL, FINE_TUNED)
    return export(model, rules(model, tables, published=True))


def rules(model, tables, published=False):
    """The key map. published=True: ValueError for position codes unknown to the official code."""
    config = model.config
    if published and config["positions"] not in ("sinusoid", "stored"):
        raise ValueError(f"position codes {config['positions']!r} are unknown to the official "
                         "code; train with --positions sinusoid")
    patch = config["size"]["patch"]
    kernel = as_kernel(config["channels"], config["tubelet"], patch, patch)
    return key_map(model, tables, {"encoder.embed.weight": (as_matrix, kernel)}, SAME)


@torch.no_grad()
def take_over_pixels(model, file):
    """Change the patch embedding so that the model takes pixels normalised with ImageNet's mean m
    and deviation s, although its folder says m' and s'. Returns the model.

    With x = (p - m) / s and x' = (p - m') / s', W x' + b is a linear function of x. Its weight is
    W s / s', its bias b + sum of W (m - m') / s'. The outputs are the same up to rounding.
    """
    pixels = hub_pixels(file.source)
    if pixels is None and file.image:
        print_once(f"{file.name}: nothing says how its pixels are normalised; ImageNet's mean and "
                   "deviation are used")
    if pixels is None or pixels == (list(IMAGENET_MEAN), list(IMAGENET_STD)):
        return model
    channels, embed = model.config["channels"], model.encoder.embed
    if len(pixels[0]) != channels or channels != 3:
        raise WeightsError(f"{file.name}: normalises {len(pixels[0])} channels and has {channels}; "
                           "only 3 can be read here")
    mean, std, our_mean, our_std = (torch.tensor(x, dtype=torch.float64)[:, None] for x in
                                    (*pixels, IMAGENET_MEAN, IMAGENET_STD))
    weight = embed.weight.double().unflatten(1, (channels, -1))              # (D, C, pixels)
    embed.bias += (weight * ((our_mean - mean) / std)).sum(dim=(1, 2)).float()
    embed.weight.copy_((weight * (our_std / std)).flatten(1))
    print_once(
        f"{file.name}: its pixels have mean {pixels[0]} and deviation {pixels[1]}; its embedding "
        "is rewritten for those of ImageNet, with the same outputs")
    return model


class VideoMAEFile(OfficialFile):
    """An official file of this family.

    layout  key map from the authors' pretraining names to the names in the authors' files of the
            same kind: () or FINE_TUNED
    """

    def __init__(self, source, layout=()):
        super().__init__(source)
        if "backbone.patch_embed.proj.weight" in self.tensors:
            # an encoder inside a larger model
            self.tensors = {key.removeprefix("backbone."): value
                            for key, value in self.tensors.items()}
        self.source, self.unused = source, []
        self.image = not self.config and image_vit.is_image(self.tensors)
        if any(key.startswith("embeddings.patch_embeddings.") for key in self.tensors):
            # transformers' VideoMAEModel or ViTModel, without a head
            prefix = "vit." if self.image else "videomae."
            self.tensors = {prefix + key: value for key, value in self.tensors.items()}
        self.hub, self.tables, self.positions = {}, (OFFICIAL, layout), None
        self.hugging_face = any(key.startswith(("videomae.", "vit.")) for key in self.tensors)
        if self.hugging_face:
            self.hub = hub_config(source)
            self.activation(self.hub, "gelu")
            self.tables = (OFFICIAL, self.spelling())
        elif self.image:
            self.tables = (OFFICIAL, IMAGE)
        elif "backbone.patch_embed.projection.weight" in self.tensors:
            self.from_mmaction()

    def spelling(self):
        """The table for transformers' names, in the version of this file."""
        if self.image:
            return IMAGE_HUGGING_FACE
        new = any(key.endswith("attention.query.bias") for key in self.tensors)
        return HUGGING_FACE_5 if new else HUGGING_FACE

    def from_mmaction(self):
        """Read a file of mmaction2, which stores its position table. A table of sinusoids is
        dropped, because this code computes it."""
        self.tables = (OFFICIAL, MMACTION)
        table = self.tensors.get("backbone.pos_embed")
        if table is not None and table.ndim == 3 and torch.allclose(
                table[0], sinusoid_table(*table.shape[1:]), atol=1e-5):
            self.positions = len(self.tensors.pop("backbone.pos_embed")[0])

    def check_hub_sizes(self, names, sizes):
        """WeightsError if config.json has another size than the tensors."""
        for key, name in names.items():
            if name in sizes and self.hub.get(key, sizes[name]) != sizes[name]:
                raise WeightsError(f"{self.name}: its config.json says {key} {self.hub[key]}, the "
                                   f"tensors say {sizes[name]}")

    def clip_options(self, frames, image_size, positions, options):
        """{"frames", "image_size", "positions"}: as given, from a Hugging Face folder, or the
        published ones. No shape of a tensor shows them."""
        clips = hub_clips(self.source)
        if self.positions and not (frames or image_size):
            patch = self.shape("encoder.embed.weight", 5)[2:]
            count = math.prod(size // p for size, p in zip((16, 224, 224), patch))
            if count != self.positions:
                raise WeightsError(
                    f"{self.name}: its pos_embed has {self.positions} positions, and 16 frames of "
                    f"224 x 224 pixels have {count}; pass frames= and image_size=")
        return dict(frames=frames or clips.get("num_frames", 16),
                    image_size=image_size or clips.get("input_size", 224),
                    positions=options.get("positions", positions))

    def mlp_width(self, block):
        return self.size(block + "mlp.fc1.bias", block + "mlp.fc1.weight",
                         (block + "mlp.fc2.weight", 1))

    def encoder(self, heads):
        """(Size without a decoder, options), from the shapes."""
        _, channels, tubelet, patch, patch_width = self.shape("encoder.embed.weight", 5)
        if patch != patch_width:
            raise WeightsError(f"{self.name}: wrong shape: {self.spell('encoder.embed.weight')} "
                               f"has patches of {patch} x {patch_width}")
        block = "encoder.blocks.#."
        width = self.width(block)
        heads = heads or self.hub.get("num_attention_heads")
        size = Size(width, self.depth("encoder.blocks."),
                    self.heads(width, heads, usual=USUAL_HEADS), self.mlp_width(block), patch,
                    decoder_width=0, decoder_depth=0, decoder_heads=0, decoder_mlp_width=0)
        # A file of transformers must have biases unless its configuration excludes them. An early
        # version 5 lost them in a renaming and continued with zeros; such a file is refused.
        biased = self.hugging_face and self.hub.get("qkv_bias", True) or self.has(
            block + "attn.q_bias", block + "attn.v_bias")
        eps = self.hub.get("layer_norm_eps", 1e-12) if self.hugging_face else 1e-6
        options = dict(
            tubelet=tubelet, channels=channels, bias="qv" if biased else "none",
            cosine=self.has(block + "attn.temperature"),
            layer_scale=1.0 if self.has(block + "gamma1", block + "gamma2") else None,
            eps=eps, head_eps=1e-5 if self.hugging_face and not self.image else eps)
        self.check_hub_sizes(HUB_SIZES, vars(size) | options)
        return size, options | ({"positions": "stored"} if self.has("encoder.stored") else {})
