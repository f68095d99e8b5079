"""What the user sees of a launch elsewhere: its phase, how long it has lasted, and its logs."""

import sys
import time
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.status import Status

from rankwright.executor.launch_state import LaunchState


class PhaseView:
    """A line that changes on a terminal, a line for each change elsewhere; logs above it."""

    def __init__(self, name: str, *, stream: TextIO | None = None) -> None:
        """Prepare for the launch called `name`."""
        self._stream = sys.stderr if stream is None else stream
        self._name = name
        self._console = Console(file=self._stream, highlight=False, soft_wrap=True)
        self._status: Status | None = None
        self._shown = ("", "")
        self._since_s = self._started_s = time.monotonic()

    def show(self, state: LaunchState) -> None:
        """Show `state`."""
        if state.phase == "ready" and self._shown[0] == "stopping":
            return  # its port is closed already; what was told to stop does not get ready again
        now_s = time.monotonic()
        if state.phase != self._shown[0]:
            self._since_s = now_s
        changed = (state.phase, state.detail) != self._shown
        self._shown = (state.phase, state.detail)
        if state.phase == "ready":
            if changed:
                detail = f" ({state.detail})" if state.detail else ""
                took = f"{now_s - self._started_s:.1f} s"
                self.say(f"ready in {took}: {self._name} on {state.url}{detail}")
            return
        text = f"{self._name} is {state.phase}"
        detail = f": {state.detail}" if state.detail else ""
        if not self._console.is_terminal or self._console.is_dumb_terminal:
            if changed:
                self.say(text + detail)
            return
        if self._status is None:
            self._status = self._console.status("")
            self._status.start()
        seconds = f"{now_s - self._since_s:.0f} s"
        self._status.update(f"{escape(text)} [dim]{seconds}{escape(detail)}[/dim]")

    def log(self, line: str) -> None:
        """Print a line of a log."""
        self._console.print(line, style="dim", markup=False)

    def say(self, text: str) -> None:
        """Print a line of ours, in place of the one that changes."""
        self.clear()
        print(f"rankwright: {text}", file=self._stream, flush=True)

    def clear(self) -> None:
        """Take the changing line away."""
        if self._status is not None:
            self._status.stop()
            self._status = None
