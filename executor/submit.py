"""`launch` through a scheduler: render, submit, follow. A new one is a row here.

Imports neither torch nor the server, so that it runs on a login node.
"""

import contextlib
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import cast

from rankwright.executor.backends.tools import ToolError
from rankwright.executor.follow import EXIT_FAILED, EXIT_OK, follow
from rankwright.executor.launch_record import LaunchRecord, write_record
from rankwright.executor.launch_state import Launch
from rankwright.executor.phase_view import PhaseView
from rankwright.planner.parts_plan import OwnPlan
from rankwright.templates.options import default_name

# Modules with a `submit(plan, folder, settings)`.
SUBMITTERS = {"slurm": "slurm", "kubernetes": "kubernetes"}
# Classes of launches by the kind of place that their records name.
_LAUNCHES = {
    "process": ("process", "ProcessLaunch"),
    "slurm": ("slurm", "SlurmLaunch"),
    "kubernetes": ("kubernetes", "KubernetesLaunch"),
}
_FOLDER = "rankwright-jobs"

Submitter = Callable[[OwnPlan, Path, Mapping[str, object]], Launch]


def submit_and_follow(
    plan: OwnPlan,
    backend: str,
    *,
    folder: Path | None = None,
    settings: Mapping[str, object] | None = None,
    detach: bool = False,
) -> int:
    """Submit `plan` and follow it to its end; return 0, or 5 where it failed.

    Args:
        plan: What to run.
        backend: A key of `SUBMITTERS`.
        folder: For the rendered files; None: one of its own below `rankwright-jobs` here.
        settings: Options of the target, as for `render`.
        detach: Return once it is submitted.

    Raises:
        MissingToolError: The scheduler's program is not here.
        ValueError: An option is not valid, or the scheduler does not have what the plan asks for.
    """
    module = import_module(f"rankwright.executor.backends.{SUBMITTERS[backend]}")
    view = PhaseView(plan.model.name)
    try:
        launch = cast(Submitter, module.submit)(plan, folder or _new_folder(plan), settings or {})
    except ToolError as error:
        view.say(str(error))
        return EXIT_FAILED
    record = launch.record
    with contextlib.suppress(OSError):  # then `status` does not list it: no reason to give up
        write_record(record)
    view.say(f"submitted {describe_place(record)} as {record.id}")
    if detach:
        view.say(f"`rankwright status` shows it, `rankwright stop {record.id}` ends it")
        return EXIT_OK
    return follow(launch, view)


def launch_of(record: LaunchRecord) -> Launch:
    """Return the launch that `record` is about."""
    module, name = _LAUNCHES[record.place.kind]
    made = getattr(import_module(f"rankwright.executor.backends.{module}"), name)
    return cast(Launch, made(record))


def describe_place(record: LaunchRecord) -> str:
    """Return where a launch is, in words."""
    place = record.place
    if place.kind == "slurm":
        return f"job {place.job}"
    if place.kind == "kubernetes":
        return f"{place.name} in namespace {place.namespace}"
    return f"process {place.pid} on {place.host}"


def _new_folder(plan: OwnPlan) -> Path:
    """Return a folder that no other launch has."""
    base = Path(_FOLDER) / default_name(plan)
    number = 1
    while (folder := base.with_name(f"{base.name}-{number}")).exists():
        number += 1
    return folder
