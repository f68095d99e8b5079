"""Programs of a scheduler: found or asked for by name, run, and their refusals passed on."""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

# A controller that is busy answers in some seconds; Slurm's own clients give up after 10 by default
# (slurm.conf(5), MessageTimeout).
_TIMEOUT_S = 60.0


class MissingToolError(Exception):
    """A program that a back end needs is not installed; exit code 4."""


class ToolError(Exception):
    """A scheduler's program refused; one line, exit code 5."""


def require(program: str, remedy: str) -> None:
    """Check that `program` is in the PATH.

    Raises:
        MissingToolError: It is not; `remedy` says what to install, or where to go.
    """
    if shutil.which(program) is None:
        raise MissingToolError(f"{program} is not installed here; {remedy}")


def run_tool(
    command: Sequence[str], *, cwd: Path | None = None, stdin: str | None = None
) -> "subprocess.CompletedProcess[str]":
    """Return what `command` printed, whatever its exit code.

    Raises:
        ToolError: It does not end.
    """
    try:
        return subprocess.run(
            command,
            cwd=cwd,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
            # Ctrl-C is for us: it must not also end a submission half way.
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        raise ToolError(f"`{command[0]}` has not answered for {_TIMEOUT_S:g} s") from None


def check_tool(command: Sequence[str], *, cwd: Path | None = None, stdin: str | None = None) -> str:
    """Return what `command` printed.

    Raises:
        ToolError: It failed; with what it said.
    """
    done = run_tool(command, cwd=cwd, stdin=stdin)
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
        raise ToolError(f"`{' '.join(command[:2])}` failed: {said}")
    return done.stdout
