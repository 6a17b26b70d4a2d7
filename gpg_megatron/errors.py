"""The one exception that means "the user can mend this": one clear line, exit code 2."""


class UserError(ValueError):
    """Bad input or configuration.

    The message is a single line that says what is wrong, where, and what would be right.
    Commands print it without a traceback and exit with code 2.
    """
