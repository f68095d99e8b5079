"""Memory of the rank that is fullest, over all replicas of a split and their GPUs."""

from collections.abc import Iterator, Sequence

from rankwright.cost_model.efficiency import device_class
from rankwright.cost_model.layout import SlotKind
from rankwright.cost_model.legality import shares_are_legal
from rankwright.cost_model.memory import rank_memory
from rankwright.cost_model.model_spec import ModelSpec
from rankwright.cost_model.prediction import MemoryPart
from rankwright.cost_model.shards import Shares
from rankwright.cost_model.split import Split
from rankwright.cost_model.workload import Workload
from rankwright.topology.cluster import Gpu


def cached_tokens(sequences: int, tokens: int, split: Split) -> int:
    """Return the tokens that a rank caches of `sequences` of `tokens` each."""
    per_rank = -(-sequences // split.tp) if split.attention == "dp" else sequences
    return per_rank * -(-tokens // split.cp)


def fullest_rank(
    model: ModelSpec,
    split: Split,
    groups: Sequence[Sequence[SlotKind]],
    workload: Workload,
    kv_tokens: int | None = None,
) -> tuple[MemoryPart, ...]:
    """Return the memory of the rank that is fullest, as a share of its GPU."""
    if kv_tokens is None:
        tokens = workload.input_tokens + workload.output_tokens
        kv_tokens = cached_tokens(split.max_batch_size, tokens, split)
    fullest: tuple[float, tuple[MemoryPart, ...]] | None = None
    for gpu, stage, tp_rank, shares in _fullest_ranks(model, split, groups):
        parts = rank_memory(
            model,
            split,
            stage=stage,
            kv_tokens=kv_tokens,
            max_batched_tokens=max(split.chunk_tokens, split.max_batch_size),
            max_num_seqs=split.max_batch_size,
            device=memory_class(gpu.device, device_class(gpu)),
            tp_rank=tp_rank,
            shares=shares,
        )
        share = sum(part.bytes for part in parts) / gpu.memory_bytes
        if fullest is None or share > fullest[0]:
            fullest = share, parts
    assert fullest is not None, "a split has a rank"
    return fullest[1]


def _fullest_ranks(
    model: ModelSpec, split: Split, groups: Sequence[Sequence[SlotKind]]
) -> Iterator[tuple[Gpu, int, int, Shares | None]]:
    """Yield GPU, stage, tp_rank and shares of the ranks of which one is the fullest.

    Of a slot with GPUs of one kind, and of one whose shares must be equal, that is rank 0.
    """
    gpu = groups[0][0].gpu
    legal = shares_are_legal(model, ep=split.ep, cp=split.cp, attention=split.attention)
    unlike = [
        (stage, kind)
        for group in groups
        for stage, kind in enumerate(group)
        if kind.members and legal is None
    ]
    if not unlike:
        yield from ((gpu, stage, 0, None) for stage in range(split.pp))
        return
    for group in groups:
        for stage, kind in enumerate(group):
            if not kind.members:
                yield kind.gpu, stage, 0, None
            for tp_rank, member in enumerate(kind.members):
                yield member, stage, tp_rank, kind.shares


def memory_class(device: str, runtime: str) -> str:
    """Return the row of `RESERVED_BYTES` for a device: what is no CPU runs under CUDA or HIP."""
    return "cpu" if device == "cpu" or runtime == "cpu" else "cuda"
