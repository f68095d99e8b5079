"""A plan in words and figures."""

from rankwright.cost_model.prediction import MemoryPart, Part
from rankwright.cost_model.shards import range_size
from rankwright.cost_model.split import CpExchange
from rankwright.planner.explain_lines import join_sections, proof_lines, section, time_lines
from rankwright.planner.figures import figure
from rankwright.planner.plan import Certificate, Plan
from rankwright.planner.plan_shares import gpu_of, has_unequal_shares, memory_of, shares_of

_EXCHANGES: dict[CpExchange, str] = {
    "gather": "are gathered from the context ranks before attention",
    "ring": "go round the context ranks, each part attended to while the next one travels",
}


def explain(plan: Plan) -> str:
    """Return what was chosen, what it will do, where memory and time go, and why others lost."""
    sections = [
        _headline(plan),
        _shares(plan),
        _prediction(plan),
        _memory(plan.prediction.memory_parts),
        _time("One decode step of the slowest stage", plan.prediction.decode_parts),
        _time(
            "The steps that prefill one prompt, on the slowest stage", plan.prediction.prefill_parts
        ),
        _proof(plan.certificate),
        section(
            "Runners-up",
            [f"{one.split.label()}: {one.reason}" for one in plan.certificate.runners_up],
        ),
        section("Settings", [f"{one.name}={one.value}: {one.reason}" for one in plan.environment]),
        section("Assumed", plan.assumptions),
        section("About the cluster", plan.cluster.notes),
    ]
    return join_sections(sections)


def _headline(plan: Plan) -> str:
    split, limits = plan.split, plan.limits
    kv_tokens = plan.kv_cache.num_tokens
    replicas = "1 replica" if split.dp == 1 else f"{split.dp} replicas"
    lines = [
        f"{plan.model.name} on {plan.cluster.describe()}: {split.label()}, "
        f"{plan.num_gpus} of {plan.cluster.num_gpus} GPUs",
        f"  {replicas} of {split.gpus_per_replica} "
        f"{'GPU' if split.gpus_per_replica == 1 else 'GPUs'}; each rank holds "
        f"{_share(plan)}{_stages(split.stage_layers)}",
        f"  up to {limits.max_num_seqs} requests at once in a replica, "
        f"{limits.max_batched_tokens} tokens a step, requests of up to "
        f"{limits.max_model_len} tokens; "
        f"{kv_tokens * split.cache_parts:,} tokens of KV cache a replica",
    ]
    if split.cp > 1:
        lines.append(f"  keys and values of prompts {_EXCHANGES[split.cp_exchange]}")
    return "\n".join(lines)


def _share(plan: Plan) -> str:
    if plan.split.tp == 1:
        return ""
    return "its share of " if has_unequal_shares(plan) else f"1/{plan.split.tp} of "


def _shares(plan: Plan) -> str:
    """Return what each rank of the first group with unequal shares holds, and why."""
    for rank in plan.ranks:
        shares = shares_of(plan, rank)
        if shares is None:
            continue
        lines = ["Shares of the ranks, unequal as their GPUs are:"]
        for one in plan.ranks[rank.rank : rank.rank + plan.split.tp]:
            gpu, taken = gpu_of(plan, one), sum(part.bytes for part in memory_of(plan, one))
            lines.append(
                f"  rank {one.rank} ({gpu.device}): {range_size(one.query_heads)} query and "
                f"{range_size(one.kv_heads)} KV heads, {range_size(one.ffn_columns)} columns, "
                f"{range_size(one.vocab)} rows of the vocabulary; {taken / 1e9:.2f} of "
                f"{gpu.memory_bytes / 1e9:.2f} GB"
            )
        return "\n".join(lines)
    return ""


def _stages(layers: tuple[int, ...]) -> str:
    if len(layers) == 1:
        return f"{layers[0]} layers"
    if len(set(layers)) == 1:
        return f"{layers[0]} layers ({len(layers)} equal stages)"
    return f"{min(layers)} to {max(layers)} layers (stages of {', '.join(map(str, layers))})"


def _prediction(plan: Plan) -> str:
    one = plan.prediction
    limits = plan.workload
    rows = [
        ("time to first token", one.ttft_s, 1e3, "ms", limits.ttft_limit_s),
        ("time per output token", one.tpot_s, 1e3, "ms", limits.tpot_limit_s),
        ("output tokens per second", one.output_tokens_per_s, 1.0, "", None),
    ]
    lines = [
        f"Predicted at {limits.input_tokens} tokens in, {limits.output_tokens} out, "
        f"{one.batch_size} requests in flight a replica:"
    ]
    for name, found, scale, unit, limit in rows:
        text = f"  {name:<26}{figure(found.value * scale):>12} {unit:<3}"
        text += f"({figure(found.low * scale)} to {figure(found.high * scale)})"
        if limit is not None:
            text += f", limit {figure(limit * scale)}"
        lines.append(text.rstrip())
    return "\n".join(lines)


def _memory(parts: tuple[MemoryPart, ...]) -> str:
    total = sum(part.bytes for part in parts)
    lines = [f"Memory of the fullest rank, {total / 1e9:.2f} GB:"]
    lines += [
        f"  {part.name:<26}{part.bytes / 1e9:>12.2f} GB {part.bytes / total:>6.0%}"
        for part in parts
    ]
    return "\n".join(lines)


def _time(title: str, parts: tuple[Part, ...]) -> str:
    return "\n".join(time_lines(title, parts))


def _proof(proof: Certificate) -> str:
    looked_at = f"{proof.num_candidates} candidates, {proof.num_illegal} shapes not legal"
    return "\n".join(proof_lines(proof, looked_at))
