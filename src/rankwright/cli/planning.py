"""From what was typed to a `Plan`: the road that `plan`, `launch`, `generate` and `bench` share."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, overload

from rankwright.cli.options import calibrated, check_positive, with_dtypes
from rankwright.cost_model.dtypes import Dtype
from rankwright.cost_model.model_spec import ModelSpec
from rankwright.cost_model.read_model import read_model
from rankwright.cost_model.workload import Workload
from rankwright.planner.make_plan import Pins, make_plan
from rankwright.planner.plan import Plan
from rankwright.planner.read_plan import read_launchable, read_plan
from rankwright.planner.solver import TIME_LIMIT_S
from rankwright.topology.cluster import Cluster
from rankwright.topology.read_cluster import read_cluster

if TYPE_CHECKING:
    from rankwright.cost_model.trace import TraceRow
    from rankwright.planner.disaggregated_plan import DisaggregatedPlan
    from rankwright.planner.parts_plan import PartsPlan


@dataclass(frozen=True, slots=True)
class Asked:
    """What every planner is given, read and checked.

    Attributes:
        model: With the dtypes that were asked for.
        cluster: With what was measured on it.
        workload: What is to be served.
        memory_budget_bytes: Of each GPU; None: all that is free.
        time_limit_s: How long the solver may take.
    """

    model: ModelSpec
    cluster: Cluster
    workload: Workload
    memory_budget_bytes: int | None
    time_limit_s: float

    @classmethod
    def read(
        cls,
        model: ModelSpec,
        cluster: str,
        workload: Workload,
        *,
        memory_budget_gb: float | None = None,
        dtype: Dtype | None = None,
        kv_dtype: Dtype | None = None,
        time_limit_s: float = TIME_LIMIT_S,
        calibration: Path | None = None,
    ) -> "Asked":
        """Return it for the cluster that `cluster` names.

        It uses `calibration`, or where that is None what `rankwright calibrate` left for these
        GPUs.

        Raises:
            ValueError: An input is unsound; names the option or the field.
            ProbeError: `cluster` is "auto" and this machine cannot be read.
        """
        check_positive("--memory-budget", memory_budget_gb, " GB")
        check_positive("--time-limit", time_limit_s, " s")
        machines = calibrated(read_cluster(cluster), calibration)
        return cls(
            with_dtypes(model, dtype, kv_dtype),
            machines,
            workload,
            None if memory_budget_gb is None else int(memory_budget_gb * 1e9),
            time_limit_s,
        )


def plan_for(
    asked: Asked,
    *,
    pins: Pins | None = None,
    top: int = 1,
    engine: str = "rankwright",
    pareto: bool = False,
    trace: Sequence["TraceRow"] = (),
) -> Plan:
    """Return the plan of replicas that are alike.

    Raises:
        ValueError: An input is unsound; names the option or the field.
        NoFeasiblePlanError: Nothing fits.
    """
    return make_plan(
        asked.model,
        asked.cluster,
        asked.workload,
        memory_budget_bytes=asked.memory_budget_bytes,
        pins=pins,
        top=top,
        engine=engine,
        pareto=pareto,
        time_limit_s=asked.time_limit_s,
        trace=trace,
    )


def parts_for(asked: Asked, *, top: int = 1) -> "Plan | PartsPlan":
    """Return the plan, of unlike replicas where those serve clearly more; raises as `plan_for`."""
    from rankwright.planner.make_parts import plan_parts

    return plan_parts(
        asked.model,
        asked.cluster,
        asked.workload,
        memory_budget_bytes=asked.memory_budget_bytes,
        top=top,
        time_limit_s=asked.time_limit_s,
    )


def pools_for(asked: Asked, *, top: int = 2, engine: str = "rankwright") -> "DisaggregatedPlan":
    """Return the plan with separate pools for prefill and decode; raises as `plan_for`."""
    from rankwright.planner.disaggregate import DEFAULT_ENGINE, plan_disaggregated

    assumed: tuple[str, ...] = ()
    if engine == "rankwright":
        engine = DEFAULT_ENGINE
        assumed = (f"engine: {engine}, since rankwright's own executor does not run pools",)
    return plan_disaggregated(
        asked.model,
        asked.cluster,
        asked.workload,
        memory_budget_bytes=asked.memory_budget_bytes,
        engine=engine,
        top=top,
        time_limit_s=asked.time_limit_s,
        assumptions=assumed,
    )


def plan_of(
    text: str, cluster: str, workload: Workload, *, pins: Pins | None = None
) -> tuple[Plan, bool]:
    """Return the plan that `text` names, or one made now for the model it names, and which."""
    value = plan_or_model(text)
    if isinstance(value, Plan):
        return value, False
    return plan_for(Asked.read(value, cluster, workload), pins=pins), True


def launchable(
    text: str,
    cluster: str,
    workload: Workload,
    *,
    pins: Pins | None = None,
) -> "tuple[Plan | PartsPlan, bool]":
    """Return what `plan_of` does, or a plan of unlike replicas from a file."""
    value = plan_or_model(text, read_launchable)
    if not isinstance(value, ModelSpec):
        return value, False
    return plan_for(Asked.read(value, cluster, workload), pins=pins), True


P = TypeVar("P")


@overload
def plan_or_model(text: str) -> Plan | ModelSpec: ...


@overload
def plan_or_model(text: str, read: Callable[[Path], P]) -> P | ModelSpec: ...


def plan_or_model(text: str, read: Callable[[Path], object] = read_plan) -> object:
    """Return the plan in the file `text`, or the model that `text` names.

    A JSON file with a `split`, or pools or parts, in it is a plan; `config.json` files have none.

    Args:
        text: A file, or what `read_model` takes.
        read: How plans are read.
    """
    path = Path(text)
    if path.suffix == ".json" and path.name != "config.json":
        if not path.is_file():
            raise ValueError(f"there is no file {text}; `rankwright plan MODEL -o FILE` makes one")
        return read(path)
    if path.is_file():
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            is_plan = any(name in fields for name in ("split", "prefill", "parts"))
        except (TypeError, ValueError):
            is_plan = False
        if is_plan:
            return read(path)
    return read_model(text)
