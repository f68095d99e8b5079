"""A plan of unlike replicas in words and figures."""

from rankwright.planner.explain_lines import (
    join_sections,
    limit_texts,
    proof_lines,
    section,
    time_lines,
)
from rankwright.planner.figures import figure
from rankwright.planner.parts_plan import PartsPlan, part_label
from rankwright.planner.plan import Certificate, Plan


def explain_parts(plan: PartsPlan) -> str:
    """Return what was chosen, what each part does, the proof, and how alike replicas compare."""
    sections = [
        _headline(plan),
        *(
            _part(number, part, share)
            for number, (part, share) in enumerate(zip(plan.parts, plan.shares(), strict=True))
        ),
        _prediction(plan),
        _proof(plan.certificate),
        f"Beside alike replicas:\n  {plan.alike.verdict}",
        section("Settings", [f"{one.name}={one.value}: {one.reason}" for one in plan.environment]),
        section("Assumed", plan.assumptions),
        section("About the cluster", plan.cluster.notes),
    ]
    return join_sections(sections)


def gpus_of(part: Plan, replica: int) -> str:
    """Return the GPUs of one replica, each kind with its numbers: `a100-pcie 0, 1 and l4 3`."""
    (node,) = part.cluster.nodes
    devices = {gpu.index: gpu.device for gpu in node.gpus}
    by_device: dict[str, list[int]] = {}
    for rank in part.ranks:
        if rank.replica == replica:
            by_device.setdefault(devices[rank.gpu], []).append(rank.gpu)
    return " and ".join(
        f"{device} {', '.join(map(str, numbers))}" for device, numbers in by_device.items()
    )


def _headline(plan: PartsPlan) -> str:
    return (
        f"{plan.model.name} on {plan.cluster.describe()}: {plan.label()}, {plan.num_gpus} of "
        f"{plan.cluster.num_gpus} GPUs; {plan.num_replicas} replicas behind one router"
    )


def _part(number: int, part: Plan, share: float) -> str:
    limits, one = part.limits, part.prediction
    places = "; ".join(gpus_of(part, replica) for replica in range(part.split.dp))
    layers = ", ".join(map(str, part.split.stage_layers))
    tokens = part.kv_cache.num_tokens
    lines = [
        f"Part {number}, {part_label(part)} on {places}:",
        f"  layers {layers}; up to {limits.max_num_seqs} requests at once in a replica, "
        f"{limits.max_batched_tokens} tokens a step; {tokens:,} tokens of KV cache a rank, "
        f"{one.memory_bytes_per_gpu.value / 1e9:.1f} GB on the fullest GPU",
        f"  {figure(one.output_tokens_per_s.value)} output tokens/s, {share:.0%} of all; "
        f"first token after {figure(one.ttft_s.value * 1e3)} ms, then "
        f"{figure(one.tpot_s.value * 1e3)} ms each",
    ]
    lines += time_lines("one decode step of the slowest stage", one.decode_parts, indent="  ")
    return "\n".join(lines)


def _prediction(plan: PartsPlan) -> str:
    one, load = plan.prediction, plan.workload
    limits = limit_texts(load)
    rate = one.output_tokens_per_s
    return "\n".join(
        [
            f"Predicted at {load.input_tokens} tokens in, {load.output_tokens} out:",
            f"  all parts: {figure(rate.value)} output tokens/s ({figure(rate.low)} to "
            f"{figure(rate.high)})",
            f"  slowest part: time to first token {figure(one.ttft_s.value * 1e3)} ms{limits[0]}",
            f"  slowest part: time per output token {figure(one.tpot_s.value * 1e3)} ms{limits[1]}",
        ]
    )


def _proof(proof: Certificate) -> str:
    looked_at = f"{proof.num_candidates} candidates for a replica on some set of GPUs"
    return "\n".join(proof_lines(proof, looked_at))
