"""What an engine holds of a checkpoint's weights: as they are stored, or widened as they load.

Our executor multiplies in 16 or 32 bits, and widens what it reads. So its plans count wide weights,
in memory and in time; other engines have kernels for the stored form.
"""

from rankwright.cost_model.dtypes import BITS
from rankwright.cost_model.model_spec import ModelSpec, WeightDtypes

# Methods that the executor reads, with the formats of each: DeepSeek's blocks and transformers',
# llm-compressor's scales a matrix, a row or a block, gpt-oss's experts.
_WIDENED: dict[str, tuple[str, ...]] = {
    "fp8": ("float8",),
    "compressed-tensors": ("float8", "int8"),
    "mxfp4": ("mxfp4",),
}


def is_widened(dtypes: WeightDtypes) -> bool:
    """Return whether the executor widens weights that are stored so."""
    formats = _WIDENED.get(dtypes.method or "", ())
    return dtypes.zero_point_bits == 0 and dtypes.feed_forward in formats


def about_weights(spec: ModelSpec, engine: str) -> tuple[str, ...]:
    """Return what to know of how `engine` holds weights and KV cache of `spec`; empty: as they are.

    >>> from rankwright.cost_model.read_model import read_model
    >>> about_weights(read_model("openai/gpt-oss-20b"), "rankwright")[0][:36]
    'weights: stored as mxfp4 (mxfp4), an'
    """
    dtypes = spec.weight_dtypes
    if engine != "rankwright":
        return ()
    cache: tuple[str, ...] = ()
    if spec.kv_dtype != spec.dtype:
        cache = (
            f"KV cache: {spec.kv_dtype}, which rankwright's executor does not keep: planned for "
            "what it would do, and refused at launch; other engines have it (--engine)",
        )
    stored = f"{dtypes.feed_forward}{f' ({dtypes.method})' if dtypes.method else ''}"
    if is_widened(dtypes):
        return (
            f"weights: stored as {stored}, and widened to {spec.dtype} as they load; other engines "
            "keep them as stored (--engine)",
            *cache,
        )
    if BITS[dtypes.feed_forward] < 16:
        return (
            f"weights: {stored}, which rankwright's executor does not compute in: planned for what "
            "it would do; other engines have it (--engine)",
            *cache,
        )
    return cache


def held_by(spec: ModelSpec, engine: str) -> ModelSpec:
    """Return `spec` with its weights in the formats that `engine` holds them in.

    >>> from rankwright.cost_model.read_model import read_model
    >>> spec = read_model("openai/gpt-oss-20b")
    >>> [held_by(spec, name).weight_dtypes.feed_forward for name in ("vllm", "rankwright")]
    ['mxfp4', 'bfloat16']
    """
    dtypes = spec.weight_dtypes
    if engine != "rankwright" or not is_widened(dtypes):
        return spec
    wide = dtypes.model_copy(update={"attention": spec.dtype, "feed_forward": spec.dtype})
    return spec.model_copy(update={"weight_dtypes": wide})
