"""Qwen3 with experts: Qwen3's attention, experts in most or all layers."""

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
    ),
)
