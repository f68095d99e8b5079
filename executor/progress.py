"""What the user sees while ranks start: a bar on a terminal, a line now and then elsewhere."""

import re
import sys
import time
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from rankwright.planner.parts_plan import PartsPlan
from rankwright.planner.plan import Plan

# Between lines of a log: often enough to see that it goes on, too seldom to fill the log.
_LINE_EVERY_S = 10.0
# What a rank says of how far it is: "layer 3 of 36".
_HOW_FAR = re.compile(r"(\d+) of (\d+)")


class Progress:
    """Says on stderr that ranks start, what the first one does, and how long it took."""

    def __init__(
        self, plan: Plan | PartsPlan, *, stream: TextIO | None = None, quiet: bool = False
    ) -> None:
        """Prepare for `plan`; `quiet` says nothing at all."""
        self._stream = sys.stderr if stream is None else stream
        self._quiet = quiet
        count = plan.num_gpus
        self._what = f"starting {count} rank{'s' * (count > 1)} ({plan.label()})"
        self._bar: Bar | None = None
        self._started_s = self._printed_s = 0.0
        self._text = ""

    def __enter__(self) -> "Progress":
        """Start the clock."""
        self._started_s = self._printed_s = time.monotonic()
        if self._quiet:
            return self
        if self._stream.isatty():
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TimeElapsedColumn(),
                TextColumn("[dim]{task.fields[said]}[/dim]"),
            )
            self._bar = Bar(*columns, console=Console(file=self._stream), transient=True)
            self._bar.add_task(escape(self._what), total=None, said="")
            self._bar.start()
        else:
            self._print(f"{self._what} ...")
        return self

    def __exit__(self, *_: object) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def show(self, text: str) -> None:
        """Show `text`: what the first rank does."""
        now_s = time.monotonic()
        seconds = f"{now_s - self._started_s:.0f} s"
        if self._bar is not None:
            (task,) = self._bar.task_ids
            self._bar.update(task, said=escape(text))
            if found := _HOW_FAR.search(text):
                self._bar.update(task, completed=int(found[1]), total=int(found[2]))
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
