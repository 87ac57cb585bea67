"""The errors that a person can act on: one line that says what, where, and what to do."""


class UserError(Exception):
    """The user's data, files or machine are wrong: the scripts print one line and exit 1."""


class UsageError(UserError):
    """A flag or a configuration value is wrong: the scripts print one line and exit 2."""
