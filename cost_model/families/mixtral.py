"""Mixtral: Mistral with experts in every layer."""

from rankwright.cost_model.families.config import Config
from rankwright.cost_model.families.decoder import (
    build_spec,
    read_attention,
    read_experts_per_token,
)
from rankwright.cost_model.model_spec import FeedForward, Layer, ModelSpec


def read(config: Config, name: str) -> ModelSpec:
    """Return the spec: one kind of layer; the chosen experts' weights sum to one."""
    window = config.integer("sliding_window") if config.has("sliding_window") else None
    attention = read_attention(config, num_kv_heads=8).model_copy(update={"sliding_window": window})
    num_experts = config.integer("num_local_experts", 8)
    layer = Layer(
        attention=attention,
        feed_forward=FeedForward(
            kind="moe",
            intermediate_size=config.integer("intermediate_size"),
            activation=config.activation(),
            num_experts=num_experts,
            experts_per_token=read_experts_per_token(config, num_experts, 2),
        ),
    )
    layers = [layer] * config.integer("num_hidden_layers")
    return build_spec(config, name, family="mixtral", layers=layers, default_norm_eps=1e-5)
