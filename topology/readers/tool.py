"""Runs a tool that asks a driver, and gives it up when the driver holds it."""

import subprocess
from collections.abc import Sequence
from contextlib import suppress

_KILLED_WITHIN_S = 0.5


def run_tool(command: Sequence[str], timeout_s: float) -> str:
    """Return what a command prints, its errors after its output, whatever its exit code.

    Raises:
        FileNotFoundError: There is no such command.
        OSError: It cannot be started.
        subprocess.TimeoutExpired: It did not end in time.
    """
    process = subprocess.Popen(
        list(command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    # Not subprocess.run: after its time limit that waits until the process is gone.
    try:
        output, errors = process.communicate(timeout=timeout_s)
    except BaseException:
        end(process)
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()
        raise
    return output + errors


def end(process: subprocess.Popen[str]) -> None:
    """End a process that we need no more, without waiting for one that the driver holds.

    A process within a driver call cannot be killed; it goes when the call returns.
    """
    process.kill()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_KILLED_WITHIN_S)
