"""`quantization_config` of a `config.json` to `WeightDtypes`: one row a method.

What stays in the model's own format: embedding, head, norms, biases and routers, as every method
here leaves them by default.
"""

from collections.abc import Callable

from rankwright.cost_model.dtypes import Dtype
from rankwright.cost_model.families.config import Config
from rankwright.cost_model.model_spec import WeightDtypes

_KEY = "quantization_config"


def read_weight_dtypes(config: Config, dtype: Dtype) -> WeightDtypes:
    """Return the number format of each weight group.

    Args:
        config: With or without `quantization_config`.
        dtype: Of everything that is not quantised.

    Raises:
        ValueError: the method or one of its settings is not supported; the message names it.
    """
    settings = config.mapping(_KEY)
    if settings is None:
        return WeightDtypes(
            attention=dtype, feed_forward=dtype, embedding=dtype, head=dtype, other=dtype
        )
    inner = Config(settings, f"{config.name} ({_KEY})")
    method = inner.text("quant_method", "")
    if method not in _METHODS:
        raise inner.wrong("quant_method", f"one of {', '.join(sorted(_METHODS))}")
    return _METHODS[method](inner, dtype)


def _fp8(config: Config, dtype: Dtype) -> WeightDtypes:
    """FP8 with float32 scales: a block of `weight_block_size` each, or one a matrix."""
    block = config.integers("weight_block_size")
    if block and (len(block) != 2 or min(block) < 1):
        raise config.wrong("weight_block_size", "two whole numbers such as [128, 128]")
    return _quantised(
        "fp8",
        "float8",
        dtype,
        scale_rows=block[0] if block else None,
        scale_group=block[1] if block else None,
        scale_dtype="float32",
    )


def _integer_groups(config: Config, dtype: Dtype) -> WeightDtypes:
    """AWQ and GPTQ: integers with a float16 scale and a zero point a group of inputs."""
    bits = config.integer("bits")
    formats: dict[int, Dtype] = {4: "int4", 8: "int8"}
    if bits not in formats:
        raise config.wrong("bits", "4 or 8")
    group = config.integer("group_size", 128, minimum=-1)
    if group == 0:
        raise config.wrong("group_size", "-1 (all inputs) or at least 1")
    return _quantised(
        config.text("quant_method", ""),
        formats[bits],
        dtype,
        scale_rows=1,
        scale_group=None if group == -1 else group,
        scale_dtype="float16",
        zero_point_bits=bits,
    )


def _mxfp4(config: Config, dtype: Dtype) -> WeightDtypes:
    """MXFP4 of the experts only, as gpt-oss ships; the shared scales are in the 4.25 bits."""
    del config
    return WeightDtypes(
        method="mxfp4",
        attention=dtype,
        feed_forward="mxfp4",
        embedding=dtype,
        head=dtype,
        other=dtype,
    )


def _compressed_tensors(config: Config, dtype: Dtype) -> WeightDtypes:
    """One group of settings for all linear layers, as llm-compressor writes it."""
    groups = Config(config.mapping("config_groups") or {}, f"{config.name}, config_groups")
    if len(groups.values) != 1:
        raise config.wrong("config_groups", "one group of layers")
    name = next(iter(groups.values))
    group = Config(groups.mapping(name) or {}, f"{groups.name}, {name!r}")
    weights = group.mapping("weights")
    if weights is None:
        raise group.wrong("weights", "an object")
    inner = Config(weights, f"{group.name}, weights")
    formats: dict[tuple[str, int], Dtype] = {
        ("float", 8): "float8",
        ("int", 8): "int8",
        ("int", 4): "int4",
    }
    kind = (inner.text("type", "int"), inner.integer("num_bits"))
    if kind not in formats:
        raise inner.wrong("num_bits", "8-bit float, 8-bit int or 4-bit int")
    strategies: dict[str, tuple[int | None, int | None]] = {  # rows and inputs that share a scale
        "tensor": (None, None),
        "channel": (1, None),
        "group": (1, inner.integer("group_size", 128)),
        "block": (128, 128),
    }
    strategy = inner.text("strategy", "tensor")
    if strategy not in strategies:
        raise inner.wrong("strategy", f"one of {', '.join(sorted(strategies))}")
    rows, inputs = strategies[strategy]
    if strategy == "block" and inner.has("block_structure"):
        block = inner.integers("block_structure")
        if len(block) != 2 or min(block) < 1:
            raise inner.wrong("block_structure", "two whole numbers such as [128, 128]")
        rows, inputs = block
    return _quantised(
        "compressed-tensors",
        formats[kind],
        dtype,
        scale_rows=rows,
        scale_group=inputs,
        scale_dtype=dtype,
        zero_point_bits=0 if inner.flag("symmetric", True) else kind[1],
    )


def _quantised(
    method: str,
    weights: Dtype,
    rest: Dtype,
    *,
    scale_rows: int | None,
    scale_group: int | None,
    scale_dtype: Dtype,
    zero_point_bits: int = 0,
) -> WeightDtypes:
    return WeightDtypes(
        method=method,
        attention=weights,
        feed_forward=weights,
        embedding=rest,
        head=rest,
        other=rest,
        scale_rows=scale_rows,
        scale_group=scale_group,
        scale_dtype=scale_dtype,
        zero_point_bits=zero_point_bits,
    )


_METHODS: dict[str, Callable[[Config, Dtype], WeightDtypes]] = {
    "awq": _integer_groups,
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
    "gptq": _integer_groups,
    "mxfp4": _mxfp4,
}
