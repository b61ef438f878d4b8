"""Names of classes: where weights keep them, and which row of a head each class of the data has.

    questions.json beside the weights --> names of the rows of a head --+
    the data set                      --> names of its classes ---------+--> `match` --> rows

The rows of a head have an order, and so have the classes of a data set. Nothing makes both the
same: folders are sorted, lists are numbered, a test set may lack a class. So rows and classes meet
by name.

- Evaluation (--steps 0) keeps the whole head. A class that it does not know is refused.
- Training has a head for the data's classes. Known names keep their rows, others start anew.
- Official files bring no names. Numbers in the data are then numbers of rows. Where there are as
  many classes as rows, they are taken in the data's order. Anything else has no answer.

>>> head = Head("--weights RUN", 3, {"label": ("clap", "jump", "wave")})
>>> match([head], {"label": ("wave", "clap")}, evaluate=True)
({'label': ('clap', 'jump', 'wave')}, [[0, 1, 2]])
>>> match([head], {"label": ("jump", "wave", "xray")}, evaluate=False)
--weights RUN: of its head the rows of 2 classes are kept by name (jump, wave); 1 is new (xray)
({'label': ('jump', 'wave', 'xray')}, [[1, 2, None]])
"""

import json
from pathlib import Path
from typing import NamedTuple

import weights
from engine.errors import UserError
from weights.places import MODEL_FILES, split


class Head(NamedTuple):
    """A head of weights, and what its rows stand for."""

    flag: str  # where it comes from, as the user typed it, for messages
    count: int  # rows; 0 = there is no head
    names: dict | None  # {question: names}, side by side in the rows; None = the file tells none


def write(folder, classes, several=()):
    """questions.json: {question: names}, in the order of the logits; for a question in `several`,
    to which a clip may have several answers, {question: {"several": names}}."""
    found = {question: {"several": list(names)} if question in several else list(names)
             for question, names in classes.items()}
    weights.write_aside(Path(folder) / "questions.json",
                        lambda path: Path(path).write_text(json.dumps(found) + "\n"))


def read(source, count):
    """({question: names}, questions that may have several answers) beside weights.

    From questions.json, or from the config.json that transformers writes beside its two file names.
    (None, ()) where neither is there.

    source  path of a run, of its model, or of a file with official weights
    count   rows of the head
    raises  UserError: a questions.json that is none, or names another number of classes
    """
    file = split(source)[0]  # without ::NAME
    folder = file if file.is_dir() else file.parent
    path = folder / "questions.json"
    if not path.exists():
        theirs = file.name in MODEL_FILES or file.is_dir()
        names = weights.hub_config(folder).get("id2label") if theirs else None
        names = [names.get(str(i)) for i in range(count)] if isinstance(names, dict) else []
        told = names and all(isinstance(name, str) for name in names) and names[0] != "LABEL_0"
        return ({"label": tuple(names)} if told else None), frozenset()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        several = frozenset(question for question in found if isinstance(found[question], dict))
        classes = {question: tuple(names["several"] if question in several else names)
                   for question, names in found.items()}
        if not all(isinstance(name, str) for names in classes.values() for name in names):
            raise TypeError("a name is no text")
    except (ValueError, TypeError, LookupError, AttributeError, OSError) as error:
        raise UserError(f"{path}: must hold {{question: names of its answers}} ({error})") from None
    named = sum(map(len, classes.values()))
    if named != count:
        raise UserError(f"{path}: names {named} answers, the weights have {count}")
    return classes, several


def head_of(name, source, count):
    """The Head with `count` rows of the weights that the flag --`name` gives."""
    return Head(f"--{name} {source}", count, read(source, count)[0] if count else None)


def match(heads, classes, evaluate):
    """Which rows of the heads the classes of the data are. Says in one line what is not the same.

    heads     list of Head
    classes   {question: names} of the data
    evaluate  True: whole heads are needed, and nothing new
    returns   {question: names}, by which the data are to be numbered, and for each head a list with
              the row of each of these names, None = a new row; or None where there is no head
    raises    UserError: classes to evaluate that a head does not know
    """
    if evaluate:
        classes = whole(heads, classes)
    return classes, [rows_of(head, classes, evaluate) for head in heads]


def whole(heads, classes):
    """{question: all names that every head knows}, in the order of the first; these questions."""
    known = [(head, names) for head in heads if (names := names_of(head, classes))]
    for head, names in known:
        unknown = [name for question in classes for name in classes[question]
                   if name not in names.get(question, ())]
        if unknown:
            others = [name for part in names.values() for name in part]
            raise UserError(f"{head.flag}: does not know {listed(unknown)}, which the data names; "
                            f"its {len(others)} classes are {listed(others)}; evaluation can "
                            "measure only these (fine-tune it, or leave out the others)")
    if not known:
        return classes
    return {question: tuple(name for name in known[0][1][question]
                            if all(name in names[question] for _, names in known[1:]))
            for question in classes}


def names_of(head, classes):
    """The names of a head's rows; numbers where it has none and the data has numbers; or None."""
    if head.names or len(classes) != 1:
        return head.names
    (question, names), = classes.items()
    numbered = head.count and all(name.isdecimal() for name in names)
    return {question: tuple(map(str, range(head.count)))} if numbered else None


def rows_of(head, classes, evaluate):
    """The row of each class in one head; see `match`."""
    if not head.count:
        return None
    names = names_of(head, classes) if evaluate else head.names
    if names is None:
        return rows_without_names(head, classes, evaluate)
    keys = [(question, name) for question in names for name in names[question]]
    place = {key: row for row, key in reversed(list(enumerate(keys)))}
    wanted = [(question, name) for question in classes for name in classes[question]]
    rows = [place.get(key) for key in wanted]
    kept = [name for (_, name), row in zip(wanted, rows) if row is not None]
    fresh = [name for (_, name), row in zip(wanted, rows) if row is None]
    if rows != list(range(head.count)):
        new = f"; {len(fresh)} {'is' if len(fresh) == 1 else 'are'} new ({listed(fresh)})"
        print(f"{head.flag}: of its head the rows of {len(kept)} classes are kept by name"
              + f" ({listed(kept)})" * bool(kept) + new * bool(fresh))
    return rows


def rows_without_names(head, classes, evaluate):
    """The row of each class in a head that tells no names."""
    names = [name for part in classes.values() for name in part]
    if len(names) == head.count:
        print(f"{head.flag}: tells no class names; its {head.count} rows are taken for the data's "
              f"classes in their order ({listed(names, 2)})")
    elif (head.count, len(names)) == (710, 400):
        print(f"{head.flag}: the first 400 of its 710 classes are taken for Kinetics-400, as in "
              "InternVideo and UniFormerV2; VideoMAE V2's are in another order, for which see "
              "--head-rows")
    elif evaluate:
        raise UserError(f"{head.flag}: has {head.count} classes without names, so that none of the "
                        f"{len(names)} that the data names can be found among them; number the "
                        "data's classes by its rows, give --head-rows, or put a questions.json "
                        "beside it")
    else:
        print(f"{head.flag}: the head for {len(names)} classes is new; the file's {head.count} "
              "tell no names")
        return [None] * len(names)
    return list(range(len(names)))


def listed(names, most=5):
    """The first names on one line, and that there are more."""
    return ", ".join(names[:most]) + ", ..." * (len(names) > most)
