"""Log files that grow, and appear, while they are read."""

from collections.abc import Callable, Iterable
from pathlib import Path

# How a line of a rank's log begins that the user should see.
WARNING = "warning: "


class LogTail:
    """What a changing set of files has got since it was last asked."""

    def __init__(self, find: Callable[[], Iterable[Path]]) -> None:
        """Read the files that `find` returns at each call, from their beginning."""
        self._find = find
        self._read_bytes: dict[Path, int] = {}

    def lines(self) -> list[str]:
        """Return the new lines, file by file; a line that has no end yet waits for it."""
        found: list[str] = []
        for path in self._find():
            try:
                with path.open("rb") as file:
                    file.seek(self._read_bytes.get(path, 0))
                    new = file.read()
            except FileNotFoundError:
                continue
            whole = new[: new.rfind(b"\n") + 1]
            self._read_bytes[path] = self._read_bytes.get(path, 0) + len(whole)
            found += whole.decode(errors="replace").splitlines()
        return found
