"""The command line: the fields of a stage as flags, errors as one line and an exit code."""

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
    """argparse whose errors are one line, without the usage text of fifty flags before it."""

    def error(self, message):
        self.exit(2, f"train.py: {message} (see python {self.prog} --help)\n")

    def parse_args(self, argv):
        parsed = super().parse_args(argv)
        for name, value in vars(parsed).items():
            if isinstance(value, list):  # what argparse makes of --flag=--
                raise UserError(f"{spelled(name)}: expected a value")
        return parsed


def spelled(name):
    """A field's name as users type it."""
    return "--" + name.replace("_", "-")


def parser_of(kind):
    """A parser for the fields of a stage, in groups; it returns only what was typed."""
    parser = Parser(prog=f"train.py {kind.name}", usage=f"train.py {kind.name} [--FLAG VALUE ...]",
                    description=inspect.getdoc(kind), argument_default=argparse.SUPPRESS,
                    formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False, add_help=False)
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    groups["run"].add_argument("-h", "--help", action="help", help="print this and exit")
    notes = {"": "", "files": "; only with --data", "generated": "; only without --data"}
    for field in dataclasses.fields(kind):
        info = details(field)
        paper = f"; paper: {info['paper']}" if info["paper"] else ""
        shown = '""' if field.default == "" else field.default
        text = f"{info['help']} (default: {shown}{paper}{notes[info['only']]})"
        options = dict(dest=field.name, help=text.replace("%", "%%"))
        if field.type in (bool, "bool"):
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= dict(type=field.type, choices=info["choices"],
                            metavar=None if info["choices"] else field.name.upper())
        groups[info["group"]].add_argument(spelled(field.name), **options)
    return parser


def parse(kind, argv):
    """Class of a stage, ["--flag", "value", ...] -> the stage; its `typed` names what was typed.

    --some-flag and --some_flag are the same. UserError where a value is not legal.
    """
    argv = ["--" + arg[2:].split("=")[0].replace("_", "-") + arg[len(arg.split("=")[0]):]
            if arg.startswith("--") else arg for arg in argv]
    typed = vars(parser_of(kind).parse_args(argv))
    stage = kind(**typed)
    stage.typed = frozenset(typed)
    unused = "generated" if stage.data else "files"
    for field in dataclasses.fields(stage):
        value, info = getattr(stage, field.name), details(field)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            low = info["low"]
            high = 10**9 if info["high"] is None else info["high"]  # what numpy and torch count
            if not math.isfinite(value) or (low is not None and value < low) or value > high:
                raise UserError(f"{spelled(field.name)} {value}: must be at least {low} and at "
                                f"most {high}")
        if value != field.default and info["only"] == unused:  # it would change nothing
            raise UserError(f"{spelled(field.name)}: is for " + (
                "moving shapes; leave it or --data out" if stage.data else
                "video files; a clip of moving shapes is all there is; give --data or leave it "
                "out"))
    return stage


def check_environment():
    """UserError where the variables of torchrun are incomplete. Only process 0 prints."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        if not os.environ.get(name, "0").isdecimal():
            raise UserError(f"{name}={os.environ.pop(name)}: torchrun makes it a number; unset it")
    if processes.several() and not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
        raise UserError(f"WORLD_SIZE={os.environ.pop('WORLD_SIZE')}: several processes are started "
                        "with torchrun; unset it for one")
    if processes.several() and int(os.environ["RANK"]) > 0:
        sys.stdout = open(os.devnull, "w")


def exit_code(command):
    """Call `command()`; print an error as one line -> 0, 1 (RunError), 2 (UserError), 130."""
    def interrupt(*_):
        signal.signal(signal.SIGTERM, before)  # a second one ends the program at once
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)  # as Ctrl-C; `Run.training` handles its own
    try:
        try:
            check_environment()
            command()
            processes.end()
            return 0
        finally:  # inside: torchrun may send SIGTERM to a process that is about to end
            if signal.getsignal(signal.SIGTERM) is interrupt:
                signal.signal(signal.SIGTERM, before)
    except UserError as error:
        lines, code = error.args, 2
    except RunError as error:
        lines, code = error.args, 130 if isinstance(error, Interrupted) else 1
    except KeyboardInterrupt:  # before a stage began, or at the table of the default run
        lines, code = ["interrupted; nothing is lost: the same line goes on"], 130
    for line in lines:
        line = printable(str(line))  # a name may have any characters; an error is one line
        if processes.first_to_say(line):
            several = processes.several()  # with several processes, start behind another's bar
            who = f"\ntrain.py: process {os.environ['RANK']}" if several else "train.py"
            print(f"{who}: {line}", file=sys.stderr)
    return code


def text_of(path, flag):
    """The text of a UTF-8 file that a flag names. UserError where it is none."""
    try:
        if not os.path.isfile(path):  # a pipe would block
            raise OSError("no such file")
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, ValueError) as error:
        raise UserError(f"--{flag} {path}: {error}") from None


def numbers(text, flag):
    """"2,5,8" -> [2, 5, 8], "" -> None; UserError where it is neither."""
    if not text:
        return None
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise UserError(f"--{flag} {text}: give numbers with commas, as 2,5,8")
    return [int(number) for number in text.split(",")]
