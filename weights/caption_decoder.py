"""Load and export official files of InternVideo-MM's caption decoder.

A file contains the decoder alone, or a whole checkpoint with the decoder under "caption_decoder.".
All sizes come from the shapes. Even the number of heads does, because keys and values have a
single head, whose width is therefore visible.
"""

import torch

from caption_decoder import rotary_frequencies
from weights.files import WeightsError, export
from weights.official import OfficialFile, key_map
from weights.runs import rebuild

# Our name -> the official name, in network order. Names that match SAME are equal in both.
OFFICIAL = (
    (r"^queries$", "visual_queries"),
    (r"^pooler\.(attn\.)?", "visual_attn_pooler."),
    (r"^pooled_norm\.", "visual_pooler_norm."),
    (r"^self_blocks\.(\d+)\.", r"multimodal_layers.\1.0.fn."),
    (r"fn\.frequencies$", "fn.rotary_emb.inv_freq"),
    (r"fn\.fused\.", "fn.fused_attn_ff_proj."),  # rows: queries, keys, values, MLP
    (r"fn\.proj\.", "fn.attn_out."),
    (r"fn\.fc2\.", "fn.ff_out.1."),
    (r"^cross_blocks\.(\d+)\.(attn\.)?", r"multimodal_layers.\1.1.fn."),
    (r"\.q\.", ".to_q."),
    (r"\.kv\.", ".to_kv."),
    (r"\.proj\.", ".to_out."),
    (r"\.fc1\.", ".ff.0."),
    (r"\.fc2\.", ".ff.2."),
    (r"^vocabulary\.", "predictor.4."),
)
SAME = r"(text_norm|predictor\.[013])\..*"
PREFIX = "caption_decoder."


def load(cls, source, *, heads):
    """A CaptionDecoder in eval mode.

    source   path or {name: tensor}, see weights.read: the decoder alone, a whole checkpoint, or a
             run of ours
    heads    query heads; default: as the shapes say (published models: W/64)
    raises   WeightsError: the file has no decoder, or a tensor does not fit
    """
    file = CaptionDecoderFile(source)
    if file.config.get("model") == "CaptionDecoder":
        return rebuild(cls.from_config, file.tensors, file.config, file.name)
    model = file.build(cls, **file.measures(heads))
    file.fill(model, key_map(model, file.tables, same=SAME))
    check_rotary(model, file)
    return model


def to_official(model):
    """{official name: tensor} of a CaptionDecoder."""
    return export(model, key_map(model, (OFFICIAL, ((r"^", PREFIX),)), same=SAME))


class CaptionDecoderFile(OfficialFile):
    """The decoder's tensors in an official file, or a run of ours."""

    def __init__(self, source):
        super().__init__(source, "caption_decoder")
        prefix = PREFIX if any(key.startswith(PREFIX) for key in self.tensors) else ""
        self.tables = (OFFICIAL, ((r"^", prefix),))
        if self.config.get("model") != "CaptionDecoder":
            self.tensors = {key: value for key, value in self.tensors.items()
                            if key.startswith(prefix)}

    def depth(self, blocks):
        """Number of layers. Each layer has one of our self_blocks and one of our cross_blocks."""
        return super().depth("multimodal_layers.")

    def measures(self, heads):
        """The constructor arguments, from the shapes."""
        visual = any(".visual_" in "." + key for key in self.tensors)
        if not self.depth("self_blocks.") or not visual:
            raise WeightsError(f"{self.name}: holds no caption decoder (no caption_decoder.*, nor "
                               "visual_queries and multimodal_layers.* without that prefix)")
        width = self.size("text_norm.weight", "text_norm.bias", "self_blocks.#.norm.gamma",
                          "cross_blocks.#.norm.gamma")
        head_width = self.size("pooler.attn.kv.weight", "cross_blocks.#.attn.kv.weight") // 2
        return dict(
            width=width, heads=heads or max(1, width // max(1, head_width)),
            depth=self.depth("self_blocks."),
            visual_width=self.size("pooler.context_norm.gamma", "pooler.context_norm.beta",
                                   ("pooler.attn.kv.weight", 1)),
            vocabulary=self.rows("vocabulary.weight", "vocabulary.bias") or self.size(
                "vocabulary.weight"),
            queries=self.size("queries"),
            mlp_width=self.size(("self_blocks.#.fc2.weight", 1), ("cross_blocks.#.fc2.weight", 1)))


@torch.no_grad()
def check_rotary(decoder, file):
    """WeightsError if a file has other rotary frequencies than this code.

    Official files store this table, although the code computes it. Half precision rounds it. The
    comparison therefore has a tolerance, and the exact table replaces the stored one.
    """
    for i, block in enumerate(decoder.self_blocks):
        table = rotary_frequencies(2 * len(block.frequencies)).to(block.frequencies)
        if not torch.allclose(block.frequencies, table, rtol=0.01, atol=0):
            raise WeightsError(f"{file.name}: {file.spell(f'self_blocks.{i}.frequencies')} holds "
                               "other frequencies than 10000^(-2j/K)")
        block.frequencies.copy_(table)
