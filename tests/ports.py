"""Ports that a test gives to processes which take them seconds later.

The system would hand out such a port again meanwhile, to a connection of the other xdist worker:
these lie below the range that it hands out, and each worker has a share of its own.
"""

import itertools
import os
import random
import socket
from contextlib import ExitStack

# Above what Ray's workers take (10002 to 19999), below what jobs take by their number (28000 on)
# and what Linux hands out (32768 on).
_FIRST, _SHARE, _WORKERS = 21_000, 1_700, 4
_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _WORKERS
# Runs at the same time on one machine start at different places.
_places = itertools.count(random.SystemRandom().randrange(_SHARE))


def free_port(count: int = 1) -> int:
    """Return a port that nobody listens on, nor on the `count - 1` after it, and no call returned.

    Raises:
        RuntimeError: All ports of this worker are taken.
    """
    for _ in range(_SHARE):
        places = [next(_places) % _SHARE for _ in range(count)]
        ports = [_FIRST + _worker * _SHARE + place for place in places]
        if ports[-1] - ports[0] == count - 1 and _are_free(ports):
            return ports[0]
    raise RuntimeError(f"no {count} free ports from {_FIRST + _worker * _SHARE} on")


def _are_free(ports: list[int]) -> bool:
    with ExitStack() as stack:
        try:
            for port in ports:
                stack.enter_context(socket.create_server(("", port)))
        except OSError:
            return False
    return True
