"""Official files of VideoMAE, InternVideo, VideoMAE V2, and transformers' VideoMAE.

The names of the authors' pretraining model are nearly ours. A fine-tuned file is the encoder
without a prefix. transformers has its own names, in two spellings, and stores queries, keys and
values apart. Sizes come from the shapes; numbers of heads and of frames do not show in them.
"""

from dataclasses import replace

from mae import Size, VideoMAE
from weights.files import WeightsError, export, hub_config
from weights.official import OfficialFile, as_kernel, as_matrix, key_map
from weights.runs import rebuild

# Our name -> the authors' name; all others are SAME.
OFFICIAL = (
    (r"^encoder\.embed\.", "encoder.patch_embed.proj."),
    (r"^encoder\.stored$", "pos_embed"),
    (r"\.attn\.temperature$", ".attn.scale"),
    (r"\.gamma([12])$", r".gamma_\1"),
)
SAME = (r"(encoder|decoder)\.blocks\.\d+\.(norm[12]|attn|mlp)\..*|(decoder\.)?head\..*"
        r"|(encoder\.|decoder\.|fc_)?norm\..*|encoder_to_decoder\.weight|mask_token")

# The authors' name -> that in a fine-tuned file: the classifier is the encoder, without a prefix.
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
# transformers 5 spells the two biases like those of any other layer.
HUGGING_FACE_5 = HUGGING_FACE + ((r"attention\.q_bias", "attention.query.bias"),
                                 (r"attention\.v_bias", "attention.value.bias"))

# Width -> heads of the published models; other widths have heads of 64.
USUAL_HEADS = {640: 8, 1280: 16, 1408: 16, 1664: 16}


def load_pretrained(cls, source, *, heads=None, decoder_heads=None, frames=None, image_size=None,
                    positions="sinusoid"):
    """A mae.VideoMAE in eval mode, from a pretraining file or a run of ours.

    source                 path or {name: tensor}; see weights.read
    heads, decoder_heads   shapes cannot tell them; default: those of the published models
    frames, image_size     T and H (or (H, W)) of the clips; default 16 and 224
    positions              "resized" for InternVideo's ViT-H at 384 px, see mae.position_codes
    raises                 WeightsError: not such a file, or some tensor that does not fit

    Sizes come from the shapes. Models of Hugging Face files have Hugging Face's LayerNorm epsilons
    (1e-12; 1e-5 before the head).
    """
    file = VideoMAEFile(source)
    if file.config.get("model") == cls.model_name:
        return rebuild(cls.from_config, file.tensors, file.config, file.name)
    if not file.has("encoder_to_decoder.weight", "mask_token"):
        raise WeightsError(
            f"{file.name}: a masked autoencoder needs its decoder, and this file has none (no "
            "encoder_to_decoder.weight, no mask_token); a fine-tuned file loads with "
            "VideoClassifier.from_official")
    told = file.hub_config(source)
    size, options = file.encoder(heads or told.get("num_attention_heads"))
    width = file.width("decoder.blocks.#.")
    size = replace(
        size, decoder_width=width, decoder_depth=file.depth("decoder.blocks."),
        decoder_heads=file.heads(width, decoder_heads or told.get("decoder_num_attention_heads"),
                                 "decoder_heads", USUAL_HEADS),
        decoder_mlp_width=file.mlp_width("decoder.blocks.#."))
    options |= clip_options(frames, image_size, positions, options)
    model = file.build(cls, size, **options)
    return file.fill(model, rules(model, file.tables))


def load_classifier(cls, source, *, heads=None, frames=None, image_size=None,
                    positions="sinusoid"):
    """A mae.VideoClassifier in eval mode, from a fine-tuned file or a run of ours. Arguments and
    errors as `load_pretrained`. A file without a head gives a feature extractor (classes = 0)."""
    file = VideoMAEFile(source, FINE_TUNED)
    if file.config.get("model") == cls.model_name:
        return rebuild(cls.from_config, file.tensors, file.config, file.name)
    if file.has("encoder_to_decoder.weight", "mask_token"):
        raise WeightsError(f"{file.name}: a pretraining file, without a classifier; it loads with "
                           "VideoMAE.from_official")
    if file.has("encoder.norm.") and not file.has("fc_norm."):
        raise WeightsError(
            f"{file.name}: has {file.spell('encoder.norm.weight')} and no fc_norm.weight, so it "
            "was made for reading the first token; only classifiers of the mean of all tokens load")
    told = file.hub_config(source)
    size, options = file.encoder(heads or told.get("num_attention_heads"))
    options |= clip_options(frames, image_size, positions, options)
    model = file.build(cls, size, classes=file.rows("head.weight", "head.bias"), **options)
    return file.fill(model, rules(model, file.tables))


def to_official(model):
    """{official name: tensor} of either network, as VideoMAE's own code names them. ValueError for
    position codes that its code does not have."""
    tables = (OFFICIAL,) if isinstance(model, VideoMAE) else (OFFICIAL, FINE_TUNED)
    return export(model, rules(model, tables, published=True))


def rules(model, tables, published=False):
    """The key map. published: ValueError where the official code has no such position codes."""
    config = model.config
    if published and config["positions"] not in ("sinusoid", "stored"):
        raise ValueError(f"position codes {config['positions']!r} are unknown to the official "
                         "code; train with --positions sinusoid")
    patch = config["size"]["patch"]
    kernel = as_kernel(config["channels"], config["tubelet"], patch, patch)
    return key_map(model, tables, {"encoder.embed.weight": (as_matrix, kernel)}, SAME)


def clip_options(frames, image_size, positions, options):
    """What no shape tells about the clips that a model was made for."""
    return dict(frames=frames or 16, image_size=image_size or 224,
                positions=options.get("positions", positions))


class VideoMAEFile(OfficialFile):
    """An official file of this family; layout: table of the authors' own files of its kind."""

    def __init__(self, source, layout=()):
        super().__init__(source)
        if any(key.startswith("embeddings.patch_embeddings.") for key in self.tensors):
            # transformers' VideoMAEModel alone
            self.tensors = {"videomae." + key: value for key, value in self.tensors.items()}
        if "backbone.patch_embed.proj.weight" in self.tensors:
            # an encoder inside somebody's larger model
            self.tensors = {key.removeprefix("backbone."): value
                            for key, value in self.tensors.items()}
        self.hugging_face = any(key.startswith("videomae.") for key in self.tensors)
        if self.hugging_face:
            new = any(key.endswith("attention.query.bias") for key in self.tensors)
            layout = HUGGING_FACE_5 if new else HUGGING_FACE
        self.tables = (OFFICIAL, layout)

    def hub_config(self, source):
        """What transformers wrote beside its own file, else {}; WeightsError where that differs."""
        told = hub_config(source) if self.hugging_face else {}
        self.activation(told, "gelu")
        return told

    def mlp_width(self, block):
        return self.size(block + "mlp.fc1.bias", block + "mlp.fc1.weight",
                         (block + "mlp.fc2.weight", 1))

    def encoder(self, heads):
        """Size, without a decoder, and options, read off the shapes."""
        _, channels, tubelet, patch, across = self.shape("encoder.embed.weight", 5)
        if patch != across:
            raise WeightsError(f"{self.name}: wrong shape: {self.spell('encoder.embed.weight')} "
                               f"has patches of {patch} x {across}")
        block = "encoder.blocks.#."
        width = self.width(block)
        size = Size(width, self.depth("encoder.blocks."),
                    self.heads(width, heads, usual=USUAL_HEADS), self.mlp_width(block), patch,
                    decoder_width=0, decoder_depth=0, decoder_heads=0, decoder_mlp_width=0)
        # transformers' files always have the biases: an early version 5 lost them in a renaming and
        # went on with zeros, so a file without them is refused.
        biased = self.hugging_face or self.has(block + "attn.q_bias", block + "attn.v_bias")
        options = dict(
            tubelet=tubelet, channels=channels, bias="qv" if biased else "none",
            cosine=self.has(block + "attn.temperature"),
            layer_scale=1.0 if self.has(block + "gamma1", block + "gamma2") else None,
            eps=1e-12 if self.hugging_face else 1e-6, head_eps=1e-5 if self.hugging_face else 1e-6)
        return size, options | ({"positions": "stored"} if self.has("encoder.stored") else {})
