"""Every way to render a plan: targets, schedulers around engines, flavors, options of a job."""

import re

from tests.templates.random_plans import gpu_types

from rankwright.planner.plan import Plan
from rankwright.templates.engines.table import ENGINES
from rankwright.templates.kubernetes_flavors import FLAVORS
from rankwright.templates.render import render

Way = tuple[str, str | None, dict[str, object]]  # target, on, options
ENGINE_FLAVORS = ("auto", "deployment", "auto", "statefulset", "leaderworkerset")


def ways(seed: int, made: Plan) -> list[Way]:
    types: dict[str, object] = {} if is_cpu(made) else {"gpu_types": gpu_types(made)}
    job = types | JOB_OPTIONS[seed % len(JOB_OPTIONS)] | {"partition": "paper"}
    flavors = ("auto", list(FLAVORS)[seed % len(FLAVORS)])
    found: list[Way] = [("slurm", None, job)]
    found += [("kubernetes", None, {"flavor": name, **types}) for name in flavors]
    for engine in ENGINES:
        found += [(engine, None, {}), (engine, "slurm", job)]
        flavor = ENGINE_FLAVORS[seed % len(ENGINE_FLAVORS)]
        found.append((engine, "kubernetes", {"flavor": flavor, **types}))
    return found


# What a header may say besides, and a script around what it starts.
JOB_OPTIONS: tuple[dict[str, object], ...] = (
    {},
    {"exclusive": False, "time_limit": "00:30:00", "venv": "/shared/it's venv"},
    {"requeue": False, "constraint": "paper&[paper*1]", "switches": "1@00:10:00"},
    {"container_image": "nvcr.io#x/y:1", "log_dir": "/shared/a $b", "model_path": "/m/`c`"},
    {"container_image": "/x.sif", "container_runtime": "apptainer", "health_check": False},
)


def is_cpu(made: Plan) -> bool:
    return made.cluster.node(made.ranks[0].node).gpus[0].device == "cpu"


REASONS = re.compile(
    r"cannot express|is for one machine|kind\(s\) of pod|the plan is for CPUs|--on slurm"
    r"|GPUs of their nodes|runs on .* and .*, and another engine|makes all replicas alike"
    r"|leaves it to Ray which"
)


def files_of(
    made: Plan, target: str, on: str | None, options: dict[str, object]
) -> dict[str, str] | None:
    """The rendered files; None where the target cannot express the plan, and says so."""
    try:
        return render(made, target, None, on=on, **options)
    except ValueError as error:
        if not REASONS.search(str(error)):
            raise AssertionError(f"{target} on {on}, {options}") from error
        return None
