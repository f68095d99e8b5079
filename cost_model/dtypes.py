"""Number formats and what a value of each costs in memory."""

from typing import Literal, get_args

Dtype = Literal["float32", "bfloat16", "float16", "float8", "int8", "int4", "mxfp4"]

# Bits of one weight, without the scales that stand beside the weights. MXFP4 shares one 8-bit scale
# among 32 values (OCP Microscaling Formats v1.0, section 5.2), so it costs 4.25 bits.
BITS: dict[Dtype, float] = {
    "float32": 32,
    "bfloat16": 16,
    "float16": 16,
    "float8": 8,
    "int8": 8,
    "int4": 4,
    "mxfp4": 4.25,
}
assert set(BITS) == set(get_args(Dtype))


def num_bytes(count: float, dtype: Dtype) -> int:
    """Return the bytes of `count` values.

    >>> num_bytes(10, "bfloat16")
    20
    """
    return int(count * BITS[dtype] // 8)
