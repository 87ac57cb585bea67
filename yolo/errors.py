"""The errors that a person can act on: one line that says what, where, and what to do."""

LONGEST_LINE = 1000  # characters


def one_line(text: str) -> str:
    """Return text with what no terminal should get escaped, and without the middle if it is long.

    Names and lines from strangers' files stand in errors: they may hold anything.
    """
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    if len(shown) <= LONGEST_LINE:
        return shown
    return f"{shown[: LONGEST_LINE * 2 // 3]} ... {shown[-LONGEST_LINE // 3 + 5 :]}"


def reason(error: Exception) -> str:
    """Return why something failed: of an error of the system, without number and file."""
    return getattr(error, "strerror", None) or str(error)


class UserError(Exception):
    """The user's data, files or machine are wrong: the scripts print one line and exit 1."""

    def __str__(self) -> str:
        """Return the message; a loader's worker sends it with its whole traceback before it."""
        text = super().__str__().rsplit(f"{__name__}.{type(self).__name__}: ", 1)[-1]
        return one_line(text.strip())


class UsageError(UserError):
    """A flag or a configuration value is wrong: the scripts print one line and exit 2."""
