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
ROOT_FILES = ("attention mae uniformerv2 clip_video caption_decoder fusion data train").split()
FOLDERS = "engine video weights tasks variants"
FILES = sorted(path.relative_to(ROOT) for folder in ["", *FOLDERS.split()]
               for path in (ROOT / folder).glob("*.py"))

# file or folder -> the files and folders that it may import. Imports go one way: attention ->
# components -> tasks -> train. What stands first counts. Imports inside a function may go further:
# a component's `main` shows it on a generated clip, `from_official` calls its reader in weights/.
SUPPORT = {"engine", "video", "weights"}
MAY_IMPORT = {
    "engine/errors.py": set(),
    "engine/processes.py": set(),
    "engine/large_batches.py": {"engine"},
    "engine/pictures.py": set(),
    "engine": {"engine", "video", "weights", "data", "attention"},
    "video/checking.py": {"video", "engine.errors", "engine.pictures"},
    "video": {"video", "engine.errors"},
    "weights/files.py": {"weights", "engine.errors"},
    "weights/pickles.py": {"weights", "engine.errors"},
    "weights/official.py": {"weights", "engine.errors"},
    "weights/tokenizer.py": {"weights", "engine.errors"},
    "weights": {"weights", "engine.errors", "engine.frame_size", "mae", "uniformerv2", "clip_video",
                "caption_decoder"},
    "engine/batch_norm.py": {"engine.processes"},
    "engine/flex.py": set(),
    "attention.py": {"engine.processes", "engine.flex"},
    "data.py": {"video", "engine.errors"},
    "mae.py": {"attention", "weights", "engine.processes"},
    "uniformerv2.py": {"attention", "weights", "engine.batch_norm"},
    "clip_video.py": {"attention", "uniformerv2", "weights", "engine.processes",
                      "engine.large_batches"},
    "caption_decoder.py": {"attention", "clip_video", "weights"},
    "fusion.py": {"attention", "mae", "uniformerv2", "weights", "video.transforms"},
    "tasks": {"tasks", "attention", "mae", "uniformerv2", "clip_video", "caption_decoder",
              "fusion", "data"} | SUPPORT,
    "variants/cards.py": {"variants", "train", "mae", "engine"},
    "variants": {"variants", "attention", "mae"} | SUPPORT,
    "train.py": {"tasks", "data", *ROOT_FILES} | SUPPORT - {"train"},
}


def imported(tree):
    """The modules that a file imports when it is imported, with their folder."""
    inside = {id(x) for function in ast.walk(tree)
              if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
              for x in ast.walk(function)}
    for node in ast.walk(tree):
        if id(node) in inside:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_root_holds_the_reading_path_and_each_folder_says_what_is_in_it():
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
    names = listed.stdout.split()
    assert {name for name in names if "/" not in name} == {f"{name}.py" for name in ROOT_FILES}
    for folder in FOLDERS.split():
        text = ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text()))
        assert text.splitlines()[0].endswith((".", ":", ";", ","))


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_one_way(path):
    ours = {*ROOT_FILES, *FOLDERS.split()}
    allowed = next(names for key, names in MAY_IMPORT.items()
                   if path.as_posix() == key or path.parent.as_posix() == key)
    for name in imported(ast.parse((ROOT / path).read_text())):
        if name.split(".")[0] in ours:
            assert any(name == known or name.startswith(known + ".") for known in allowed), \
                f"{path} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_nothing_happens_at_import(path):
    """No seed, no print, no thread setting: only definitions, constants and the main guard."""
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, ast.Expr):
            assert isinstance(node.value, ast.Constant), f"{path} line {node.lineno} acts"
        assert not isinstance(node, (ast.For, ast.While, ast.With)), f"{path} line {node.lineno}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_public_class_and_function_says_what_it_is(path):
    tree = ast.parse((ROOT / path).read_text())
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            short = isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno < 6
            assert short or ast.get_docstring(node), f"{path}: {node.name} has no docstring"


def test_no_path_of_somebodys_machine():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    files = listed.stdout.split()
    pattern = re.compile(r"(/home/|/mnt/|/root/|/work/|/Users/|s3://|C:\\\\)")
    for name in files:
        path = ROOT / name
        text = path.suffix in (".py", ".md", ".toml", "") and path.is_file()
        if text and name != "tests/test_repository.py":
            assert not pattern.search(path.read_text()), f"{name} holds an absolute path"


PAGES = [ROOT / "README.md", ROOT / "exercises" / "README.md",
         *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_and_target_that_a_page_names_exists(page):
    text = page.read_text()
    for name in set(re.findall(r"python ((?:\w+/)?\w+\.py)", text)):
        assert (ROOT / name).exists(), f"{page.name} names {name}"
    for name in set(re.findall(r"python -m ([\w.]+)", text)) - {"pytest"}:
        place = ROOT / name.replace(".", "/")
        assert place.with_suffix(".py").exists() or (place / "__main__.py").exists(), name
    folders = "tools|tests|tasks|video|weights|engine|variants"
    for name in set(re.findall(rf"`((?:{folders})/\w+\.py)", text)):
        assert (ROOT / name).exists(), f"{page.name} names {name}"
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for name in set(re.findall(r"::(test_\w+)", text)):
        assert f"def {name}(" in tests, f"{page.name} names {name}"
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    for target in set(re.findall(r"`make ([a-z]+)`|^ *make ([a-z]+)", text, re.M)):
        assert (target[0] or target[1]) in targets, f"{page.name} names make {target}"
    for name in set(re.findall(r"\]\(((?!https?:)[^)#]+)\)", text)):
        assert (page.parent / name).exists(), f"{page.name} links to {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_training_command_of_a_page_parses(page):
    import train
    text = page.read_text().replace("\\\n", " ")
    pattern = r"(?:^    .*?|`python )train\.py (\w+)([^`\n#|]*?)(?:$|`|#)"
    for line in re.findall(pattern, text, re.M):
        stage, flags = line
        if stage in train.STAGES and "--help" not in flags:
            train.parse(train.STAGES[stage], flags.split())


def test_the_readme_is_one_page_and_every_page_is_narrow():
    assert len(PAGES[0].read_text().splitlines()) <= 150
    for page in [*PAGES, ROOT / "LOG.md"]:
        for number, line in enumerate(page.read_text().splitlines(), 1):
            assert len(line) <= 100, f"{page.name} line {number}"


@pytest.mark.parametrize("name", ROOT_FILES[:6])
def test_each_component_alone_prints_its_shapes(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    assert not importlib.import_module(name).main()
    assert re.search(r"\(B, .*\) +\(\d+, ", capsys.readouterr().out)


def test_the_generated_world_draws_a_clip_of_each_motion(tmp_path, monkeypatch):
    from video import moving_shapes
    assert not moving_shapes.main(["--out", str(tmp_path / "figure.png")])
    assert (tmp_path / "figure.png").stat().st_size > 2000


def test_caption_metrics_show_what_they_make_of_some_captions(capsys):
    from tasks import captioning
    assert not captioning.main()
    assert "CIDEr-D" in capsys.readouterr().out
