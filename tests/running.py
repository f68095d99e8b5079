"""A request that a server works on while the test goes on."""

import threading
import time
import urllib.request

_GAUGE = 'rankwright_requests_running{replica="0"}'


def start_running(url: str, request: threading.Thread) -> None:
    """Start `request`, which asks the server at `url`, and return while the server works on it.

    The server says ten times a second what runs. Just after an earlier request it may still count
    that one: who took the 1 for this request could stop the server before the request was there.

    Raises:
        AssertionError: The request ended before the server said that it runs.
    """
    while not _says(url, "0.0"):
        time.sleep(0.02)
    request.start()
    while not _says(url, "1.0"):
        assert request.is_alive(), "the request ended before it was seen to run"
        time.sleep(0.02)


def _says(url: str, running: str) -> bool:
    with urllib.request.urlopen(f"{url}/metrics", timeout=20) as response:
        return f"{_GAUGE} {running}\n" in response.read().decode()
