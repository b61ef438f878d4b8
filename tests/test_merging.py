"""What is proved about weights/merging.py: it averages what CLIP brought, and nothing else."""

import pytest

import uniformerv2
from clip_video import TextSize, VideoCLIP
from weights.merging import merge

SIZE = uniformerv2.Size(8, 14, 2, 16, 8, 16)
OPTIONS = dict(frames=2, image_size=16, vocabulary=20, context=6)


def filled(value, **options):
    """A model of fourteen blocks whose tensors all hold `value`."""
    model = VideoCLIP(SIZE, text_size=TextSize(8, 2, 2), **OPTIONS, **options)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(value)
    return model


def test_merging_averages_what_clip_brought_and_nothing_else():
    """WiSE-FT; also in blocks 12 and 13, which the published list leaves out."""
    state = merge(filled(1), filled(5, kind="frames"), 0.25).state_dict()
    merged = {name for name, value in state.items() if bool((value == 2).all())}
    assert all(bool((state[name] == 1).all()) for name in state.keys() - merged)
    assert {"text.positions", "visual.class_token", "visual_proj.weight",
            "text.blocks.1.mlp.fc1.weight", "visual.blocks.11.attn.qkv.weight",
            "visual.blocks.13.attn.qkv.weight"} <= merged
    assert not any("global" in name or "balance" in name or name == "scale" for name in merged)


def test_models_of_two_sizes_are_not_merged():
    with pytest.raises(ValueError, match="must have the same size"):
        merge(filled(1), VideoCLIP(SIZE, text_size=TextSize(4, 2, 2), **OPTIONS))
