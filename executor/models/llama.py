"""Llama 2 and 3: RMSNorm, rotary, grouped-query attention, SwiGLU."""

from rankwright.executor.models.names import TensorNames

NAMES = TensorNames(
    embedding="model.embed_tokens.weight",
    final_norm="model.norm.weight",
    head="lm_head.weight",
    attention="model.layers.{layer}.self_attn",
    feed_forward="model.layers.{layer}.mlp",
    attention_norm="model.layers.{layer}.input_layernorm.weight",
    feed_forward_norm="model.layers.{layer}.post_attention_layernorm.weight",
)
