"""Tests of the exercises. EXERCISES=solutions tests the solutions."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

import attention
import caption_decoder
import clip_video
import data
import mae
import train
from tasks import retrieval


def load(name):
    path = FOLDER / os.environ.get("EXERCISES", ".") / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_ex01_visible_tokens():
    count = load("ex01_visible_tokens").visible_tokens
    assert count(16, 224, 224, 0.9) == 160, "20 of 196 places in each of 8 time steps"
    for frames, height, width, ratio, patch in (
            (8, 40, 40, 0.75, 8), (4, 32, 48, 0.3, 16), (2, 16, 16, 0.0, 8)):
        size = mae.Size(16, 1, 1, 16, patch, 16, 1, 1, 16)
        model = mae.VideoMAE(size, frames=frames, image_size=(height, width))
        hidden = mae.tube_mask(1, model.grid, ratio, torch.Generator())
        assert count(frames, height, width, ratio, patch) == int((~hidden).sum()), \
            f"int() rounds the hidden places of one time step: {model.grid}"


def test_ex02_attention():
    write = load("ex02_attention").attention
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    allowed = torch.rand(2, 1, 5, 7) < 0.5
    allowed[0, 0, 2] = False
    expected = attention.attention_weights(q, k, allowed) @ v
    assert torch.allclose(write(q, k, v, allowed), expected, atol=1e-5)
    assert (write(q, k, v, allowed)[0, :, 2] == 0).all()


def test_ex03_cost():
    cost = load("ex03_cost")
    for tokens, width in ((20, 32), (64, 96)):
        with torch.device("meta"):  # on a CPU torch does not count the attention kernel
            block, x = attention.Block(width, 4), torch.randn(1, tokens, width)
        with FlopCounterMode(display=False) as counter:
            block(x)
        assert cost.block_flops(tokens, width) == counter.get_total_flops(), \
            "as torch counts; a multiply-add is two FLOPs"
    assert cost.saving(1568, 160, 768) == pytest.approx(12.7, abs=0.05), \
        "more than 9.8, the ratio of tokens: the cost of pairs falls with its square"


def test_ex04_tubes():
    hide = load("ex04_tubes").tube_mask
    hidden = hide(2000, (3, 4, 5), 0.75, torch.Generator().manual_seed(0))
    assert hidden.shape == (2000, 60) and hidden.dtype == torch.bool
    frames = hidden.view(2000, 3, 20)
    assert (frames.sum(dim=2) == 15).all(), "int(0.75 * 20) places of every frame"
    assert (frames == frames[:, :1]).all(), "the same places in all frames"
    share = frames[:, 0].float().mean(dim=0)
    assert (share - 0.75).abs().max() < 0.05, "all places are equally likely"
    again, other = (hide(2000, (3, 4, 5), 0.75, torch.Generator().manual_seed(n)) for n in (0, 1))
    assert torch.equal(hidden, again), "take random numbers only from `generator`"
    assert not torch.equal(hidden, other), "another seed must give another mask"


def test_ex05_target():
    exercise = load("ex05_target")
    video = torch.randn(2, 3, 4, 16, 16)
    tubelets = mae.take_tubelets(video, None, 8, 2).transpose(2, 3)          # (B, N, pixels, C)
    every = torch.ones(2, tubelets.shape[1], dtype=torch.bool)
    expected = mae.reconstruction_target(video, every, patch=8)
    assert torch.allclose(exercise.normalised(tubelets).flatten(2), expected, atol=1e-4)
    assert exercise.cost_of_zeros(tubelets) == pytest.approx(127 / 128, abs=1e-4)


def test_ex06_contrast():
    write = load("ex06_contrast").contrastive_loss
    torch.manual_seed(0)
    video, text, scale = torch.randn(6, 9), torch.randn(6, 9), torch.tensor(1.3)
    none = torch.tensor(0.0)
    plain = clip_video.contrastive_loss(video, text, none)
    assert torch.allclose(write(video, text, none), plain, atol=1e-5), \
        "cosines; the mean of two cross-entropies, in nats"
    result, expected = write(video, text, scale), clip_video.contrastive_loss(video, text, scale)
    assert torch.allclose(result, expected, atol=1e-5), "the factor is exp(logit_scale)"
    longer = write(5 * video, text, scale)
    assert torch.allclose(longer, result, atol=1e-5), "a cosine does not depend on length"


def test_ex07_retrieval():
    exercise = load("ex07_retrieval")
    torch.manual_seed(0)
    for _ in range(5):
        similarity = 3 * torch.randn(20, 20) + 3 * torch.eye(20)
        expected = retrieval.retrieval_metrics(similarity)
        dual = exercise.dual_softmax(similarity)
        assert exercise.recall_at_1(similarity) == pytest.approx(expected["t2v_R@1"])
        assert exercise.recall_at_1(dual) == pytest.approx(expected["dsl_t2v_R@1"])
    assert exercise.recall_at_1(torch.ones(4, 4)) == 0


def test_ex08_off_by_one():
    write = load("ex08_off_by_one").caption_loss
    torch.manual_seed(0)
    ids = torch.tensor([[8, 1, 2, 9, 0, 0], [8, 3, 4, 5, 6, 9]])
    is_text, logits = torch.tensor([[True] * 4 + [False] * 2, [True] * 6]), torch.randn(2, 6, 10)
    try:
        loss = write(logits, ids, is_text)
    except (ValueError, IndexError) as error:
        raise AssertionError("as many logits as targets: the last position has none") from error
    expected = caption_decoder.caption_loss(logits[:, :-1], ids, is_text)
    assert torch.allclose(loss, expected, atol=1e-5), \
        "logits[:, t] predict ids[:, t+1]; the end token counts, padding does not"


def test_ex09_bridge():
    exercise = load("ex09_bridge")
    torch.manual_seed(0)
    bridge = exercise.Bridge(16, 24, 4)
    x, context = torch.randn(2, 5, 16), torch.randn(2, 7, 24)
    assert torch.equal(bridge(x, context), x), "at the start the output equals x bit for bit"
    bridge(x, context).square().sum().backward()
    no_gradient = {name.split(".")[0] for name, p in bridge.named_parameters()
                   if p.grad is None or not p.grad.any()}
    assert "gate" not in no_gradient, "the gate itself must learn from the first step on"
    assert exercise.without_gradient_at_step_one() == no_gradient, "the parts behind the gate"
    with torch.no_grad():
        bridge.gate.fill_(1.0)
    assert not torch.allclose(bridge(x, context), x)


def test_ex10_stage(tmp_path):
    Arrow = load("ex10_stage").Arrow
    flags = dict(steps=120, batch_size=16, eval_clips=64, eval_every=120, workers=0, device="cpu",
                 precision="fp32", lr=3e-3, optimizer="adamw", figures=False)
    train.train(Arrow(out=str(tmp_path), **flags))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert 75 < metrics["val_accuracy"] <= 100
    stage = Arrow(**flags)
    train_set, held_out = stage.datasets()
    torch.manual_seed(0)
    model = stage.build(train_set).eval()
    batch = next(data.held_out(held_out["val"], 8, 8))
    losses = [float(stage.loss(model, batch, torch.Generator().manual_seed(n))[0])
              for n in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2], "take random numbers only from `rng`"
