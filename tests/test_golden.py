"""The official numbers in full: outputs, losses and gradients of reference vectors, float32 and float64.

The vectors are too large to keep here. Set GOLDEN to their folder, or put it beside the repository
as shared/golden; without it these tests are skipped (tests/test_mae.py holds the printed sums).
Tolerances relative to the largest reference number: 1e-5 and 5e-5 (gradients) in float32, 1e-7 in
float64, where a wrong LayerNorm epsilon would show.
"""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import mae
from mae import VideoClassifier, VideoMAE, reconstruction_loss, reconstruction_target

FOLDER = Path(os.environ.get("GOLDEN", Path(__file__).resolve().parent.parent.parent / "shared" / "golden"))
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="no reference vectors (set GOLDEN)")
DTYPES = (torch.float32, torch.float64)


class Case:
    """One reference case at one precision."""

    def __init__(self, name, dtype):
        tensors = load_file(FOLDER / f"{name}.safetensors")
        self.arguments = json.loads((FOLDER / f"{name}.json").read_text())["constructor"]
        self.dtype, wide = dtype, "64" if dtype == torch.float64 else ""
        self.state, self.inputs, self.outputs, self.gradients = (
            {key[len(prefix):]: value for key, value in tensors.items() if key.startswith(prefix)}
            for prefix in ("state.", "in.", f"out{wide}.", f"grad{wide}."))

    def check(self, name, value):
        """Compare an output, where this precision has it on file (float64: small ones only)."""
        if name in self.outputs:
            self.close(value, self.outputs[name], 1e-7 if self.dtype == torch.float64 else 1e-5, name)

    def close(self, value, reference, tolerance, name):
        error = (value.double() - reference.double()).abs().max() / reference.double().abs().max()
        assert error <= tolerance, f"{name}: {error:.2e}"

    def check_gradients(self, model, rules):
        """Every recorded gradient, found through the key map by its official name."""
        ours = {rule.sources[0]: rule.ours for rule in rules}
        parameters = dict(model.named_parameters())
        assert self.gradients
        for name, reference in self.gradients.items():
            got = parameters[ours[name]].grad.view(reference.shape)
            self.close(got, reference, 1e-7 if self.dtype == torch.float64 else 5e-5, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["videomae_pretrain", "videomae_v2_pretrain", "hf_videomae_pretrain"])
def test_pretraining(name, dtype):
    case = Case(name, dtype)
    video = case.inputs.get("video")
    video = case.inputs["pixel_values"].transpose(1, 2) if video is None else video
    video = video.contiguous().to(dtype)
    hidden = case.inputs.get("mask", case.inputs.get("bool_masked_pos"))
    skipped = case.inputs.get("decode_mask")
    heads = case.arguments.get("encoder_num_heads", case.arguments.get("num_attention_heads"))
    decoder_heads = case.arguments.get("decoder_num_heads", case.arguments.get("decoder_num_attention_heads"))
    model = VideoMAE.from_official(case.state, heads=heads, decoder_heads=decoder_heads,
                                   frames=video.shape[2], image_size=tuple(video.shape[3:])).to(dtype)
    prediction = model(video, hidden, skipped)
    wanted = hidden if skipped is None else ~skipped
    weight = None if skipped is None else hidden.gather(1, mae.split(wanted)[1])
    target, raw = (reconstruction_target(video, wanted, normalise) for normalise in (True, False))
    loss = reconstruction_loss(prediction, target, weight)
    loss.backward()
    for key, value in (("pred", prediction), ("logits", prediction), ("target_normalized", target),
                       ("target_raw", raw), ("loss", loss.detach()),
                       ("loss_raw_target", reconstruction_loss(prediction.detach(), raw, weight))):
        case.check(key, value)
    visible, _ = mae.split(hidden)
    for key in ("encoder_tokens", "encoder_last_hidden_state"):
        case.check(key, model.encoder(video, visible))
    file = mae.OfficialFile(case.state, pretraining=True)
    size, options = file.encoder(heads, 16, 16, "sinusoid")
    depth = model.config["size"]["decoder_depth"]
    case.check_gradients(model, file.encoder_rules(size, options)
                         + file.block_rules("decoder.blocks.", depth, options)
                         + [file.rule(key, key) for key in ("mask_token", "encoder_to_decoder.weight")])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["videomae_finetune_meanpool", "videomae_finetune_layerscale",
                                  "videomae_finetune_token0", "hf_videomae_classify"])
def test_classification(name, dtype):
    case = Case(name, dtype)
    video = case.inputs.get("video")
    video = case.inputs["pixel_values"].transpose(1, 2) if video is None else video
    heads = case.arguments.get("num_heads", case.arguments.get("num_attention_heads"))
    model = VideoClassifier.from_official(case.state, heads=heads, frames=video.shape[2],
                                          image_size=tuple(video.shape[3:])).to(dtype)
    logits = model(video.to(dtype))
    loss = F.cross_entropy(logits, case.inputs["labels"])
    loss.backward()
    case.check("logits", logits)
    case.check("loss", loss.detach())
    case.check("features", model.features(video.to(dtype)))
    file = mae.OfficialFile(case.state, pretraining=False)
    size, options = file.encoder(heads, 16, 16, "sinusoid")
    case.check_gradients(model, file.encoder_rules(size, options) + file.pairs("head.", "head.")
                         + file.pairs("fc_norm.", "fc_norm.") + file.pairs("encoder.norm.", "encoder.norm."))


def test_tube_mask_counts():
    rows = json.loads((FOLDER / "videomae_tube_mask.json").read_text())["rows"]
    for row in rows:
        grid = row["input_size_time_height_width"]
        hidden = mae.tube_mask(3, grid, row["mask_ratio"]).view(3, grid[0], -1)
        assert (hidden.sum(dim=2) == row["num_masks_per_frame"]).all()
        assert hidden[0].sum() == row["total_masks"]
