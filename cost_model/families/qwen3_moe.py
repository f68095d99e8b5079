"""Qwen3 with experts: A3B, A22B, Coder. Dense layers may stand between."""

from rankwright.cost_model.families.config import Config
from rankwright.cost_model.families.decoder import (
    build_spec,
    read_attention,
    read_dense,
    read_experts_per_token,
)
from rankwright.cost_model.model_spec import FeedForward, Layer, ModelSpec, Router


def read(config: Config, name: str) -> ModelSpec:
    """Return the spec: every `decoder_sparse_step`-th layer has experts, `mlp_only_layers` none."""
    bias = config.flag("attention_bias", False)
    attention = read_attention(
        config, qkv_bias=bias, output_bias=bias, qk_norm=True, num_kv_heads=4
    )
    if config.flag("use_sliding_window", False) and config.has("sliding_window"):
        window = config.integer("sliding_window")
        attention = attention.model_copy(update={"sliding_window": window})
    # transformers 5.17 saves the count under Mixtral's name.
    key = "num_experts" if config.has("num_experts") else "num_local_experts"
    num_experts = config.integer(key, 128, minimum=0)
    step = config.integer("decoder_sparse_step", 1)
    dense_layers = set(config.integers("mlp_only_layers"))
    layers: list[Layer] = []
    for index in range(config.integer("num_hidden_layers")):
        if num_experts == 0 or index in dense_layers or (index + 1) % step:
            block = read_dense(config)
        else:
            block = FeedForward(
                kind="moe",
                intermediate_size=config.integer("moe_intermediate_size", 768),
                activation=config.activation(),
                num_experts=num_experts,
                experts_per_token=read_experts_per_token(config, num_experts, 8),
                router=Router(normalize=config.flag("norm_topk_prob", False)),
            )
        layers.append(Layer(attention=attention, feed_forward=block))
    return build_spec(config, name, family="qwen3_moe", layers=layers)
