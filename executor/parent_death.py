"""A rank must not outlive what started it: it would hold its GPU, and nobody would know."""

import os
import threading

# Set by a parent that holds the other end of the rank's standard input for as long as it lives.
VARIABLE = "RANKWRIGHT_END_WITH_STDIN"


def end_with_parent() -> None:
    """End this process when its standard input ends, where the parent has said so.

    A pipe, and not `PR_SET_PDEATHSIG`: that signal comes when the thread that started the process
    ends, and actors start processes from threads of a pool.
    """
    if os.environ.get(VARIABLE) == "1":
        threading.Thread(target=_wait, name="parent-death", daemon=True).start()


def _wait() -> None:
    while os.read(0, 1024):
        pass
    os._exit(1)
