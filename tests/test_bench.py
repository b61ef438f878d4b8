"""What tools/bench.py promises: forms are compared before they are timed, peers may be absent,
numbers are kept in one file, and one command makes the table of docs/speed.md from it."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import bench  # noqa: E402


def toy_case(form):
    """A product of matrices; "slow" does it three times, "wrong" gets another result."""
    name, precision = form
    if name == "absent":
        raise ImportError("No module named 'absent'")
    x = torch.eye(64, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)

    def run():
        for _ in range(3 if name == "slow" else 1):
            out = x @ x
        return out + (name == "wrong")
    return run


def toy_subject(*names):
    def subject():
        """A toy."""
        bench.table("toy", toy_case, [(name, precision) for precision in ("fp32", "bf16")
                                      for name in names], clips=2, rounds=1)
    return subject


@pytest.fixture
def measure(monkeypatch, tmp_path):
    """measure(subject, *names of forms) -> what the file holds after that subject."""
    monkeypatch.setattr(bench, "prepare", lambda threads: None)  # it sets the process's allocator
    monkeypatch.setattr(bench, "BEST", {})

    def run(subject, *names):
        bench.ROWS.clear()
        monkeypatch.setattr(bench, "CASES", {subject: toy_subject(*names)})
        monkeypatch.setattr(sys, "argv", ["bench.py", subject, "--json", str(tmp_path / "b.json")])
        bench.main()
        return json.loads((tmp_path / "b.json").read_text())
    return run


def printed_table(monkeypatch, capsys, *paths):
    monkeypatch.setattr(sys, "argv", ["bench.py", "table", *map(str, paths)])
    capsys.readouterr()
    bench.main()
    return capsys.readouterr().out


def test_a_file_keeps_every_subject_with_the_machine_that_it_was_measured_on(measure):
    assert list(measure("first", "ours", "slow")) == ["first"]
    found = measure("second", "ours")
    assert list(found) == ["first", "second"]
    assert found["first"]["versions"]["torch"] == torch.__version__
    assert found["first"]["device"] and found["first"]["threads"] == 1
    rows = found["first"]["rows"]
    assert [(row["form"], row["precision"]) for row in rows] == [
        (name, precision) for precision in ("fp32", "bf16") for name in ("ours", "slow")]
    assert all(row["ms"] > 0 and row["gflops"] > 0 for row in rows)
    needed = 2 * 64**3  # also of the slow form: the same result needs no more
    assert all(row["share"] == pytest.approx(needed / row["ms"] / row["gflops"] / 1e6)
               for row in rows)


def test_a_form_that_is_not_installed_is_named_and_left_out(measure, capsys):
    rows = measure("first", "absent", "ours")["first"]["rows"]
    assert {row["form"] for row in rows} == {"ours"}
    assert "no absent here (No module named 'absent')" in capsys.readouterr().out


def test_forms_that_disagree_are_not_timed(measure, tmp_path):
    with pytest.raises(SystemExit, match="the two forms differ by"):
        measure("first", "ours", "wrong")
    assert not (tmp_path / "b.json").exists()


def rows(*numbers):
    """Rows of one step: milliseconds of others' and our form in float32, then in bfloat16."""
    forms = [(name, p) for p in ("fp32", "bf16") for name in ("theirs", "ours")]
    return [dict(table="a step", form=name, precision=p, ms=ms, share=0.5)
            for (name, p), ms in zip(forms, numbers) if ms]


def test_the_table_has_a_column_for_each_machine(monkeypatch, capsys, tmp_path):
    (tmp_path / "one.json").write_text(json.dumps(
        {"mae": {"device": "Old", "rows": rows(30.0, 20.0, 12.0, 10.0)},
         "attention": {"device": "Old", "rows": [dict(table="kernel", form="sdpa",
                                                      precision="fp32", ms=1.0)]}}))
    (tmp_path / "two.json").write_text(json.dumps(
        {"mae": {"device": "New", "rows": rows(None, None, 15.0, 10.0)}}))
    out = printed_table(monkeypatch, capsys, tmp_path / "one.json", tmp_path / "two.json")
    assert out.splitlines() == [
        "| step | others | Old | New |", "| --- | --- | --- | --- |",
        "| a step | theirs | 1.50, 1.20, 3.00 | -, 1.50, - |", "",
        "| ours, share of products | Old | New |", "| --- | --- | --- |",
        "| a step | 50 %, 50 % | -, 50 % |", ""]


def test_measured_rows_make_a_table(measure, monkeypatch, capsys, tmp_path):
    measure("first", "ours", "slow")
    out = printed_table(monkeypatch, capsys, tmp_path / "b.json")
    assert "| toy | slow | " in out and "| toy | " in out.split("share of products")[1]


@pytest.mark.parametrize("words, message", [
    (["table", "missing.json"], "no file missing.json: measure first, with --json FILE"),
    (["mea"], "no subject 'mea': choose all, table, mae, clip")])
def test_a_word_that_means_nothing_ends_in_one_line(words, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", *words])
    with pytest.raises(SystemExit) as end:
        bench.main()
    assert end.value.code == 2 and message in capsys.readouterr().err
