"""`Plan`: the one type that flows from the planner to the templates and the executor.

A plan says everything that an executor or a manifest needs, so that nothing is decided twice.
`explain`, `render` and `launch` are conveniences: they load the folder that does the work when
called, so that the planner depends on none of them.
"""

from importlib import import_module
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from rankwright.cost_model.model_spec import ModelSpec
from rankwright.cost_model.prediction import Prediction
from rankwright.cost_model.split import Split
from rankwright.cost_model.workload import Workload
from rankwright.topology.cluster import Cluster
from rankwright.topology.value import Value

Range = tuple[int, int]  # first, one past the last


class RankPlan(Value):
    """What one rank holds. Ranges are half-open, over the whole model's indices."""

    rank: int = Field(ge=0)
    node: int = Field(ge=0, description="machine, 0-based over the cluster")
    gpu: int = Field(ge=0, description="index of the GPU on that machine")
    replica: int = Field(ge=0)
    stage: int = Field(ge=0)
    cp_rank: int = Field(default=0, ge=0, description="which part of the context it has")
    tp_rank: int = Field(ge=0)
    layers: Range
    query_heads: Range
    kv_heads: Range
    ffn_columns: Range = Field(description="columns of a dense MLP, or of each expert held")
    experts: Range = (0, 0)
    vocab: Range = Field(description="rows of the embedding and head; used on first and last stage")


class ExpertSlots(Value):
    """Wide expert parallelism: slots that hold any expert, hot ones in several."""

    layers: tuple[tuple[tuple[int, ...], ...], ...] = Field(
        min_length=1,
        description="of each layer with experts: the experts in the slots of each EP rank",
    )
    rebalance_steps: int | None = Field(
        default=None, ge=1, description="steps after which experts move; None: they stay"
    )

    @property
    def slots_per_rank(self) -> int:
        """Experts that each rank holds of a layer."""
        return len(self.layers[0][0])


class KvCachePlan(Value):
    """Paged KV cache of every rank."""

    block_tokens: int = Field(default=64, ge=1)
    num_blocks: int = Field(ge=1, description="blocks on each rank, equal over a replica")

    @property
    def num_tokens(self) -> int:
        """Tokens that each rank has room for."""
        return self.num_blocks * self.block_tokens


class Limits(Value):
    """What the scheduler may do."""

    max_num_seqs: int = Field(ge=1, description="sequences running at once in a replica")
    max_batched_tokens: int = Field(ge=1, description="tokens of one step")
    max_model_len: int = Field(ge=1, description="prompt and output of one request, tokens")


class RunnerUp(Value):
    """A plan that lost."""

    split: Split
    objective_value: float
    reason: str = Field(description="why it lost, in numbers")


class Certificate(Value):
    """The proof that comes with a plan."""

    objective: str = Field(description="what was optimised, with its unit")
    objective_value: float
    bound: float = Field(description="no plan of the model can be better than this")
    gap: float = Field(ge=0, description="|bound - value| / |value|")
    solver: str
    status: str = Field(description="'optimal', or what stopped the solver")
    solve_s: float = Field(ge=0)
    num_candidates: int = Field(ge=1, description="legal (shape, batch) pairs in the program")
    num_illegal: int = Field(default=0, ge=0)
    binding_constraint: str
    runners_up: tuple[RunnerUp, ...] = ()


class ParetoPoint(Value):
    """A split at a batch of which no other is better for both a GPU and a user."""

    label: str = Field(description="of one replica, such as 'TP8 PP2'")
    num_gpus: int = Field(ge=1, description="of one replica")
    batch_size: int = Field(ge=1)
    tokens_per_s_per_gpu: float = Field(gt=0)
    tokens_per_s_per_user: float = Field(gt=0, description="1 / TPOT")
    ttft_s: float = Field(ge=0)

    def describe(self) -> str:
        """Return the point in one line."""
        return (
            f"{self.label} at batch {self.batch_size}: {self.tokens_per_s_per_gpu:,.4g} tokens/s a "
            f"GPU, {self.tokens_per_s_per_user:,.4g} a user, TTFT {self.ttft_s * 1e3:,.4g} ms"
        )


class EnvironmentVariable(Value):
    """A setting that follows from the topology, with its reason."""

    name: str
    value: str
    reason: str


class Plan(Value):
    """A split bound to devices, with prediction and proof."""

    schema_version: Literal[1] = 1
    feasible: Literal[True] = True
    num_gpus: int = Field(ge=1)
    model: ModelSpec
    workload: Workload
    cluster: Cluster
    cluster_fingerprint: str
    split: Split
    ranks: tuple[RankPlan, ...] = Field(min_length=1)
    kv_cache: KvCachePlan
    limits: Limits
    expert_slots: ExpertSlots | None = Field(
        default=None, description="None: each rank holds its range of experts once"
    )
    prediction: Prediction
    certificate: Certificate
    environment: tuple[EnvironmentVariable, ...] = ()
    pareto: tuple[ParetoPoint, ...] = Field(default=(), description="if asked for")
    assumptions: tuple[str, ...] = Field(default=(), description="what was not said and assumed")

    @model_validator(mode="after")
    def _consistent(self) -> "Plan":
        split, ranks = self.split, self.ranks
        if not self.num_gpus == split.num_gpus == len(ranks):
            raise ValueError(
                f"num_gpus is {self.num_gpus}, the split {split.label()} takes {split.num_gpus} "
                f"and {len(ranks)} ranks are listed; the three must agree"
            )
        if sum(split.stage_layers) != self.model.num_layers:
            raise ValueError(
                f"stage_layers {split.stage_layers} sum to {sum(split.stage_layers)}, "
                f"{self.model.name} has {self.model.num_layers} layers"
            )
        if [rank.rank for rank in ranks] != list(range(len(ranks))):
            raise ValueError("ranks must be listed in order, 0 first")
        places = {(rank.node, rank.gpu) for rank in ranks}
        if len(places) != len(ranks):
            raise ValueError("two ranks are on the same GPU")
        for rank in ranks:
            self._check_rank(rank)
        if self.expert_slots is not None:
            self._check_expert_slots(self.expert_slots)
        if self.cluster_fingerprint != self.cluster.fingerprint:
            raise ValueError(
                f"cluster_fingerprint is {self.cluster_fingerprint}, the cluster in the plan has "
                f"{self.cluster.fingerprint}; make the plan again"
            )
        return self

    def _check_expert_slots(self, expert_slots: ExpertSlots) -> None:
        blocks = [
            layer.feed_forward for layer in self.model.layers if layer.feed_forward.kind == "moe"
        ]
        if len(expert_slots.layers) != len(blocks):
            raise ValueError(
                f"expert_slots has {len(expert_slots.layers)} layers, {self.model.name} has "
                f"{len(blocks)} with experts"
            )
        shape = (self.split.ep, expert_slots.slots_per_rank)
        for number, (slots, block) in enumerate(zip(expert_slots.layers, blocks, strict=True)):
            if len(slots) != shape[0] or {len(rank) for rank in slots} != {shape[1]}:
                raise ValueError(
                    f"expert_slots of layer {number} with experts: expected {shape[0]} ranks (ep) "
                    f"of {shape[1]} slots each"
                )
            if {expert for rank in slots for expert in rank} != set(range(block.num_experts)):
                raise ValueError(
                    f"expert_slots of layer {number} with experts: every expert from 0 to "
                    f"{block.num_experts - 1} needs a slot, and no other has one"
                )

    def _check_rank(self, rank: RankPlan) -> None:
        split = self.split
        stage = rank.replica * split.pp + rank.stage
        order = (stage * split.cp + rank.cp_rank) * split.tp + rank.tp_rank
        inside = rank.stage < split.pp and rank.cp_rank < split.cp and rank.tp_rank < split.tp
        if order != rank.rank or not inside:
            raise ValueError(
                f"rank {rank.rank} is listed as replica {rank.replica}, stage {rank.stage}, "
                f"cp_rank {rank.cp_rank}, tp_rank {rank.tp_rank}; rank must be "
                "((replica * pp + stage) * cp + cp_rank) * tp + tp_rank"
            )
        first = sum(split.stage_layers[: rank.stage])
        layers = (first, first + split.stage_layers[rank.stage])
        if rank.layers != layers:
            raise ValueError(
                f"rank {rank.rank} holds layers {rank.layers}, stage {rank.stage} has {layers}"
            )
        try:
            node = self.cluster.node(rank.node)
        except IndexError:
            raise ValueError(
                f"rank {rank.rank} is on node {rank.node}, the cluster has "
                f"{self.cluster.num_nodes} nodes"
            ) from None
        if rank.gpu not in {gpu.index for gpu in node.gpus}:
            raise ValueError(f"rank {rank.rank} is on GPU {rank.gpu}, {node.name} has none such")

    @property
    def num_replicas(self) -> int:
        """Copies of the model."""
        return self.split.dp

    def label(self) -> str:
        """Return the split in a few words: `TP2 DP4`."""
        return self.split.label()

    def nodes_used(self) -> tuple[int, ...]:
        """Machines that hold a rank, ascending."""
        return tuple(sorted({rank.node for rank in self.ranks}))

    def ranks_of_node(self, node: int) -> tuple[RankPlan, ...]:
        """Ranks on machine `node`, ascending."""
        return tuple(rank for rank in self.ranks if rank.node == node)

    def explain(self) -> str:
        """The plan in words and figures: what binds, what it costs, why the others lost."""
        text: str = import_module("rankwright.planner.explain").explain(self)
        return text

    def render(
        self, target: str, directory: Path | str | None = None, **options: object
    ) -> dict[str, str]:
        """Return the manifests for `target` by file name; write them to `directory` if given.

        `options` are those of the target, such as `name`, `port` and `model_path`.
        """
        files: dict[str, str] = import_module("rankwright.templates.render").render(
            self, target, directory, **options
        )
        return files

    def launch(self, **options: object) -> int:
        """Run the plan on this machine and serve it until stopped; return the exit code."""
        code: int = import_module("rankwright.executor.launch").launch(self, **options)
        return code
