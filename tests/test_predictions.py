"""What is proved about predictions:

a run leaves what it says of each held-out clip; one command says the same of videos, folders and
lists, for every kind of classifier; a file that cannot be read is named.
"""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tasks import class_names, predictions, recognition
from test_class_names import FLAGS, KNOWN, classifiers, clips, evaluate, official  # noqa: F401
from test_classify_card import encoders, run  # noqa: F401
from test_fuse_card import pair  # noqa: F401
from test_train import write_video
from video.rows import Part

ROOT = Path(__file__).resolve().parent.parent


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("kind", FLAGS)
def test_a_run_leaves_what_it_says_of_each_held_out_clip(classifiers, clips, kind,  # noqa: F811
                                                         tmp_path):
    assert evaluate(kind, classifiers, clips["clap/wave"], tmp_path) == 0
    rows = table(tmp_path / "predictions.csv")
    assert list(rows[0]) == ["path", "part", "true", "class1", "p1", "class2", "p2", "class3", "p3"]
    assert [row["true"] for row in rows] == ["clap", "clap", "wave", "wave"]
    assert all(Path(row["path"]).exists() and row["part"] == "" for row in rows)
    shares = torch.tensor([2.0, 1.0, 0.0]).softmax(dim=0)
    for row in rows:
        assert [row[f"class{i}"] for i in (1, 2, 3)] == ["wave", "jump", "clap"]
        assert [float(row[f"p{i}"]) for i in (1, 2, 3)] == pytest.approx(shares.tolist(), abs=1e-4)
    again = json.loads((tmp_path / "metrics.json").read_text())
    said = sum(row["true"] == row["class1"] for row in rows)
    assert again["val_top1"] == 100 * said / len(rows)


def test_each_question_has_a_block_of_columns(encoders, tmp_path):  # noqa: F811
    assert run("--weights", encoders["masked"][0], "--no-figures", out=tmp_path, steps=1) == 0
    rows = table(tmp_path / "predictions.csv")
    assert len(rows) == 10 and rows[3]["path"] == "generated clip 3"
    columns = [f"{question}_{word}" for question in ("motion", "shape", "colour")
               for word in ("true", *(f"{x}{i}" for i in range(1, 6) for x in ("class", "p")))]
    assert list(rows[0]) == ["path", "part", *columns]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    for question in ("motion", "shape", "colour"):
        right = [row[f"{question}_true"] == row[f"{question}_class1"] for row in rows]
        assert metrics[f"val_{question}"] == pytest.approx(100 * sum(right) / 10)


@pytest.mark.parametrize("kind", FLAGS)
def test_one_command_says_what_is_in_videos_folders_and_lists(
        classifiers, clips, kind, tmp_path, capsys):  # noqa: F811
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("a.mp4", "b.mp4"):
        write_video(bare / name, frames=6)
    (tmp_path / "list.txt").write_text("bare/b.mp4\nbare/a.mp4\n")
    sources = [str(bare / "a.mp4"), str(bare), str(tmp_path / "list.txt"), clips["clap/wave"]]
    assert predictions.main([*sources, "--weights", classifiers[kind], "--device", "cpu",
                             "--out", str(tmp_path / "out"), "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    files = [line.split("  ")[0] for line in lines[:9]]
    assert [Path(name).name for name in files[:5]] == ["a.mp4", "a.mp4", "b.mp4", "b.mp4", "a.mp4"]
    assert all(line.endswith("  wave 67%, jump 24%") for line in lines[:9])
    rows = table(tmp_path / "out" / "predictions.csv")
    assert [row["true"] for row in rows] == [""] * 5 + ["clap"] * 2 + ["wave"] * 2
    assert [row["path"] for row in rows] == files
    assert (tmp_path / "out" / "predictions.png").stat().st_size > 3000


def test_the_command_says_of_a_run_what_the_runs_own_evaluation_says(clips, tmp_path):  # noqa: F811
    data = clips["clap/jump/wave"]
    assert run("--data", data, "--val-data", data, "--sampling", "videomae-dense", "--num-frames",
               "4", "--no-figures", out=tmp_path / "run", steps=2) == 0
    assert predictions.main([data, "--weights", str(tmp_path / "run"), "--device", "cpu",
                             "--out", str(tmp_path / "out")]) == 0
    first, second = (table(tmp_path / name / "predictions.csv") for name in ("run", "out"))
    assert [list(row.values())[:4] for row in first] == [list(row.values())[:4] for row in second]
    for a, b in zip(first, second):
        assert float(a["p1"]) == pytest.approx(float(b["p1"]), abs=2e-4)
    recipe = predictions.recipe_of(tmp_path / "run")
    assert recipe == {"sampling": "videomae-dense", "transform": "plain", "stride": 4,
                      "frame_rate": 25.0}


def test_an_official_classifier_says_numbers_where_it_tells_no_names(
        official, tmp_path, capsys):  # noqa: F811
    write_video(tmp_path / "a.mp4", frames=6)
    assert predictions.main([str(tmp_path / "a.mp4"), "--weights", official,
                             "--device", "cpu"]) == 0
    words = capsys.readouterr().out.split("  ")[1].split(", ")
    assert sorted(word.split()[0] for word in words) == list("01234")


def test_a_file_that_cannot_be_read_is_named_and_the_others_are_predicted(classifiers,  # noqa: F811
                                                                          tmp_path, capsys):
    write_video(tmp_path / "a.mp4", frames=6)
    (tmp_path / "b.mp4").write_text("no video")
    assert predictions.main([str(tmp_path), "--weights", classifiers["masked"],
                             "--device", "cpu"]) == 1
    shown = capsys.readouterr()
    assert "a.mp4  wave" in shown.out and shown.err.startswith("not readable: ")
    assert "b.mp4" in shown.err and shown.err.count("\n") == 1


@pytest.mark.parametrize("arguments, complaint", [
    (("{video}", "--weights", "nowhere"), "no such file of weights"),
    (("nowhere.mp4", "--weights", "{masked}"), "no such file"),
    (("{video}", "--weights", "{pretrained}"), "has no classifier"),
    (("{video}", "--weights", "{masked}", "--top", "0"), "--top 0"),
    (("{video}", "--weights", "{masked}", "--out", "{video}"), "exists"),
])
def test_a_mistake_is_one_line(classifiers, encoders, arguments, complaint, tmp_path,  # noqa: F811
                               capsys):
    write_video(tmp_path / "a.mp4", frames=6)
    places = dict(video=tmp_path / "a.mp4", masked=classifiers["masked"],
                  pretrained=encoders["masked"][0])
    assert predictions.main([*(word.format(**places) for word in arguments),
                             "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("recognition.py: ") and error.count("\n") == 1
    assert complaint.lower() in error.lower()


@pytest.mark.parametrize("how", [["tasks/recognition.py"], pytest.param(
    ["-m", "tasks.recognition"], marks=pytest.mark.slow)], ids=["file", "module"])
def test_the_command_starts_as_a_file_and_as_a_module(how):
    done = subprocess.run([sys.executable, *how, "x.mp4", "--weights", "nowhere"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "recognition.py: nowhere: no such file of weights\n"


def test_names_and_parts_are_those_of_the_batch():
    batch = {"path": ["a.mp4", "a.mp4"], "part": [(0, 2.5), None]}
    assert recognition.names_of(batch) == [("a.mp4", (0, 2.5)), ("a.mp4", None)]
    assert predictions.spelled(Part(0, 2.5)) == "0-2.5" and predictions.spelled(None) == ""


def test_names_travel_through_a_later_run_and_into_the_fused_model(classifiers, clips,  # noqa: F811
                                                                   tmp_path):
    data = clips["clap/jump/wave"]
    assert evaluate("masked", classifiers, data, tmp_path / "second", steps=1) == 0
    assert evaluate("masked", {"masked": str(tmp_path / "second")}, data, tmp_path / "third") == 0
    assert class_names.read(tmp_path / "third", 3) == ({"label": KNOWN}, frozenset())
