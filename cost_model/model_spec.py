"""`ModelSpec`: what a model is made of, read from a Hugging Face `config.json`.

The values are here; each family's reader is a file in `families/`, and the table of well-known ids
is `known_models.py`.
"""

from typing import Literal

from pydantic import Field, model_validator

from rankwright.cost_model.dtypes import Dtype
from rankwright.topology.value import Value


class Attention(Value):
    """The attention of one layer. Head counts are of the whole model, before any split."""

    kind: Literal["mha", "gqa", "mqa", "mla"]
    num_heads: int = Field(ge=1)
    num_kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1, description="of query and key")
    value_head_dim: int = Field(ge=1)
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = Field(default=False, description="RMSNorm over each query and key head")
    sinks: bool = Field(default=False, description="a learned sink logit a head (gpt-oss)")
    sliding_window: int | None = Field(default=None, ge=1, description="tokens; None: all")
    q_lora_rank: int | None = Field(default=None, description="MLA: rank of the query projection")
    kv_lora_rank: int | None = Field(default=None, description="MLA: width of the KV latent")
    rope_head_dim: int | None = Field(default=None, description="MLA: rotary part of a head")


class Router(Value):
    """How a MoE block turns router logits into experts and their weights."""

    scoring: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = Field(default=True, description="weights of the chosen sum to one")
    scale: float = Field(default=1.0, gt=0, description="the weights are multiplied by it")
    num_groups: int = Field(default=1, ge=1, description="groups that the experts form")
    groups_per_token: int = Field(default=1, ge=1, description="groups a token may choose from")
    group_score: Literal["max", "top2_sum"] = "max"
    bias: bool = Field(default=False, description="added to the logits (gpt-oss)")
    correction_bias: bool = Field(
        default=False, description="float32, added to the scores for the choice only (DeepSeek-V3)"
    )


class FeedForward(Value):
    """The feed-forward block of one layer: one gated MLP, or experts with a router."""

    kind: Literal["dense", "moe"]
    intermediate_size: int = Field(ge=1, description="width of the MLP, or of one expert")
    activation: str = "silu"
    bias: bool = False
    num_experts: int = Field(default=0, ge=0)
    experts_per_token: int = Field(default=0, ge=0)
    shared_intermediate_size: int = Field(default=0, ge=0, description="of all shared experts")
    activation_limit: float | None = Field(
        default=None, description="gate and up are clamped to it before the activation (gpt-oss)"
    )
    router: Router = Router()

    @model_validator(mode="after")
    def _experts(self) -> "FeedForward":
        if self.kind == "moe" and not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"a MoE block needs 1 <= experts_per_token <= num_experts, got "
                f"{self.experts_per_token} of {self.num_experts}"
            )
        return self


class Layer(Value):
    """One decoder layer: norm, attention, norm, feed-forward."""

    attention: Attention
    feed_forward: FeedForward


class LayerRun(Value):
    """`count` equal layers in a row."""

    count: int = Field(ge=1)
    layer: Layer


class Rope(Value):
    """Rotary position embedding, as `config.json` gives it."""

    theta: float = Field(default=10000.0, gt=0)
    scaling: dict[str, float | int | str | bool | list[float]] | None = Field(
        default=None, description="with 'rope_type' as a key; None: no scaling"
    )
    interleaved: bool = Field(
        default=False, description="pairs are (0, 1), (2, 3), ...; else (0, d/2), (1, d/2 + 1), ..."
    )


class WeightDtypes(Value):
    """Number format of each group of weights; what is not a matrix is in `other`.

    The matrices of `attention` and `feed_forward` in `float8`, `int8` or `int4` have scales beside
    them: one for each `scale_rows` outputs and `scale_group` inputs.
    """

    method: str | None = Field(
        default=None, description="'fp8', 'awq', 'gptq', 'mxfp4', ...; None: not quantised"
    )
    attention: Dtype = "bfloat16"
    feed_forward: Dtype = "bfloat16"
    embedding: Dtype = "bfloat16"
    head: Dtype = "bfloat16"
    other: Dtype = Field(default="bfloat16", description="norms, biases, routers")
    scale_group: int | None = Field(
        default=None, ge=1, description="inputs that share a scale; None: all of a matrix"
    )
    scale_rows: int | None = Field(
        default=1, ge=1, description="outputs that share a scale; None: all of a matrix"
    )
    scale_dtype: Dtype = "float32"
    zero_point_bits: int = Field(default=0, ge=0, description="beside each scale (awq, gptq)")


class ModelSpec(Value):
    """A decoder-only transformer: shapes, counts and number formats."""

    schema_version: Literal[1] = 1
    name: str = Field(description="hub id or folder it was read from")
    family: str = Field(description="reader in cost_model/families, such as 'llama'")
    architecture: str = Field(description="class name in config.json")
    hidden_size: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    layer_runs: tuple[LayerRun, ...] = Field(min_length=1)
    tie_embeddings: bool = False
    norm_eps: float = Field(default=1e-5, gt=0)
    rope: Rope = Rope()
    max_context_tokens: int = Field(ge=1)
    dtype: Dtype = Field(default="bfloat16", description="of activations")
    weight_dtypes: WeightDtypes = WeightDtypes()
    kv_dtype: Dtype = "bfloat16"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = Field(default=(), description="any of them ends a sequence")

    @property
    def layers(self) -> tuple[Layer, ...]:
        """One entry a layer, first to last."""
        return tuple(run.layer for run in self.layer_runs for _ in range(run.count))

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return sum(run.count for run in self.layer_runs)
