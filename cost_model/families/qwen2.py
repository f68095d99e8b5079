"""Qwen 1.5, 2 and 2.5, dense: Llama with biases on query, key and value."""

from rankwright.cost_model.families.config import Config
from rankwright.cost_model.families.decoder import (
    build_spec,
    read_attention,
    read_dense,
    sliding_windows,
)
from rankwright.cost_model.model_spec import Attention, Layer, ModelSpec


def read(config: Config, name: str) -> ModelSpec:
    """Return the spec."""
    attention = read_attention(config, qkv_bias=True)
    return build_spec(config, name, family="qwen2", layers=read_layers(config, attention))


def read_layers(config: Config, attention: Attention) -> list[Layer]:
    """Return dense layers; with `use_sliding_window`, those from `max_window_layers` on slide."""
    num_layers = config.integer("num_hidden_layers")
    slides = config.flag("use_sliding_window", False) and config.has("sliding_window")
    first = config.integer("max_window_layers", 28, minimum=0) if slides else num_layers
    windows = sliding_windows(config, [index >= first for index in range(num_layers)])
    block = read_dense(config)
    return [
        Layer(attention=attention.model_copy(update={"sliding_window": window}), feed_forward=block)
        for window in windows
    ]
