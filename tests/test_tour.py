"""What is proved about docs/tour.ipynb: its stored outputs are whole, small and of the default run,

and it runs from its first to its last cell where no run exists.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOUR = ROOT / "docs" / "tour.ipynb"
MOST_CELLS, MOST_BYTES = 60, 2_000_000


def cells(kind=None):
    """The cells of the notebook, or those of one kind: "code" or "markdown"."""
    found = json.loads(TOUR.read_text())["cells"]
    return [cell for cell in found if kind in (None, cell["cell_type"])]


def outputs():
    """All stored outputs, in order."""
    return [output for cell in cells("code") for output in cell["outputs"]]


def test_the_tour_is_short_and_a_page_can_show_it():
    assert len(cells()) <= MOST_CELLS
    assert TOUR.stat().st_size < MOST_BYTES
    for cell in cells():
        for line in "".join(cell["source"]).splitlines():
            assert len(line) <= 100, line


def test_all_cells_ran_in_order_and_none_failed():
    assert [cell["execution_count"] for cell in cells("code")] == \
        list(range(1, len(cells("code")) + 1))
    kinds = {output["output_type"] for output in outputs()}
    assert kinds == {"stream", "execute_result"}
    assert not [output for output in outputs() if output.get("name") == "stderr"]


def test_every_part_shows_shapes_and_a_picture():
    parts, name = {}, ""
    for cell in cells():
        heading = re.match(r"## (\d\. .*)", "".join(cell["source"]))
        name = heading[1] if heading else name
        parts.setdefault(name, []).extend(cell.get("outputs", []))
    del parts[""]  # before the first part
    assert len(parts) == 8
    for name, found in parts.items():
        assert any("image/png" in output.get("data", {}) for output in found), name
        text = "".join("".join(output.get("text", [])) for output in found)
        assert re.search(r"\(\d+, \d+", text), name


def test_the_stored_outputs_are_those_of_the_default_run_and_name_no_machine():
    text = json.dumps([output for output in outputs() if output["output_type"] == "stream"])
    assert "the weights are those of runs/default" in text
    assert not re.search(r"/(home|mnt|root|work|tmp|Users)/|[A-Z]:\\", text)


@pytest.mark.slow  # it trains every stage, for a minute
def test_the_tour_trains_for_itself_where_no_run_exists_and_runs_from_both_folders(tmp_path):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "docs").mkdir()
    for folder in ("docs", ""):  # the second time the weights are there
        tour = nbformat.read(TOUR, 4)
        resources = {"metadata": {"path": str(tmp_path / folder)}}
        nbclient.NotebookClient(tour, timeout=600, resources=resources).execute()
        text = json.dumps([cell.get("outputs") for cell in tour.cells])
        assert "the weights are those of runs/tour" in text
    assert (tmp_path / "runs" / "tour" / "fuse" / "metrics.json").exists()
