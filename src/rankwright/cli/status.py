"""`rankwright status`: what runs, and how it does."""

import time

from rich.markup import escape

from rankwright.cli import options
from rankwright.cli.output import console, print_json, table
from rankwright.executor.backends.tools import ToolError
from rankwright.executor.launch_record import LaunchRecord, read_records, remove_record
from rankwright.executor.launch_state import LaunchState, is_over
from rankwright.executor.submit import describe_place, launch_of

_STYLES = {"ready": "green", "failed": "red", "unknown": "yellow", "ended": "dim"}


def run(as_json: options.Json = False) -> None:
    """Show the launches of this user: state, URL, replicas and queue.

    One that has ended is shown once, and then forgotten. One that has failed on Kubernetes is shown
    until `rankwright stop` deletes its objects.
    """
    found = [(record, look(record)) for record in read_records()]
    if as_json:
        print_json({"launches": [as_value(record, state) for record, state in found]})
    elif not found:
        print("nothing is launched")
    else:
        made = table("launch", "backend", "state", "URL", "replicas", "running", "waiting", "age")
        for record, state in found:
            server = state.server
            made.add_row(
                record.id,
                record.backend,
                f"[{_STYLES.get(state.phase, 'default')}]{state.phase}[/]",
                state.url or "",
                f"{server.replicas_up if server else 0}/{record.num_replicas}",
                str(server.running) if server else "",
                str(server.waiting) if server else "",
                _age(time.time() - record.created_s),
            )
            detail = f" ({escape(state.detail)})" if state.detail else ""
            made.add_row(f"[dim]  {escape(describe_place(record))}{detail}[/]")
        console().print(made)
    for record, state in found:
        if is_over(record, state.phase):
            remove_record(record.id)


def look(record: LaunchRecord) -> LaunchState:
    """Return the state of a launch; 'unknown', with the reason, where nobody says."""
    try:
        return launch_of(record).look()
    except (ToolError, OSError) as error:
        return LaunchState("unknown", str(error))


def as_value(record: LaunchRecord, state: LaunchState) -> dict[str, object]:
    """Return a launch and its state as JSON shows them."""
    server = state.server
    return {
        **record.model_dump(mode="json", exclude={"schema_version", "url"}),
        "state": state.phase,
        "detail": state.detail,
        "url": state.url,
        "replicas_up": server.replicas_up if server else 0,
        "requests_running": server.running if server else None,
        "requests_waiting": server.waiting if server else None,
    }


def _age(seconds: float) -> str:
    """Return a duration in its largest unit.

    >>> _age(12), _age(150), _age(90_000)
    ('12 s', '2 min', '25 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds // 60:.0f} min" if seconds < 6000 else f"{seconds // 3600:.0f} h"
