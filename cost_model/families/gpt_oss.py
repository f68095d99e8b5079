"""gpt-oss: every other layer slides, attention has sinks and biases, experts are MXFP4."""

from rankwright.cost_model.families.config import Config
from rankwright.cost_model.families.decoder import (
    build_spec,
    read_attention,
    read_experts_per_token,
    sliding_windows,
)
from rankwright.cost_model.model_spec import FeedForward, Layer, ModelSpec, Router


def read(config: Config, name: str) -> ModelSpec:
    """Return the spec; the first layer slides where `layer_types` does not say otherwise."""
    bias = config.flag("attention_bias", True)
    attention = read_attention(
        config, qkv_bias=bias, output_bias=bias, sinks=True, head_dim=64, num_kv_heads=8
    )
    num_experts = config.integer("num_local_experts", 128)
    block = FeedForward(
        kind="moe",
        intermediate_size=config.integer("intermediate_size"),
        # (up + 1) * gate * sigmoid(1.702 * gate), with both clamped to the limit.
        activation="clamped_swiglu",
        activation_limit=config.number("swiglu_limit", 7.0),
        bias=True,
        num_experts=num_experts,
        experts_per_token=read_experts_per_token(config, num_experts, 4),
        router=Router(bias=True),
    )
    num_layers = config.integer("num_hidden_layers")
    windows = sliding_windows(config, [index % 2 == 0 for index in range(num_layers)])
    layers = [
        Layer(attention=attention.model_copy(update={"sliding_window": window}), feed_forward=block)
        for window in windows
    ]
    return build_spec(
        config,
        name,
        family="gpt_oss",
        layers=layers,
        default_norm_eps=1e-5,
        default_dtype="bfloat16",  # published configs are silent; the weights are bfloat16
        rope=config.rope(default_theta=150000.0),
    )
