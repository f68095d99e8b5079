"""Mixtral: Mistral with experts, named w1 (gate), w3 (up) and w2 (down)."""

from dataclasses import replace

from rankwright.executor.models import llama
from rankwright.executor.models.names import ExpertNames

_BLOCK = "model.layers.{layer}.block_sparse_moe"
NAMES = replace(
    llama.NAMES,
    experts=ExpertNames(
        router=f"{_BLOCK}.gate",
        gate=f"{_BLOCK}.experts.{{expert}}.w1",
        up=f"{_BLOCK}.experts.{{expert}}.w3",
        down=f"{_BLOCK}.experts.{{expert}}.w2",
    ),
)
