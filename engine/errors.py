"""The errors that end a run: each prints one line and has an exit code; never a traceback."""


class UserError(ValueError):
    """The user can correct it. One line: what is wrong, where, what to do. Exit code 2."""

    def __str__(self):
        return printable(super().__str__())


class RunError(RuntimeError):
    """A run cannot continue: not finite numbers, no memory, a full disk. One line, exit code 1."""


class Interrupted(RunError):
    """SIGINT or SIGTERM ended the run. One line, exit code 130."""


def printable(text):
    """The text on one line, with escapes for characters that do not print.

    File names may contain line breaks, and bytes that are not UTF-8.
    """
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode()
                   for letter in text)
