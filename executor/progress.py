"""What the user sees while ranks start: a spinner on a terminal, a line now and then elsewhere."""

import sys
import time
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.status import Status

from rankwright.planner.plan import Plan

# Between lines of a log: often enough to see that it goes on, too seldom to fill the log.
_LINE_EVERY_S = 10.0


class Progress:
    """Says on stderr that ranks start, what the first one does, and how long it took."""

    def __init__(self, plan: Plan, *, stream: TextIO | None = None, quiet: bool = False) -> None:
        """Prepare for `plan`; `quiet` says nothing at all."""
        self._stream = sys.stderr if stream is None else stream
        self._quiet = quiet
        count = len(plan.ranks)
        self._what = f"starting {count} rank{'s' * (count > 1)} ({plan.split.label()})"
        self._status: Status | None = None
        self._started_s = self._printed_s = 0.0
        self._text = ""

    def __enter__(self) -> "Progress":
        """Start the clock."""
        self._started_s = self._printed_s = time.monotonic()
        if self._quiet:
            return self
        if self._stream.isatty():
            self._status = Console(file=self._stream).status(f"{escape(self._what)} ...")
            self._status.start()
        else:
            self._print(f"{self._what} ...")
        return self

    def __exit__(self, *_: object) -> None:
        """Take the spinner away."""
        if self._status is not None:
            self._status.stop()
            self._status = None

    def show(self, text: str) -> None:
        """Show `text`: what the first rank does."""
        now_s = time.monotonic()
        seconds = f"{now_s - self._started_s:.0f} s"
        if self._status is not None:
            self._status.update(f"{escape(self._what)} {seconds}  [dim]{escape(text)}[/dim]")
        elif not self._quiet and text != self._text and now_s - self._printed_s >= _LINE_EVERY_S:
            self._text, self._printed_s = text, now_s
            self._print(f"{self._what} {seconds}  {text}")

    def ready(self, what: str) -> None:
        """Say that it took so long until `what`."""
        self.__exit__()
        if not self._quiet:
            self._print(f"ready in {time.monotonic() - self._started_s:.1f} s: {what}")

    def _print(self, text: str) -> None:
        print(f"rankwright: {text}", file=self._stream, flush=True)
