"""One process at a time in a folder: a lock that the system releases when its holder ends, however it ends.

The lock is on a file in the folder, which says who holds it and is removed at the end. One that a kill left behind holds
nothing. `flock` on a network file system is a lock of all its machines where the server has locks at all; where a file
system has none, the lock is taken as held, with a warning: then nothing keeps two runs apart.
"""

import contextlib
import errno
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_HELD = {errno.EAGAIN, errno.EACCES, errno.EDEADLK}  # what a lock that another has is called, by the kinds of lock
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}
_POLL_SECONDS = 0.2


class HeldError(Exception):
    """Another process holds the lock; the message says which."""


@contextlib.contextmanager
def held(path: Path, *, wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the lock file `path` while the block runs. Its folder must be there.

    wait: told once who holds the lock, where another process does; then this one waits for it. Without it, HeldError says
    who. OSError where the file cannot be made.
    """
    file = _take(path, wait)
    try:
        yield
    finally:
        # Removed while it is held: who opened it meanwhile gets the lock of a file without a name, and sees that.
        with contextlib.suppress(OSError):
            path.unlink()  # Windows refuses, as it is open: it stays, and holds nothing
        file.close()


def _take(path: Path, wait: Callable[[str], None] | None) -> TextIO:
    told = False
    while True:
        file = open(path, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115 - what holds the lock is that it is open
        try:
            taken = _lock(file)
            if taken and _is_named(file, path):
                file.truncate(0)
                file.write(f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
                file.flush()
                return file
            if not taken and not told:
                holder = _holder(file)
                if wait is None:
                    raise HeldError(holder)
                wait(holder)
                told = True
        except BaseException:
            file.close()
            raise
        file.close()
        if not taken:
            time.sleep(_POLL_SECONDS)


def _lock(file: TextIO) -> bool:
    """Whether the lock of an open file is now ours."""
    if sys.platform == "win32":
        try:
            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    for take in (fcntl.flock, fcntl.lockf):  # some network file systems have only the second, which threads share
        try:
            take(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in _HELD:
                return False
            if error.errno not in _NO_LOCKS:
                raise
    print(
        f"warning: {file.name}: this file system has no locks; nothing keeps two processes apart here", file=sys.stderr
    )
    return True


def _holder(file: TextIO) -> str:
    """What the holder of a lock wrote of itself."""
    file.seek(0)
    with contextlib.suppress(OSError):  # Windows lets nobody read what is locked
        return " ".join(file.read().split()) or "another process"
    return "another process"


def _is_named(file: TextIO, path: Path) -> bool:
    """Whether an open file is still the one of that name, and not one that its last holder removed."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
