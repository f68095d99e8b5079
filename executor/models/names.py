"""What a model family says of its checkpoints: where each tensor is."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertNames:
    """Names of a MoE block whose experts are tensors of their own.

    `{layer}` stands for the layer's number, `{expert}` for the expert's; the matrices have no
    `.weight` at their end.
    """

    router: str
    gate: str
    up: str
    down: str
    correction: str | None = None  # added to the scores for the choice
    shared: str | None = None  # prefix of the experts that every token takes
    float32_router: bool = False  # logits in float32, as the family's own code has them


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedExpertNames:
    """Names of a MoE block whose experts are packed into one tensor a kind, as gpt-oss does.

    `gate_up` is [experts, inputs, 2 x width] with gate and up columns in turn, `down` is
    [experts, width, outputs]; their biases end in `_bias`.
    """

    router: str
    gate_up: str
    down: str
    correction: None = None
    shared: None = None
    float32_router: bool = False


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
    experts: ExpertNames | PackedExpertNames | None = None
