"""What is proved about train.py:

the schedule at its landmarks; what is decayed; the loop names no stage; a killed run resumes bit
for bit; evaluation repeats itself; nothing is overwritten; errors of a user are one line and exit
code 2; flags that contradict a checkpoint or the weights are refused; a faulty stage is refused at
the start; real files train too, and broken ones are named, skipped and counted.
"""

import dataclasses
import inspect
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import clip_video
import data
import mae
import train
import uniformerv2
from caption_decoder import CaptionDecoder
from engine import dry_run, optimisers
from engine import run as running
from engine import stage as stages
from engine.checkpoints import without_caption_decoder
from engine.command_line import exit_code, numbers, parse
from engine.errors import UserError
from engine.stage import STAGES, Stage, flag
from video import moving_shapes

ROOT = Path(train.__file__).parent
SMALL = ("--num-frames 4 --input-size 32 --mask-ratio 0.5 --batch-size 4 --eval-clips 8 "
         "--workers 0 --precision fp32 --device cpu").split()


def run(*flags, out, steps=4):
    return train.main(["mae", *SMALL, "--out", str(out), "--steps", str(steps), *flags])


def built(stage):
    """The stage's model on its own data sets."""
    train_set, _ = stage.datasets()
    return stage.build(train_set)


def lines(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_the_schedule_at_its_landmarks():
    stage = train.MaskedModelling(steps=100, warmup=0.1, lr=2.0, min_lr=0.01)
    rates = [optimisers.learning_rate(stage, step) for step in range(101)]
    assert rates[0] == 0 and rates[5] == 1.0 and rates[10] == 2.0
    assert math.isclose(rates[55], 2 * (0.01 + 0.99 * 0.5)) and math.isclose(rates[100], 0.02)
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)


def test_the_base_rate_is_scaled_by_all_clips_of_a_step():
    stage = train.MaskedModelling(steps=10, warmup=0.0, blr=1e-3, batch_size=64, accum=8)
    assert math.isclose(optimisers.learning_rate(stage, 0), 1e-3 * 64 * 8 / 256)


WORDS = {"text.positions", "text.embed.weight"}
UNDECAYED = {  # of each network, besides all that has one axis
    "mae": {"mask_token"},
    "masked": set(),
    "multimodal": {"positions", "global_token"},
    "clip": {"visual.positions", "visual.global_token"} | WORDS,
    "joint": {"visual.positions", "visual.times"} | WORDS,
    "decoder": set(),
}


@pytest.mark.parametrize("name", UNDECAYED)
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_norms_biases_tokens_and_tables_are_not_decayed_and_all_else_is(name, optimizer):
    visual = uniformerv2.Size(32, 2, 2, 64, 16, 32)
    clip = dict(text_size=clip_video.TextSize(32, 1, 2), frames=4, vocabulary=50, context=8)
    model = {
        "mae": lambda: mae.VideoMAE("tiny", frames=4, image_size=32),
        "masked": lambda: mae.VideoClassifier("tiny", classes=3, frames=4, image_size=32),
        "multimodal": lambda: uniformerv2.UniFormerV2(visual, classes=3, local_units=1),
        "clip": lambda: clip_video.VideoCLIP(visual, **clip),
        "joint": lambda: clip_video.VideoCLIP(visual, kind="joint", **clip),
        "decoder": lambda: CaptionDecoder(32, heads=2, depth=1, visual_width=32, vocabulary=50),
    }[name]()
    stage = train.MaskedModelling(optimizer=optimizer, weight_decay=0.05)
    groups = optimisers.build_optimizer(model, stage).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert set(decay.values()) == {0.05, 0.0} and len(decay) == len(list(model.parameters()))
    kept = {part: p for part, p in model.named_parameters() if decay[id(p)] == 0}
    assert {part for part, p in kept.items() if p.ndim > 1} == UNDECAYED[name]
    assert {part for part, p in model.named_parameters() if p.ndim < 2} <= set(kept)


def test_muon_moves_the_same_matrices_without_weight_decay():
    model = built(train.MaskedModelling(num_frames=4, input_size=32, mask_ratio=0.5))

    def moved(**options):
        muon = optimisers.build_optimizer(model, train.MaskedModelling(**options)).parts[0]
        assert isinstance(muon, optimisers.Muon)
        return {id(p) for group in muon.param_groups for p in group["params"]}
    assert moved(weight_decay=0.0) == moved(weight_decay=0.05)


def test_muon_moves_the_matrices_of_blocks_and_adamw_everything_with_the_papers_optimiser():
    card = train.MaskedModelling(num_frames=4, input_size=32, mask_ratio=0.5)
    model = built(card)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    muon, adamw = optimisers.build_optimizer(model, card).parts
    moved = {names[id(p)] for p in muon.param_groups[0]["params"]}
    assert {"encoder.blocks.0.attn.qkv.weight", "decoder.blocks.1.mlp.fc2.weight"} <= moved
    assert all(".blocks." in name and name.endswith(".weight") for name in moved)
    assert not any("norm" in name for name in moved)
    alone = optimisers.build_optimizer(model, train.MaskedModelling(optimizer="adamw"))
    assert [type(part).__name__ for part in alone.parts] == ["AdamW"]


def test_stacked_muon_is_the_librarys_muon():
    torch.manual_seed(0)
    shapes = (8, 12), (12, 8), (8, 8), (8, 12), (8, 8), (3, 5)
    ours, theirs = ([torch.nn.Parameter(torch.zeros(shape)) for shape in shapes] for _ in range(2))
    pair = [make([{"params": found[:4], "weight_decay": 0.1}, {"params": found[4:], "lr": 0.5}],
                 lr=0.1, adjust_lr_fn="match_rms_adamw")
            for make, found in ((optimisers.Muon, ours), (torch.optim.Muon, theirs))]
    for _ in range(3):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        for optimiser in pair:
            optimiser.step()
    for a, b in zip(ours, theirs):
        a, b = a.detach(), b.detach()
        assert a.norm() > 0.1 and torch.allclose(a, b, atol=0.01 * float(b.abs().max()))


def test_the_loop_names_no_stage():
    source = "".join(map(inspect.getsource, (train.train, running, dry_run, stages)))
    for name, card in STAGES.items():
        assert f'"{name}"' not in source and card.__name__ not in source


def test_randomness_is_a_function_of_seed_and_step():
    draw = lambda *key: torch.rand(3, generator=stages.generator(*key)).tolist()  # noqa: E731
    assert draw(0, "loss", 5) == draw(0, "loss", 5)
    assert len({tuple(draw(*key)) for key in ((0, "loss", 5), (0, "loss", 6), (1, "loss", 5),
                                              (0, "picture", 5), (0, "loss", 5, 1))}) == 5


def test_a_run_leaves_all_its_files_and_they_are_plain(tmp_path):
    assert run(out=tmp_path) == 0
    for name in ("log.jsonl", "metrics.json", "model.safetensors", "config.json", "last.pt",
                 "loss.png", "reconstruction_0.png", "reconstruction_0.gif"):
        assert (tmp_path / name).stat().st_size > 0
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    assert saved["step"] == 4 and saved["settings"]["mask_ratio"] == 0.5
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["val_clips"] == 8 and 0.9 < metrics["val_trivial_loss"] <= 1
    assert not list(tmp_path.glob("*.part"))


def test_a_small_run_learns(tmp_path):
    assert run("--blr", "0.1", "--batch-size", "16", out=tmp_path, steps=60) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["val_loss"] < metrics["initial_val_loss"] - 0.1
    assert lines(tmp_path)[-1]["val_loss"] == pytest.approx(metrics["val_loss"], abs=1e-6)


def test_killed_without_warning_and_resumed_ends_with_the_same_weights(tmp_path):
    """SIGKILL at a random moment, for real, in another process."""
    flags = ["mae", *SMALL, "--steps", "12", "--save-every", "1", "--no-figures"]
    command = [sys.executable, "train.py", *flags, "--out"]
    quiet = dict(cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                 env=os.environ | {"OMP_NUM_THREADS": "1"})
    victim = subprocess.Popen(command + [str(tmp_path / "cut")], **quiet)
    while not (tmp_path / "cut" / "last.pt").exists():
        assert victim.poll() is None
        time.sleep(0.01)
    time.sleep(random.random() * 0.5)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    for name, more in (("cut", ["--resume"]), ("whole", [])):
        subprocess.run(command + [str(tmp_path / name), *more], check=True, **quiet)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_zero_steps_evaluate_the_weights_given_and_twice_alike(tmp_path):
    assert run(out=tmp_path / "a") == 0
    trained = json.loads((tmp_path / "a" / "metrics.json").read_text())["val_loss"]
    for name in ("b", "c"):
        assert run("--weights", str(tmp_path / "a"), out=tmp_path / name, steps=0) == 0
        assert json.loads((tmp_path / name / "metrics.json").read_text())["val_loss"] == trained


def test_a_dry_run_counts_and_writes_nothing(tmp_path, capsys):
    assert run("--dry-run", out=tmp_path / "x") == 0
    text = capsys.readouterr().out
    assert "FLOPs per clip" in text and "expected memory" in text and not (tmp_path / "x").exists()


def test_the_dry_runs_flops_are_the_ones_counted_by_hand(tmp_path):
    """Products of the tiny encoder and decoder on 2 x 4 x 4 tokens, 16 of them visible."""
    stage = parse(train.MaskedModelling, [*SMALL, "--dry-run"])
    train_set, _ = stage.datasets()
    flops = dry_run.dry_run(stage, stage.build(train_set), train_set)["forward_flops"]
    D, d, P, Nv, Nm, N = 96, 96, 384, 16, 16, 32

    def block(n, q, k):
        return 2 * (n * k * 2 * k + q * k * 2 * k + 2 * q * n * k + q * 8 * k * k)

    encoder = 2 * Nv * P * D + 3 * block(Nv, Nv, D)
    decoder = 2 * Nv * D * d + 3 * block(N, N, d) + block(N, Nm, d) + 2 * Nm * d * P
    expected = encoder + decoder
    assert flops == expected


def test_recomputing_changes_no_number(tmp_path):
    for name, flags in (("a", ()), ("b", ("--recompute",))):
        assert run(*flags, out=tmp_path / name) == 0
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_the_average_of_the_weights_follows_its_formula():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 1.0)
    average = optimisers.WeightAverage(model, 0.9)
    torch.nn.init.constant_(model.weight, 2.0)
    average.update(model)
    with average.in_place(model):
        assert model.weight.item() == pytest.approx(1.1)
    assert model.weight.item() == 2.0


@pytest.mark.parametrize("flags", [("--precision", "bf16"), ("--no-normalise",),
                                   ("--mask-type", "random"), ("--mask-type", "frame"),
                                   ("--decoder_depth=1",), ("--clip-grad", "0"),
                                   ("--optimizer", "adamw", "--positions", "sinusoid")])
def test_every_option_of_the_recipe_runs(tmp_path, flags):
    assert run(*flags, out=tmp_path, steps=2) == 0


def test_an_earlier_run_is_moved_aside_never_overwritten(tmp_path, capsys):
    assert run(out=tmp_path) == 0
    before = (tmp_path / "model.safetensors").read_bytes()
    assert run("--seed", "1", out=tmp_path) == 0
    assert "previous-1" in capsys.readouterr().out
    assert (tmp_path / "previous-1" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("argv, words", [
    (["mea"], "no stage 'mea': choose mae"),
    (["mae", "--mask-ratios", "0.5"], "unrecognized arguments: --mask-ratios"),
    (["mae", "--steps", "many"], "--steps"),
    (["mae", "--steps", "-1"], "--steps -1: must be at least 0"),
    (["mae", "--lr", "nan"], "--lr nan"),
    (["mae", "--mask-ratio", "1.5"], "--mask-ratio 1.5"),
    (["mae", *SMALL, "--mask-ratio", "0.01"], "--mask-ratio 0.01: must hide at least one"),
    (["mae", *SMALL, "--mask-ratio", "1"], "leave at least one"),
    (["mae", "--input-size", "60"], "does not divide"),
    (["mae", "--num-frames", "3"], "does not divide"),
    (["mae", "--model", "enormous"], "enormous"),
    (["mae", "--device", "tpu"], "--device tpu"),
    (["mae", "--device", "cuda:99"], "--device cuda:99"),
    (["mae", "--weights", "nowhere.pth"], "nowhere.pth: no such file"),
    (["mae", *SMALL, "--data", "nowhere"], "nowhere"),
])
def test_a_mistake_is_one_line_and_exit_code_2(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = train.main(argv)
    except SystemExit as exit:
        code = exit.code
    error = capsys.readouterr().err
    assert code == 2 and words in error and error.count("\n") == 1, error


def test_resuming_with_another_recipe_is_refused(tmp_path, capsys):
    assert run(out=tmp_path) == 0
    assert run("--resume", "--mask-ratio", "0.75", out=tmp_path) == 2
    assert "was made with --mask-ratio 0.5" in capsys.readouterr().err


def test_a_torn_checkpoint_is_named(tmp_path, capsys):
    assert run(out=tmp_path) == 0
    whole = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(whole[:len(whole) // 2])
    assert run("--resume", out=tmp_path) == 2
    assert "not a readable checkpoint" in capsys.readouterr().err


def test_the_decoders_width_and_depth_are_flags():
    size = built(train.MaskedModelling(num_frames=4, input_size=32, mask_ratio=0.5,
                                       decoder_width=48, decoder_depth=1)).config["size"]
    assert size["decoder_width"] == 48 and size["decoder_depth"] == 1
    with pytest.raises(UserError, match="multiple of the 4 heads"):
        built(train.MaskedModelling(decoder_width=50))


def test_lists_of_numbers_have_commas_and_nothing_else():
    assert numbers("2,5,8", "before") == [2, 5, 8] and numbers("", "before") is None
    for text in ("0,half", "1,,2", "0.5", "-1"):
        with pytest.raises(UserError, match=f"--before {text}: give numbers with commas"):
            numbers(text, "before")


def test_dashes_and_underscores_are_the_same():
    for text in ("--mask-ratio", "--mask_ratio"):
        assert parse(train.MaskedModelling, [text, "0.7"]).mask_ratio == 0.7
        assert parse(train.MaskedModelling, [text + "=0.7"]).mask_ratio == 0.7
    assert parse(train.MaskedModelling, ["--data", "my_videos"]).data == "my_videos"


@pytest.mark.parametrize("name", STAGES)
def test_every_flag_explains_itself(name, capsys):
    for field in dataclasses.fields(STAGES[name]):
        assert len(stages.details(field)["help"]) > 10, field.name
    with pytest.raises(SystemExit):
        train.main([name, "--help"])
    text = capsys.readouterr().out
    places = [text.index(f"\n{group}:\n") for group in ("recipe", "clips", "run", "machine")]
    assert "; paper: " in " ".join(text.split()) and places == sorted(places)


def write_video(path, frames=20):
    import av
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 48
        stream.pix_fmt = "yuv420p"
        for i in range(frames):
            picture = np.full((48, 48, 3), i * 10 % 256, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def test_real_files_train_and_broken_ones_are_named_skipped_and_counted(tmp_path, capsys):
    folder = tmp_path / "videos"
    folder.mkdir()
    for i in range(5):
        write_video(folder / f"good_{i}.mp4")
    (folder / "broken.mp4").write_bytes(b"this is no video")
    assert run("--data", str(folder), "--workers", "1", out=tmp_path / "run", steps=8) == 0
    out, metrics = capsys.readouterr(), json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert [Path(path).name for path in metrics["bad_files"]] == ["broken.mp4"]
    assert "broken.mp4" in out.out + out.err


def test_two_thirds_of_nothing_is_an_error_not_a_hang(tmp_path, capsys):
    (tmp_path / "v").mkdir()
    for i in range(3):
        (tmp_path / "v" / f"{i}.mp4").write_bytes(b"nothing")
    assert run("--data", str(tmp_path / "v"), out=tmp_path / "run") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_held_out_clips_do_not_depend_on_the_training_length(tmp_path):
    stage = train.MaskedModelling()
    _, held_out = stage.datasets()
    first = next(iter(data.held_out(held_out["val"], 4, 4)))["video"]
    assert torch.equal(first, next(iter(data.held_out(held_out["val"], 8, 4)))["video"])


def test_what_weights_have_decided_no_flag_can_ask_otherwise(tmp_path, capsys):
    assert run(out=tmp_path / "run", steps=1) == 0
    for flags in (("--decoder-depth", "1"), ("--positions", "sinusoid"), ("--model", "base")):
        assert run("--weights", str(tmp_path / "run"), *flags, out=tmp_path / "again", steps=1) == 2
        assert f"{flags[0]} {flags[1]}: {tmp_path / 'run'} keeps its own" in capsys.readouterr().err


def test_a_typed_flag_that_contradicts_the_weights_is_refused_also_where_it_is_the_default(
        tmp_path, capsys):
    first = tmp_path / "run"
    assert run("--positions", "sinusoid", out=first, steps=1) == 0
    weights = ("--weights", str(first))
    assert run(*weights, "--positions", "cosines", out=tmp_path / "again", steps=1) == 2
    assert f"--positions cosines: {first} keeps its own, sinusoid" in capsys.readouterr().err
    assert run(*weights, out=tmp_path / "again", steps=1) == 0  # not typed: what holds is written
    settings = json.loads((tmp_path / "again" / "metrics.json").read_text())["settings"]
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert settings["positions"] == config["positions"] == "sinusoid"
    assert run(*weights, "--positions", "sinusoid", out=tmp_path / "third", steps=1) == 0


def edited(folder, change):
    """Apply `change` to the settings in a run's last.pt."""
    saved = torch.load(folder / "last.pt", weights_only=True)
    change(saved["settings"])
    torch.save(saved, folder / "last.pt")


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_steps")
    assert run("--no-figures", out=folder, steps=2) == 0
    return folder


def test_a_flag_that_the_checkpoint_does_not_know_had_its_default(two_steps, tmp_path, capsys):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    edited(tmp_path, lambda settings: settings.pop("normalise"))
    assert run("--resume", "--no-normalise", out=tmp_path) == 2
    assert "was made with --normalise True: resume with the same" in capsys.readouterr().err
    assert run("--resume", "--no-figures", out=tmp_path) == 0
    assert lines(tmp_path)[-1]["step"] == 4


@pytest.mark.parametrize("flag, value, code", [
    ("spike", 0.0, 0), ("spike", 5.0, 2), ("decoder", "pyav", 0), ("decoder", "torchcodec", 2),
    ("keep", 7, 0), ("onednn", "off", 0), ("max_bad", 0.9, 0), ("space_time", "joint", 0),
    ("space_time", "divided", 2), ("dual_mask", True, 2), ("pack_frames", "2,4", 2)])
def test_a_checkpoint_of_older_code_goes_on_where_its_removed_flags_had_their_defaults(
        two_steps, tmp_path, capsys, flag, value, code):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    edited(tmp_path, lambda settings: settings.update({flag: value}))
    assert run("--resume", "--no-figures", out=tmp_path) == code
    error = capsys.readouterr().err
    named = f"--{flag.replace('_', '-')} {value}, which this version does not have"
    assert code == 0 or named in error


def test_flags_that_weights_fix_may_stand_as_they_were_typed_in_checkpoints_of_older_code(
        tmp_path, capsys):
    assert run("--no-figures", "--positions", "sinusoid", out=tmp_path / "first", steps=1) == 0
    flags = ("--no-figures", "--weights", str(tmp_path / "first"))
    assert run(*flags, out=tmp_path / "run", steps=2) == 0
    edited(tmp_path / "run", lambda settings: settings.update(positions="axes"))
    assert run(*flags, "--resume", out=tmp_path / "run") == 2
    assert "was made with --positions axes: resume with the same" in capsys.readouterr().err
    edited(tmp_path / "run", lambda settings: settings.update(onednn="off"))  # as older code did
    assert run(*flags, "--resume", out=tmp_path / "run") == 0


def test_an_older_run_of_retrieve_goes_on_without_the_caption_decoder_around_it():
    older = {"model": {"clip.visual.w": 1, "clip.scale": 2, "caption_decoder.w": 3}, "average": {},
             "optimiser": {"clip.visual.w.exp_avg": 4}}
    own = {"model": {"visual.w": 0, "scale": 0}}
    assert without_caption_decoder(older, own) == {
        "model": {"visual.w": 1, "scale": 2}, "average": {}, "optimiser": {"visual.w.exp_avg": 4}}
    assert without_caption_decoder(older, older) is older


def test_the_command_line_knows_what_was_typed_and_the_legal_world_of_a_flag():
    stage = parse(train.MaskedModelling,
                        ["--positions", "axes", "--steps=5", "--no-normalise"])
    assert stage.typed == {"positions", "steps", "normalise"} and not stage.normalise
    assert parse(train.MaskedModelling, []).typed == frozenset()

    @dataclasses.dataclass
    class Worldly(Stage):
        filed: int = flag(1, "of a file", only="files")
        drawn: int = flag(1, "of a generated clip", only="generated")

    assert parse(Worldly, ["--drawn", "2", "--filed", "1"]).drawn == 2
    assert parse(Worldly, ["--filed", "2", "--data", "x"]).filed == 2
    for flags, reason in ((["--filed", "2"], "--filed: is for video files"),
                          (["--drawn", "2", "--data", "x"], "--drawn: is for moving shapes")):
        with pytest.raises(UserError, match=reason):
            parse(Worldly, flags)


def test_a_flag_takes_what_it_leaves_out_from_the_flag_of_that_name_in_its_base():
    @dataclasses.dataclass
    class Base(Stage):
        steps: int = flag(7, paper="800 epochs")

    @dataclasses.dataclass
    class Heir(Base):
        steps: int = flag(9)

    info = stages.details(Heir.__dataclass_fields__["steps"])
    assert info["help"].startswith("optimiser steps") and info["low"] == 0
    assert info["paper"] == "800 epochs" and Heir().steps == 9
    with pytest.raises(UserError, match="--steps -1: must be at least 0"):
        parse(Heir, ["--steps", "-1"])


def test_a_faulty_stage_is_told_each_of_its_faults_before_anything_starts(tmp_path, capsys):
    @dataclasses.dataclass
    class Faulty(Stage):
        data_set: str = flag("", "no fault")
        evaluate: int = flag(3, "the name of a method")

        def build(self, train_set):
            return torch.nn.Linear(1, 1)

    code = exit_code(lambda: train.train(Faulty(out=str(tmp_path / "run"))))
    error = capsys.readouterr().err.splitlines()
    assert code == 2 and not (tmp_path / "run").exists()
    assert [line.split(":", 2)[2].split(";")[0].strip() for line in error] == [
        "has no method datasets()", "has no method loss()",
        "the field evaluate has the name of a method"]


def test_a_stage_without_its_decorator_is_told_so(tmp_path):
    class Bare(train.MaskedModelling):
        steps: int = flag(3)

    with pytest.raises(UserError, match="stage bare: .* write @dataclass above the class"):
        train.train(Bare(out=str(tmp_path / "run")))


def tiny_stage(config={"model": "Linear"}, metrics=("loss",)):  # noqa: B006
    """A stage that fits a line to the brightness of clips; its held-out sets have three names."""
    @dataclasses.dataclass
    class Brightness(Stage):
        test: int = flag(0, "clips of the set test")

        def datasets(self):
            sets = [moving_shapes.MovingShapes(split, 2, 16, self.seed)
                    for split in ("train", "val", "unseen", "test")]
            return sets[0], dict(zip(("val", "unseen", "test"), sets[1:]))

        def build(self, train_set):
            model = torch.nn.Linear(1, 1)
            model.config = config
            return model

        def loss(self, model, batch, rng):
            mean = batch["video"].float().mean(dim=(1, 2, 3, 4))[:, None] / 255
            loss = (model(mean) - 1).square().mean()
            return loss, {name: loss.detach() for name in metrics}

        def evaluate(self, model, batches, held_out_set):
            return super().evaluate(model, batches, held_out_set) | {"table": torch.ones(2)}

        def finish(self, model, held_out, results):
            return {"tables": float(sum(results[name]["table"].sum() for name in held_out))}

    return Brightness


def test_every_held_out_set_is_evaluated_by_its_name_and_test_once_after_the_last_step(tmp_path):
    stage = tiny_stage()(out=str(tmp_path), steps=4, eval_every=2, eval_clips=6, test=5, workers=0,
                         batch_size=2, device="cpu", figures=False)
    report = train.train(stage)
    counts = [sum(f"{name}_loss" in line for line in lines(tmp_path))
              for name in ("val", "unseen", "test")]
    assert counts == [3, 3, 1] and report["tables"] == 6
    assert [report[f"{name}_clips"] for name in ("val", "unseen", "test")] == [6, 6, 5]
    assert "initial_unseen_loss" in report and "val_table" not in report


@pytest.mark.parametrize("faults, reason", [
    (dict(config={"size": {1, 2}}), "cannot be written as JSON"),
    (dict(config=None), "is no dict"), (dict(metrics=("error",)), "no number named loss")])
def test_a_model_without_a_plain_config_and_a_loss_without_a_loss_are_refused(
        tmp_path, faults, reason):
    with pytest.raises(UserError, match=reason):
        train.train(tiny_stage(**faults)(out=str(tmp_path), steps=2, eval_clips=2, workers=0,
                                         batch_size=2, test=2, device="cpu", figures=False))
