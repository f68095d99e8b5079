"""How a launch does: its phase, and what its server says about itself."""

import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from rankwright.executor.launch_record import LaunchRecord

Phase = Literal["queued", "starting", "loading", "ready", "stopping", "ended", "failed", "unknown"]
FINAL: frozenset[Phase] = frozenset({"ended", "failed"})

_HTTP_TIMEOUT_S = 2.0
# A login node often has a proxy for the outside, which knows nothing of the machines inside.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_GAUGE = re.compile(r"^(rankwright_\w+)\{[^}]*\} (\S+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class ServerState:
    """What a server says.

    Attributes:
        status: Of `/health`: 'ok', or what keeps it from answering.
        replicas_up: Replicas that run.
        running: Sequences in the batches of all replicas.
        waiting: Requests that are not yet in one.
    """

    status: str
    replicas_up: int = 0
    running: int = 0
    waiting: int = 0


@dataclass(frozen=True, slots=True)
class LaunchState:
    """How a launch does now.

    Attributes:
        phase: Where it is between submission and end.
        detail: More of it in a few words, such as why it waits.
        url: Of its server, where there is one.
        server: What the server says; None: no answer.
    """

    phase: Phase
    detail: str = ""
    url: str | None = None
    server: ServerState | None = None


def is_over(record: LaunchRecord, phase: Phase) -> bool:
    """Return whether nothing is left of a launch in `phase`, so that its record can go.

    Objects of Kubernetes stay when what they started has failed, until `stop` deletes them.
    """
    return phase == "ended" or (phase == "failed" and record.place.kind != "kubernetes")


class Launch(Protocol):
    """A launch that can be looked at and stopped; a back end has one class of them."""

    @property
    def record(self) -> LaunchRecord:
        """What it is and where."""
        ...

    def look(self) -> LaunchState:
        """Return how it does now."""
        ...

    def log_lines(self) -> list[str]:
        """Return what its logs have got since the last call."""
        ...

    def stop(self, *, drain: bool) -> None:
        """Begin to end it: after its running requests, or at once."""
        ...

    def close(self) -> None:
        """Stop to look at it; it goes on."""
        ...


def ask_server(url: str) -> ServerState | None:
    """Return what the server at `url` says about itself; None where none answers."""

    def fetch(page: str) -> str:
        try:
            with _OPENER.open(url + page, timeout=_HTTP_TIMEOUT_S) as response:
                text: bytes = response.read()
        except urllib.error.HTTPError as error:
            text = error.read()  # 503, with the reason
        return text.decode(errors="replace")

    return read_server(fetch)


def read_server(fetch: Callable[[str], str]) -> ServerState | None:
    """Return what a server says on the pages that `fetch` gets; None where none answers."""
    try:
        status = str(json.loads(fetch("/health"))["status"])
        metrics = fetch("/metrics")
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not a server of ours, or one that ends just now
    return ServerState(
        status,
        replicas_up=_sum(metrics, "rankwright_replica_up"),
        running=_sum(metrics, "rankwright_requests_running"),
        waiting=_sum(metrics, "rankwright_requests_waiting"),
    )


def phase_of(server: ServerState) -> Phase:
    """Return the phase of a launch whose server answers."""
    if server.status == "starting":
        return "loading"
    if server.status == "draining":
        return "stopping"
    return "failed" if server.status == "failed" else "ready"


def _sum(metrics: str, name: str) -> int:
    return int(sum(float(value) for found, value in _GAUGE.findall(metrics) if found == name))
