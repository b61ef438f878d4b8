"""What is proved about the stage localise, and open-set recognition in the stage classify:

a run on generated videos keeps its encoder, loads alone and names segments of a file; features from
files train with an annotation of ActivityNet's form; unknown classes are left out of training and
scored; mistakes get one line.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import engine.run
import train
from tasks import localisation, recognition
from test_classify_card import encoders  # noqa: F401, a fixture
from test_classify_card import run as run_classify
from test_train import write_video
from video import moving_shapes, segments
from video.decoding import Video
from weights.encoders import load_encoder

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import predict  # noqa: E402

FLAGS = ("--videos 6 --eval-clips 4 --batch-size 3 --width 16 --depth 2 --precision fp32 "
         "--device cpu").split()


def run(*flags, out, steps=5):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.run.pictures, "curve", lambda *_: [])
        return train.main(["localise", *FLAGS, "--out", str(out), "--steps", str(steps), *flags])


@pytest.mark.parametrize("kind", ["masked", "multimodal"])
def test_a_run_keeps_its_encoder_loads_alone_and_names_segments_of_a_file(encoders, kind, tmp_path,
                                                                          capsys):
    path, _ = encoders[kind]
    assert run("--weights", path, out=tmp_path / "run") == 0
    assert "protocol: videos: 4 held-out long videos of moving shapes" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    for name in ("val_mAP@0.3", "val_mAP@0.7", "val_mAP", "mean_segments_mAP@0.5",
                 "mean_segments_mAP"):
        assert 0 <= metrics[name] <= 100
    assert metrics["mean_segments_mAP"] > 0
    assert (tmp_path / "run" / "segments.png").stat().st_size > 0
    model = localisation.Localiser.from_run(tmp_path / "run")
    before = load_encoder(path).state_dict()
    assert all(torch.equal(value, before[key])
               for key, value in model.encoder.state_dict().items() if "head" not in key)
    assert run("--weights", str(tmp_path / "run"), out=tmp_path / "again", steps=0) == 0
    again = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert again["val_mAP@0.3"] == metrics["val_mAP@0.3"]
    assert again["val_loss"] == pytest.approx(metrics["val_loss"])
    write_video(tmp_path / "a.mp4", frames=40)
    capsys.readouterr()
    assert predict.main([str(tmp_path / "a.mp4"), "--weights", str(tmp_path / "run"),
                         "--min-score", "0", "--out", str(tmp_path / "a.png")]) == 0
    out = capsys.readouterr().out
    assert "40 frames, one step per 4 frames" in out and (tmp_path / "a.png").stat().st_size > 0
    assert any(f"%  {name}" in out for name in model.names)


def test_a_dry_run_computes_the_features_of_one_video_and_writes_nothing(encoders, tmp_path,
                                                                         capsys):
    assert run("--weights", encoders["masked"][0], "--dry-run", out=tmp_path / "run") == 0
    assert "FLOPs per clip" in capsys.readouterr().out and not (tmp_path / "run").exists()


def test_the_segments_of_a_video_do_not_depend_on_how_it_streams_by(encoders, tmp_path):
    assert run("--weights", encoders["masked"][0], out=tmp_path / "run") == 0
    model = localisation.Localiser.from_run(tmp_path / "run")
    write_video(tmp_path / "a.mp4", frames=60)
    with Video(tmp_path / "a.mp4") as video:
        one, many = model.find(video, 1), model.find(video, 64)
    assert len(one) and np.allclose(one, many, atol=1e-4)


@pytest.fixture(scope="module")
def extracted(tmp_path_factory, encoders):
    """A folder with features/*.npz and annotation.json, in the form of ActivityNet."""
    import extract
    folder, database = tmp_path_factory.mktemp("extracted"), {}
    (folder / "videos").mkdir()
    for i in range(5):
        # ActivityNet's files have a prefix that its annotation lacks
        name = f"v_{i}" if i % 2 else str(i)
        write_video(folder / "videos" / f"{name}.mp4", frames=30 + 5 * i)
        database[str(i)] = {"subset": "training" if i < 3 else "validation", "duration": 1.0,
                            "annotations": [
            {"segment": [0.2, 0.8], "label": ("wave", "jump")[i % 2]}]}
    (folder / "annotation.json").write_text(json.dumps({"version": "1", "database": database}))
    assert extract.main(["--data", str(folder / "videos"), "--model", encoders["masked"][0],
                         "--stride", "2", "--out",
                         str(folder / "features"), "--device", "cpu"]) == 0
    return folder


def test_features_from_files_train_with_their_annotation(extracted, encoders, tmp_path, capsys):
    files = ("--data", str(extracted / "features"), "--annotations",
             str(extracted / "annotation.json"),
             "--length", "8")
    assert run(*files, out=tmp_path / "run") == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["val_clips"] == 2 and metrics["settings"]["stride"] == 2
    model = localisation.Localiser.from_run(tmp_path / "run")
    assert model.encoder is None and model.names == ["jump", "wave"] and model.stride == 2
    video = str(extracted / "videos" / "0.mp4")
    assert predict.main([video, "--weights", str(tmp_path / "run")]) == 2
    assert "has no encoder" in capsys.readouterr().err
    assert run(*files, "--weights", encoders["masked"][0], out=tmp_path / "both") == 0
    assert predict.main([video, "--weights", str(tmp_path / "both"), "--out",
                              str(tmp_path / "a.png")]) == 0


def test_mistakes_about_files_get_one_line(extracted, encoders, tmp_path, capsys):
    features, annotation = str(extracted / "features"), str(extracted / "annotation.json")
    (tmp_path / "odd.json").write_text('{"database": {"a": {"annotations": []}}}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "0.npz").write_bytes(b"no")
    alone = str(tmp_path / "alone")
    os.mkdir(alone)
    (tmp_path / "empty").mkdir()
    for i in range(5):
        np.save(f"{alone}/{i}.npy", np.ones((25, 6), np.float32))
    for flags, complaint in (
            ((), "needs an encoder"), (("--data", features), "--annotations"),
            (("--data", features, "--annotations", "nowhere.json"), "no such file"),
            (("--data", features, "--annotations", str(tmp_path / "odd.json")),
             "ActivityNet's form"),
            (("--data", features, "--annotations", annotation, "--train-subset", "Test"),
             "it has training, validation"),
            (("--data", str(tmp_path / "empty"), "--annotations", annotation, "--train-subset",
              "VALIDATION"),
             "features of none of the 2 videos"),
            (("--data", str(tmp_path / "broken"), "--annotations", annotation),
             "not a file of tools/extract.py"),
            (("--data", features, "--annotations", annotation, "--weights",
              encoders["multimodal"][0]),
             "is not the model"),
            (("--data", features, "--annotations", annotation, "--stride", "4"),
             "was extracted with a stride of 2"),
            (("--data", features, "--annotations", annotation, "--rate", "30"), "has the times"),
            (("--data", alone, "--annotations", annotation, "--stride", "2", "--rate", "50",
              "--weights", encoders["masked"][0]), "does not say which model")):
        assert run(*flags, out=tmp_path / "run") == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and complaint in err, err


def test_segments_of_no_length_are_left_out_and_counted(tmp_path):
    (tmp_path / "a.json").write_text(
        json.dumps({"database": {"a": {"subset": "Test", "annotations": [
        {"segment": [3, 3], "label": "x"}, {"segment": [1, 2], "label": "x"}]}}}))
    found = segments.read_segments(tmp_path / "a.json")
    assert found.videos == {"a": segments.Timed("Test", [(1.0, 2.0, "x")])}
    assert "1 segments do not end after their start" in found.summary()


# ------------------------------------------------------------------------------------------------
# Open-set recognition


def test_auroc_by_hand_ties_count_half():
    known, unknown = torch.tensor([0.9, 0.5, 0.5]), torch.tensor([0.5, 0.2])
    assert recognition.auroc(known, unknown) == pytest.approx((1 + 1 + 0.5 + 1 + 0.5 + 1) / 6)
    assert recognition.auroc(known + 1, unknown) == 1 and recognition.auroc(unknown, known + 1) == 0
    assert recognition.auroc(torch.ones(3), torch.ones(4)) == 0.5


@pytest.mark.parametrize("unknown, left", [("4", ("meet", "part", "brighten", "darken")),
                                           ("left,grow", ("left", "grow"))])
def test_unknown_motions_are_left_out_of_training_and_scored(tmp_path, unknown, left):
    seen, target = set(), train.PostPretraining.target

    def spy(self, batch):
        seen.update(facts["motion"] for facts in batch["facts"])
        return target(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.PostPretraining, "target", spy)
        assert run_classify("--unknown", unknown, out=tmp_path) == 0
    assert seen and not seen & set(left)
    known = json.loads((tmp_path / "questions.json").read_text())["motion"]
    assert known == [motion for motion in moving_shapes.MOTIONS if motion not in left]
    assert load_file(tmp_path / "model.safetensors")["head.weight"].shape[0] == 30 - len(left)
    assert 0 <= json.loads((tmp_path / "metrics.json").read_text())["val_unknown_auroc"] <= 100


def test_unknown_classes_of_files(tmp_path, capsys):
    for name in ("jump", "run", "wave"):
        (tmp_path / "videos" / name).mkdir(parents=True)
        for i in range(3):
            write_video(tmp_path / "videos" / name / f"{i}.mp4", frames=6)
    files = ("--data", str(tmp_path / "videos"), "--val-data", str(tmp_path / "videos"))
    assert run_classify(*files, "--unknown", "run", out=tmp_path / "run") == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["val_clips"] == 6 and 0 <= metrics["val_unknown_auroc"] <= 100
    assert json.loads((tmp_path / "run" / "questions.json").read_text()) == {"label": ["jump",
                                                                                       "wave"]}
    capsys.readouterr()
    for flags in (("--unknown", "2"), ("--unknown", "fly"),
                  ("--unknown", "run", "--test-clips", "2")):
        assert run_classify(*files, *flags, out=tmp_path / "no") == 2
    assert capsys.readouterr().err.count("\n") == 3
