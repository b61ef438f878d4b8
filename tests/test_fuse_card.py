"""What is proved about the fuse card of train.py:

two runs of classify become one whole that starts as late fusion and loads alone; what is frozen is
the same file to file; official files of both encoders fuse on real videos; mistakes get one line.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

import data
import engine.run
import fusion
import train
import weights
from conftest import official_fill
from tasks import recognition
from tasks.localisation import window_feature
from tasks.probes import AttentiveProbe
from test_fusion import clip, encoders
from test_mae import block_shapes
from test_train import write_video
from test_uniformerv2 import official as uniformer
from video import moving_shapes
from weights.encoders import load_encoder

FLAGS = "--batch-size 6 --eval-clips 10 --workers 0 --precision fp32 --device cpu".split()


def run(*flags, out, steps=3):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.run.pictures, "curve", lambda *_: [])
        return train.main(["fuse", *FLAGS, "--out", str(out), "--steps", str(steps), *flags])


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The flags that name two encoders with heads for the 30 answers about moving shapes."""
    folder = tmp_path_factory.mktemp("encoders")
    masked, (multimodal,) = encoders(classes=30)
    for name, model in (("masked", masked), ("multimodal", multimodal)):
        weights.save(folder / name, model, model.config)
    return ["--masked", str(folder / "masked"), "--multimodal", str(folder / "multimodal")]


def test_a_run_starts_as_late_fusion_keeps_what_is_frozen_and_loads_alone(pair, tmp_path):
    assert run(*pair, "--lr", "1e-2", "--log-every", "1", out=tmp_path) == 0
    for name in ("confusion.png", "gates.png", "cross_attention.png", "questions.json",
                 "model.safetensors"):
        assert (tmp_path / name).stat().st_size > 0
    whole = fusion.InternVideo.from_run(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for part, source in (("masked.", pair[1]), ("multimodal.0.", pair[3])):
        kept = {key: value for key,
                value in weights.read(source)[0].items() if part + key in whole.frozen}
        assert len(kept) > 20
        assert all(torch.equal(tensors[part + key], value) for key, value in kept.items())
    assert any(p.abs() > 0 for name, p in whole.named_parameters() if "gate_" in name)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    world = moving_shapes.MovingShapes("val", 4, 16, 0)
    batch = next(data.held_out(world, 10, 10))
    alone = [load_encoder(source).eval() for source in pair[1::2]]
    with torch.no_grad():
        equal = sum(model(fusion.prepare_clip(batch["video"], model)) for model in alone) / 2
    parts = recognition.split_by_question(equal, world.classes)
    for name, value in recognition.accuracies(parts, batch["labels"]).items():
        assert metrics[f"initial_val_{name}"] == pytest.approx(value)
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    logged = [line for line in logged if "lr" in line]
    assert logged[0]["share_masked"] == 0.5 and logged[0]["gate_bridges.0.0.attn"] == 0
    assert logged[-1]["gate_bridges.0.0.attn"] != 0


def test_an_attentive_probe_is_a_masked_encoder_whose_query_trains(pair, tmp_path, capsys):
    torch.manual_seed(0)
    probes = {name: AttentiveProbe(load_encoder(source).with_head(0), 30, 2).eval()
              for name, source in (("masked", pair[1]), ("multimodal", pair[3]))}
    for name, probe in probes.items():
        weights.save(tmp_path / name, probe, probe.config)
        feature = window_feature(probe, fusion.prepare_clip(clip(), probe))
        assert feature.shape == (2, probe.width)
    flags = "--masked", str(tmp_path / "masked"), *pair[2:]
    assert run(*flags, out=tmp_path / "late", steps=0) == 0
    whole = fusion.InternVideo.from_run(tmp_path / "late")
    with torch.no_grad():
        late = [model(fusion.prepare_clip(clip(), model))
                for model in (probes["masked"], load_encoder(pair[3]).eval())]
        assert torch.allclose(whole(clip()), sum(late) / 2, atol=1e-5)
    assert run(*flags, "--lr", "1e-2", out=tmp_path / "fused") == 0
    assert not (tmp_path / "fused" / "gates.png").exists()  # three steps log no curve
    fused = fusion.InternVideo.from_run(tmp_path / "fused").masked
    assert not torch.equal(fused.query, probes["masked"].query)
    assert all(torch.equal(a, b) for a, b in zip(fused.encoder.state_dict().values(),
                                                 probes["masked"].encoder.state_dict().values()))
    assert fused.with_head(7, rows=[3] * 7).head.weight.shape == (7, fused.width)
    capsys.readouterr()
    assert run(*pair[:2], "--multimodal", str(tmp_path / "multimodal"), out=tmp_path / "x") == 2
    assert "is an attentive probe, whose query takes the place of the global token" in \
        capsys.readouterr().err



@pytest.mark.slow
def test_official_files_of_both_encoders_fuse_on_real_videos(tmp_path):
    width = 384
    tensors = official_fill(
        {"patch_embed.proj.weight": (width, 3, 2, 16, 16), "patch_embed.proj.bias": (width,),
         "fc_norm.weight": (width,), "fc_norm.bias": (width,), "head.weight": (400, width),
         "head.bias": (400,)}
        | block_shapes("blocks.", width, 2, 4 * width))
    torch.save({"module": tensors}, tmp_path / "vit.pth")
    torch.save({"model_state": uniformer(D=64, reduced=42, classes=400)}, tmp_path / "k400.pyth")
    rows = []
    for i in range(4):
        write_video(tmp_path / f"{i}.mp4", frames=20)
        rows.append(f"{i}.mp4 {('wave', 'jump')[i % 2]}")
    (tmp_path / "list.txt").write_text("\n".join(rows))
    assert run("--masked", str(tmp_path / "vit.pth"), "--multimodal", str(tmp_path / "k400.pyth"),
               "--data",
               str(tmp_path / "list.txt"), "--val-data", str(tmp_path / "list.txt"), "--batch-size",
               "2",
               out=tmp_path / "run", steps=2) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["masked"]["classes"] == config["multimodal"][0]["classes"] == 2
    assert config["masked"]["frames"] == 16 and config["multimodal"][0]["frames"] == 8
    assert fusion.InternVideo.from_run(tmp_path / "run").before == [0, 1]


@pytest.mark.parametrize("flags, complaint", [
    (lambda a, b: ["--masked", a], "--multimodal: fuse needs both"),
    (lambda a, b: ["--masked", b, "--multimodal", b], "is a UniFormerV2; give it to --multimodal"),
    (lambda a, b: ["--masked", a, "--multimodal", a], "is a VideoMAE; give it to --masked"),
    (lambda a, b: ["--masked", a, "--multimodal", b, "--before", "7"], "blocks 0 to 2"),
    (lambda a, b: ["--masked", a, "--multimodal", b, "--before", "x"], "give numbers with commas"),
    (lambda a, b: ["--masked", a, "--multimodal", b, "--num-frames", "2"], "need 4 frames; give"),
    (lambda a, b: ["--weights", a], "not InternVideo"),
])
def test_mistakes_get_one_line(pair, tmp_path, capsys, flags, complaint):
    assert run(*flags(*pair[1::2]), out=tmp_path) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and complaint in err, err


def test_one_way_alone_and_everything_thawed(pair, tmp_path):
    for way, bridges, last in (("masked", 2, 0), ("multimodal", 0, 1)):
        assert run(*pair, "--way", way, out=tmp_path / way) == 0
        model = fusion.InternVideo.from_run(tmp_path / way)
        assert (len(model.bridges[0]) > 0, len(model.last)) == (bridges > 0, last)
    assert run(*pair, "--thaw", out=tmp_path / "thawed") == 0
    metrics = json.loads((tmp_path / "thawed" / "metrics.json").read_text())
    assert metrics["trained"] == metrics["parameters"]
    before, after = weights.read(pair[1])[0], load_file(
        tmp_path / "thawed" / "model.safetensors")
    assert not torch.equal(before["encoder.embed.weight"], after["masked.encoder.embed.weight"])
    assert run(*pair, "--way", "multimodal", "--before", "1", out=tmp_path / "x") == 2
