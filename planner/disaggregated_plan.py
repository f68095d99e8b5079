"""`DisaggregatedPlan`: two plans on disjoint GPUs of one cluster, one for prefill, one for decode.

Engines and papers call this disaggregated prefill, or disaggregated serving. Each pool is a `Plan`
of its own, so that whatever reads a plan's ranks, batch and memory reads a pool's the same way.
"""

from importlib import import_module
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from rankwright.cost_model.model_spec import ModelSpec
from rankwright.cost_model.prediction import Estimate
from rankwright.cost_model.workload import Workload
from rankwright.planner.plan import Certificate, Plan
from rankwright.topology.cluster import Cluster
from rankwright.topology.value import Value


class PoolsPrediction(Value):
    """Predicted speed of both pools together."""

    ttft_s: Estimate = Field(description="wait, prompt, and cache on the way")
    tpot_s: Estimate
    output_tokens_per_s: Estimate
    requests_per_s: float = Field(gt=0)
    wait_s: float = Field(ge=0, description="mean, for a free prefill worker")
    prompt_s: float = Field(gt=0)
    transfer_s: float = Field(ge=0, description="of one prompt's KV cache to its decode worker")
    transfer_bytes: int = Field(ge=0, description="of one prompt, over the busiest GPU's link")
    prefill_load: float = Field(ge=0, le=1, description="part of the time that prefill is busy")
    decode_load: float = Field(ge=0, description="requests decoding, over those there is room for")


class LosingPair(Value):
    """Shapes of both pools that lost."""

    label: str
    objective_value: float
    reason: str = Field(description="why they lost, in numbers")


class OnePool(Value):
    """The best plan without separate pools, for comparison."""

    label: str | None = Field(default=None, description="its split; None: none keeps the limits")
    num_gpus: int = Field(default=0, ge=0)
    batch_size: int = Field(default=0, ge=0)
    objective_value: float | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    output_tokens_per_s: float | None = None
    is_better: bool = Field(description="whether it beats the two pools in the objective")
    verdict: str = Field(description="the comparison in one line, in numbers")


class DisaggregatedPlan(Value):
    """Separate pools for prefill and decode, with prediction, proof and comparison."""

    schema_version: Literal[1] = 1
    kind: Literal["disaggregated"] = "disaggregated"
    feasible: Literal[True] = True
    num_gpus: int = Field(ge=2)
    engine: str = Field(description="that runs it")
    prefill: Plan
    decode: Plan
    prediction: PoolsPrediction
    certificate: Certificate = Field(description="of both pools; those of the plans repeat it")
    runners_up: tuple[LosingPair, ...] = ()
    one_pool: OnePool
    assumptions: tuple[str, ...] = Field(default=(), description="what was not said and assumed")

    @model_validator(mode="after")
    def _consistent(self) -> "DisaggregatedPlan":
        prefill, decode = self.prefill, self.decode
        if self.num_gpus != prefill.num_gpus + decode.num_gpus:
            raise ValueError(
                f"num_gpus is {self.num_gpus}, the pools have {prefill.num_gpus} + "
                f"{decode.num_gpus}; the sum must agree"
            )
        if prefill.cluster != decode.cluster or prefill.model != decode.model:
            raise ValueError("prefill and decode must be of one model on one cluster")
        places = {(rank.node, rank.gpu) for rank in prefill.ranks}
        both = sorted(places & {(rank.node, rank.gpu) for rank in decode.ranks})
        if both:
            node, gpu = both[0]
            raise ValueError(f"GPU {gpu} of node {node} is in both pools")
        if prefill.expert_slots is not None or decode.expert_slots is not None:
            raise ValueError("pools have no expert slots: the engines that run them have their own")
        return self

    @property
    def model(self) -> ModelSpec:
        """What both pools run."""
        return self.prefill.model

    @property
    def cluster(self) -> Cluster:
        """Where both pools are."""
        return self.prefill.cluster

    @property
    def workload(self) -> Workload:
        """What both pools were planned for."""
        return self.decode.workload

    @property
    def pools(self) -> dict[str, Plan]:
        """Both plans by what they do, prefill first."""
        return {"prefill": self.prefill, "decode": self.decode}

    def label(self) -> str:
        """Return both pools in a few words: `prefill 4 x TP1, decode 1 x TP4`."""
        return ", ".join(
            f"{role} {plan.split.dp} x {plan.split.model_copy(update={'dp': 1}).label()}"
            for role, plan in self.pools.items()
        )

    def explain(self) -> str:
        """The plan in words and figures, and how it compares with one pool."""
        text: str = import_module("rankwright.planner.explain_pools").explain_pools(self)
        return text

    def render(
        self, target: str, directory: Path | str | None = None, **options: object
    ) -> dict[str, str]:
        """Return the manifests for `target` by file name; write them to `directory` if given.

        `options` are those of the target; see `docs/disaggregate.md` for the targets.
        """
        files: dict[str, str] = import_module("rankwright.templates.render").render(
            self, target, directory, **options
        )
        return files
