"""A plan with separate pools in words and figures."""

from rankwright.planner.disaggregated_plan import DisaggregatedPlan
from rankwright.planner.explain_lines import (
    join_sections,
    limit_texts,
    proof_lines,
    section,
    time_lines,
)
from rankwright.planner.figures import figure
from rankwright.planner.plan import Plan


def explain_pools(plan: DisaggregatedPlan) -> str:
    """Return what was chosen, what it will do, where its time goes, and how one pool compares."""
    sections = [
        _headline(plan),
        *(_pool(role, pool) for role, pool in plan.pools.items()),
        _prediction(plan),
        _proof(plan),
        f"Beside one pool:\n  {plan.one_pool.verdict}",
        section("Assumed", plan.assumptions),
        section("About the cluster", plan.cluster.notes),
    ]
    return join_sections(sections)


def _headline(plan: DisaggregatedPlan) -> str:
    return (
        f"{plan.model.name} on {plan.cluster.describe()}: {plan.label()}, {plan.num_gpus} of "
        f"{plan.cluster.num_gpus} GPUs, for {plan.engine}"
    )


def _pool(role: str, pool: Plan) -> str:
    split, limits, prediction = pool.split, pool.limits, pool.prediction
    tokens = pool.kv_cache.num_tokens
    each, label = split.gpus_per_replica, split.model_copy(update={"dp": 1}).label()
    layers = ", ".join(map(str, split.stage_layers))
    lines = [
        f"Pool for {role}, {pool.num_gpus} GPUs:",
        f"  {split.dp} worker{'s' * (split.dp > 1)} of {each} GPU{'s' * (each > 1)}, "
        f"{label}, layers {layers}",
        f"  up to {limits.max_num_seqs} requests at once in a worker, {limits.max_batched_tokens} "
        f"tokens a step; {tokens:,} tokens of KV cache a rank, "
        f"{prediction.memory_bytes_per_gpu.value / 1e9:.1f} GB on the fullest GPU",
    ]
    parts = prediction.prefill_parts or prediction.decode_parts
    what = "one prompt" if prediction.prefill_parts else "one step"
    lines += time_lines(f"{what} on the slowest stage", parts, indent="  ")
    return "\n".join(lines)


def _prediction(plan: DisaggregatedPlan) -> str:
    one, load = plan.prediction, plan.workload
    limits = limit_texts(load)
    return "\n".join(
        [
            f"Predicted at {load.input_tokens} tokens in, {load.output_tokens} out:",
            f"  time to first token {figure(one.ttft_s.value * 1e3)} ms{limits[0]}: wait "
            f"{figure(one.wait_s * 1e3)}, prompt {figure(one.prompt_s * 1e3)}, cache of "
            f"{figure(one.transfer_bytes / 1e6)} MB a GPU on its way "
            f"{figure(one.transfer_s * 1e3)}",
            f"  time per output token {figure(one.tpot_s.value * 1e3)} ms{limits[1]}",
            f"  {figure(one.output_tokens_per_s.value)} output tokens/s, "
            f"{figure(one.requests_per_s)} requests/s; prefill is busy "
            f"{one.prefill_load:.0%} of the time, decode has "
            f"{one.decode_load:.0%} of its places taken",
        ]
    )


def _proof(plan: DisaggregatedPlan) -> str:
    lines = proof_lines(plan.certificate, f"{plan.certificate.num_candidates} pairs of workers")
    lines += [f"  runner-up {loser.label}: {loser.reason}" for loser in plan.runners_up]
    return "\n".join(lines)
