"""Parts of a plan in the units that engines take: memory as a fraction, shares of a batch."""

import math
from typing import NoReturn

from rankwright.cost_model.dtypes import BITS, Dtype
from rankwright.planner.plan import EnvironmentVariable, Plan
from rankwright.topology.cluster import Gpu

# Engines take the fraction with three digits at most; a thousandth of 80 GB is 80 MB.
_DIGITS = 1000
# Most of the free memory that an engine is told to take. Before it takes any, vLLM compares what is
# asked for with what is free then, and ends at once where less is: its processes' own CUDA contexts
# are gone by then, some 0.5 GB (19.77 of 22.05 GiB free where 0.9 were asked for:
# github.com/pytorch/pytorch/issues/175666).
MOST_OF_FREE = 0.98


def smallest_gpu(plan: Plan) -> Gpu:
    """Return the GPU with the least memory among those used."""
    used = (
        gpu
        for rank in plan.ranks
        for gpu in plan.cluster.node(rank.node).gpus
        if gpu.index == rank.gpu
    )
    return min(used, key=lambda gpu: gpu.total_memory_bytes)


def memory_fraction(plan: Plan) -> float:
    """Return the part of a GPU's memory that the plan fills: weights, cache and buffers.

    The upper end of the predicted bytes, rounded up to a thousandth, over the memory of the
    smallest GPU used; not more than `MOST_OF_FREE` of what was free there, unless the predicted
    bytes themselves are.
    """
    gpu, memory = smallest_gpu(plan), plan.prediction.memory_bytes_per_gpu
    free = gpu.memory_bytes
    most = min(free, max(MOST_OF_FREE * free, memory.value))
    wanted = math.ceil(memory.high / gpu.total_memory_bytes * _DIGITS)
    return min(wanted, math.floor(most / gpu.total_memory_bytes * _DIGITS)) / _DIGITS


def attention_ranks(plan: Plan) -> int:
    """Return the groups into which the sequences of a replica are split: 1, or tp."""
    return plan.split.tp if plan.split.attention == "dp" else 1


def share(total: int, ranks: int) -> int:
    """Return what each of `ranks` takes of `total` so that all of it is taken.

    >>> share(64, 8), share(65, 8)
    (8, 9)
    """
    return -(-total // ranks)


def has_experts(plan: Plan) -> bool:
    """Return whether any layer is a mixture of experts."""
    return any(run.layer.feed_forward.kind == "moe" for run in plan.model.layer_runs)


def dense_layers(plan: Plan) -> int:
    """Return how many layers have one gated MLP instead of experts."""
    return sum(run.count for run in plan.model.layer_runs if run.layer.feed_forward.kind == "dense")


def is_uneven(plan: Plan) -> bool:
    """Return whether the stages hold different numbers of layers."""
    return len(set(plan.split.stage_layers)) > 1


def layers_of_stages(plan: Plan) -> str:
    """Return the layers of each stage as `40,41`."""
    return ",".join(map(str, plan.split.stage_layers))


def refuse(engine: str, what: str, instead: str) -> NoReturn:
    """Raise for a part of a plan that `engine` has no way to say.

    Raises:
        ValueError: Always.
    """
    raise ValueError(f"{engine} cannot express {what}; {instead}")


def activation_dtype(engine: str, plan: Plan) -> str:
    """Return the number format of activations.

    Raises:
        ValueError: It is not one that engines compute in.
    """
    if plan.model.dtype not in ("bfloat16", "float16", "float32"):
        refuse(engine, f"activations in {plan.model.dtype}", "plan with --dtype bfloat16")
    return plan.model.dtype


def cache_dtype(engine: str, plan: Plan, names: dict[Dtype, str]) -> str:
    """Return the engine's name for the format of the KV cache; `auto` where it is the model's.

    Raises:
        ValueError: The engine has no such cache.
    """
    kv_dtype = plan.model.kv_dtype
    if kv_dtype == plan.model.dtype:
        return "auto"
    if kv_dtype not in names:
        choices = ", ".join(names)
        refuse(
            engine,
            f"a KV cache in {kv_dtype} beside activations in {plan.model.dtype}",
            f"plan with a --kv-dtype among {choices}, or that of the model",
        )
    return names[kv_dtype]


def quantized_at_load(plan: Plan) -> Dtype | None:
    """Return the format that plain weights are to be turned into when loaded; None: as they are."""
    weights = plan.model.weight_dtypes
    if weights.method is None and BITS[weights.feed_forward] < BITS[plan.model.dtype]:
        return weights.feed_forward
    return None


def stage_variable(name: str, plan: Plan) -> tuple[EnvironmentVariable, ...]:
    """Return the variable `name` with the layers of each stage, where they are uneven."""
    if not is_uneven(plan):
        return ()
    return (
        EnvironmentVariable(
            name=name,
            value=layers_of_stages(plan),
            reason="layers of each stage; the engine would choose others",
        ),
    )


def micro_batch_note(engine: str, plan: Plan) -> tuple[str, ...]:
    """Return the note for a pipeline whose batches in flight the engine sets by itself."""
    split = plan.split
    if split.pp == 1 or split.micro_batches == split.pp:
        return ()
    return (
        f"{engine} keeps {split.pp} batches in flight over {split.pp} stages; "
        f"the plan was priced with {split.micro_batches}.",
    )
