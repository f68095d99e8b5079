"""The `rankwright` command in a process of its own, watched as a user watches it."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[2]


class Command:
    """A command that runs; `terminal` gives it one for its input and its messages."""

    def __init__(
        self, *arguments: str, environment: Mapping[str, str], cwd: Path, terminal: bool = False
    ) -> None:
        self.lines: list[str] = []
        self._ours, theirs = os.openpty() if terminal else os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rankwright", *arguments],
            env={**environment, "PYTHONPATH": str(ROOT / "src"), "TERM": "dumb"},
            cwd=cwd,
            stdin=theirs if terminal else subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=theirs,
            start_new_session=True,
            # What a shell starts in the background ignores Ctrl-C, and so do its children.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        os.close(theirs)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        rest = b""
        with contextlib.suppress(OSError):  # a terminal's other end is gone
            while chunk := os.read(self._ours, 65536):
                *whole, rest = (rest + chunk).split(b"\n")
                self.lines += [line.decode().rstrip() for line in whole]
                self._unfinished = rest.decode(errors="replace")
        self.lines.append(rest.decode())

    _unfinished = ""

    @property
    def text(self) -> str:
        return "\n".join([*self.lines, self._unfinished])

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def url(self, within_s: float = 60) -> str:
        found = self.wait_for(
            lambda: re.search(r"^rankwright: ready in .* on (http://\S+)", self.text, re.M),
            within_s,
        )
        return str(found.group(1))

    def wait_for(self, what: Callable[[], Any], within_s: float = 30) -> Any:
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            if value := what():
                return value
            assert self.process.poll() is None, self.text
            time.sleep(0.02)
        raise AssertionError(f"waited in vain:\n{self.text}")

    def exit_code(self, within_s: float = 40) -> int:
        code = self.process.wait(within_s)
        self._reader.join(10)
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._reader.join(10)
        os.close(self._ours)


@contextlib.contextmanager
def command(*arguments: str, **options: Any) -> Iterator[Command]:
    it = Command(*arguments, **options)
    try:
        yield it
    finally:
        it.close()


def complete(url: str, **body: Any) -> dict[str, Any]:
    """The answer of `/v1/completions`."""
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    result: dict[str, Any] = response.json()
    return result
