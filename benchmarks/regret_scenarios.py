"""What the regret benchmark asks: scenarios, and the plans of each.

A scenario is a model, a load, at times a limit, and a memory budget that makes smaller cards out of
the GPUs that there are. Its plans are every split of the GPUs that fits, at the batch that the
memory or the load allows and, where a limit may ask for fewer requests at once, at a half and a
quarter of it. Equal (model, split, load, batch) of several scenarios are measured once.
"""

from dataclasses import dataclass, field
from math import ceil
from typing import Literal

from rankwright.cost_model.model_spec import ModelSpec
from rankwright.cost_model.predict import predict
from rankwright.cost_model.split import Split
from rankwright.cost_model.workload import Workload
from rankwright.planner import candidates
from rankwright.planner.make_plan import NoFeasiblePlanError, Pins, make_plan
from rankwright.planner.plan import Plan
from rankwright.planner.shapes import find_shapes
from rankwright.topology.cluster import Cluster
from regret_load import SPREAD

# Tokens of a step, in every plan: one process per split measures all of its loads and batches.
CHUNK_TOKENS = 2048
_GB = 10**9


@dataclass(frozen=True, slots=True)
class Scenario:
    """One question to the planner."""

    model: str
    input_tokens: int
    output_tokens: int
    concurrency: int
    objective: Literal["throughput", "latency"] = "throughput"
    tpot_limit_s: float | None = None
    memory_budget_gb: float | None = None

    @property
    def budget_bytes(self) -> int | None:
        """Bytes of each GPU that a plan may use."""
        return None if self.memory_budget_gb is None else int(self.memory_budget_gb * _GB)

    def workload(self, *, limited: bool = True) -> Workload:
        """Return the load, with its limit or without."""
        return Workload(
            input_tokens=self.input_tokens,
            output_tokens=self.output_tokens,
            concurrency=self.concurrency,
            objective=self.objective,
            tpot_limit_s=self.tpot_limit_s if limited else None,
        )

    def describe(self) -> str:
        """Return the scenario in one line."""
        parts = [
            f"{self.model}: {self.input_tokens}+{self.output_tokens} tokens",
            f"{self.concurrency} in flight, best {self.objective}",
        ]
        if self.tpot_limit_s is not None:
            parts.append(f"TPOT {self.tpot_limit_s * 1e3:g} ms")
        if self.memory_budget_gb is not None:
            parts.append(f"{self.memory_budget_gb:g} GB a GPU")
        return ", ".join(parts)


# (model, limit on TPOT in ms, budgets in GB): cards of 24, 48 and 80 GB, and the GPU as it is where
# that makes a difference: more memory than the load needs would be the same scenario again.
_MODELS: tuple[tuple[str, float, tuple[float | None, ...]], ...] = (
    ("meta-llama/Llama-3.1-8B", 11, (24, 48)),
    ("Qwen/Qwen3-32B", 28, (48, 80, None)),
    ("Qwen/Qwen3-30B-A3B", 12, (48, 80)),
)
# (prompt, output, in flight)
_LOADS = ((1024, 128, 64), (128, 256, 128), (6000, 64, 8), (512, 16, 32))


def default_scenarios() -> list[Scenario]:
    """Return the scenarios of the published figures: 38, of three models, no two with all alike."""
    found: list[Scenario] = []
    for model, tpot_ms, budgets in _MODELS:
        for budget in budgets:
            found += [Scenario(model, *load, memory_budget_gb=budget) for load in _LOADS]
            found.append(
                Scenario(model, *_LOADS[0], tpot_limit_s=tpot_ms / 1e3, memory_budget_gb=budget)
            )
        found.append(Scenario(model, 1024, 128, 1, "latency"))
    return found


@dataclass(frozen=True, slots=True)
class Job:
    """One run: a split of a model under so many requests at once in each replica.

    Attributes:
        model: Its id.
        split: Its label.
        input_tokens: Of a prompt, on average.
        output_tokens: Of an answer, on average.
        batch_size: Requests on their way in each replica.
        kv_blocks: Blocks of the cache of each rank; None: more than they can fill.
    """

    model: str
    split: str
    input_tokens: int
    output_tokens: int
    batch_size: int
    kv_blocks: int | None = None


@dataclass(frozen=True, slots=True)
class Option:
    """One plan of a scenario: its split and its batch; the rest follows from these.

    Attributes:
        label: Of the split.
        split: How the model is cut, with batch and chunk.
        batch_size: Requests on their way in each replica.
        kv_blocks: As of `Job`.
        predicted: What the planner expects: tokens/s of all replicas, TPOT, seconds of a request.
    """

    label: str
    split: Split = field(compare=False)
    batch_size: int
    kv_blocks: int | None = field(default=None, compare=False)
    predicted: dict[str, float] = field(default_factory=dict[str, float], compare=False)

    def job(self, scenario: Scenario) -> Job:
        """Return the run that tells how it does."""
        return Job(
            scenario.model,
            self.label,
            scenario.input_tokens,
            scenario.output_tokens,
            self.batch_size,
            self.kv_blocks,
        )


def pins_of(split: Split) -> Pins:
    """Return what fixes everything but layers and batch."""
    return Pins(split.tp, split.pp, split.ep, split.dp, split.cp, split.attention)


def plan(
    scenario: Scenario,
    model: ModelSpec,
    cluster: Cluster,
    pins: Pins | None = None,
    *,
    limited: bool = True,
) -> Plan | None:
    """Return the planner's answer; None where nothing fits."""
    levels, candidates.CHUNK_LEVELS = candidates.CHUNK_LEVELS, (CHUNK_TOKENS,)
    try:
        return make_plan(
            model,
            cluster,
            scenario.workload(limited=limited),
            memory_budget_bytes=scenario.budget_bytes,
            pins=pins,
        )
    except NoFeasiblePlanError:
        return None
    finally:
        candidates.CHUNK_LEVELS = levels


def find_options(scenario: Scenario, model: ModelSpec, cluster: Cluster) -> list[Option]:
    """Return every plan of `scenario` that fits in memory."""
    found: list[Option] = []
    for shape in find_shapes(model, cluster).legal:
        for dp in range(1, cluster.num_gpus // shape.num_gpus + 1):
            pins = Pins(shape.tp, shape.pp, shape.ep, dp, shape.cp, shape.attention)
            made = plan(scenario, model, cluster, pins, limited=False)
            if made is None:
                continue
            most = _batch_of(made, scenario)
            batches = {most}
            if scenario.tpot_limit_s is not None:
                batches |= {max(1, most // 2), max(1, most // 4)}
            found += [option_of(made, scenario, batch) for batch in sorted(batches)]
    return found


def option_of(made: Plan, scenario: Scenario, batch_size: int | None = None) -> Option:
    """Return what a plan amounts to when it runs, with fewer requests at once if asked to."""
    batch = batch_size or _batch_of(made, scenario)
    split = made.split.model_copy(update={"max_batch_size": batch, "chunk_tokens": CHUNK_TOKENS})
    said = predict(made.model, made.cluster, scenario.workload(limited=False), split)
    request_s = said.ttft_s.value + (scenario.output_tokens - 1) * said.tpot_s.value
    predicted = {
        "output_tokens_per_s": said.output_tokens_per_s.value,
        "tpot_s": said.tpot_s.value,
        "request_s": request_s,
    }
    return Option(made.split.label(), split, batch, _kv_blocks(made, scenario, batch), predicted)


def _batch_of(made: Plan, scenario: Scenario) -> int:
    return min(made.limits.max_num_seqs, ceil(scenario.concurrency / made.split.dp))


def _kv_blocks(made: Plan, scenario: Scenario, batch: int) -> int | None:
    """Return the blocks of a rank's cache under the budget, if `batch` requests may fill them."""
    blocks, size = made.kv_cache.num_blocks, made.kv_cache.block_tokens
    longest = ceil((1 + SPREAD) * (scenario.input_tokens + scenario.output_tokens))
    sequences = ceil(batch / made.split.tp) if made.split.attention == "dp" else batch
    needed = sequences * ceil(ceil(longest / made.split.cp) / size)
    return blocks if blocks < needed else None
