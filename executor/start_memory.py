"""Memory at start: whether a rank's part can fit, and what to change where it does not.

What the weights and the KV cache take is known to the byte, so more of them than is free is said
before anything is loaded. What else a start takes is an estimate; it is only used to explain.
"""

from dataclasses import dataclass

from rankwright.cost_model.memory import stage_kv_bytes_per_token
from rankwright.cost_model.prediction import MemoryPart
from rankwright.planner.plan import Plan, RankPlan
from rankwright.planner.plan_shares import memory_of, shares_of
from rankwright.topology.readers.cpu import usable_memory_bytes


class StartMemoryError(Exception):
    """A rank has not the memory that the plan gives it; says what takes most and what would fit."""


@dataclass(frozen=True, slots=True)
class Room:
    """Memory of a device, in bytes.

    Attributes:
        free_bytes: What this rank may still have, with what it has already.
        total_bytes: What there is, with what others hold.
    """

    free_bytes: int
    total_bytes: int


def check_room(plan: Plan, rank: RankPlan, room: Room) -> None:
    """Check that weights and KV cache of `rank` fit into `room`.

    Raises:
        StartMemoryError: They do not.
    """
    needed = sum(
        part.bytes for part in memory_of(plan, rank) if part.name in ("weights", "kv cache")
    )
    if needed > room.free_bytes:
        raise StartMemoryError(explain(plan, rank, room, "before the weights load"))


def explain(plan: Plan, rank: RankPlan, room: Room, when: str) -> str:
    """Return one line: that memory ran out, the largest consumers, and a setting that would fit.

    Args:
        plan: What was started.
        rank: Whose memory ran out.
        room: Of its device.
        when: During what, such as "at layer 3 of 32".
    """
    parts = memory_of(plan, rank)
    others = MemoryPart(name="other use", bytes=max(0, room.total_bytes - room.free_bytes))
    largest = sorted((*parts, others), key=lambda part: -part.bytes)
    listed = ", ".join(f"{part.name} {_gb(part.bytes)}" for part in largest if part.bytes)
    return (
        f"out of memory {when}: of {_gb(room.total_bytes)}, {_gb(room.free_bytes)} are free for "
        f"this rank, and it needs {_gb(sum(part.bytes for part in parts))} (largest first: "
        f"{listed}); {_remedy(plan, rank, parts, room)}"
    )


def blocks_that_fit(plan: Plan, rank: RankPlan, room: Room) -> int:
    """Return the KV blocks that `rank` has room for beside all else; below 0: not even that."""
    rest = sum(part.bytes for part in memory_of(plan, rank) if part.name != "kv cache")
    per_token = stage_kv_bytes_per_token(
        plan.model,
        plan.split,
        stage=rank.stage,
        tp_rank=rank.tp_rank,
        shares=shares_of(plan, rank),
    )
    return (room.free_bytes - rest) // (per_token * plan.kv_cache.block_tokens)


def _remedy(plan: Plan, rank: RankPlan, parts: tuple[MemoryPart, ...], room: Room) -> str:
    fits = blocks_that_fit(plan, rank, room)
    planned, tokens = plan.kv_cache.num_blocks, plan.kv_cache.block_tokens * plan.split.cp
    budget = f"plan again with --memory-budget {room.free_bytes / 1e9:.1f}"
    if fits < 1:
        return (
            "weights and activations leave no KV cache: cut the model over more GPUs (plan again "
            "with a larger --tp or --pp), or free memory that others hold"
        )
    if fits >= planned:
        return (
            "by the plan's count it would fit, so another process has taken memory since, or a "
            f"step takes more than was counted: stop the former, or {budget} less a margin"
        )
    change = f"set kv_cache.num_blocks to {fits} (now {planned})"
    if fits * tokens < plan.limits.max_model_len:
        change += f" and limits.max_model_len to {fits * tokens} (now {plan.limits.max_model_len})"
    return f"{change} in the plan, or {budget}"


def cpu_room(ranks_here: int) -> Room:
    """Return a CPU rank's share of this machine's memory: as much as each other rank here."""
    total_bytes, free_bytes = usable_memory_bytes()
    return Room(free_bytes // ranks_here, total_bytes // ranks_here)


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"
