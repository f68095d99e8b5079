"""What the user is told of a launch elsewhere while its phase changes."""

import io

from rankwright.executor.launch_state import LaunchState
from rankwright.executor.phase_view import PhaseView


def said(*states: LaunchState) -> list[str]:
    stream = io.StringIO()
    view = PhaseView("job-1", stream=stream)
    for state in states:
        view.show(state)
    return stream.getvalue().splitlines()


LOADING = LaunchState("loading", "on a[1-2]")
READY = LaunchState("ready", "on a[1-2]", "http://a1:8000")
CLOSED = LaunchState("ready", "on a[1-2]; its port is closed to this machine", "http://a1:8000")
STOPPING = LaunchState("stopping", "draining", "http://a1:8000")


def test_each_change_is_said_once() -> None:
    lines = said(LOADING, LOADING, READY, READY)
    assert lines[0] == "rankwright: job-1 is loading: on a[1-2]"
    assert lines[1].startswith("rankwright: ready in 0.0 s: job-1 on http://a1:8000")
    assert len(lines) == 2


def test_a_server_that_closed_its_port_while_it_stops_is_not_ready_again() -> None:
    assert said(STOPPING, CLOSED) == ["rankwright: job-1 is stopping: draining"]
