"""What is proved about the default run: it does each of its commands once, and ends in a table."""

import json

import pytest

import train
from tools import table

SMALL = (" --steps 2 --batch-size 4 --eval-clips 8 --workers 0 --precision fp32 --no-figures "
         "--device cpu")
SIZE = " --num-frames 2 --input-size 16"


def test_the_default_run_does_each_stage_once_and_ends_in_a_table(tmp_path, monkeypatch, capsys):
    commands = {command.replace("--steps 200", "") + SMALL
                + SIZE * (not command.startswith("fuse")): 1
                for command in train.DEFAULT_RUN}
    monkeypatch.setattr(train, "DEFAULT_RUN", commands)
    own = table.write_table
    monkeypatch.setattr(table, "write_table", lambda out, seed, clips=20: own(out, seed, clips))
    out = tmp_path / "run"
    assert train.main(["--out", str(out), "--seed", "3"]) == 0
    text = capsys.readouterr().out
    assert "about" in text and "cross-model attention" in text
    found = json.loads((out / "table.json").read_text())
    assert len(found["rows"]) == 6 and found["seed"] == 3
    columns = ("motion", "shape", "colour", "all facts", "unseen motion", "unseen all facts")
    for row in found["rows"].values():
        assert all(0 <= row[name] <= 100 for name in columns) and row["seconds"] >= 0
    bridge, late = found["rows"]["cross-model attention"], found["rows"]["late fusion, equal"]
    assert bridge["trained"] > late["trained"] == 0
    assert (out / "table.png").stat().st_size > 0
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/model.safetensors")}
    assert len(before) == 6
    assert train.main(["--out", str(out), "--seed", "4"]) == 2
    assert "was made with seed 3" in capsys.readouterr().err
    (out / "fuse" / "metrics.json").unlink()
    assert train.main(["--out", str(out), "--seed", "3"]) == 0
    assert capsys.readouterr().out.count("done already") == 5
    assert all((path.stat().st_mtime_ns == moment) == (path.parent.name != "fuse")
               for path, moment in before.items())
    (out / "table.json").unlink()
    assert table.main([str(out)]) == 0 and (out / "table.json").exists()
    assert table.main([str(tmp_path)]) == 2


def test_the_default_run_takes_no_other_flags(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--seed", "0", "--steps", "3"])
    assert stop.value.code == 2 and train.main(["--seed", "-1"]) == 2


def test_the_default_run_is_what_a_reader_would_type():
    for command in train.DEFAULT_RUN:
        name, *flags = command.format(out="runs/default").split()
        assert train.parse(train.STAGES[name], flags).out.startswith("runs/default/")
