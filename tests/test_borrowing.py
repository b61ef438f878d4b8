"""What is proved about components in somebody else's code (docs/borrowing.md):

They run as files that are copied beside others, and as a package of another project that has an
attention.py of its own. The page lists just the files that each component needs.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools import borrow

ROOT = Path(borrow.__file__).resolve().parents[1]
PAGE = ROOT / "docs/borrowing.md"
COMPONENTS = ("attention", "mae", "uniformerv2", "clip_video", "caption_decoder", "fusion")

# Builds a network, gives it another head (which imports weights/), writes and reads a run.
USE = """
import attention
assert attention.MINE == 1
import torch
from {package} import mae, uniformerv2
import {package}.weights as weights
model = mae.VideoMAE("tiny", frames=4, image_size=32)
weights.save("run", model, model.config)
classifier = mae.VideoMAE.from_official("run").with_head(3)
assert classifier(torch.zeros(1, 3, 4, 32, 32)).shape == (1, 3)
assert uniformerv2.UniFormerV2("tiny", classes=2).with_head(5).options.classes == 5
import sys
from pathlib import Path
names = {{"mae", "uniformerv2", "weights", "engine", "data", "train"}}
assert not names & set(sys.modules), "a name of these files is taken in the other project"
"""


def python(code, folder, **environment):
    """Run code in a folder, far from this repository."""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True,
                          env={"PATH": "", "OMP_NUM_THREADS": "1"} | environment)
    assert done.returncode == 0, done.stderr


def test_a_package_runs_beside_an_attention_py_of_its_users(tmp_path, capsys):
    """In two folders deep, with names that would hide ours."""
    assert borrow.main(["mae", "uniformerv2", "--into", str(tmp_path / "mypackage/video")]) == 0
    for name in ("attention", "data", "train"):
        (tmp_path / f"{name}.py").write_text("MINE = 1\n")
    python(USE.format(package="mypackage.video"), tmp_path)
    assert (tmp_path / "mypackage/video/LICENSE").exists()
    assert set(capsys.readouterr().out.split()) == {
        str(path.relative_to(tmp_path / "mypackage/video"))
        for path in (tmp_path / "mypackage/video").rglob("*.py")} - {"__init__.py"}


@pytest.mark.slow
def test_files_that_are_copied_as_they_are_run_in_another_folder(tmp_path):
    for path in borrow.closure(["mae"]):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    python("import mae, torch, weights\n"
           "model = mae.VideoMAE('tiny', frames=4, image_size=32)\n"
           "weights.save('run', model, model.config)\n"
           "mae.VideoMAE.from_official('run').with_head(3)(torch.zeros(1, 3, 4, 32, 32))", tmp_path)


@pytest.mark.parametrize("name", COMPONENTS)
def test_the_page_lists_the_files_of_each_component(name):
    row, = re.findall(rf"^- `{name}`: (.*(?:\n  .*)*)", PAGE.read_text(), re.MULTILINE)
    listed = {path for path in re.findall(r"`([\w/.]+\.py)`", row)}
    base, = re.findall(r"All need (.*)\.\n", PAGE.read_text())
    listed |= set(re.findall(r"`([\w/.]+\.py)`", base)) | {f"{name}.py"}
    assert {path for path in borrow.closure([name]) if not path.startswith("weights/")} == listed


@pytest.mark.parametrize("flags, message", [
    (["attentions"], "attentions: no such file here"),
    (["mae", "--into", "."], "--into .: exists already"),
])
def test_a_mistake_is_one_line(flags, message, capsys):
    assert borrow.main(flags) == 2
    assert message in capsys.readouterr().err
