"""What the executor cannot run, said before any process starts and without importing torch."""

from rankwright.cost_model.held_weights import is_widened
from rankwright.cost_model.legality import cut_is_legal
from rankwright.cost_model.model_spec import Layer, ModelSpec
from rankwright.executor.models import FAMILIES, tensor_names
from rankwright.planner.plan import Plan

DTYPES = ("float32", "bfloat16", "float16")
_ACTIVATIONS = {"dense": ("silu",), "moe": ("silu", "clamped_swiglu")}


def check_supported(plan: Plan) -> None:
    """Return if the executor runs the plan.

    Raises:
        ValueError: The model, its number formats or the split are beyond the executor; the first
            reason found, with what it can do.
    """
    spec, split = plan.model, plan.split
    tensor_names(spec.architecture)
    for number, layer in enumerate(spec.layers):
        reason = _layer_reason(layer)
        if reason is not None:
            raise ValueError(
                f"the executor cannot run {spec.name!r}: layer {number} has {reason}; it runs "
                f"{', '.join(sorted(FAMILIES))}"
            )
    _check_formats(spec)
    reason = cut_is_legal(spec, tp=split.tp, ep=split.ep, cp=split.cp, attention=split.attention)
    if reason is not None:
        raise ValueError(
            f"the executor cannot run {spec.name!r} as {split.label()}: {reason}; plan again"
        )


def _layer_reason(layer: Layer) -> str | None:
    attention, block = layer.attention, layer.feed_forward
    found = {
        "values and keys of different widths": attention.kind != "mla"
        and attention.value_head_dim != attention.head_dim,
        f"activation {block.activation!r}": block.activation not in _ACTIVATIONS[block.kind],
    }
    return next((name for name, present in found.items() if present), None)


def _check_formats(spec: ModelSpec) -> None:
    if spec.dtype not in DTYPES:
        raise ValueError(
            f"the executor cannot compute in {spec.dtype}; plan again with --dtype "
            f"{', '.join(DTYPES[:-1])} or {DTYPES[-1]}"
        )
    groups = spec.weight_dtypes
    for group in ("attention", "feed_forward", "embedding", "head"):
        found = getattr(groups, group)
        if found not in DTYPES and is_widened(groups):
            raise ValueError(
                f"the plan counts the {group.replace('_', '-')} weights of {spec.name!r} as they "
                f"are stored, in {found}, and the executor widens them to {spec.dtype} as they "
                "load, which takes more memory; plan again for engine rankwright"
            )
        if found not in DTYPES:
            raise ValueError(
                f"the executor cannot run {spec.name!r}: its {group.replace('_', '-')} weights are "
                f"{found}; give a checkpoint in {DTYPES[1]}, or render for an engine that can"
            )
    if spec.kv_dtype != spec.dtype:
        raise ValueError(
            f"the executor keeps KV in the dtype of activations, {spec.dtype}, and the plan wants "
            f"{spec.kv_dtype}; plan again without --kv-dtype"
        )
