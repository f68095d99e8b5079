"""Reads rendered files back and proves that they ask for what the plan says.

Runs after every render. It knows nothing of the templates: it parses what Slurm, Kubernetes and the
engines will parse, so that a template that drifts from the plan cannot ship.
"""

from collections.abc import Callable

from rankwright.planner.parts_plan import OwnPlan, PartsPlan
from rankwright.planner.plan import Plan
from rankwright.templates.checks.commands import check_engine, check_engine_job
from rankwright.templates.checks.engine_objects import check_engine_objects
from rankwright.templates.checks.objects import check_objects
from rankwright.templates.checks.sbatch import check_slurm
from rankwright.templates.engines.table import ENGINES
from rankwright.templates.kubernetes_objects import KUBERNETES_FILE
from rankwright.templates.slurm_job import SLURM_FILE

Check = Callable[[Plan, dict[str, str]], None]


def check(plan: OwnPlan, target: str, files: dict[str, str], on: str | None = None) -> None:
    """Compare `files` with `plan`.

    Raises:
        ManifestMismatchError: They ask for other machines, ranks or GPUs, or carry another plan.
    """
    if isinstance(plan, PartsPlan):
        PART_CHECKS[target](plan, files)
    else:
        CHECKS[target, on](plan, files)


def _engine(target: str) -> Check:
    return lambda plan, files: check_engine(plan, target, files)


def _engine_job(target: str) -> Check:
    return lambda plan, files: check_engine_job(plan, target, files[SLURM_FILE])


def _engine_objects(target: str) -> Check:
    return lambda plan, files: check_engine_objects(plan, target, files[KUBERNETES_FILE])


PART_CHECKS: dict[str, Callable[[OwnPlan, dict[str, str]], None]] = {
    "slurm": lambda plan, files: check_slurm(plan, files[SLURM_FILE]),
    "kubernetes": lambda plan, files: check_objects(plan, files[KUBERNETES_FILE]),
}

CHECKS: dict[tuple[str, str | None], Check] = {
    **{(target, None): own for target, own in PART_CHECKS.items()},
    **{(target, None): _engine(target) for target in ENGINES},
    **{(target, "slurm"): _engine_job(target) for target in ENGINES},
    **{(target, "kubernetes"): _engine_objects(target) for target in ENGINES},
}
