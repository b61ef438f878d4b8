"""What is proved about --input-size HxW:

Every stage trains on, evaluates, resumes and draws rectangular clips, generated or from files. The
next stage, predict.py and a run for another size read what it leaves. No transform distorts them.
What is no size is refused in one line.
"""

import argparse
import json

import numpy as np
import pytest
import torch

import train
from engine.frame_size import frame_size, height_width, spelled
from test_train import write_video
from tools import predict
from video.transforms import TRANSFORMS, crop_frames
from weights import encoders

SMALL = ("--num-frames 2 --batch-size 3 --eval-clips 4 --eval-batch 4 --workers 0 --precision fp32 "
         "--device cpu --save-every 1").split()
MASKED = "mae --mask-ratio 0.5 --input-size 32x16"
LANGUAGE = "clip --image-batch 3 --input-size 16x24"


def run(line, out, *flags, steps=1):
    return train.main([*line.split(), *SMALL, *flags, "--steps", str(steps), "--out", str(out)])


def image_size(folder, *keys):
    config = json.loads((folder / "config.json").read_text())
    for key in keys:
        config = config[key]
    return config["image_size"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of stage 1, 2 and, of each of these, 3."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("rectangles")
    for name, line in {
            "mae": MASKED, "clip": LANGUAGE,
            "masked": f"classify --input-size 32x16 --weights {folder / 'mae'}",
            "multimodal": f"classify --input-size 16x24 --weights {folder / 'clip'}",
    }.items():
        assert run(line, folder / name, "--no-figures") == 0
    return folder


def test_a_size_is_a_number_or_two():
    assert [frame_size(x) for x in ("112", "112x160", "64x64", "0")] == [112, "112x160", 64, 0]
    assert [height_width(x) for x in (112, "112x160", [8, 16])] == [(112, 112), (112, 160), (8, 16)]
    assert [spelled(x) for x in (112, "112x160", [8, 8])] == [112, "112x160", 8]
    for text in ("112x", "x112", "0x112", "112x160x3", "112 x 160", "1.5", "abc", "", "9x99999"):
        with pytest.raises(argparse.ArgumentTypeError):
            frame_size(text)


@pytest.mark.parametrize("size, message", [
    ("30x16", "30 x 16 pixels does not divide"), ("abc", "'abc': give pixels, as 112, or height"),
    ("-1", "--input-size -1: must be at least 1"), ("0x16", "each from 1 to 10000")])
def test_a_size_that_cannot_be_is_refused_in_one_line(size, message, tmp_path, capsys):
    try:
        code = run("mae --mask-ratio 0.5", tmp_path / "run", f"--input-size={size}")
    except SystemExit as error:  # argparse's own errors
        code = error.code
    errors = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and len(errors) == 1 and message in errors[0]


def test_stages_one_to_three_keep_height_and_width(runs):
    assert image_size(runs / "mae") == image_size(runs / "masked") == [32, 16]
    assert image_size(runs / "clip", "clip") == image_size(runs / "multimodal") == [16, 24]


@pytest.mark.slow  # pictures take longer than all the rest
@pytest.mark.parametrize("line, picture", [(MASKED, "reconstruction_0.png"),
                                           (LANGUAGE, "attention.png"),
                                           ("fuse --masked {masked} --multimodal {multimodal}",
                                            "cross_attention.png")])
def test_rectangles_are_drawn(line, picture, runs, tmp_path):
    line = line.format(**{name: runs / name for name in ("masked", "multimodal")})
    assert run(line, tmp_path / "run") == 0
    assert (tmp_path / "run" / picture).stat().st_size > 0


def test_a_rectangular_run_goes_on_and_another_size_does_not(runs, tmp_path, capsys):
    assert run(MASKED, tmp_path / "run", "--no-figures") == 0
    assert run(MASKED, tmp_path / "run", "--no-figures", "--resume") == 0
    assert run(MASKED.replace("32x16", "16x32"), tmp_path / "run", "--resume") == 2
    assert "input" in capsys.readouterr().err


def test_weights_serve_another_rectangle(runs, tmp_path, capsys):
    """The masked encoder computes its codes for it, the multimodal one stretches its table."""
    for name, weights in (("masked", "mae"), ("multimodal", "clip")):
        assert run(f"classify --no-figures --input-size 24x32 --weights {runs / weights}",
                   tmp_path / name) == 0
        assert image_size(tmp_path / name) == [24, 32]
    assert "for 16 x 24 pixels, is interpolated" in capsys.readouterr().out
    model = encoders.load_encoder(tmp_path / "multimodal")
    assert model.grid == (3, 4) and model.positions.shape[0] == 1 + 12


def test_two_encoders_of_different_rectangles_are_fused_and_predict_together(runs, tmp_path):
    """A clip is as high and as wide as the larger of both; each encoder resizes it for itself."""
    out = tmp_path / "fuse"
    assert run(f"fuse --masked {runs / 'masked'} --multimodal {runs / 'multimodal'}", out,
               "--no-figures") == 0
    settings = json.loads((out / "metrics.json").read_text())["settings"]
    assert settings["input_size"] == "32x24"
    assert predict.main(["--weights", str(out), "--out", str(tmp_path / "x.png")]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("line", [
    "retrieve --weights {clip} --input-size 24x16", "answer --weights {clip}",
    "localise --weights {multimodal} --eval-clips 2 --videos 3",
    "classify --weights {clip} --input-size 16x24 --mode attentive --probe-clips 6",
    "classify --weights {mae} --input-size 32x16 --mode probe --probe-clips 6",
    "clip --kind joint --image-batch 3 --input-size 16x24"])
def test_every_other_stage_takes_rectangles_and_predicts(line, runs, tmp_path):
    small = SMALL if "localise" not in line else SMALL[8:]
    line = line.format(**{name: runs / name for name in ("clip", "mae", "multimodal")}).split()
    assert train.main([*line, *small, "--steps", "1", "--out", str(tmp_path / "run")]) == 0
    text = ["--text", "a ring", "a star"] if line[0] == "retrieve" else []
    assert predict.main(["--weights", str(tmp_path / "run"), *text, "--out",
                         str(tmp_path / "x.png")]) == 0


def test_files_train_and_are_predicted_in_rectangles(runs, tmp_path):
    for i in range(4):
        write_video(tmp_path / f"{i}.mp4", frames=4)
    assert run(MASKED, tmp_path / "run", "--no-figures", "--data", str(tmp_path),
               "--transform", "videomae-pretrain") == 0
    assert predict.main([str(tmp_path / "0.mp4"), "--weights", str(runs / "masked"), "--out",
                         str(tmp_path / "x.png")]) == 0


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("size", [(32, 48), (48, 32), (32, 96)])
@pytest.mark.parametrize("shape", [(60, 120), (120, 60)])
def test_a_rectangle_is_filled_and_only_squashing_transforms_change_the_aspect(name, size, shape):
    """Colours rise with the row and the column, by equal steps as long as nothing is distorted."""
    H, W = shape
    row, column = np.mgrid[:H, :W].astype(np.uint8)
    video = np.stack([row, column, row], axis=-1)[None].repeat(2, axis=0)
    if name == "plain":  # the decoder has resized it
        video = crop_frames("videomae", video, size)
    out = crop_frames(name, video, size).astype(float)
    assert out.shape == (2, *size, 3)
    h, w = size
    down = (out[0, h - 5, w // 2, 0] - out[0, 4, w // 2, 0]) / (h - 9)
    right = (out[0, h // 2, w - 5, 1] - out[0, h // 2, 4, 1]) / (w - 9)
    kept = abs(down / right - 1) < 0.1
    assert kept == (name not in ("internvideo", "viclip"))
    trained = crop_frames(name, video, size, np.random.default_rng(0))
    assert trained.shape == (2, *size, 3)
