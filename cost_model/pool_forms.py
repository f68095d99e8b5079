"""Which prefill and decode workers each engine can join: what its cache transfer understands.

Beside `legality.py`, which says what one worker may be. The planner pairs what is legal here; the
renderers refuse what is not.
"""

from dataclasses import dataclass
from typing import Literal

from rankwright.cost_model.split import Split


@dataclass(frozen=True, slots=True)
class PoolForms:
    """What an engine's cache transfer understands.

    Args:
        stages: Pipelines: in neither pool; in prefill, and in decode none or as many; or any.
        source: Where this is said.
    """

    stages: Literal["none", "prefill", "any"]
    source: str


POOL_FORMS: dict[str, PoolForms] = {
    "vllm": PoolForms(
        "none",
        "vLLM 0.26, v1/nixl: the pull connector asks for pp_rank 0; features/nixl_connector_"
        "compatibility.md for unequal TP",
    ),
    "sglang": PoolForms("prefill", "SGLang 0.5.17, srt/disaggregation/common/conn.py"),
    "trtllm": PoolForms("any", "TensorRT-LLM 1.2, features/disagg-serving.md, FAQ"),
}


def pair_is_legal(engine: str, prefill: Split, decode: Split) -> str | None:
    """Return why `engine` cannot hand caches from `prefill` to `decode`, or None where it can.

    Raises:
        ValueError: The engine has no separate pools.
    """
    if engine not in POOL_FORMS:
        raise ValueError(
            f"engine {engine!r} does not run separate pools for prefill and decode; expected one "
            f"of {', '.join(POOL_FORMS)}"
        )
    stages = POOL_FORMS[engine].stages
    if stages == "none" and max(prefill.pp, decode.pp) > 1:
        return f"{engine} hands no cache over from or to pipelines: pp must be 1 in both pools"
    if stages == "prefill" and decode.pp not in (1, prefill.pp):
        return f"{engine} needs decode with pp=1 or pp={prefill.pp} as prefill has"
    if prefill.cp > 1 or decode.cp > 1:
        return f"{engine} hands no cache over from or to context groups"
    first, second = (1 if one.attention == "dp" else one.tp for one in (prefill, decode))
    if max(first, second) % min(first, second):
        return (
            f"ranks that share attention, {first} in prefill and {second} in decode, must divide "
            "one another"
        )
    return None
