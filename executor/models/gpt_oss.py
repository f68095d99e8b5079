"""gpt-oss: attention sinks, every other layer a sliding window, experts packed and with biases."""

from dataclasses import replace

from rankwright.executor.models import llama
from rankwright.executor.models.names import PackedExpertNames

_BLOCK = "model.layers.{layer}.mlp"
NAMES = replace(
    llama.NAMES,
    experts=PackedExpertNames(
        router=f"{_BLOCK}.router",
        gate_up=f"{_BLOCK}.experts.gate_up_proj",
        down=f"{_BLOCK}.experts.down_proj",
    ),
)
