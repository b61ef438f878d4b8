"""What is proved about clips that have several labels:

a batch holds a one for each; each class has a sigmoid and a binary cross entropy; what is measured
is mAP; classifiers, probes and the fused model train on them, and say all of them.
"""

import csv
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
from video.rows import Part
import mae
import train
from tasks import class_names, predictions, recognition
from test_classify_card import TINY, encoders, run, save  # noqa: F401
from test_fusion import encoders as two_encoders
from test_train import write_video
from video.clip_set import ClipSet

NAMES = ("red", "green", "blue", "never")


def item(**labels):
    return {"video": np.zeros((1, 2, 2, 3), np.uint8), "labels": labels, "path": "x.mp4",
            "part": None}


def test_a_batch_holds_a_one_for_each_label_and_minus_one_or_no_one_where_there_is_none():
    batch = data.collate([item(actions=np.array([0, 1, 1], np.uint8), place=2),
                          item(place=0), item(actions=np.array([1, 0, 0], np.uint8))])
    assert torch.equal(batch["labels"]["actions"],
                       torch.tensor([[0.0, 1, 1], [0, 0, 0], [1, 0, 0]]))
    assert torch.equal(batch["labels"]["place"], torch.tensor([2, 0, -1]))
    assert batch["labels"]["place"].dtype == torch.int64 and batch["part"] == [None] * 3


class Lights(ClipSet):
    """Clips on which some of three lights are on; "place" is the second question, where asked."""

    source, several, train, weights = "lights", frozenset({"colours"}), True, None

    def __init__(self, size=16, both=False, count=24):
        self.classes = {"colours": NAMES} | ({"place": ("in", "out")} if both else {})
        self.size, self.both, self.count = size, both, count

    def __len__(self):
        return self.count

    def on(self, index):
        return np.array([index >> bit & 1 for bit in range(3)] + [0], np.uint8)

    def labels_of(self, question):
        return [self.on(i) if question == "colours" else i % 2 for i in range(self.count)]

    def __getitem__(self, index):
        index = index[0] if isinstance(index, tuple) else index
        video = np.full((4, self.size, self.size, 3), 20, np.uint8)
        video[..., :] += 200 * self.on(index)[:3]
        labels = {"colours": self.on(index)} | ({"place": index % 2} if self.both else {})
        return {"video": video, "labels": labels, "path": f"{index}.mp4", "bad": [],
                "part": Part(index, index + 1.5)}


@pytest.fixture
def lights(monkeypatch):
    """A function that has every run open these clips."""
    def use(**options):
        clips = Lights(**options)
        monkeypatch.setattr(data, "open_sets", lambda *_, **__: (clips, {"val": clips}))
    return use


def test_average_precision_by_hand_and_equal_scores_come_at_once():
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6])
    first = recognition.average_precision(scores, torch.tensor([True, False, True, False]))
    assert first == pytest.approx((1 + 2 / 3) / 2)
    for positive in ([True, False, False, False], [False, False, False, True]):
        alike = recognition.average_precision(torch.zeros(4), torch.tensor(positive))
        assert alike == pytest.approx(1 / 4)
    table = torch.tensor([[0.9, 0.1, 0.5], [0.8, 0.2, 0.5]])
    target = torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    assert recognition.mean_average_precision(table, target) == 1.0  # the third class has no clip
    assert recognition.accuracies({"colours": table}, {"colours": target}) == {"mAP": 100.0}


def test_the_loss_is_the_mean_binary_cross_entropy_and_leaves_other_questions_as_they_are():
    classes = {"colours": NAMES, "place": ("in", "out")}
    logits = torch.randn(5, 6)
    labels = {"colours": torch.randint(2, (5, 4)).float(), "place": torch.randint(2, (5,))}
    target = recognition.one_hot(labels, classes)
    found = recognition.cross_entropy(logits, target, classes, several={"colours"})
    assert torch.allclose(found, F.binary_cross_entropy_with_logits(logits[:, :4],
                                                                    labels["colours"])
                          + F.cross_entropy(logits[:, 4:], labels["place"]))


def test_a_head_that_says_the_same_of_all_has_the_share_of_each_class_as_map(lights, tmp_path):
    lights()
    model = mae.VideoClassifier(TINY, classes=4, frames=4, image_size=16)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor([3.0, 2.0, 0.0, -1.0]))
    save(tmp_path / "run", model)
    class_names.write(tmp_path / "run", {"colours": NAMES}, {"colours"})
    assert run("--weights", str(tmp_path / "run"), "--eval-clips", "24", out=tmp_path / "out",
               steps=0) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["val_mAP"] == pytest.approx(50.0) and "val_top1" not in metrics
    assert metrics["val_classes"]["colours"][3] == {"class": "never", "clips": 0, "AP": None}
    assert metrics["val_classes"]["colours"][0] == {"class": "red", "clips": 12, "AP": 50.0}
    with open(tmp_path / "out" / "predictions.csv", newline="") as file:
        row = list(csv.DictReader(file))[3]
    assert row["true"] == "red;green" and row["part"] == "3-4.5" and row["class1"] == "red"
    assert [float(row[f"p{i}"]) for i in (1, 2, 3, 4)] == pytest.approx(
        torch.tensor([3.0, 2.0, 0.0, -1.0]).sigmoid().tolist(), abs=1e-4)
    # the command knows it, too, from the names beside the weights
    write_video(tmp_path / "a.mp4", frames=6)
    assert predictions.main([str(tmp_path / "a.mp4"), "--weights", str(tmp_path / "out"),
                             "--device", "cpu", "--out", str(tmp_path / "said")]) == 0
    with open(tmp_path / "said" / "predictions.csv", newline="") as file:
        said = next(csv.DictReader(file))
    assert float(said["p1"]) == pytest.approx(0.9526, abs=1e-4)


@pytest.mark.parametrize("flags", [
    ("--mode", "finetune", "--mixup", "0.8", "--steps", "3"),
    ("--mode", "attentive", "--steps", "3"),
    ("--mode", "probe", "--steps", "60", "--lr", "0.1"),
])
def test_classifiers_and_probes_learn_several_labels(
        lights, encoders, flags, tmp_path):  # noqa: F811
    lights()
    assert run("--weights", encoders["masked"][0], "--eval-clips", "24", *flags,
               out=tmp_path / "out") == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["val_loss"] < metrics["initial_val_loss"]
    assert class_names.read(tmp_path / "out", 4) == ({"colours": NAMES}, frozenset({"colours"}))
    if "probe" in flags:
        assert metrics["val_mAP"] > 95


def test_a_question_with_one_answer_stands_beside_one_with_several(lights, encoders,  # noqa: F811
                                                                   tmp_path):
    lights(both=True)
    assert run("--weights", encoders["masked"][0], "--eval-clips", "24", out=tmp_path / "out",
               steps=2) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert {"val_colours_mAP", "val_place", "val_place_mean_class"} <= set(metrics)
    assert "val_all_facts" not in metrics
    assert "mAP in percent" in metrics["protocol"]["accuracy"]


def test_two_encoders_fuse_on_several_labels(lights, tmp_path):
    lights(size=32)
    first, (second,) = two_encoders(classes=4)
    for name, model in (("a", first), ("b", second)):
        save(tmp_path / name, model)
        class_names.write(tmp_path / name, {"colours": NAMES}, {"colours"})
    assert train.main(["fuse", "--masked", str(tmp_path / "a"), "--multimodal", str(tmp_path / "b"),
                       *"--steps 2 --workers 0 --precision fp32 --device cpu".split(),
                       "--out", str(tmp_path / "out")]) == 0
    assert 0 <= json.loads((tmp_path / "out" / "metrics.json").read_text())["val_mAP"] <= 100


def test_views_of_several_labels_are_merged_as_probabilities_of_each_class():
    views = torch.tensor([[0.0, 2.0], [0.0, -2.0]])
    assert torch.allclose(recognition.merge_views(views, "sigmoid"), torch.tensor([0.5, 0.5]))
