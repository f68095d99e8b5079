"""How tensors are stored in checkpoints: which number formats are read, and where scales are.

Names are those of the safetensors header. Without torch, so that a launcher can check a checkpoint.
"""

# Read as they are.
PLAIN = ("F32", "BF16", "F16", "F64")
# Read with a scale beside them, and widened.
SCALED = ("F8_E4M3", "F8_E5M2", "I8")
# Of scales: float32, or a power of two in a byte.
SCALES = (*PLAIN, "F8_E8M0")
# Bytes of a number, by its name in the header; the reader of ranks knows the same.
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
# Inputs that share a scale (OCP Microscaling Formats v1.0, section 5.2).
MXFP4_GROUP = 32


def scale_names(name: str) -> tuple[str, str]:
    """Return what the scale of tensor `name` may be called.

    DeepSeek's FP8 and transformers' (a factor, in spite of its name), then compressed-tensors'.

    >>> scale_names("mlp.up_proj.weight")
    ('mlp.up_proj.weight_scale_inv', 'mlp.up_proj.weight_scale')
    """
    return f"{name}_scale_inv", f"{name}_scale"
