"""Mistral 7B to Small: Llama with a window over all layers in its first version."""

from rankwright.cost_model.families.config import Config
from rankwright.cost_model.families.decoder import build_spec, read_attention, read_dense
from rankwright.cost_model.model_spec import Layer, ModelSpec


def read(config: Config, name: str) -> ModelSpec:
    """Return the spec: one kind of layer. `sliding_window` null means none, absent means 4096."""
    window = None
    if "sliding_window" not in config.values or config.has("sliding_window"):
        window = config.integer("sliding_window", 4096)
    attention = read_attention(config, num_kv_heads=8).model_copy(update={"sliding_window": window})
    layer = Layer(attention=attention, feed_forward=read_dense(config))
    layers = [layer] * config.integer("num_hidden_layers")
    return build_spec(config, name, family="mistral", layers=layers)
