"""What is proved about the runs of every stage:

one that is cut off and resumed ends with the same weights bit for bit, with workers, accumulation
and averaged weights; what is evaluated depends neither on the batches of training nor on the number
of workers.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

import train
import variants.cards  # noqa: F401 (registers mae-dual)
from engine import pictures
from test_classify_card import encoders  # noqa: F401
from test_clip_card import finished  # noqa: F401
from test_fuse_card import pair  # noqa: F401

SHARED = ("--batch-size 4 --eval-clips 10 --eval-every 5 --workers 0 --precision fp32 "
          "--device cpu").split()
SMALL = "--num-frames 4 --input-size 16".split()
RUNS = {  # name -> stage and flags; {masked}, {clip}, {finished}: weights to start from
    "mae": "mae --num-frames 4 --input-size 32 --mask-ratio 0.5",
    "mae with everything on": "mae-dual --num-frames 4 --input-size 32 --mask-ratio 0.5 "
                              "--accum 2 --ema 0.9 --drop-path 0.2 --workers 2",
    "clip with everything on": "clip --num-frames 2 --input-size 16 --temporal-downsample --ema "
                               "0.9 --workers 1",
    "retrieve": "retrieve --weights {finished} --num-frames 4 --input-size 16 --ema 0.9",
    "classify": "classify --weights {clip} --num-frames 4 --input-size 16",
    "classify, a probe": "classify --weights {clip} --num-frames 4 --input-size 16 --mode probe "
                         "--probe-clips 20",
    "classify with everything on": "classify --weights {masked} --num-frames 4 --input-size 16 "
                                   "--mixup 0.8 --cutmix 1 --drop 0.3 --drop-path 0.2 "
                                   "--ema 0.9 --accum 2 --workers 1",
    "fuse": "fuse --masked {first} --multimodal {second} --drop 0.5 --ema 0.9",
    "localise": "localise --weights {clip} --videos 6 --width 16 --depth 2 --ema 0.9",
    "answer": "answer --weights {finished} --drop 0.3 --ema 0.9 --accum 2",
}


@pytest.fixture
def start(request, encoders, finished, pair, monkeypatch):  # noqa: F811
    """A function that does this test's run in a folder, with more flags -> exit code."""
    places = dict(masked=encoders["masked"][0], clip=encoders["multimodal"][0], finished=finished,
                  first=pair[1], second=pair[3])
    stage, *flags = RUNS[request.param].format(**places).split()
    card = train.STAGES[stage]
    monkeypatch.setattr(pictures, "curve", lambda *_: [])
    for kind in train.STAGES.values():
        monkeypatch.setattr(kind, "pictures", lambda *_: [])

    def start(out, *more):
        return train.main([stage, *SHARED, *flags, "--out", str(out), *more])

    start.card = card
    return start


@pytest.mark.parametrize("start", RUNS, indirect=True)
def test_resuming_equals_never_stopping_bit_for_bit(start, tmp_path):
    assert start(tmp_path / "whole", "--steps", "5") == 0
    calls, loss = [], start.card.loss

    def power_cut(self, model, batch, rng):
        calls.append(torch.is_grad_enabled())
        if sum(calls) == 4 * self.accum:
            raise KeyError("power cut")
        return loss(self, model, batch, rng)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start.card, "loss", power_cut)
        with pytest.raises(KeyError):
            start(tmp_path / "cut", "--steps", "5", "--save-every", "2")
    assert start(tmp_path / "cut", "--steps", "5", "--resume") == 0
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    told = [json.loads(line) for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in told if "lr" in line]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize("start",
                         ["mae with everything on", pytest.param(
                             "clip with everything on", marks=pytest.mark.slow), "retrieve",
                          "classify", "fuse", "answer"], indirect=True)
def test_no_evaluation_depends_on_the_batches_of_training_or_on_workers(start, tmp_path,
                                                                        monkeypatch):
    monkeypatch.setattr(start.card, "untrained", lambda self: "")  # else --steps 0 is refused
    found = []
    for name, flags in (("a", ("--batch-size", "3", "--workers", "0")),
                        ("b", ("--batch-size", "5", "--workers", "2"))):
        assert start(tmp_path / name, "--steps", "0", "--eval-batch", "4", *flags) == 0
        found.append(json.loads((tmp_path / name / "metrics.json").read_text()))
    a, b = ({key: value for key, value in metrics.items() if key not in ("settings", "seconds")}
            for metrics in found)
    assert a == b and a["val_clips"] == 10
