"""The one exception that a user is meant to read."""


class UserError(Exception):
    """Bad input, or a condition that the user can mend: the message says what, where and what to do.

    The command line and the jobs print the message alone, without a traceback, and exit with 1.
    """
