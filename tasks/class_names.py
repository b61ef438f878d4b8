"""Match the classes of a data set with the rows of a trained classifier head, by name.

    questions.json beside the weights --> names of the rows of a head --+
    the data set                      --> names of its classes ---------+--> `match` --> rows

The order of the rows in a head and the order of the classes in a data set may differ: folders are
sorted, lists are numbered, and a test set may lack a class. Names make the connection.

- Evaluation (--steps 0) keeps the whole head. It refuses a class that the head does not know.
- Training makes a head for the classes of the data. Classes with a known name start from their old
  row; the others start from new random numbers.
- Official files contain no names. In evaluation, class names that are numbers are then row
  numbers. If there are as many classes as rows, they are matched in order. Otherwise evaluation
  is refused, and training starts with a new head.

>>> head = Head("--weights RUN", 3, {"label": ("clap", "jump", "wave")})
>>> match([head], {"label": ("wave", "clap")}, evaluate=True)
({'label': ('clap', 'jump', 'wave')}, [[0, 1, 2]])
>>> match([head], {"label": ("jump", "wave", "xray")}, evaluate=False)
--weights RUN: the rows of 2 classes are kept by name (jump, wave); 1 is new (xray)
({'label': ('jump', 'wave', 'xray')}, [[1, 2, None]])
"""

import json
from pathlib import Path
from typing import NamedTuple

import weights
from engine.errors import UserError
from weights.places import MODEL_FILES, split


class Head(NamedTuple):
    """A classifier head in a file of weights, and the names of its rows."""

    flag: str  # the flag and the path that the user typed, for messages
    count: int  # number of rows; 0 = there is no head
    names: dict | None  # {question: names}, concatenated in the rows; None = the file has none


def write(folder, classes, several=()):
    """Write questions.json: {question: names}, in the order of the logits.

    A clip may have several answers to the questions in `several`. These are written as
    {question: {"several": names}}.
    """
    content = {question: {"several": list(names)} if question in several else list(names)
               for question, names in classes.items()}
    weights.write_atomically(Path(folder) / "questions.json",
                        lambda path: Path(path).write_text(json.dumps(content) + "\n"))


def read(source, count):
    """Read the class names that lie beside a file of weights.

    They come from questions.json, or from the config.json of a Hugging Face folder.

    source   path of a run, of its model, or of a file with official weights
    count    rows of the head
    returns  ({question: names}, the questions that may have several answers); (None, empty set)
             if there are no names
    raises   UserError: questions.json is malformed, or names another number of classes
    """
    file = split(source)[0]  # without ::NAME
    folder = file if file.is_dir() else file.parent
    path = folder / "questions.json"
    if not path.exists():
        hugging_face = file.name in MODEL_FILES or file.is_dir()
        names = weights.hub_config(folder).get("id2label") if hugging_face else None
        names = [names.get(str(i)) for i in range(count)] if isinstance(names, dict) else []
        # transformers writes LABEL_0, LABEL_1, ... where its user gave no names.
        named = names and all(isinstance(name, str) for name in names) and names[0] != "LABEL_0"
        return ({"label": tuple(names)} if named else None), frozenset()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        several = frozenset(question for question in content if isinstance(content[question], dict))
        classes = {question: tuple(names["several"] if question in several else names)
                   for question, names in content.items()}
        if not all(isinstance(name, str) for names in classes.values() for name in names):
            raise TypeError("a name is no text")
    except (ValueError, TypeError, LookupError, AttributeError, OSError) as error:
        raise UserError(f"{path}: must hold {{question: names of its answers}} ({error})") from None
    total = sum(map(len, classes.values()))
    if total != count:
        raise UserError(f"{path}: names {total} answers, the weights have {count}")
    return classes, several


def head_of(name, source, count):
    """The Head, with `count` rows, of the weights `source` that the flag --`name` gives."""
    return Head(f"--{name} {source}", count, read(source, count)[0] if count else None)


def match(heads, classes, evaluate):
    """Find the row of each class in each head. Prints one line per head where the order differs.

    heads     list of Head
    classes   {question: names} of the data
    evaluate  True: keep whole heads and refuse unknown classes. False: new rows are allowed
    returns   {question: names}, the order in which labels must be numbered; and for each head a
              list with the row of each name (None = a new row), or None if there is no head
    raises    UserError: a class to evaluate is unknown to a head
    """
    if evaluate:
        classes = known_names(heads, classes)
    return classes, [rows_of(head, classes, evaluate) for head in heads]


def known_names(heads, classes):
    """{question: all names that every head knows}, in the order of the first head. Only questions
    of the data. UserError: a class of the data is unknown to a head."""
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
    """{question: names of the head's rows}. A head without names gets the row numbers as names if
    all class names of the data are numbers, else None."""
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
    row_of_key = {key: row for row, key in reversed(list(enumerate(keys)))}
    needed = [(question, name) for question in classes for name in classes[question]]
    rows = [row_of_key.get(key) for key in needed]
    kept = [name for (_, name), row in zip(needed, rows) if row is not None]
    fresh = [name for (_, name), row in zip(needed, rows) if row is None]
    if rows != list(range(head.count)):
        new = f"; {len(fresh)} {'is' if len(fresh) == 1 else 'are'} new ({listed(fresh)})"
        print(f"{head.flag}: the rows of {len(kept)} classes are kept by name"
              + f" ({listed(kept)})" * bool(kept) + new * bool(fresh))
    return rows


def rows_without_names(head, classes, evaluate):
    """The row of each class in a head without names."""
    names = [name for part in classes.values() for name in part]
    if len(names) == head.count:
        print(f"{head.flag}: contains no class names; its {head.count} rows are matched with the "
              f"data's classes in order ({listed(names, 2)})")
    elif (head.count, len(names)) == (710, 400):
        print(f"{head.flag}: the first 400 of its 710 classes are used for Kinetics-400, as in "
              "InternVideo and UniFormerV2; VideoMAE V2 has another order, for which use "
              "--head-rows")
    elif evaluate:
        raise UserError(f"{head.flag}: has {head.count} classes without names, so the "
                        f"{len(names)} classes of the data cannot be found among them; name the "
                        "data's classes by the row numbers, give --head-rows, or put a "
                        "questions.json beside it")
    else:
        print(f"{head.flag}: the head for {len(names)} classes is new, because the "
              f"{head.count} classes of the file have no names")
        return [None] * len(names)
    return list(range(len(names)))


def listed(names, most=5):
    """The first `most` names on one line, with ", ..." if there are more."""
    return ", ".join(names[:most]) + ", ..." * (len(names) > most)
