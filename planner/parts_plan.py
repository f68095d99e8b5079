"""`PartsPlan`: plans of unlike replicas on disjoint GPUs of one machine, behind one router.

The replicas of a `Plan` are alike. Where cards are not, or their number does not divide, each part
here is a `Plan` of its own, so that whatever reads a plan's ranks, batch and memory reads a
part's the same way.
"""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from rankwright.cost_model.model_spec import ModelSpec
from rankwright.cost_model.prediction import Estimate
from rankwright.cost_model.workload import Workload
from rankwright.planner.plan import Certificate, EnvironmentVariable, Plan, RankPlan
from rankwright.topology.cluster import Cluster
from rankwright.topology.value import Value


class PartsPrediction(Value):
    """Predicted speed of all parts together."""

    ttft_s: Estimate = Field(description="of the slowest part")
    tpot_s: Estimate = Field(description="of the slowest part")
    output_tokens_per_s: Estimate = Field(description="over all parts")
    memory_bytes_per_gpu: Estimate = Field(description="of the fullest rank of all")


class AlikePlan(Value):
    """The best plan whose replicas are alike, for comparison."""

    label: str
    num_gpus: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    objective_value: float
    ttft_s: float
    tpot_s: float
    verdict: str = Field(description="the comparison in one line, in numbers")


class PartsPlan(Value):
    """Unlike replicas of one model on one machine, with prediction, proof and comparison."""

    schema_version: Literal[1] = 1
    kind: Literal["parts"] = "parts"
    feasible: Literal[True] = True
    num_gpus: int = Field(ge=1)
    workload: Workload = Field(description="of all parts; those of the plans are their shares")
    parts: tuple[Plan, ...] = Field(min_length=2, description="the one that serves most first")
    prediction: PartsPrediction
    certificate: Certificate = Field(description="of all parts; those of the plans repeat it")
    alike: AlikePlan
    assumptions: tuple[str, ...] = Field(default=(), description="what was not said and assumed")

    @model_validator(mode="after")
    def _consistent(self) -> "PartsPlan":
        total = sum(part.num_gpus for part in self.parts)
        if self.num_gpus != total:
            raise ValueError(
                f"num_gpus is {self.num_gpus}, the parts have {total}; they must agree"
            )
        first = self.parts[0]
        if any(part.cluster != first.cluster or part.model != first.model for part in self.parts):
            raise ValueError("all parts must be of one model on one cluster")
        if first.cluster.num_nodes != 1:
            raise ValueError(
                f"parts must be on one machine, the cluster has {first.cluster.num_nodes}"
            )
        owners: dict[int, int] = {}
        for number, part in enumerate(self.parts):
            if part.expert_slots is not None:
                raise ValueError(f"part {number} has expert slots, which parts do not have")
            for rank in part.ranks:
                if rank.gpu in owners:
                    raise ValueError(
                        f"GPU {rank.gpu} is in part {owners[rank.gpu]} and in part {number}"
                    )
                owners[rank.gpu] = number
        return self

    @property
    def model(self) -> ModelSpec:
        """What all parts run."""
        return self.parts[0].model

    @property
    def cluster(self) -> Cluster:
        """Where all parts are."""
        return self.parts[0].cluster

    @property
    def cluster_fingerprint(self) -> str:
        """Of the cluster."""
        return self.parts[0].cluster_fingerprint

    @property
    def ranks(self) -> tuple[RankPlan, ...]:
        """Ranks of all parts, part by part, each with its number within its part."""
        return tuple(rank for part in self.parts for rank in part.ranks)

    @property
    def environment(self) -> tuple[EnvironmentVariable, ...]:
        """Settings of all parts, each once: they follow from the machine, which is one."""
        return tuple(dict.fromkeys(one for part in self.parts for one in part.environment))

    @property
    def num_replicas(self) -> int:
        """Replicas of all parts."""
        return sum(part.split.dp for part in self.parts)

    def nodes_used(self) -> tuple[int, ...]:
        """Machines that hold a rank: one."""
        return self.parts[0].nodes_used()

    def ranks_of_node(self, node: int) -> tuple[RankPlan, ...]:
        """Ranks of all parts on machine `node`."""
        return tuple(rank for rank in self.ranks if rank.node == node)

    def shares(self) -> tuple[float, ...]:
        """Return the share of the tokens that each part makes when all are busy."""
        return shares_of([part.prediction.output_tokens_per_s.value for part in self.parts])

    def label(self) -> str:
        """Return all parts in a few words: `TP2 + 2 x TP1`."""
        return " + ".join(part_label(part) for part in self.parts)

    def explain(self) -> str:
        """The plan in words and figures, and how it compares with alike replicas."""
        text: str = import_module("rankwright.planner.explain_parts").explain_parts(self)
        return text

    def render(
        self, target: str, directory: Path | str | None = None, **options: object
    ) -> dict[str, str]:
        """Return the manifests for `target` by file name; write them to `directory` if given.

        Raises:
            ValueError: The target starts one shape of replica only.
        """
        files: dict[str, str] = import_module("rankwright.templates.render").render(
            self, target, directory, **options
        )
        return files

    def launch(self, **options: object) -> int:
        """Run all parts on this machine and serve them until stopped; return the exit code."""
        code: int = import_module("rankwright.executor.launch").launch(self, **options)
        return code


# What our own executor runs: replicas that are alike, or parts.
OwnPlan = Plan | PartsPlan


def part_label(part: Plan) -> str:
    """Return the replicas of one part: `2 x TP1`, or `TP2 PP2` where it is one."""
    one = part.split.model_copy(update={"dp": 1}).label()
    return one if part.split.dp == 1 else f"{part.split.dp} x {one}"


def shares_of(speeds: Sequence[float]) -> tuple[float, ...]:
    """Return `speeds` as shares of their sum.

    >>> shares_of([300.0, 100.0])
    (0.75, 0.25)
    """
    total = sum(speeds)
    return tuple(speed / total for speed in speeds)
