"""What is proved about classes with unlike numbers of clips:

accuracy is also the mean over classes; each class has a line in metrics.json; rare classes may
count as much as frequent ones, in the loss or by how often their clips come.
"""

import collections
import json

import numpy as np
import pytest
import torch

import data
import mae
import weights
from tasks import recognition
from test_class_names import KNOWN, evaluate, named, says
from test_classify_card import TINY, run
from test_train import write_video
from video.loading import Plan

CLASSES = {"label": ("clap", "jump", "wave")}


def uneven(place, **counts):
    """A folder with so many videos of each class."""
    for name, count in counts.items():
        (place / name).mkdir(parents=True)
        for i in range(count):
            write_video(place / name / f"{i}.mp4", frames=4)
    return str(place)


def test_the_mean_over_classes_and_a_line_for_each_stand_beside_top_1(tmp_path):
    always = says(mae.VideoClassifier(TINY, classes=3, frames=4, image_size=16), 0.0, 0.0, 1.0)
    data = uneven(tmp_path / "data", clap=2, wave=6)
    model = {"masked": named(tmp_path / "run", always, KNOWN)}
    assert evaluate("masked", model, data, tmp_path / "out") == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["val_top1"] == 75.0 and metrics["val_mean_class"] == 50.0
    assert metrics["val_classes"]["label"] == [
        {"class": "clap", "clips": 2, "right": 0, "accuracy": 0.0},
        {"class": "jump", "clips": 0, "right": 0, "accuracy": None},
        {"class": "wave", "clips": 6, "right": 6, "accuracy": 100.0}]


def test_the_mean_over_classes_stands_in_the_last_line(tmp_path, capsys):
    data = uneven(tmp_path / "data", clap=1, wave=2)
    assert run("--data", data, "--val-data", data, "--no-figures", out=tmp_path / "out",
               steps=1) == 0
    assert "val_mean_class" in capsys.readouterr().out.splitlines()[-1]


def test_weights_of_classes_and_clips_by_hand():
    labels = {"label": torch.tensor([0] * 6 + [2] * 2)}
    assert torch.allclose(recognition.class_weights(labels, CLASSES), torch.tensor([2 / 3, 1, 2.0]))
    shares = recognition.clip_weights(labels, CLASSES)
    assert torch.allclose(shares, torch.tensor([1 / 12] * 6 + [1 / 4] * 2).double())
    several = {"label": torch.tensor([[1, 0, 1], [0, 0, 1], [0, 0, 1], [0, 0, 0]])}
    weight = recognition.class_weights(several, CLASSES)
    assert torch.allclose(weight, torch.tensor([2.0, 1, 2 / 3]))
    shares = recognition.clip_weights(several, CLASSES)
    assert torch.allclose(shares * 11, torch.tensor([4.0, 2, 2, 3]).double())


def test_a_weighted_loss_is_the_mean_of_each_clips_weighted_loss():
    logits, labels = torch.randn(8, 3), torch.tensor([0] * 6 + [2] * 2)
    weight = torch.tensor([2 / 3, 1, 2.0])
    target = recognition.one_hot({"label": labels}, CLASSES)
    each = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    found = recognition.cross_entropy(logits, target, CLASSES, weight=weight)
    assert torch.allclose(found, (weight[labels] * each).mean())
    assert torch.allclose(recognition.cross_entropy(logits, target, CLASSES), each.mean())


def drawn(dataset, rank=0, world=1, start=0):
    """Numbers (item, draw) of each step's batch."""
    return list(Plan(dataset, 8 // world, 0, 50, start, True, rank, world, 1))


def test_a_balanced_sampler_is_a_function_of_seed_and_step_on_any_number_of_processes(tmp_path):
    clips = data.VideoFiles(uneven(tmp_path, clap=6, wave=2), 4, 16)
    plain = collections.Counter(item for batch in drawn(clips) for item, _ in batch)
    assert set(plain.values()) == {50}
    clips.weights = np.array([1 / 12] * 6 + [1 / 4] * 2)
    alone = drawn(clips)
    wave = np.mean([item >= 6 for batch in alone for item, _ in batch])
    assert 0.43 < wave < 0.57
    assert len({draw for batch in alone for draw in batch}) == 400, "no clip comes twice alike"
    halves = zip(drawn(clips, 0, 2), drawn(clips, 1, 2))
    assert [first + second for first, second in halves] == alone
    assert drawn(clips, start=13) == alone[13:]


@pytest.mark.parametrize("mode", ["finetune", "probe"])
def test_each_way_of_balancing_trains_to_other_weights(tmp_path, mode):
    found, videos = {}, uneven(tmp_path / "data", clap=5, wave=1)
    for balance in ("none", "loss", "sampler"):
        assert run("--data", videos, "--val-data", videos, "--no-figures", "--mode", mode,
                   "--balance", balance, "--probe-clips", "0", out=tmp_path / balance,
                   steps=4) == 0
        found[balance] = weights.read(tmp_path / balance)[0]["head.bias"]
    lean = {name: float(bias[1] - bias[0]) for name, bias in found.items()}
    assert lean["none"] < lean["loss"] and lean["none"] < lean["sampler"], lean


def test_balance_is_for_files_that_name_their_classes(tmp_path, capsys):
    assert run("--balance", "loss", out=tmp_path) == 2
    assert "--balance: is for video files" in capsys.readouterr().err
