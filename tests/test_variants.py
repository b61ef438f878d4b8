"""What is proved about variants/:

running cells decode every token in its turn; dual masking gives the plain form's and the official
numbers; divided attention is joint attention under two masks, and refuses other clips; both train
as stages, and what they leave loads again.
"""

import json

import pytest
import torch
from conftest import assert_summary
from test_mae import OPTIONS, clip, official, plain_forward, reference_clip, reference_mask

import mae
import train
import weights
from variants import cards
from variants.divided_attention import DividedVideoClassifier, DividedVideoMAE
from variants.dual_masking import (
    DualMaskedVideoMAE, dual_masking_loss, hidden_among_decoded, running_cell_mask)
from weights.encoders import load_encoder


# Dual masking -----------------------------------------------------------------------------------


def test_running_cells_leave_out_half_and_decode_all_within_three_steps():
    """VideoMAE V2, Sec. 3.2, Dual Masking: the four maps, and each token's turn."""
    skipped = running_cell_mask(40, (8, 4, 6), torch.Generator().manual_seed(0))
    skipped = skipped.view(40, 8, 4, 6)
    assert (skipped.sum(dim=(2, 3)) == 12).all() and torch.equal(skipped[:, :4], skipped[:, 4:])
    assert all((~skipped[:, i:i + 3]).any(dim=1).all() for i in range(6))
    cells = [[[1, 0], [0, 1]], [[0, 0], [1, 1]], [[0, 1], [1, 0]], [[1, 1], [0, 0]]]
    starts = set()
    for sample in skipped:
        start = cells.index(sample[0, :2, :2].int().tolist())
        starts.add(start)
        for step in range(8):
            assert sample[step, 2:4, 4:6].int().tolist() == cells[(start + step) % 4]
    assert starts == {0, 1, 2, 3}
    with pytest.raises(ValueError, match="2 x 2"):
        running_cell_mask(1, (2, 3, 4))


def test_decoding_half_gives_the_numbers_of_the_plain_form():
    size = mae.Size(32, 2, 2, 64, 8, 16, 2, 2, 32)
    model = DualMaskedVideoMAE(size, frames=4, image_size=32).double()
    video, hidden = clip(dtype=torch.float64), mae.tube_mask(2, (2, 4, 4), 0.5)
    skipped = running_cell_mask(2, (2, 4, 4))
    quick = model(video, hidden, skipped)
    plain = plain_forward(model, video, hidden, ~skipped)
    torch.testing.assert_close(quick, plain, atol=1e-12, rtol=1e-12)
    upstream = torch.randn_like(plain)
    for a, b in zip(torch.autograd.grad(quick, list(model.parameters()), upstream),
                    torch.autograd.grad(plain, list(model.parameters()), upstream)):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)
    assert torch.equal(model(video, hidden), mae.VideoMAE.forward(model, video, hidden))


def test_tokens_that_the_encoder_saw_weigh_nothing_in_the_loss():
    prediction, target = torch.randn(2, 2, 4, 6)
    hidden = torch.tensor([[1, 1, 0, 1, 0, 0, 0, 1], [0, 1, 0, 1, 0, 0, 1, 1]]).bool()
    skipped = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 0, 1, 1, 1]]).bool()
    weight = hidden_among_decoded(hidden, skipped)
    assert weight.int().tolist() == [[1, 1, 0, 1], [0, 1, 0, 0]]
    expected = ((prediction - target) ** 2).mean(-1)[weight].mean()
    torch.testing.assert_close(dual_masking_loss(prediction, target, weight), expected)


def test_official_dual_mask_numbers():
    video, hidden = reference_clip(), reference_mask()
    odd = (torch.arange(32) % 2 == 1).expand(2, -1)
    plain = DualMaskedVideoMAE.from_official(official(), **OPTIONS)
    assert_summary(plain(video, hidden, odd), -1072.209120,
                   first=[-3.904275, 0.366621, 0.359072, 0.928667])
    cosine = DualMaskedVideoMAE.from_official(official(cosine=2), **OPTIONS)
    assert_summary(cosine(video, hidden, odd), -1022.204606,
                   first=[-3.900030, 0.355084, 0.386568, 0.959175])


# Divided attention ------------------------------------------------------------------------------


def test_divided_attention_is_joint_attention_under_two_masks():
    """Over time a token sees its own place, over space its own time step.

    Both written out as masks over all pairs, in float64, on the visible tokens of a tube mask.
    """
    torch.manual_seed(0)
    model = DividedVideoMAE("tiny", frames=8, image_size=40).double()
    hidden = mae.tube_mask(2, model.grid, 0.75, torch.Generator().manual_seed(0))
    visible, _ = mae.split_by_mask(hidden)
    x = model.encoder.start(torch.randn(2, 3, 8, 40, 40, dtype=torch.float64), visible).tokens
    block = model.encoder.blocks[0]
    place, time = visible % 25, visible // 25
    plain = x
    for norm, layer, group in ((block.norm_time, block.attn_time, place),
                               (block.norm1, block.attn, time)):
        q, k, v = layer.queries_keys_values(norm(plain))
        same = group[:, None, :, None] == group[:, None, None]
        scores = (q @ k.mT / q.shape[-1]**0.5).masked_fill(~same, -torch.inf)
        plain = plain + layer.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    plain = plain + block.mlp(block.norm2(plain))
    assert (block(x) - plain).abs().max() < 1e-12


def test_divided_attention_refuses_other_clips_and_survives_a_classifier(tmp_path):
    model = DividedVideoMAE("tiny", frames=8, image_size=40).eval()
    video = torch.randn(2, 3, 8, 40, 40)
    with pytest.raises(ValueError, match="a tube mask"):
        model(video, mae.random_mask(2, model.grid, 0.75, torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match="is for clips of 8 frames, not of 16"):
        model.encoder(torch.randn(1, 3, 16, 40, 40))
    with pytest.raises(ValueError, match="unknown to the official code"):
        model.to_official()
    weights.save(tmp_path, model, model.config)
    again = DividedVideoMAE.from_official(tmp_path)
    assert torch.equal(again.encoder(video), model.encoder(video))
    classifier = again.with_head(5).eval()
    assert isinstance(classifier, DividedVideoClassifier)
    expected = model.encoder.run(model.encoder.start(video), 0, 3).tokens
    assert torch.equal(classifier.tokens(video), expected)
    assert torch.equal(classifier.with_head(5).eval()(video), classifier(video))


def test_runs_of_older_code_with_divided_attention_load():
    config = DividedVideoMAE("tiny", frames=8, image_size=40).config
    older = config | {"model": "VideoMAE", "space_time": "divided"}
    assert DividedVideoMAE.from_config(older).config == config
    with pytest.raises(weights.WeightsError, match="space_time='divided'; this option was removed"):
        weights.runs.build(mae.VideoMAE.from_config, older, "a run")


# As stages --------------------------------------------------------------------------------------

FLAGS = ("--num-frames 4 --input-size 32 --mask-ratio 0.5 --batch-size 4 --eval-clips 8 "
         "--workers 0 --steps 2 --precision fp32 --device cpu --no-figures").split()


@pytest.mark.parametrize("name", ["mae-dual", "mae-divided"])
def test_a_variant_trains_and_its_encoder_is_fine_tuned(name, tmp_path):
    assert train.main([name, *FLAGS, "--out", str(tmp_path / "run")]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["val_loss"] > 0 and metrics["val_trivial_loss"] == pytest.approx(1, abs=0.03)
    flags = [flag for flag in FLAGS if flag not in ("--mask-ratio", "0.5")]
    assert train.main(["classify", *flags, "--weights", str(tmp_path / "run"),
                       "--out", str(tmp_path / "labels")]) == 0
    model = load_encoder(tmp_path / "labels")
    assert isinstance(model, DividedVideoClassifier) == (name == "mae-divided")


@pytest.mark.parametrize("flags, message", [
    (["mae-dual", *FLAGS, "--input-size", "40"], "needs an even token grid, this one is 5 x 5"),
    (["mae-divided", *FLAGS, "--mask-type", "random"], "--mask-type: divided attention needs")])
def test_clips_and_masks_that_a_variant_cannot_take_are_refused_in_one_line(flags, message, capsys):
    assert train.main(flags) == 2
    err = capsys.readouterr().err.strip()
    assert message in err and "\n" not in err


def test_both_variants_are_registered_as_stages():
    assert train.STAGES["mae-divided"] is cards.DividedAttention
    assert train.STAGES["mae-dual"] is cards.DualMasking
