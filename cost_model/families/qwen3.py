"""Qwen3, dense: RMSNorm on query and key heads, a head width of its own, no biases."""

from rankwright.cost_model.families.config import Config
from rankwright.cost_model.families.decoder import build_spec, read_attention
from rankwright.cost_model.families.qwen2 import read_layers
from rankwright.cost_model.model_spec import ModelSpec


def read(config: Config, name: str) -> ModelSpec:
    """Return the spec."""
    bias = config.flag("attention_bias", False)
    attention = read_attention(
        config, qkv_bias=bias, output_bias=bias, qk_norm=True, head_dim=128, num_kv_heads=32
    )
    return build_spec(config, name, family="qwen3", layers=read_layers(config, attention))
