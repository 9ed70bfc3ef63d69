"""The one exception that means: the user can mend this. And how a program says so."""

import sys
from pathlib import Path
from typing import NoReturn


class UserError(ValueError):
    """A mistake in an option, a file or the environment; its message names what was found and what is allowed.

    The command-line programs print it as one line and exit with status 2; any other exception is a bug and keeps its
    traceback.
    """


def fail(error: UserError, program: str = "") -> NoReturn:
    """Print a user's mistake as one line, whatever a library put in it, and exit with status 2."""
    print(f"{program or Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
    raise SystemExit(2)
