"""The errors that a person can act on: one line that says what, where, and what to do."""


class UserError(Exception):
    """The user's data, files or machine are wrong: the scripts print one line and exit 1."""

    def __str__(self) -> str:
        """Return the message; a loader's worker process sends it with its whole traceback before it."""
        return super().__str__().rsplit(f"{__name__}.{type(self).__name__}: ", 1)[-1].strip()


class UsageError(UserError):
    """A flag or a configuration value is wrong: the scripts print one line and exit 2."""
