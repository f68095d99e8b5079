"""Reads and writes plan files, and refuses plans that were made for another cluster."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from rankwright.planner.plan import Plan
from rankwright.topology.cluster import Cluster
from rankwright.topology.whole_file import write_whole

if TYPE_CHECKING:
    from rankwright.planner.disaggregated_plan import DisaggregatedPlan
    from rankwright.planner.parts_plan import PartsPlan


def read_plan(path: str | Path) -> Plan:
    """Return the plan in the file at `path`.

    Raises:
        ValueError: There is no such file, it is no plan, it is one of two pools or of unlike
            replicas, or it contradicts itself; one line that names the field.
    """
    plan = read_any_plan(path)
    if isinstance(plan, Plan):
        return plan
    from rankwright.planner.parts_plan import PartsPlan

    if isinstance(plan, PartsPlan):
        raise ValueError(
            f"plan {str(path)!r} has replicas of different shapes ({plan.label()}), and one shape "
            "is needed here; plan again with --mixed-shapes never"
        )
    return _of_one_pool(plan, path)


def read_launchable(path: str | Path) -> "Plan | PartsPlan":
    """Return the plan in the file at `path`, of one pool, its replicas alike or not.

    Raises:
        ValueError: As `read_plan`.
    """
    plan = read_any_plan(path)
    if isinstance(plan, Plan):
        return plan
    from rankwright.planner.parts_plan import PartsPlan

    return plan if isinstance(plan, PartsPlan) else _of_one_pool(plan, path)


def read_any_plan(path: str | Path) -> "Plan | PartsPlan | DisaggregatedPlan":
    """Return the plan in the file at `path`, of one pool or of two, of like replicas or unlike.

    Raises:
        ValueError: There is no such file, it is no plan, or it contradicts itself; one line that
            names the field.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"plan {str(path)!r} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"plan {str(path)!r} is not a text file") from None
    kind = _kind_of(text)
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise ValueError(f"plan {str(path)!r}: {_first_problem(error)}") from None


def _of_one_pool(plan: "Plan | DisaggregatedPlan", path: str | Path) -> Plan:
    if isinstance(plan, Plan):
        return plan
    raise ValueError(
        f"plan {str(path)!r} has separate pools for prefill and decode, which the executor of "
        f"rankwright does not run; `rankwright render {path} --target {plan.engine}` writes it "
        "for an engine that does"
    )


def _kind_of(text: str) -> "type[Plan | PartsPlan | DisaggregatedPlan]":
    try:
        fields = json.loads(text)
    except ValueError:
        return Plan  # what is wrong with it is said by who reads it as a plan
    # The rarer kinds are loaded where a file is one: `plan`, which only writes, does without.
    if isinstance(fields, dict) and "prefill" in fields:
        from rankwright.planner.disaggregated_plan import DisaggregatedPlan

        return DisaggregatedPlan
    if isinstance(fields, dict) and "parts" in fields:
        from rankwright.planner.parts_plan import PartsPlan

        return PartsPlan
    return Plan


def write_plan(plan: "Plan | PartsPlan | DisaggregatedPlan", path: str | Path) -> None:
    """Write `plan` to `path`, whole or not at all.

    Raises:
        ValueError: The folder does not exist or cannot be written to.
    """
    try:
        write_whole(path, plan.model_dump_json(indent=2) + "\n")
    except OSError as error:
        raise ValueError(f"plan {str(path)!r} cannot be written: {error.strerror}") from None


def check_cluster(plan: Plan, cluster: Cluster) -> None:
    """Check that `plan` was made for `cluster`.

    Raises:
        ValueError: It was not; one line that says what differs.
    """
    if plan.cluster_fingerprint == cluster.fingerprint:
        return
    wanted, found = plan.cluster, cluster
    raise ValueError(
        f"the plan was made for {wanted.describe()} and this is {found.describe()}: "
        f"{_difference(wanted, found)}; plan again for this cluster"
    )


def _first_problem(error: ValidationError) -> str:
    """Return the first of `error`'s problems in one line, with the field's path."""
    problem = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in problem["loc"])
    message = str(problem["msg"]).removeprefix("Value error, ").replace("\n", " ")
    given = problem.get("input")
    shown = ""
    if isinstance(given, str | int | float | bool) and problem["type"] != "json_invalid":
        shown = f" (got {json.dumps(given)})"
    more = error.error_count() - 1
    others = f"; and {more} more" if more else ""
    return f"{where}: {message}{shown}{others}" if where else f"{message}{others}"


def _difference(wanted: Cluster, found: Cluster) -> str:
    """Return the first fact that differs."""
    if wanted.num_nodes != found.num_nodes:
        return f"{wanted.num_nodes} machines against {found.num_nodes}"
    if wanted.num_gpus != found.num_gpus:
        return f"{wanted.num_gpus} GPUs against {found.num_gpus}"
    for index in range(wanted.num_nodes):
        one, other = wanted.node(index), found.node(index)
        if len(one.gpus) != len(other.gpus):
            return f"node {index} has {len(other.gpus)} GPUs instead of {len(one.gpus)}"
        for a, b in zip(one.gpus, other.gpus, strict=True):
            facts = (a.index, a.device, round(a.total_memory_bytes / 2**30))
            others = (b.index, b.device, round(b.total_memory_bytes / 2**30))
            if facts != others:
                return (
                    f"node {index} GPU {a.index} is {b.device} with "
                    f"{b.total_memory_bytes / 1e9:.0f} GB instead of {a.device} with "
                    f"{a.total_memory_bytes / 1e9:.0f} GB"
                )
        links = {(link.a, link.b): link.kind for link in one.links}
        for link in other.links:
            kind = links.pop((link.a, link.b), "none")
            if kind != link.kind:
                return (
                    f"node {index}: GPUs {link.a} and {link.b} are joined by {link.kind} instead "
                    f"of {kind}"
                )
        if links:
            (a_gpu, b_gpu), kind = next(iter(links.items()))
            return f"node {index}: the link {kind} of GPUs {a_gpu} and {b_gpu} is missing"
    return "the fabric between the machines differs"
