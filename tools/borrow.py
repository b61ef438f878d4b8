"""Copy components, with the files that they import, into your own package: docs/borrowing.md.

    python tools/borrow.py mae --into mypackage/video       # then: from mypackage.video import mae
    python tools/borrow.py uniformerv2 clip_video --into mypackage/video
    python tools/borrow.py mae                              # only list the files

Imports become relative, so no name of these files conflicts with yours. Nothing else changes. Files
that only the function `main` of a component needs are not copied, so `main` does not run in the
copy.
"""

import argparse
import ast
import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # `python tools/borrow.py` searches only tools/ for modules

from engine.errors import UserError  # noqa: E402


def path_of(module):
    """"engine.flex" -> "engine/flex.py", "weights" -> "weights/__init__.py", other modules -> None.
    """
    path = module.replace(".", "/")
    return next((name for name in (f"{path}.py", f"{path}/__init__.py") if (ROOT / name).is_file()),
                None)


def imports(tree):
    """Yield (import statement, [modules of this repository that it names])."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == "main":
            continue
        for part in ast.walk(node):
            if isinstance(part, ast.ImportFrom):
                names = [part.module, *(f"{part.module}.{name.name}" for name in part.names)]
            elif isinstance(part, ast.Import):
                names = [name.name for name in part.names]
            else:
                continue
            ours = [name for name in names if path_of(name)]
            if ours:
                yield part, ours


def closure(modules):
    """Modules -> their files and all files that these import, sorted."""
    todo, files = list(modules), set()
    while todo:
        module = todo.pop()
        parents = [module.rpartition(".")[0]] if "." in module else []
        path = path_of(module)
        if path not in files:
            files.add(path)
            tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
            todo += parents + [name for _, names in imports(tree) for name in names]
    return sorted(files)


def relative(path):
    """The text of a file with relative imports."""
    text = (ROOT / path).read_text(encoding="utf-8")
    lines, dots = text.splitlines(keepends=True), "." * (path.count("/") + 1)
    for node, _ in imports(ast.parse(text)):
        new = ("from " + dots, "from ") if isinstance(node, ast.ImportFrom) else (
            f"from {dots} import ", "import ")
        lines[node.lineno - 1] = lines[node.lineno - 1].replace(*reversed(new), 1)
    return "".join(lines)


def main(argv=None):
    """The command. Returns the exit code: 0, or 2 for a user's error."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("component", nargs="+", help="a file without .py: mae, video.decoding")
    parser.add_argument("--into", metavar="FOLDER",
                        help="a new folder for the copy; default: only list the files")
    args = parser.parse_args(argv)
    try:
        unknown = [name for name in args.component if not path_of(name)]
        if unknown:
            raise UserError(f"{unknown[0]}: no such file here; give a name such as mae, or "
                            "video.decoding")
        files = closure(args.component)
        if args.into and os.path.lexists(args.into):
            raise UserError(f"--into {args.into}: exists already; give a new folder")
        for path in files:
            print(path)
            if args.into:
                target = Path(args.into) / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(relative(path), encoding="utf-8")
        if args.into:
            (Path(args.into) / "__init__.py").touch()
            shutil.copy(ROOT / "LICENSE", args.into)
    except (UserError, OSError) as error:
        print(f"borrow.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
