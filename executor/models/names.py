"""What a model family says of its checkpoints: where each tensor is."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorNames:
    """Names in the checkpoint; `{layer}` stands for the layer's number."""

    embedding: str
    final_norm: str
    head: str
    attention: str
    feed_forward: str
    attention_norm: str
    feed_forward_norm: str
