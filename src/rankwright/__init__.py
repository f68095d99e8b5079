"""Plan the parallelism of an LLM deployment, then run it.

The public API is what this file exports; everything else may change. Names load on first use, so
that `import rankwright` costs nothing on a login node.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rankwright.cost_model.model_spec import ModelSpec
    from rankwright.cost_model.predict import predict
    from rankwright.cost_model.prediction import Prediction
    from rankwright.cost_model.read_model import read_model
    from rankwright.cost_model.split import Split
    from rankwright.cost_model.workload import Workload
    from rankwright.planner.config import AutoParallelConfig
    from rankwright.planner.disaggregate import plan_disaggregated
    from rankwright.planner.disaggregated_plan import DisaggregatedPlan
    from rankwright.planner.make_parts import plan_parts
    from rankwright.planner.make_plan import NoFeasiblePlanError, make_plan
    from rankwright.planner.parts_plan import PartsPlan
    from rankwright.planner.plan import Plan
    from rankwright.topology.cluster import Cluster
    from rankwright.topology.probe import probe
    from rankwright.topology.shorthand import parse_cluster

__version__ = "0.1.0"

_HOME = {
    "AutoParallelConfig": "rankwright.planner.config",
    "Cluster": "rankwright.topology.cluster",
    "DisaggregatedPlan": "rankwright.planner.disaggregated_plan",
    "ModelSpec": "rankwright.cost_model.model_spec",
    "NoFeasiblePlanError": "rankwright.planner.make_plan",
    "PartsPlan": "rankwright.planner.parts_plan",
    "Plan": "rankwright.planner.plan",
    "Prediction": "rankwright.cost_model.prediction",
    "Split": "rankwright.cost_model.split",
    "Workload": "rankwright.cost_model.workload",
    "make_plan": "rankwright.planner.make_plan",
    "parse_cluster": "rankwright.topology.shorthand",
    "plan_disaggregated": "rankwright.planner.disaggregate",
    "plan_parts": "rankwright.planner.make_parts",
    "predict": "rankwright.cost_model.predict",
    "probe": "rankwright.topology.probe",
    "read_model": "rankwright.cost_model.read_model",
}

__all__ = [
    "AutoParallelConfig",
    "Cluster",
    "DisaggregatedPlan",
    "ModelSpec",
    "NoFeasiblePlanError",
    "PartsPlan",
    "Plan",
    "Prediction",
    "Split",
    "Workload",
    "__version__",
    "make_plan",
    "parse_cluster",
    "plan_disaggregated",
    "plan_parts",
    "predict",
    "probe",
    "read_model",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'rankwright' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
