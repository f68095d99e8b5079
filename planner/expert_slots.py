"""Gives a plan expert slots: replicas of hot experts, placed by how often each is chosen."""

from collections.abc import Sequence
from math import ceil

from rankwright.cost_model.memory import stage_kv_bytes_per_token, stage_layers
from rankwright.cost_model.parameters import layer_tensors, tensor_bytes
from rankwright.planner.experts import place_experts
from rankwright.planner.plan import ExpertSlots, Plan


def with_expert_slots(
    plan: Plan,
    slots_per_rank: int,
    *,
    loads: Sequence[Sequence[float]] | None = None,
    rebalance_steps: int | None = None,
) -> Plan:
    """Return `plan` with `slots_per_rank` expert slots on each rank, paid for with KV blocks.

    Args:
        plan: With ep > 1.
        slots_per_rank: Experts that each rank holds of a layer, at least its share of them.
        loads: Of each layer with experts, how often each expert was chosen, as recorded; None: all
            are as likely.
        rebalance_steps: Steps after which experts move by what was counted; None: they stay.

    Raises:
        ValueError: The plan has no expert parallelism, there are too few slots, the loads are not
            those of the model, or the extra weights leave no room for a request of the workload.
    """
    blocks = [layer.feed_forward for layer in plan.model.layers if layer.feed_forward.kind == "moe"]
    if not blocks or plan.split.ep < 2:
        raise ValueError(
            f"expert slots need a model with experts and ep of 2 or more; {plan.model.name} runs "
            f"as {plan.split.label()}"
        )
    if loads is None:
        loads = [[1.0] * block.num_experts for block in blocks]
    if [len(load) for load in loads] != [block.num_experts for block in blocks]:
        raise ValueError(
            f"loads of {len(loads)} layers with {sorted({len(load) for load in loads})} experts; "
            f"{plan.model.name} has {len(blocks)} layers of {blocks[0].num_experts}"
        )
    layers = tuple(place_experts(load, plan.split.ep, slots_per_rank) for load in loads)
    num_blocks = plan.kv_cache.num_blocks - _blocks_for_slots(
        plan, slots_per_rank, moves=rebalance_steps is not None
    )
    each = plan.kv_cache.block_tokens * plan.split.cp
    longest = min(plan.limits.max_model_len, max(0, num_blocks) * each)
    request = plan.workload.input_tokens + plan.workload.output_tokens
    needed = ceil(min(request, plan.limits.max_model_len) / each)
    if num_blocks < needed:
        raise ValueError(
            f"{slots_per_rank} expert slots leave {num_blocks} KV blocks, and one request may take "
            f"{needed}; use fewer slots, or plan for shorter requests"
        )
    return Plan.model_validate(
        plan.model_dump()
        | {
            "kv_cache": plan.kv_cache.model_copy(update={"num_blocks": num_blocks}).model_dump(),
            "limits": plan.limits.model_copy(update={"max_model_len": longest}).model_dump(),
            "expert_slots": ExpertSlots(
                layers=layers, rebalance_steps=rebalance_steps
            ).model_dump(),
        }
    )


def _blocks_for_slots(plan: Plan, slots_per_rank: int, *, moves: bool) -> int:
    """Return the KV blocks that take as many bytes as the extra experts, on the worst stage.

    Experts that move wait beside the slots until all of their layer have been sent.
    """
    spec, split, most = plan.model, plan.split, 0
    for stage in range(split.pp):
        extra = 0
        for layer, count in stage_layers(spec, split, stage):
            for tensor in layer_tensors(layer, spec.hidden_size, tp=split.tp, ep=split.ep):
                if tensor.name.startswith("expert "):
                    one = tensor_bytes(tensor, spec.weight_dtypes) / tensor.copies
                    extra += ceil(count * one * (slots_per_rank - tensor.copies))
                    extra += ceil(one * slots_per_rank) if moves else 0
        block = plan.kv_cache.block_tokens * stage_kv_bytes_per_token(spec, split, stage=stage)
        most = max(most, ceil(extra / block))
    return most
