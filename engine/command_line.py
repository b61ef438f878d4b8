"""The command line: flags from the fields of a stage; one line and an exit code for an error.

    ["--steps", "10"] --> parse(class of the stage) --> stage
    exit_code(command) --> 0, 1, 2 or 130
"""

import argparse
import dataclasses
import inspect
import math
import os
import re
import signal
import sys

from engine import processes
from engine.errors import Interrupted, RunError, UserError, printable
from engine.stage import GROUPS, details


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without a usage text of fifty flags."""

    def error(self, message):
        self.exit(2, f"train.py: {message} (see python {self.prog} --help)\n")

    def parse_args(self, argv):
        parsed = super().parse_args(argv)
        for name, value in vars(parsed).items():
            if isinstance(value, list):  # argparse returns [] for --flag=--
                raise UserError(f"{spelled(name)}: expected a value")
        return parsed


def spelled(name):
    """The name of a field as users type it: "batch_size" -> "--batch-size"."""
    return "--" + name.replace("_", "-")


def parser_of(stage_class):
    """The parser of a class of stages, flags in groups. It returns only flags that were typed."""
    parser = Parser(prog=f"train.py {stage_class.name}",
                    usage=f"train.py {stage_class.name} [--FLAG VALUE ...]",
                    description=inspect.getdoc(stage_class), argument_default=argparse.SUPPRESS,
                    formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False, add_help=False)
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    groups["run"].add_argument("-h", "--help", action="help", help="print this and exit")
    conditions = {"": "", "files": "; only with --data", "generated": "; only without --data"}
    for field in dataclasses.fields(stage_class):
        info = details(field)
        paper = f"; paper: {info['paper']}" if info["paper"] else ""
        shown = '""' if field.default == "" else field.default
        text = f"{info['help']} (default: {shown}{paper}{conditions[info['only']]})"
        options = dict(dest=field.name, help=text.replace("%", "%%"))
        if field.type in (bool, "bool"):
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= dict(type=field.type, choices=info["choices"],
                            metavar=None if info["choices"] else field.name.upper())
        groups[info["group"]].add_argument(spelled(field.name), **options)
    return parser


def parse(stage_class, argv):
    """A class of stages and ["--flag", "value", ...] -> the stage. Its `typed` has the typed flags.

    --some-flag and --some_flag are the same. UserError where a value is not allowed.
    """
    argv = ["--" + arg[2:].split("=")[0].replace("_", "-") + arg[len(arg.split("=")[0]):]
            if arg.startswith("--") else arg for arg in argv]
    typed = vars(parser_of(stage_class).parse_args(argv))
    stage = stage_class(**typed)
    stage.typed = frozenset(typed)
    unused = "generated" if stage.data else "files"
    for field in dataclasses.fields(stage):
        value, info = getattr(stage, field.name), details(field)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            low = info["low"]
            high = 10**9 if info["high"] is None else info["high"]  # within int32
            if not math.isfinite(value) or (low is not None and value < low) or value > high:
                raise UserError(f"{spelled(field.name)} {value}: must be at least {low} and at "
                                f"most {high}")
        if value != field.default and info["only"] == unused:  # the flag would have no effect
            raise UserError(f"{spelled(field.name)}: is for " + (
                "moving shapes; leave out this flag or --data" if stage.data else
                "video files, not for moving shapes; give --data or leave out this flag"))
    return stage


def check_environment():
    """UserError where the variables of torchrun are wrong. Silence all processes but process 0."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        if not os.environ.get(name, "0").isdecimal():
            raise UserError(f"{name}={os.environ.pop(name)}: torchrun sets a number here; unset it")
    if processes.is_distributed() and not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
        raise UserError(f"WORLD_SIZE={os.environ.pop('WORLD_SIZE')}: several processes are started "
                        "with torchrun; unset it for one process")
    if processes.is_distributed() and int(os.environ["RANK"]) > 0:
        sys.stdout = open(os.devnull, "w")


def exit_code(command):
    """Call command(); print an error as one line -> 0; 1, 2 or 130 as in engine/errors.py."""
    def interrupt(*_):
        signal.signal(signal.SIGTERM, before)  # a second SIGTERM ends the program at once
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)  # like Ctrl-C; not in Run.training
    try:
        try:
            check_environment()
            command()
            processes.end()
            return 0
        finally:  # inside the outer try: torchrun may send SIGTERM at this moment
            if signal.getsignal(signal.SIGTERM) is interrupt:
                signal.signal(signal.SIGTERM, before)
    except UserError as error:
        lines, code = error.args, 2
    except RunError as error:
        lines, code = error.args, 130 if isinstance(error, Interrupted) else 1
    except KeyboardInterrupt:  # outside of a stage
        lines, code = ["interrupted; nothing is lost: the same command continues"], 130
    for line in lines:
        line = printable(str(line))  # file names may contain line breaks
        if processes.first_to_print(line):
            several = processes.is_distributed()  # then a new line, after another process's bar
            who = f"\ntrain.py: process {os.environ['RANK']}" if several else "train.py"
            print(f"{who}: {line}", file=sys.stderr)
    return code


def text_of(path, flag):
    """The text of a UTF-8 file given by a flag. UserError where it cannot be read."""
    try:
        if not os.path.isfile(path):  # opening a pipe would block
            raise OSError("no such file")
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, ValueError) as error:
        raise UserError(f"--{flag} {path}: {error}") from None


def numbers(text, flag):
    """A list of integers: "2,5,8" -> [2, 5, 8], "" -> None. UserError for any other text."""
    if not text:
        return None
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise UserError(f"--{flag} {text}: give numbers with commas, as 2,5,8")
    return [int(number) for number in text.split(",")]
