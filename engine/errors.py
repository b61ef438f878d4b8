"""What ends a run early, and how it is said: one line, an exit code, never a traceback."""


class UserError(ValueError):
    """The user can correct this. The message is one line: what is wrong, where, what to do.

    Exit code 2.
    """

    def __str__(self):
        return printable(super().__str__())


class RunError(RuntimeError):
    """A run cannot go on: not finite numbers, no memory, a full disk. One line. Exit code 1."""


class Interrupted(RunError):
    """The run was asked to end by SIGINT or SIGTERM. One line. Exit code 130."""


def printable(text):
    """The text on one line, as any terminal shows it.

    Characters that do not print become escapes. File names may hold line breaks, and bytes that
    are not UTF-8.
    """
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode()
                   for letter in text)
