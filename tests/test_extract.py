"""What tools/extract.py promises: features are those of the model on the windows that its head
describes, with the right times; what is done is not done again; a user's error is one line."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import clip_video
import mae
import uniformerv2
import weights
from video import decoding, transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import extract  # noqa: E402

av = pytest.importorskip("av")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for name, frames in (("sub/a.mp4", 21), ("b.mp4", 3), ("c.mp4", 8)):
        (folder / name).parent.mkdir(exist_ok=True)
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream("mpeg4", rate=10)
            stream.width, stream.height, stream.pix_fmt, stream.gop_size = 48, 32, "yuv420p", 6
            for number in range(frames):
                rng = np.random.default_rng(number)
                picture = rng.integers(256, size=(4, 6, 3), dtype=np.uint8)
                picture = picture.repeat(8, axis=0).repeat(8, axis=1)
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    (folder / "broken.mp4").write_text("no video")
    return folder


def models():
    """One tiny model of each family, of 4 frames of 32 pixels."""
    torch.manual_seed(0)
    size = uniformerv2.Size(32, 2, 2, 64, 16, 32)
    text = clip_video.TextSize(32, 2, 2)
    return {
        "masked": mae.VideoClassifier(mae.Size(32, 2, 2, 64, 16, 32, 1, 2, 64), classes=3,
                                      frames=4, image_size=32),
        "multimodal": uniformerv2.UniFormerV2(size, classes=3, frames=4, global_layers=(1,)),
        "ViCLIP": clip_video.VideoCLIP(size, kind="joint", frames=4, text_size=text,
                                       vocabulary=60, context=8)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, model in models().items():
        weights.save(folder / name, model.eval(), model.config)
    return folder


def run(videos, model, out, *more):
    return extract.main(["--data", str(videos), "--model", str(model), "--out", str(out),
                         "--device", "cpu", "--batch-size", "2", *more])


@pytest.mark.parametrize("name", ["masked", "multimodal", "ViCLIP"])
@pytest.mark.parametrize("pool", ["all", "space", "none"])
def test_features_are_those_of_the_model_on_each_window(videos, runs, tmp_path, name, pool,
                                                        monkeypatch):
    monkeypatch.setattr(extract, "CHUNK", 8)  # several chunks
    # 1: one video is broken
    assert run(videos, runs / name, tmp_path, "--stride", "3", "--pool", pool) == 1
    file = np.load(tmp_path / "sub" / "a.npz")
    model = extract.load(runs / name)
    frames = torch.from_numpy(decoding.read_clip(videos / "sub/a.mp4", range(21), (32, 32)))
    starts = range(0, 21 - 4 + 1, 3)
    times = 1 if pool == "all" else 2 if name == "masked" else 4
    feats = file["feats"]
    with torch.no_grad():
        windows = [extract.features(model, frames[None, start:start + 4], pool)
                   for start in starts]
    expected = torch.cat([window.reshape(times, *feats.shape[1:]) for window in windows])
    assert feats.shape[0] == len(starts) * times and feats.dtype == np.float32
    assert feats.shape[-1] == 32 and feats.ndim == (3 if pool == "none" else 2)
    assert np.allclose(feats, expected, atol=1e-5)
    span = 4 // times
    middles = [(start + span * i + (span - 1) / 2) / 10 for start in starts for i in range(times)]
    assert np.allclose(file["timestamps"], middles)
    assert file["fps"] == pytest.approx(10)
    assert (file["frames"], file["window"], file["stride"]) == (21, 4, 3)
    assert len(str(file["model"])) == 16
    assert np.load(tmp_path / "b.npz")["feats"].shape[0] == times


def test_pooling_all_of_an_encoder_is_what_its_head_sees(runs):
    video = torch.randint(256, (2, 4, 32, 32, 3), dtype=torch.uint8)
    model = extract.load(runs / "masked")
    ready = transforms.normalise(video, model.mean, model.std)
    with torch.no_grad():
        every, space, tokens = (extract.features(model, video, pool)
                                for pool in ("all", "space", "none"))
        assert torch.allclose(model.head(every), model(ready), atol=1e-5)
        assert torch.allclose(tokens.mean(dim=2), space, atol=1e-6)
        mean = tokens.flatten(1, 2).mean(dim=1)
        assert torch.allclose(model.fc_norm(mean), model.feature(ready), atol=1e-5)


def test_the_tokens_of_viclip_are_told_apart_by_time(runs):
    """With everything inside its blocks at zero nothing is mixed, and a change in the last frame
    moves the last time alone."""
    model = extract.load(runs / "ViCLIP")
    for block in model.visual.blocks:
        for parameter in block.parameters():
            torch.nn.init.zeros_(parameter)
    video = torch.randint(256, (1, 4, 32, 32, 3), dtype=torch.uint8)
    other = video.clone()
    other[:, 3] = 255 - other[:, 3]
    moved = extract.features(model, video, "space") - extract.features(model, other, "space")
    moved = moved.norm(dim=-1)[0]
    assert moved[3] > 0.1 and moved[:3].max() == 0


def test_what_is_done_is_not_done_again_and_another_setting_is_refused(videos, runs, tmp_path,
                                                                       capsys):
    assert run(videos, runs / "masked", tmp_path) == 1
    assert "no video" not in capsys.readouterr().err
    first = (tmp_path / "c.npz").read_bytes()
    (tmp_path / "c.npz").write_bytes(b"kept")
    (tmp_path / "b.npz").unlink()
    assert run(videos, runs / "masked", tmp_path) == 1
    assert "2 done already" in capsys.readouterr().out
    assert (tmp_path / "c.npz").read_bytes() == b"kept" != first and (tmp_path / "b.npz").exists()
    for other in (["--stride", "4"], ["--pool", "space"]):
        assert run(videos, runs / "masked", tmp_path, *other) == 2
    assert run(videos, runs / "multimodal", tmp_path) == 2
    assert "use another folder" in capsys.readouterr().err


def test_localisation_code_finds_an_array_of_window_features(videos, runs, tmp_path):
    assert run(videos, runs / "masked", tmp_path, "--format", "npy", "--stride", "4") == 1
    assert np.load(tmp_path / "sub" / "a.npy").shape == (5, 32)


def test_mistakes_are_one_line(videos, runs, tmp_path, capsys):
    for arguments in ([videos / "gone", runs / "masked"], [videos, runs / "gone"]):
        assert run(*arguments, tmp_path) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert run(videos, runs / "masked", tmp_path, "--stride", "0") == 2
