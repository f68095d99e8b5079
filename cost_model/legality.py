"""Which cuts of a replica are legal: what a model allows, and what each engine runs.

The one place that says so. The planner searches what is legal here, `predict` refuses what is not,
and the executor checks plans that come from elsewhere against its own row, so that what is planned
is what runs.
"""

from dataclasses import dataclass
from typing import Literal

from rankwright.cost_model.efficiency import ENGINES
from rankwright.cost_model.model_spec import ModelSpec
from rankwright.cost_model.shards import tp_is_legal
from rankwright.cost_model.split import AttentionSplit


@dataclass(frozen=True, slots=True)
class Forms:
    """Parallel forms that an engine runs, besides TP, PP, DP and EP.

    Args:
        uneven_heads: Whether TP may leave ranks with unequal numbers of heads.
        attention_dp: Models whose attention it can replicate: any, those with experts, or none.
        hybrid_experts: Whether experts may be cut in both ways at once (`1 < ep < tp`).
        context_parallel: Whether it cuts contexts over ranks.
        unlike_shares: Whether ranks of a TP group may hold unequal parts, as their GPUs are.
        attention_dp_in_stages: Whether it replicates attention within stages of a pipeline.
        source: Where this is said.
    """

    uneven_heads: bool
    attention_dp: Literal["any", "experts", "none"]
    hybrid_experts: bool
    context_parallel: bool
    unlike_shares: bool
    attention_dp_in_stages: bool
    source: str


_SGLANG = Forms(False, "experts", True, False, False, True, "docs.sglang.ai, server arguments")
FORMS: dict[str, Forms] = {
    "rankwright": Forms(True, "any", True, True, True, True, "executor/models/supported.py"),
    "vllm": Forms(
        False, "experts", False, False, False, False, "docs.vllm.ai, data and expert parallel pages"
    ),
    "sglang": _SGLANG,
    "sglang-mixed": _SGLANG,
    "trtllm": Forms(
        False, "experts", True, False, False, True, "TensorRT-LLM, parallel strategy page"
    ),
}


def cut_is_legal(
    model: ModelSpec,
    *,
    tp: int,
    ep: int = 1,
    cp: int = 1,
    pp: int = 1,
    attention: AttentionSplit = "tp",
    engine: str = "rankwright",
) -> str | None:
    """Return why `engine` cannot cut each of `pp` stages of `model` so, or None where it can.

    Raises:
        ValueError: The engine is unknown.
    """
    if engine not in FORMS:
        raise ValueError(f"engine {engine!r}: expected one of {', '.join(ENGINES)}")
    if min(tp, ep, cp) < 1:
        return f"tp={tp} ep={ep} cp={cp}: expected 1 or more of each"
    reason = stages_are_legal(pp, attention, engine)
    reason = reason or tp_is_legal(model, tp, whole_heads=attention == "dp")
    reason = reason or ep_is_legal(model, tp, ep)
    return reason or _engine_lacks(model, tp, ep, cp, attention, engine)


def stages_are_legal(pp: int, attention: AttentionSplit, engine: str) -> str | None:
    """Return why `engine` cannot have `pp` stages with attention split so, or None where it can."""
    if attention == "tp" or pp == 1 or FORMS[engine].attention_dp_in_stages:
        return None
    return f"pp={pp}: {engine} runs attention DP within one stage only"


def ep_is_legal(model: ModelSpec, tp: int, ep: int) -> str | None:
    """Return why experts cannot be shared out over `ep` groups, or None where they can."""
    if tp % ep:
        return f"ep={ep} does not divide tp={tp}: moe_tp * ep must equal tp"
    experts = [
        run.layer.feed_forward.num_experts
        for run in model.layer_runs
        if run.layer.feed_forward.kind == "moe"
    ]
    if ep > 1 and not experts:
        return f"ep={ep}: the model has no experts"
    if experts and ep > min(experts):
        return f"ep={ep} leaves ranks without any of the {min(experts)} experts"
    return None


def shares_are_legal(
    model: ModelSpec,
    *,
    ep: int = 1,
    cp: int = 1,
    attention: AttentionSplit = "tp",
    engine: str = "rankwright",
) -> str | None:
    """Return why the ranks of a TP group must hold equal parts of `model`, or None where not.

    A plan says one range of heads, of columns and of vocabulary for each rank, for all its layers.
    """
    if not FORMS[engine].unlike_shares:
        return f"{engine} gives every rank of a TP group an equal part"
    if attention == "dp":
        return "attention DP: every rank has all heads, and an equal share of the requests"
    if ep > 1:
        return f"ep={ep}: experts are shared out by their number, evenly"
    if cp > 1:
        return f"cp={cp}: ranks of a context group hold equal parts, their contexts too"
    sizes = {
        (
            run.layer.attention.num_heads,
            run.layer.attention.num_kv_heads,
            run.layer.feed_forward.kind,
            run.layer.feed_forward.intermediate_size,
        )
        for run in model.layer_runs
    }
    if len(sizes) > 1:
        return "layers of several sizes, of which a rank has one range each"
    if any(run.layer.feed_forward.shared_intermediate_size for run in model.layer_runs):
        return "shared experts beside others: their columns are cut evenly"
    return None


def has_experts(model: ModelSpec) -> bool:
    """Return whether any layer of `model` is a mixture of experts."""
    return any(run.layer.feed_forward.kind == "moe" for run in model.layer_runs)


def _engine_lacks(
    model: ModelSpec, tp: int, ep: int, cp: int, attention: AttentionSplit, engine: str
) -> str | None:
    forms = FORMS[engine]
    if attention == "dp" and tp == 1:
        return "attention DP over one rank is TP1"
    if attention == "dp" and forms.attention_dp == "none":
        return f"{engine} does not run attention DP"
    if attention == "dp" and forms.attention_dp == "experts" and not has_experts(model):
        return f"{engine} runs attention DP for models with experts only"
    if cp > 1 and not forms.context_parallel:
        return f"cp={cp}: {engine} does not run context parallelism"
    if 1 < ep < tp and not forms.hybrid_experts:
        return f"ep={ep} of tp={tp}: {engine} shares experts over all ranks or none"
    if attention == "tp" and not forms.uneven_heads:
        heads = [run.layer.attention.num_heads for run in model.layer_runs]
        uneven = next((number for number in heads if number % tp), None)
        if uneven is not None:
            return f"tp={tp} does not divide the {uneven} query heads, as {engine} needs"
    return None
