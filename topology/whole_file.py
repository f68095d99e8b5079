"""Writes files that appear whole or not at all, and leaves devices and pipes what they are."""

import errno
import os
import tempfile
from pathlib import Path


def write_whole(path: str | Path, text: str) -> None:
    """Write `text` to `path`: under a temporary name beside it, which is then renamed.

    Where `path` is a link, the file that it leads to is written. A device or a pipe, such as
    `/dev/stdout`, is written to: renaming a file over it would take it away.

    Raises:
        OSError: It cannot be written; its `filename` is `path`, and what was there is still there.
    """
    given = Path(path)
    try:
        # Asked of the path as it is given: a pipe behind `/dev/stdout` has no path of its own.
        if given.exists() and not (given.is_file() or given.is_dir()):
            with given.open("w", encoding="utf-8") as file:
                file.write(text)
        else:
            _replace(Path(os.path.realpath(path)), text)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def _replace(target: Path, text: str) -> None:
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:100]}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        # mkstemp makes files that only their owner reads; these are as public as any other.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
