"""Llama 1 to 3.3, and models that use its class (SmolLM2, DeepSeek-R1-Distill-Llama, Yi)."""

from rankwright.cost_model.families.config import Config
from rankwright.cost_model.families.decoder import build_spec, read_attention, read_dense
from rankwright.cost_model.model_spec import Layer, ModelSpec


def read(config: Config, name: str) -> ModelSpec:
    """Return the spec: one kind of layer; `attention_bias` is on all four projections."""
    bias = config.flag("attention_bias", False)
    layer = Layer(
        attention=read_attention(config, qkv_bias=bias, output_bias=bias),
        feed_forward=read_dense(config, bias=config.flag("mlp_bias", False)),
    )
    layers = [layer] * config.integer("num_hidden_layers")
    return build_spec(config, name, family="llama", layers=layers)
