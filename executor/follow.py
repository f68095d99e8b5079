"""Follows a launch that runs elsewhere: shows it until it ends, or leaves it running.

Ctrl-C means one of two things, so it asks; where nobody can answer, it leaves the launch running,
because ending one by mistake costs more than ending one later.
"""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

from rankwright.executor.backends.tools import ToolError
from rankwright.executor.launch_record import remove_record
from rankwright.executor.launch_state import FINAL, Launch, LaunchState, is_over
from rankwright.executor.phase_view import PhaseView

EXIT_OK, EXIT_FAILED = 0, 5

# Logs are files and cost nothing to look at; each look at the state is a question to a scheduler
# that thousands share, so a phase that lasts is asked after less and less often.
_LOG_PERIOD_S = 0.25
_FIRST_LOOK_S, _LAST_LOOK_S, _SLOWER_EACH = 0.5, 10.0, 1.15


class _TerminatedError(KeyboardInterrupt):
    """SIGTERM came: somebody ends this process, not the launch."""


def follow(launch: Launch, view: PhaseView) -> int:
    """Show `launch` until it ends; return 0, or 5 where it failed.

    SIGTERM, Ctrl-C without a terminal and a second Ctrl-C leave it running, and return 0.
    """
    with _term_as_interrupt():
        try:
            state = until_final(launch, view)
        except KeyboardInterrupt as interrupt:
            if not _asked_to_stop(launch, view, interrupt):
                return _leave(launch, view)
            view.say("stopping once running requests are done (Ctrl-C: leave it to itself)")
            try:
                launch.stop(drain=True)
                state = until_final(launch, view)
            except KeyboardInterrupt:
                return _leave(launch, view)
    return end(launch, view, state)


def until_final(
    launch: Launch, view: PhaseView, within_s: float | None = None, *, logs: bool = True
) -> LaunchState:
    """Return the state in which `launch` ended, showing it meanwhile, with its `logs` or without.

    Raises:
        TimeoutError: It has not ended `within_s` seconds from now.
    """
    deadline_s = None if within_s is None else time.monotonic() + within_s
    period_s, look_at_s, phase = _FIRST_LOOK_S, 0.0, ""
    try:
        while True:
            for line in launch.log_lines() if logs else ():
                view.log(line)
            now_s = time.monotonic()
            if now_s >= look_at_s:
                state = _look(launch)
                view.show(state)
                if state.phase in FINAL:
                    for line in launch.log_lines() if logs else ():
                        view.log(line)
                    return state
                period_s = min(period_s * _SLOWER_EACH, _LAST_LOOK_S)
                if state.phase != phase:
                    period_s, phase = _FIRST_LOOK_S, state.phase
                look_at_s = now_s + period_s
            if deadline_s is not None and now_s > deadline_s:
                raise TimeoutError
            time.sleep(_LOG_PERIOD_S)
    finally:
        view.clear()
        launch.close()


def _look(launch: Launch) -> LaunchState:
    """Return the state; a scheduler that does not answer now may do so later."""
    try:
        return launch.look()
    except ToolError as error:
        return LaunchState("unknown", str(error))


def end(launch: Launch, view: PhaseView, state: LaunchState) -> int:
    """Say how `launch` ended, forget it if nothing is left, and return the exit code it means."""
    record = launch.record
    view.say(f"{record.id} has {state.phase}" + (f": {state.detail}" * bool(state.detail)))
    if is_over(record, state.phase):
        remove_record(record.id)
    else:
        view.say(f"its objects are still there; `rankwright stop {record.id}` deletes them")
    return EXIT_OK if state.phase == "ended" else EXIT_FAILED


def _asked_to_stop(launch: Launch, view: PhaseView, interrupt: KeyboardInterrupt) -> bool:
    if isinstance(interrupt, _TerminatedError):
        return False
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    view.clear()
    print(f"\nrankwright: stop {launch.record.id}? [y/N] ", end="", file=sys.stderr, flush=True)
    try:
        return sys.stdin.readline().strip().lower() in ("y", "yes")
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return False


def _leave(launch: Launch, view: PhaseView) -> int:
    record = launch.record
    view.say(f"{record.id} runs on; `rankwright stop {record.id}` ends it")
    return EXIT_OK


@contextlib.contextmanager
def _term_as_interrupt() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise _TerminatedError

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
