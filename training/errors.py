"""The one exception that means: the user can mend this."""


class UserError(ValueError):
    """A mistake in an option, a file or the environment; its message names what was found and what is allowed.

    The command-line programs print it as one line and exit with status 2; any other exception is a bug and keeps its
    traceback.
    """
