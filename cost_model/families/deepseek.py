"""DeepSeek V2, V3 and R1: latent attention, first layers dense, shared experts beside the routed.

The multi-token-prediction layer of V3 checkpoints (`num_nextn_predict_layers`) is left out: it
takes no part in ordinary decoding.
"""

from rankwright.cost_model.families.config import Config
from rankwright.cost_model.families.decoder import (
    build_spec,
    read_dense,
    read_experts_per_token,
)
from rankwright.cost_model.model_spec import Attention, FeedForward, Layer, ModelSpec, Router


def read(config: Config, name: str) -> ModelSpec:
    """Return the spec; V2 and V3 differ in the router and in defaults."""
    version_3 = config.texts("architectures")[0] == "DeepseekV3ForCausalLM"
    attention = _read_attention(config)
    dense = read_dense(config)
    first_moe = config.integer("first_k_dense_replace", 3 if version_3 else 0, minimum=0)
    step = config.integer("moe_layer_freq", 1)
    num_layers = config.integer("num_hidden_layers")
    has_experts = config.has("n_routed_experts") and first_moe < num_layers
    experts = _read_experts(config, version_3) if has_experts else dense
    layers = [
        Layer(
            attention=attention,
            feed_forward=experts if index >= first_moe and index % step == 0 else dense,
        )
        for index in range(num_layers)
    ]
    rope = config.rope(interleaved=config.flag("rope_interleave", True))
    return build_spec(config, name, family="deepseek", layers=layers, rope=rope)


def _read_attention(config: Config) -> Attention:
    rotary = config.integer("qk_rope_head_dim", 64)
    if rotary % 2:
        raise config.wrong("qk_rope_head_dim", "an even number, as rotary embedding needs pairs")
    bias = config.flag("attention_bias", False)
    return Attention(
        kind="mla",
        num_heads=config.integer("num_attention_heads"),
        num_kv_heads=1,  # the latent, which all heads read
        head_dim=config.integer("qk_nope_head_dim", 128) + rotary,
        value_head_dim=config.integer("v_head_dim", 128),
        qkv_bias=bias,
        output_bias=bias,
        q_lora_rank=config.integer("q_lora_rank") if config.has("q_lora_rank") else None,
        kv_lora_rank=config.integer("kv_lora_rank", 512),
        rope_head_dim=rotary,
    )


def _read_experts(config: Config, version_3: bool) -> FeedForward:
    num_experts = config.integer("n_routed_experts")
    width = config.integer("moe_intermediate_size")
    experts_per_token = read_experts_per_token(config, num_experts)
    router = _read_router(config, num_experts, version_3)
    reachable = num_experts // router.num_groups * router.groups_per_token
    if experts_per_token > reachable:
        raise config.wrong(
            "num_experts_per_tok",
            f"at most the {reachable} experts of the topk_group={router.groups_per_token} groups "
            "that a token may choose from",
        )
    return FeedForward(
        kind="moe",
        intermediate_size=width,
        activation=config.activation(),
        num_experts=num_experts,
        experts_per_token=experts_per_token,
        shared_intermediate_size=width * config.integer("n_shared_experts", 0, minimum=0),
        router=router,
    )


def _read_router(config: Config, num_experts: int, version_3: bool) -> Router:
    """Return the router: V3 adds a correction bias, V2 may choose groups by their best expert."""
    method = config.text("topk_method", "noaux_tc" if version_3 else "greedy")
    known = ("noaux_tc",) if version_3 else ("greedy", "group_limited_greedy")
    if method not in known:
        raise config.wrong("topk_method", f"one of {', '.join(known)}")
    grouped = method != "greedy"
    num_groups = config.integer("n_group", 1) if grouped else 1
    groups_per_token = config.integer("topk_group", 1) if grouped else 1
    if num_experts % num_groups:
        raise config.wrong("n_group", f"a divisor of the {num_experts} experts")
    if groups_per_token > num_groups:
        raise config.wrong("topk_group", f"at most n_group={num_groups}")
    return Router(
        scoring="sigmoid" if version_3 else "softmax",
        normalize=config.flag("norm_topk_prob", version_3),
        scale=config.number("routed_scaling_factor", 2.5 if version_3 else 1.0),
        num_groups=num_groups,
        groups_per_token=groups_per_token,
        group_score="top2_sum" if version_3 else "max",
        correction_bias=version_3,
    )
