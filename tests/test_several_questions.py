"""What is proved about files that ask several questions, as EPIC-Kitchens does: verb, noun, action.

Nothing assumes that a question is called "label": losses, accuracies, views, balance, names and
predictions take each question by itself.
"""

import csv
import json

import numpy as np
import pytest
import torch

import data
import mae
import weights
from tasks import class_names
from test_classify_card import TINY, encoders, run, save  # noqa: F401
from video.clip_set import ClipSet

CLASSES = {"verb": ("cut", "take", "wash"), "noun": ("cup", "knife"),
           "action": ("cut cup", "take cup", "wash knife", "take knife")}


class Kitchen(ClipSet):
    """Twelve clips in memory with three answers each."""

    source, train = "kitchen", True

    def __init__(self, classes=CLASSES):
        self.classes, self.views = dict(classes), None
        self.answers = {question: [i % len(CLASSES[question]) for i in range(12)]
                        for question in classes}

    def __len__(self):
        return 12

    def only(self, question, names):
        """Number the classes of a question in this order."""
        old = self.classes[question]
        self.answers[question] = [names.index(old[i]) for i in self.answers[question]]
        self.classes[question] = tuple(names)
        return self

    def with_views(self, clips, crops):
        """A copy whose items have several views."""
        other = Kitchen(self.classes)
        other.answers, other.views = self.answers, clips * crops
        return other

    def labels_of(self, question):
        return self.answers[question]

    def __getitem__(self, index):
        index = index[0] if isinstance(index, tuple) else index
        video = np.full((4, 16, 16, 3), 20 * index, np.uint8)
        if self.views:
            video = np.stack([video] * (1 + self.views))
        return {"video": video, "path": f"{index}.mp4", "bad": [],
                "labels": {question: found[index] for question, found in self.answers.items()}}


@pytest.fixture
def kitchen(monkeypatch):
    """Every run opens these clips, anew."""
    monkeypatch.setattr(data, "open_sets",
                        lambda *_, **__: (Kitchen(), {"val": Kitchen()}))


@pytest.mark.parametrize("balance", ["none", "loss", "sampler"])
def test_a_run_on_three_questions_measures_each_and_all_together(kitchen, encoders,  # noqa: F811
                                                                 balance, tmp_path):
    assert run("--weights", encoders["masked"][0], "--data", "x", "--eval-clips", "12",
               "--test-clips", "2", "--balance", balance, "--no-figures", out=tmp_path,
               steps=2) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    for question in CLASSES:
        assert {f"val_{question}", f"val_{question}_mean_class",
                f"val_{question} (2 x 1 views)"} <= set(metrics)
        assert len(metrics["val_classes"][question]) == len(CLASSES[question])
    assert "val_all_facts (2 x 1 views)" in metrics
    with open(tmp_path / "predictions.csv", newline="") as file:
        row = list(csv.DictReader(file))[5]
    assert (row["verb_true"], row["noun_true"], row["action_true"]) == ("wash", "knife", "take cup")


def test_rows_of_a_head_for_three_questions_are_found_by_question_and_name(kitchen, tmp_path):
    model = mae.VideoClassifier(TINY, classes=8, frames=4, image_size=16)
    torch.nn.init.normal_(model.head.bias)
    save(tmp_path / "run", model)
    turned = {"noun": ("knife", "cup"), "verb": ("wash", "cut"), "action": CLASSES["action"]}
    class_names.write(tmp_path / "run", turned)
    assert run("--weights", str(tmp_path / "run"), "--lr", "0", "--no-figures",
               out=tmp_path / "out", steps=1) == 0
    bias, old = weights.read(tmp_path / "out")[0]["head.bias"], model.head.bias
    assert bias[[0, 2]].equal(old[[3, 2]]) and bias[[3, 4]].equal(old[[1, 0]])
    assert bias[5:].equal(old[4:]) and bias[1] not in old


def test_evaluation_numbers_every_question_as_the_head_does(kitchen, tmp_path):
    model = mae.VideoClassifier(TINY, classes=9, frames=4, image_size=16)
    torch.nn.init.normal_(model.head.bias)
    turned = {"noun": ("knife", "cup"), "verb": ("wash", "cut", "take"),
              "action": CLASSES["action"]}
    found = {}
    for name, classes in (("straight", CLASSES), ("turned", turned)):
        places = [(question, answer) for question in classes for answer in classes[question]]
        known = [(question, answer) for question in CLASSES for answer in CLASSES[question]]
        rows = [known.index(place) for place in places]
        save(tmp_path / name, model.with_head(9, rows=rows))
        class_names.write(tmp_path / name, classes)
        assert run("--weights", str(tmp_path / name), "--eval-clips", "12", "--no-figures",
                   out=tmp_path / f"{name} out", steps=0) == 0
        found[name] = json.loads((tmp_path / f"{name} out" / "metrics.json").read_text())
    for question in CLASSES:
        assert found["turned"][f"val_{question}"] == found["straight"][f"val_{question}"]
    assert found["turned"]["val_loss"] == pytest.approx(found["straight"]["val_loss"])
