"""The exceptions that a user is meant to read."""


class UserError(Exception):
    """Bad input, or a condition that the user can mend: the message says what, where and what to do.

    The command line and the jobs print the message alone, without a traceback, and exit with 1.
    """


class DamagedFile(UserError, ValueError):
    """A file that cannot be parsed; a ``ValueError`` too, as what the parser raises, for those who can do without the file."""
