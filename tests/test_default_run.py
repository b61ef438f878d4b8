"""What is proved about the default run: it does each of its commands once, and ends in a table
and a page.

Stages run side by side: what needs another waits for it, one that fails ends all, no process is
left, and the weights are those of one stage after the other.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from engine import default_run, machine, side_by_side
from engine.errors import Interrupted, RunError, UserError
from tools import table
from tools.soak import differences
from video import moving_shapes

ROOT = Path(__file__).resolve().parent.parent

SMALL = (" --steps 2 --batch-size 4 --eval-clips 8 --workers 0 --precision fp32 --no-figures "
         "--device cpu")
SIZE = " --num-frames 2 --input-size 16"
OWN = r"--(steps|batch-size|num-frames|input-size|train-clips|probe-clips) \S+"


def small(command):
    """A command of the default run with few small clips and two steps."""
    probe = " --probe-clips 8" * ("--mode" in command)
    return re.sub(OWN, "", command) + SMALL + SIZE * (not command.startswith("fuse")) + probe


def test_the_default_run_does_each_stage_once_and_ends_in_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "DEFAULT_RUN", {small(line): 1 for line in train.DEFAULT_RUN})
    monkeypatch.setattr(machine, "processors", lambda: 2)
    own = table.write_table
    monkeypatch.setattr(table, "write_table", lambda out, seed, clips=20: own(out, seed, clips))
    out = tmp_path / "run"
    assert train.main(["--out", str(out), "--seed", "3"]) == 0
    text = capsys.readouterr().out
    assert "2 stages at a time" in text and "cross-model attention" in text
    assert re.search(r"^masked: step 2: val_loss ", text, re.M) and "clip: done" in text
    assert "2 steps of 4 clips" in (out / "clip" / "run.log").read_text()
    assert not (out / "clips").exists()
    found = json.loads((out / "table.json").read_text())
    assert len(found["rows"]) == 9 and found["seed"] == 3
    columns = ("motion", "shape", "colour", "all facts", "unseen motion", "unseen all facts")
    for row in found["rows"].values():
        assert all(0 <= row[name] <= 100 for name in columns) and row["seconds"] >= 0
    bridge, late = found["rows"]["cross-model attention"], found["rows"]["late fusion, equal"]
    assert bridge["trained"] > late["trained"] == 0
    assert (out / "table.png").stat().st_size > 0
    page = (out / "report.html").read_text()
    assert f"{bridge['all facts']:.1f} % right" in page  # in the box of the fused score
    assert page.count("<h2>") == 7 and 'class="s-fuse off"' not in page
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/model.safetensors")}
    assert len(before) == 8
    assert train.main(["--out", str(out), "--seed", "4"]) == 2
    assert "was made with seed 3" in capsys.readouterr().err
    (out / "fuse" / "metrics.json").unlink()
    assert train.main(["--out", str(out), "--seed", "3"]) == 0
    assert capsys.readouterr().out.count("done already") == 7
    assert all((path.stat().st_mtime_ns == moment) == (path.parent.name != "fuse")
               for path, moment in before.items())
    (out / "table.json").unlink()
    assert table.main([str(out)]) == 0 and (out / "table.json").exists()
    assert table.main([str(tmp_path)]) == 2
    found["rows"]["cross-model attention"]["all facts"] = 90.0
    found["rows"]["masked encoder"]["all facts"] = 80.0
    found["rows"]["multimodal encoder"]["all facts"] = 70.0
    other = tmp_path / "other"
    other.mkdir()
    (other / "table.json").write_text(json.dumps(found | {"seed": 4}))
    capsys.readouterr()
    assert table.main([str(other), str(other)]) == 0
    text = capsys.readouterr().out
    assert "seeds 4, 4" in text and "better encoder, all facts | +10.0 | +10.0, +10.0 |" in text
    assert "| late fusion, tuned | " in text  # without the weights, which differ between seeds


def test_the_default_run_takes_no_other_flags(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--seed", "0", "--steps", "3"])
    assert stop.value.code == 2 and train.main(["--seed", "-1"]) == 2


def test_the_default_run_is_what_a_reader_would_type():
    for command in train.DEFAULT_RUN:
        name, *flags = command.format(out="runs/default").split()
        assert train.parse(train.STAGES[name], flags).out.startswith("runs/default/")


# Side by side


def jobs_of(folder, **needs):
    """{name: name of what it needs or ""} -> jobs of ten seconds each."""
    jobs = []
    for name, other in needs.items():
        stage = train.PostPretraining(out=str(folder / name),
                                      weights=str(folder / other) if other else "")
        jobs.append(side_by_side.Job(stage, 10, jobs))
    return jobs


def note(stage, word):
    with open(Path(stage.out).parent / "notes", "a") as file:
        file.write(f"{Path(stage.out).name} {word}\n")


def notes(folder):
    return [tuple(line.split()) for line in (folder / "notes").read_text().splitlines()]


def endless(stage, again):
    """A stage that runs until it is asked to end."""
    note(stage, "begins")
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        note(stage, "saved")
        raise Interrupted(f"stopped; go on with: {again}") from None


def everyone_is_gone(jobs):
    return all(job.process is None or not job.process.is_alive() for job in jobs)


def test_a_stage_needs_those_whose_folders_its_flags_name():
    jobs = []
    for command, seconds in train.DEFAULT_RUN.items():
        name, *flags = command.format(out="runs/x").split()
        jobs.append(side_by_side.Job(train.parse(train.STAGES[name], flags), seconds, jobs))
    needs = {job.name: {other.name for other in job.needs} for job in jobs}
    assert needs == {"mae": set(), "clip": set(), "masked": {"mae"}, "multimodal": {"clip"},
                     "untrained": set(), "scratch": set(), "finetuned": {"mae"},
                     "fuse": {"masked", "multimodal"}}


def test_the_time_left_by_hand(tmp_path):
    """Two at a time: a (30) and b (10) begin; c (10), which needs b, ends at 20; d needs both."""
    jobs = jobs_of(tmp_path, a="", b="", c="b")
    jobs[0].left = 30
    assert side_by_side.seconds_left(jobs, 2) == 30
    assert side_by_side.seconds_left(jobs, 1) == 50
    jobs[0].left = 5
    assert side_by_side.seconds_left(jobs, 2) == 20


def test_stages_begin_in_order_as_soon_as_what_they_need_is_over(tmp_path):
    def quick(stage, again):
        note(stage, "begins")
        while stage.out.endswith("a") and ("e", "begins") not in notes(tmp_path):
            time.sleep(0.05)  # the other place runs b, d and e meanwhile, however slow this is
        note(stage, "ends")

    jobs = jobs_of(tmp_path, a="", b="", c="a", d="b", e="")
    side_by_side.run(quick, jobs, 2, "", None)
    order = notes(tmp_path)
    assert len(order) == 10
    running = 0
    for name, word in order:
        running += 1 if word == "begins" else -1
        assert running <= 2
    begins = [name for name, word in order if word == "begins"]
    assert set(begins[:2]) == {"a", "b"} and begins[2:4] == ["d", "e"]  # c waits for a
    assert order.index(("a", "ends")) < order.index(("c", "begins"))


@pytest.mark.parametrize("error", [UserError, RunError])
def test_one_error_ends_all_stages_and_is_the_one_that_is_raised(tmp_path, error):
    def one_fails(stage, again):
        if stage.out.endswith("b"):
            time.sleep(0.5)
            raise error("no such file")
        endless(stage, again)

    jobs = jobs_of(tmp_path, a="", b="", c="b")
    with pytest.raises(error, match="^b: no such file$"):
        side_by_side.run(one_fails, jobs, 2, "", None)
    assert notes(tmp_path) == [("a", "begins"), ("a", "saved")] and everyone_is_gone(jobs)


def test_a_stage_that_is_killed_or_breaks_is_reported_with_its_log(tmp_path):
    def killed(stage, again):
        os.kill(os.getpid(), signal.SIGKILL)

    def broken(stage, again):
        raise ZeroDivisionError("a mistake of the program")

    with pytest.raises(RunError, match="a: its process was killed by signal 9.*run.log"):
        side_by_side.run(killed, jobs_of(tmp_path, a="", b="a"), 2, "", None)
    with pytest.raises(RunError, match="a: ended with exit code 1; see the end of .*run.log"):
        side_by_side.run(broken, jobs_of(tmp_path, a="", b="a"), 2, "", None)
    assert "ZeroDivisionError: a mistake" in (tmp_path / "a" / "run.log").read_text()


def test_ctrl_c_lets_all_stages_save_and_says_the_line_that_goes_on(tmp_path):
    def interrupt():
        while not (tmp_path / "notes").exists() or len(notes(tmp_path)) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    jobs = jobs_of(tmp_path, a="", b="")
    threading.Thread(target=interrupt).start()
    with pytest.raises(Interrupted, match="stopped during a, b; go on with: python it"):
        side_by_side.run(endless, jobs, 2, "python it", None)
    assert sorted(notes(tmp_path)) == [("a", "begins"), ("a", "saved"), ("b", "begins"),
                                       ("b", "saved")]
    assert everyone_is_gone(jobs)


def test_stages_end_when_the_process_that_started_them_is_killed(tmp_path):
    jobs = jobs_of(tmp_path, a="", b="")
    parent = side_by_side.PROCESSES.Process(target=side_by_side.run,
                                            args=(endless, jobs, 2, "", None))
    parent.start()
    while not (tmp_path / "notes").exists() or len(notes(tmp_path)) < 2:
        time.sleep(0.05)
    parent.kill()
    parent.join()
    for _ in range(300):
        if len(notes(tmp_path)) == 4:
            break
        time.sleep(0.1)
    assert sorted(word for _, word in notes(tmp_path)) == ["begins"] * 2 + ["saved"] * 2


def short_commands():
    """Two stages that need nothing, and one that needs the first."""
    return {command + SMALL + SIZE: 1 for command in (
        "mae --out {out}/mae", "classify --out {out}/scratch",
        "classify --weights {out}/mae --out {out}/masked")}


def test_side_by_side_gives_the_weights_of_one_after_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "DEFAULT_RUN", short_commands())
    monkeypatch.setattr(table, "write_table", lambda *_: None)
    for count, folder in ((1, "turns"), (2, "side")):
        monkeypatch.setattr(machine, "processors", lambda count=count: count)
        assert train.main(["--out", str(tmp_path / folder)]) == 0
    assert capsys.readouterr().out.count("2 stages at a time") == 1
    different, count = differences(tmp_path / "turns", tmp_path / "side")
    assert count > 50 and not different
    assert (tmp_path / "side" / "mae" / "run.log").exists()
    assert not (tmp_path / "turns" / "mae" / "run.log").exists()


@pytest.mark.parametrize("code, words", [(2, "mae: nowhere: no such file of weights"),
                                         (1, "mae: step 0: loss nan")])
def test_an_error_in_a_stage_is_one_line_with_its_exit_code(tmp_path, monkeypatch, capsys, code,
                                                            words):
    first, *others = short_commands()
    first += " --weights nowhere" * (code == 2)
    monkeypatch.setattr(train, "DEFAULT_RUN", dict.fromkeys([first, *others], 1))
    monkeypatch.setattr(machine, "processors", lambda: 2)
    own = train.MaskedModelling.loss

    def not_finite(self, model, batch, rng):
        loss, metrics = own(self, model, batch, rng)
        return loss * float("nan"), metrics | {"loss": loss * float("nan")}

    monkeypatch.setattr(train.MaskedModelling, "loss", not_finite)
    assert train.main(["--out", str(tmp_path / "run")]) == code
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("train.py: ")]
    assert len(lines) == 1 and lines[0].startswith(f"train.py: {words}"), said
    assert "Traceback" not in said and not (tmp_path / "run" / "masked").exists()


def test_a_folder_that_cannot_be_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(machine, "processors", lambda: 2)
    for out in (tmp_path / "file" / "run", "a\0b"):
        assert train.main(["--out", str(out)]) == 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1 and said[0].startswith("train.py: --out "), said


def test_one_stage_at_a_time_on_a_gpu_and_under_torchrun(tmp_path, monkeypatch):
    jobs = jobs_of(tmp_path, a="", b="", c="")
    monkeypatch.setattr(machine, "processors", lambda: 2)
    monkeypatch.setattr(machine, "choose_device", lambda name: "cpu")
    assert default_run.stages_at_once(jobs) == 2
    assert default_run.stages_at_once(jobs[:1]) == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert default_run.stages_at_once(jobs) == 1
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr(machine, "choose_device", lambda name: "cuda")
    assert default_run.stages_at_once(jobs) == 1


def test_stages_read_each_others_clips_and_the_clips_go_at_the_end(tmp_path, monkeypatch):
    world = moving_shapes.MovingShapes("train", 4, 16)
    expected = world[3]["video"]
    with default_run.cached_clips(tmp_path / "run" / "clips") as clips:
        assert (world[3]["video"] == expected).all()
        rendered = []
        monkeypatch.setattr(moving_shapes, "render", lambda *_: rendered.append(1) or expected)
        assert (world[3]["video"] == expected).all() and not rendered  # read
        assert world[4]["video"] is not None and rendered
        assert Path(clips).is_dir()
    assert not Path(clips).exists() and moving_shapes._shelf is None
    monkeypatch.setattr(default_run, "ROOM", 2**62)
    with default_run.cached_clips(tmp_path / "run" / "clips") as clips:
        assert clips is None and moving_shapes._shelf is None


# Threads


def test_the_threads_of_a_run_follow_from_machine_and_settings(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machine, "processors", lambda: 3)
    try:
        assert machine.choose_threads(1e6, 32 * 8 * 40 * 40) == "a small network"
        assert torch.get_num_threads() == 1
        assert machine.choose_threads(86e6, 8 * 16 * 224 * 224) == "all processors"
        assert torch.get_num_threads() == 3
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        torch.set_num_threads(2)
        assert machine.choose_threads(1e6, 32 * 8 * 40 * 40) == "OMP_NUM_THREADS"
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("files, count", [
    ({}, 8), ({"cpu.max": "max 100000\n"}, 8), ({"cpu.max": "250000 100000\n"}, 2),
    ({"cpu.max": "50000 100000\n"}, 1), ({"cpu.max": "1600000 100000\n"}, 8),
    ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
    ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3)])
def test_processors_are_those_allowed_or_fewer_by_a_quota(tmp_path, monkeypatch, files, count):
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert machine.processors() == count


# As a reader starts it

SCRIPT = """
import sys
import train
from engine import machine
from tools import table
machine.processors = lambda: int(sys.argv[1])
train.DEFAULT_RUN = {{line + {flags!r} + {size!r} * (not line.startswith("fuse")): 1
                     for line in train.DEFAULT_RUN}}
own = table.write_table
table.write_table = lambda out, seed: own(out, seed, 20)
raise SystemExit(train.main(sys.argv[2:]))
"""


def steps_in(log):
    """The last step in a log.jsonl; 0 where there is none."""
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


@pytest.mark.slow
def test_the_whole_run_side_by_side_stopped_twice_equals_one_after_the_other(tmp_path):
    """Ctrl-C of a terminal reaches every process, SIGTERM the first alone. No process is left."""
    script = tmp_path / "small.py"
    script.write_text(SCRIPT.format(size=SIZE, flags=(
        " --steps 24 --save-every 5 --log-every 1 --eval-every 24 --batch-size 4 --eval-clips 8 "
        "--workers 1 --no-figures --device cpu")))

    def start(count, folder):
        return subprocess.Popen(
            [sys.executable, str(script), str(count), "--out", str(tmp_path / folder)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True)

    for name, send, number in (("mae", os.killpg, signal.SIGINT),
                               ("clip", os.kill, signal.SIGTERM)):
        log = tmp_path / "side" / name / "log.jsonl"
        before, process = steps_in(log), start(2, "side")
        while process.poll() is None and steps_in(log) < before + 2:
            time.sleep(0.02)
        send(process.pid, number)
        _, said = process.communicate()
        last = said.splitlines()[-1]
        assert process.returncode == 130 and last.startswith("train.py: stopped during "), said
        assert last.endswith(f"go on with: python train.py --out {tmp_path}/side")
        assert 2 <= steps_in(log) < 24
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
    for count, folder in ((2, "side"), (1, "turns")):
        process = start(count, folder)
        _, said = process.communicate()
        assert process.returncode == 0, said
    different, count = differences(tmp_path / "turns", tmp_path / "side")
    assert count > 600 and not different
    assert not (tmp_path / "side" / "clips").exists()
