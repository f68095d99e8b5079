"""DeepSeek V2, V3 and R1: latent attention, first layers dense, shared experts."""

from dataclasses import replace

from rankwright.executor.models import llama
from rankwright.executor.models.names import ExpertNames

_BLOCK = "model.layers.{layer}.mlp"
NAMES = replace(
    llama.NAMES,
    experts=ExpertNames(
        router=f"{_BLOCK}.gate",
        gate=f"{_BLOCK}.experts.{{expert}}.gate_proj",
        up=f"{_BLOCK}.experts.{{expert}}.up_proj",
        down=f"{_BLOCK}.experts.{{expert}}.down_proj",
        correction=f"{_BLOCK}.gate.e_score_correction_bias",
        shared=f"{_BLOCK}.shared_experts",
        float32_router=True,
    ),
)
