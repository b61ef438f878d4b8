"""What is proved about the repository as a whole:

imports go one way; nothing happens at import; no path of somebody's machine; every public name says
what it is; the commands of the README exist.
"""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = {path.stem: path for path in ROOT.glob("*.py")}

# file -> the project files it may import. Models know no data and data knows no model; whatever a
# file needs to demonstrate itself it imports inside `main`.
MAY_IMPORT = {
    "processes": set(),
    "attention": {"processes"},
    "weights": set(),
    "annotations": set(),
    "moving_shapes": {"annotations"},
    "data": {"annotations", "moving_shapes"},
    "mae": {"attention", "weights"},
    "uniformerv2": {"attention", "processes", "weights"},
    "caption_decoder": {"attention", "weights"},
    "clip_video": {"attention", "processes", "weights", "uniformerv2"},
    "fusion": {"attention", "weights", "mae", "uniformerv2"},
    "caption_metrics": set(),
    "question_answering": {"attention", "weights", "clip_video", "caption_decoder"},
    "localise": {"attention", "weights", "mae", "uniformerv2"},
    "draw": {"data"},
    "train": set(MODULES) - {"train"},
}


def imported(nodes):
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_one_way(name):
    tree = ast.parse(MODULES[name].read_text())
    mains = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    inside = {id(x) for main in mains for x in ast.walk(main)}
    outside = [node for node in ast.walk(tree) if id(node) not in inside]
    edges = set(imported(outside)) & set(MODULES)
    assert edges <= MAY_IMPORT[name], f"{name}.py imports {edges - MAY_IMPORT[name]}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_nothing_happens_at_import(name):
    """No seed, no print, no thread setting: only definitions, constants and the main guard."""
    for node in ast.parse(MODULES[name].read_text()).body:
        if isinstance(node, ast.Expr):
            assert isinstance(node.value, ast.Constant), f"{name}.py line {node.lineno} acts at import"
        assert not isinstance(node, (ast.For, ast.While, ast.With)), f"{name}.py line {node.lineno}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_every_public_class_and_function_says_what_it_is(name):
    tree = ast.parse(MODULES[name].read_text())
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            short = isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno < 6
            assert short or ast.get_docstring(node), f"{name}.{node.name} has no docstring"


def test_no_path_of_somebodys_machine():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    pattern = re.compile(r"(/home/|/mnt/|/root/|/work/|/Users/|s3://|C:\\\\)")
    for name in files:
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", "") and path.is_file() and name != "tests/test_repository.py":
            assert not pattern.search(path.read_text()), f"{name} holds an absolute path"


def test_every_file_and_target_that_the_readme_names_exists():
    readme = (ROOT / "README.md").read_text()
    for name in set(re.findall(r"python ((?:tools/)?\w+\.py)", readme)):
        assert (ROOT / name).exists(), f"README names {name}"
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    for target in set(re.findall(r"`make ([a-z]+)`|^make ([a-z]+)", readme, re.M)):
        assert (target[0] or target[1]) in targets, f"README names make {target}"
    for name in set(re.findall(r"\]\(((?!https?:)[^)#]+)\)", readme)):
        assert (ROOT / name).exists(), f"README links to {name}"


def test_every_training_command_of_the_readme_parses():
    import train
    for line in re.findall(r"python train\.py (\w+)([^`\n#|]*)", (ROOT / "README.md").read_text()):
        stage, flags = line
        if stage in train.STAGES and "--help" not in flags:
            train.parse(train.STAGES[stage], flags.removesuffix(" and the same flags").split())


@pytest.mark.parametrize("name", ["attention", "moving_shapes", "mae", "uniformerv2", "clip_video", "caption_decoder", "fusion", "localise",
                                  "question_answering", "caption_metrics"])
def test_each_component_alone_prints_its_shapes_and_draws_its_figure(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    main = importlib.import_module(name).main
    drawn = name not in ("question_answering", "caption_metrics")
    assert not main(["--out", str(tmp_path / "figure.png")] if drawn else [] if name == "question_answering" else None)
    said = capsys.readouterr().out
    assert name == "caption_metrics" and "CIDEr-D" in said or name == "moving_shapes" and "drawn" in said or re.search(r"\(B, .*\) +\(\d+, ", said), said
    assert not drawn or (tmp_path / "figure.png").stat().st_size > 2000


def test_every_number_of_the_readmes_claims_is_one_of_claims_md():
    readme, found = (ROOT / "README.md").read_text(), (ROOT / "claims.md").read_text()
    section = readme.split("## What of the paper holds here")[1].split("\n## ")[0]
    numbers = re.findall(r"\d+\.\d+", section)
    assert len(numbers) > 30
    for number in numbers:
        assert re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", found), f"README says {number}; claims.md does not"
    for line in re.findall(r"^\| (\d+[a-d]?)\. ", section, re.M):
        assert f"| {line} | " in found
