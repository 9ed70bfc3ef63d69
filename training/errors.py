"""The one exception that means: the user can mend this. And how a program says so."""

import contextlib
import errno
import sys
from pathlib import Path
from typing import NoReturn

_REFUSALS = [
    "EACCES",
    "EPERM",
    "EROFS",
    "ENAMETOOLONG",
    "ELOOP",
    "ENOTDIR",
    "ENOSPC",
    "EDQUOT",
    "EFBIG",
    "EIO",
    "ESTALE",
    "EMFILE",
]


class UserError(ValueError):
    """A mistake in an option, a file or the environment; its message names what was found and what is allowed.

    The command-line programs print it as one line and exit with status 2, and so they do with what the system refuses
    (`refused`). Any other exception is a bug and keeps its traceback.
    """


def refused(error: BaseException) -> UserError | None:
    """What the system refuses of a path, and the user can mend, in a line; None for every other error."""
    if not (isinstance(error, OSError) and errno.errorcode.get(error.errno or 0) in _REFUSALS):
        return None
    return UserError(": ".join(str(part) for part in (error.filename, error.strerror) if part))


def fail(error: UserError, program: str = "") -> NoReturn:
    """Print a user's mistake as one line, whatever a library put in it, and exit with status 2."""
    with contextlib.suppress(OSError):  # where even that can't be written there is nobody to tell
        print(
            f"{program or Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True
        )
    raise SystemExit(2)
