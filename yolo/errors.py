"""The errors that a person can act on: one line that says what, where, and what to do."""


class UserError(Exception):
    """Something in the user's data, files or machine is wrong. The scripts print it as one line and exit 1."""


class UsageError(UserError):
    """A flag or a configuration value is wrong. The scripts print it as one line and exit 2."""
