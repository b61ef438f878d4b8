"""What is proved about accidents: each is made to happen, each ends in one line that says what
happened and how to go on, and none loses what was saved.

The lines are those of docs/failures.md, "When something goes wrong".
"""

import math
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
import weights
from engine import checkpoints, command_line, pictures, processes
from engine.errors import RunError
from engine.run import describe_error
from test_train import ROOT, SMALL, run, write_video
from video import decoding, loading


@pytest.fixture(autouse=True)
def no_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.MaskedModelling, "pictures", lambda *_: [])
        patch.setattr(pictures, "curve", lambda *_: [])
        yield


def one_line(capsys):
    """What train.py said on stderr, apart from its bar of progress."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: ")]
    assert len(lines) == 1
    return lines[0]


def in_docs(said):
    """True where docs/failures.md has this line, up to numbers, files and folders.

    There, ... stands for anything."""
    def plain(line):
        for what, form in ((r"[^\s(]+\.mp4(, \S+\.mp4)*", "FILES"), (r"\S+/last", "last"),
                           (r"--out [^\s:]+", "--out RUN"),
                           (r"damaged \(.*?\);", "damaged (SO);"),
                           (r"(?<![\w.])\d[\d.e+-]*", "NUMBER")):
            line = re.sub(what, form, line)
        return line

    page = (ROOT / "docs" / "failures.md").read_text()
    table = re.sub(r"\n +", " ", page.split("## When something goes wrong")[1].split("\n## ")[0])
    cells = re.findall(r"(?<!`)(`{1,2})(?!`)(.+?)(?<!`)\1(?!`)", table)
    lines = [plain(line).split("...") for _, line in cells]
    said = plain(said)
    return any(said.startswith(parts[0]) and said.endswith(parts[-1])
               and (len(parts) > 1 or said == parts[0]) for parts in lines)


def at_step(monkeypatch, step, happen):
    """Call happen(loss, values) in place of what the training loss gives at this step."""
    loss, calls = train.MaskedModelling.loss, []

    def broken(self, model, batch, rng):
        found = loss(self, model, batch, rng)
        calls.append(model.training)
        return happen(*found) if model.training and sum(calls) == step + 1 else found

    monkeypatch.setattr(train.MaskedModelling, "loss", broken)


def videos(folder, count=12, broken=0):
    folder.mkdir()
    for i in range(count):
        if i < broken:
            (folder / f"{i:02d}.mp4").write_bytes(b"no video at all" * 40)
        else:
            write_video(folder / f"{i:02d}.mp4", frames=8)
    return str(folder)


def tensors(folder):
    return load_file(folder / "model.safetensors")


@pytest.fixture
def small_disk(tmp_path):
    """(folder, function that remounts it with other options) of a file system in memory, where
    mounting is allowed."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", place],
                          capture_output=True)
    if made.returncode:
        pytest.skip("needs the right to mount")
    yield place, lambda options: subprocess.run(["mount", "-o", f"remount,{options}", place],
                                                check=True)
    subprocess.run(["umount", "-l", place], check=True)


FILLING = ("--save-every", "1")


def test_a_full_disk_leaves_the_last_good_checkpoint_and_the_run_goes_on_from_it(small_disk,
                                                                                 tmp_path, capsys):
    disk, remount = small_disk
    assert run(*FILLING, out=tmp_path / "whole") == 0
    size = (tmp_path / "whole" / "last.pt").stat().st_size
    remount(f"size={int(2.5 * size) // 1024}k")
    capsys.readouterr()
    assert run(*FILLING, out=disk / "run") == 1
    said = one_line(capsys)
    assert "No space left on device; the last good checkpoint is" in said and in_docs(said)
    assert weights.load(disk / "run" / "last.pt")["step"] == 2
    assert not list((disk / "run").glob("*.part"))
    remount("size=64m")
    assert run(*FILLING, "--resume", out=disk / "run") == 0
    a, b = tensors(tmp_path / "whole"), tensors(disk / "run")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_limit_on_the_size_of_files_is_no_traceback_either(tmp_path, capsys):
    """Where nobody may mount: the system refuses to write beyond half of a checkpoint."""
    assert run(out=tmp_path / "whole") == 0
    half = (tmp_path / "whole" / "last.pt").stat().st_size // 2
    done = subprocess.run([sys.executable, "train.py", "mae", *SMALL, "--steps", "4", "--out",
                           str(tmp_path / "run")], cwd=ROOT,
                          capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE,
                                                                (half, half)))
    said = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    assert done.returncode == 1 and "Traceback" not in done.stderr and len(said) == 1
    assert "File too large; no checkpoint was written yet" in said[0]
    assert not list((tmp_path / "run").glob("last*"))


def test_a_folder_that_cannot_be_written_is_a_mistake_and_nothing_starts(small_disk, tmp_path,
                                                                         capsys):
    disk, remount = small_disk
    remount("ro")
    (tmp_path / "file").write_text("")
    for out, reason in ((disk, "Read-only file system"), (disk / "run", "Read-only file system"),
                        (tmp_path / "file", "File exists"),
                        (tmp_path / "file" / "run", "Not a directory")):
        assert run(out=out) == 2
        said = one_line(capsys)
        assert said == f"train.py: --out {out}: {reason}" and in_docs(said) == (
            reason == "Read-only file system")


def test_a_loss_that_is_not_finite_stops_with_the_weights_before_it_and_the_files(tmp_path, capsys,
                                                                                  monkeypatch):
    at_step(monkeypatch, 2,
            lambda loss, values: (loss * math.nan, {"loss": loss.detach() * math.nan}))
    assert run("--data", videos(tmp_path / "videos"), out=tmp_path / "run") == 1
    said = one_line(capsys)
    assert "step 2: loss nan, gradient norm" in said
    assert "lr " in said and ".mp4" in said and "not finite" in said
    assert str(tmp_path / "run" / "last.pt") in said and in_docs(said)
    saved = weights.load(tmp_path / "run" / "last.pt")
    assert saved["step"] == 2 and all(value.isfinite().all() for value in saved["model"].values())


def test_memory_that_runs_out_says_what_to_lower(tmp_path, capsys, monkeypatch):
    def full(loss, values):
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    at_step(monkeypatch, 2, full)
    assert run("--save-every", "1", out=tmp_path / "run") == 1
    said = one_line(capsys)
    assert "out of memory on cpu: try --batch-size 2 --accum 2, which is the same step" in said
    assert "--recompute" in said
    assert f"the last good checkpoint is {tmp_path / 'run' / 'last.pt'}" in said and in_docs(said)


@pytest.mark.skipif(multiprocessing.get_start_method(allow_none=True) not in (None, "fork")
                    or sys.version_info >= (3, 14),
                    reason="what is put in place of a function reaches forks only")
def test_a_worker_that_dies_is_reported_with_the_file_it_held(tmp_path, capsys, monkeypatch):
    """As one file in twelve does to it that crashes the decoder, in the third step or later."""
    ours, read, reads = os.getpid(), decoding.Video.read, []

    def crash(self, *rest):
        reads.append(self.path)
        if os.getpid() != ours and len(reads) > 10 and Path(self.path).name == "07.mp4":
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, *rest)

    monkeypatch.setattr(decoding.Video, "read", crash)
    data = videos(tmp_path / "videos")
    flags = ("--data", data, "--val-data", str(tmp_path / "videos" / "00.mp4"), "--workers", "1",
             "--save-every", "1")
    assert run(*flags, out=tmp_path / "run", steps=50) == 1
    said = one_line(capsys)
    assert "a process that loads clips (pid" in said and ("exited unexpectedly" in said
                                                          or "has ended" in said)
    assert "while reading " in said and "07.mp4. If" in said
    assert in_docs(said.replace("has ended", "exited unexpectedly"))
    monkeypatch.undo()
    assert run(*flags, "--resume", out=tmp_path / "run", steps=4) == 0


def test_a_worker_that_somebody_kills_is_reported_too(tmp_path, capsys, monkeypatch):
    def kill(loss, values):
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)
        return loss, values

    at_step(monkeypatch, 1, kill)
    assert run("--workers", "1", "--save-every", "1", out=tmp_path / "run", steps=50) == 1
    said = one_line(capsys)
    assert "a process that loads clips (pid" in said and "while reading" in said
    assert "the last good checkpoint is" in said


@pytest.mark.parametrize("error",
                         [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_pipe_that_broke_because_a_worker_died_is_reported_as_that(monkeypatch, error):
    """Where the worker dies while it hands over a clip, all that is heard is the pipe, and a moment
    before it has ended."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.3)"])
    notes = torch.zeros(1, 512, dtype=torch.uint8)
    note = torch.tensor(list(f"{child.pid} a/b.mp4".encode()), dtype=torch.uint8)
    notes[0, :len(note)] = note
    monkeypatch.setattr(loading, "_notes", [notes])
    said = describe_error(error, train.MaskedModelling())
    assert said.startswith(f"a process that loads clips (pid {child.pid}) has ended while reading "
                           f"a/b.mp4. If")
    monkeypatch.setattr(loading, "_notes", [])
    assert "clips" not in (describe_error(error, train.MaskedModelling(out="runs/x")) or "")


def test_data_of_which_most_cannot_be_read_stops_the_run(tmp_path, capsys):
    data = videos(tmp_path / "videos", count=12, broken=9)
    assert run("--data", data, "--val-data", str(tmp_path / "videos" / "11.mp4"),
               out=tmp_path / "run", steps=50) == 2
    said = one_line(capsys)
    assert "clips could not be read, more than half" in said and in_docs(said)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_who_is_asked_to_stop_finishes_the_step_saves_and_says_how_to_go_on(tmp_path, capsys,
                                                                            monkeypatch, number):
    def ask(loss, values):
        os.kill(os.getpid(), number)
        return loss, values

    assert run(out=tmp_path / "whole") == 0
    at_step(monkeypatch, 1, ask)
    capsys.readouterr()
    assert run(out=tmp_path / "cut") == 130
    assert one_line(capsys) == (f"train.py: stopped at step 2 of 4, saved in "
                                f"{tmp_path / 'cut'}/last.pt; go on with: python train.py mae "
                                f"--resume --out {tmp_path / 'cut'} and the same flags")
    assert in_docs("train.py: stopped at step 2 of 4, saved in x/last.pt; go on with: python "
                     "train.py mae --resume --out x and the same flags")
    monkeypatch.undo()
    assert run("--resume", out=tmp_path / "cut") == 0
    a, b = tensors(tmp_path / "whole"), tensors(tmp_path / "cut")
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("number, where",
                         [(signal.SIGTERM, "datasets"), (signal.SIGTERM, "finish"),
                          (signal.SIGINT, "prepare"), (signal.SIGINT, "finish")])
def test_who_is_asked_to_stop_before_or_after_training_says_where_the_last_checkpoint_is(
        tmp_path, capsys, monkeypatch, number, where):
    own = getattr(train.MaskedModelling, where)

    def asked(self, *rest):
        os.kill(os.getpid(), number)
        return own(self, *rest)

    monkeypatch.setattr(train.MaskedModelling, where, asked)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert run(out=tmp_path / "run") == 130
    kept = f"the last good checkpoint is {tmp_path / 'run' / 'last.pt'}, go on with --resume"
    said = one_line(capsys)
    kept = kept if where == "finish" else "no checkpoint was written yet"
    assert said == f"train.py: interrupted; {kept}"
    assert in_docs(said) == (where == "finish")
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.undo()
    assert run("--resume", out=tmp_path / "run") == 0


def test_a_run_that_never_began_does_not_name_the_checkpoint_of_another(tmp_path, capsys,
                                                                        monkeypatch):
    assert run(out=tmp_path / "run", steps=1) == 0
    monkeypatch.setattr(train.MaskedModelling, "datasets",
                        lambda self: os.kill(os.getpid(), signal.SIGTERM))
    capsys.readouterr()
    assert run(out=tmp_path / "run") == 130
    assert one_line(capsys) == "train.py: interrupted; no checkpoint was written yet"


def test_a_process_that_ends_with_an_error_while_torchrun_ends_it_leaves_no_traceback(capsys,
                                                                                    monkeypatch):
    own, asked = signal.getsignal, []

    def getsignal(number):
        if not asked:  # the last moment in which SIGTERM is heard
            asked.append(number)
            os.kill(os.getpid(), signal.SIGTERM)
        return own(number)

    def failing():
        raise RunError("another process failed")

    before = own(signal.SIGTERM)
    monkeypatch.setattr(signal, "getsignal", getsignal)
    assert command_line.exit_code(failing) == 130 and asked
    assert one_line(capsys).startswith("train.py: interrupted; ")
    assert own(signal.SIGTERM) == before


def test_who_is_asked_to_stop_after_the_last_step_has_the_rest_left_to_do(tmp_path, capsys,
                                                                          monkeypatch):
    own = train.MaskedModelling.evaluate

    def asked(self, *rest):
        os.kill(os.getpid(), signal.SIGTERM)
        return own(self, *rest)

    assert run(out=tmp_path / "run", steps=2) == 0
    monkeypatch.setattr(train.MaskedModelling, "evaluate", asked)
    with monkeypatch.context() as first:
        calls = []
        first.setattr(train.MaskedModelling, "evaluate", lambda self, *rest: calls.append(0)
                      or (asked if len(calls) == 2 else own)(self, *rest))
        assert run("--eval-every", "9", out=tmp_path / "cut", steps=2) == 130
    assert "stopped at step 2 of 2, saved in" in one_line(capsys)
    assert not (tmp_path / "cut" / "metrics.json").exists()
    monkeypatch.undo()
    assert run("--resume", out=tmp_path / "cut", steps=2) == 0
    assert (tmp_path / "cut" / "metrics.json").exists()
    whole, cut = tensors(tmp_path / "run"), tensors(tmp_path / "cut")
    assert all(torch.equal(cut[key], whole[key]) for key in whole)


def test_who_is_asked_to_stop_while_parts_are_read_does_not_find_them_damaged(tmp_path,
                                                                              monkeypatch):
    """torch catches all there is, and would make of a KeyboardInterrupt an error of the file's."""
    processes.save_parts(tmp_path / "last.pt", {"model/a": torch.ones(2)}, {"step": 1})

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem.FileSystemReader.read_data",
                        interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.read_checkpoint(tmp_path / "last.pt", {"model": {}})


def test_a_stage_of_the_default_run_says_the_line_that_goes_on_with_it(tmp_path, capsys,
                                                                       monkeypatch):
    def ask(loss, values):
        os.kill(os.getpid(), signal.SIGTERM)
        return loss, values

    at_step(monkeypatch, 1, ask)
    monkeypatch.setattr(train, "DEFAULT_RUN", {
        "mae --num-frames 4 --input-size 32 --mask-ratio 0.5 --batch-size 2 --eval-clips 2 "
        "--workers 0 --device cpu "
        "--out {out}/mae": 1})
    assert train.main(["--out", str(tmp_path / "all"), "--seed", "3"]) == 130
    assert one_line(capsys).endswith(f"go on with: python train.py --out {tmp_path / 'all'} --seed "
                                     f"3")
    (tmp_path / "all" / "mae" / "metrics.json").write_text("{}")
    assert train.main(["--out", str(tmp_path / "all"), "--seed", "3"]) == 2
    assert "metrics.json: not what a run wrote; remove it" in one_line(capsys)


def test_parts_of_a_checkpoint_that_find_the_disk_full_are_taken_away_and_torch_says_so_as_an_error(
    small_disk):
    """torch raises something that is no Exception; a handler of errors would let it pass."""
    disk, remount = small_disk
    remount("size=512k")
    with pytest.raises(OSError, match="No space left on device|the disk may be full"):
        processes.save_parts(disk / "last.pt.part", {"model/a": torch.randn(1024, 1024)}, {})
    assert not list(disk.iterdir())


def test_a_folder_takes_the_place_of_a_file_among_the_checkpoints_and_back(tmp_path):
    """A run that goes on with --shard, or without: parts are a folder, the whole is a file. At no
    moment is there none."""
    def save(step, shard):
        checkpoints.save_checkpoint(tmp_path, {"step": step}, {"model": {"a": torch.ones(2)}},
                                    shard)

    for step, shard in enumerate((False, True, True, False, False, True, True, False)):
        with pytest.MonkeyPatch.context() as patch:
            for name in ("replace", "unlink", "rmdir"):
                def watched(*args, own=getattr(os, name), **options):
                    done = own(*args, **options)
                    assert step == 0 or checkpoints.checkpoints(tmp_path)
                    return done
                patch.setattr(os, name, watched)
            save(step, shard)
        assert [path.is_dir() for path in checkpoints.checkpoints(tmp_path)][0] == shard
        names = sorted(path.name for path in tmp_path.iterdir())
        assert names == (["last.1.pt", "last.pt"] if step else ["last.pt"])


def test_a_mistake_leaves_the_earlier_run_where_it_is(tmp_path, capsys):
    assert run(out=tmp_path / "run", steps=1) == 0
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert run("--data", str(tmp_path / "nowhere"), out=tmp_path / "run") == 2
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


@pytest.mark.parametrize("size, accum, advice",
                         [(6, 1, "--batch-size 3 --accum 2, which is the same step"),
                          (9, 2, "--batch-size 3 --accum 6, "),
                          (7, 1, "--batch-size 1 --accum 7, "),
                          (1, 4, "try --eval-batch 16")])
def test_what_is_advised_for_lack_of_memory_is_the_same_step_and_may_be_changed_in_a_resumed_run(
    size, accum, advice):
    card = train.MaskedModelling(batch_size=size, accum=accum)
    said = describe_error(torch.OutOfMemoryError("80 GiB"), card)
    assert advice in said
    assert {"recompute", "precision", "eval_batch", "workers"} <= checkpoints.FREE_TO_CHANGE


@pytest.mark.parametrize("text",
                         ["unable to open shared memory object </torch_12_3> in read-write mode: "
                          "Too many open files (24)",
                          "unable to allocate shared memory(shm) for file </torch_2_1>: No "
                          "space left on device (28)"])
def test_no_room_between_processes_says_what_to_lower(text):
    assert "fewer --workers" in describe_error(RuntimeError(text), train.MaskedModelling())
    full = OSError(28, "No space left on device", "/scratch/torch_2/run/last.pt.whole")
    text = describe_error(full, train.MaskedModelling())
    assert text == "/scratch/torch_2/run/last.pt.whole: No space left on device"
    assert describe_error(RuntimeError("out of resource: shared memory, Required: 1, Hardware "
                                       "limit: 2"), train.MaskedModelling()) is None


def test_a_damaged_checkpoint_gives_way_to_the_one_before_with_a_line(tmp_path, capsys):
    assert run("--save-every", "1", out=tmp_path) == 0
    expected, raw = tensors(tmp_path), bytearray((tmp_path / "last.pt").read_bytes())
    raw[len(raw) // 2] ^= 1
    (tmp_path / "last.pt").write_bytes(raw)
    capsys.readouterr()
    assert run("--save-every", "1", "--resume", out=tmp_path) == 0
    said = capsys.readouterr().out
    assert any("last.pt: damaged (" in line and in_docs(line) for line in said.splitlines()), said
    assert Path(tmp_path / "last.pt.damaged").exists()
    assert all(torch.equal(tensors(tmp_path)[key], expected[key]) for key in expected)
