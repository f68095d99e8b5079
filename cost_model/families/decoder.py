"""What the families share: the parts of a pre-norm decoder with rotary attention."""

from collections.abc import Sequence
from itertools import groupby

from rankwright.cost_model.dtypes import Dtype
from rankwright.cost_model.families.config import Config
from rankwright.cost_model.families.quantization import read_weight_dtypes
from rankwright.cost_model.model_spec import (
    Attention,
    FeedForward,
    Layer,
    LayerRun,
    ModelSpec,
    Rope,
)


def read_attention(
    config: Config,
    *,
    qkv_bias: bool = False,
    output_bias: bool = False,
    qk_norm: bool = False,
    sinks: bool = False,
    head_dim: int | None = None,
    num_kv_heads: int | None = None,
) -> Attention:
    """Return multi-head, grouped-query or multi-query attention over all tokens.

    Args:
        config: Its head counts and, where it has one, `head_dim`.
        qkv_bias: Query, key and value projections add a bias.
        output_bias: The output projection adds a bias.
        qk_norm: RMSNorm over each query and key head.
        sinks: A learned sink logit a head.
        head_dim: Where the config names none; None: hidden size over heads.
        num_kv_heads: Where the config names none; None: as many as query heads.

    Raises:
        ValueError: a head count is missing or does not divide.
    """
    hidden_size = config.integer("hidden_size")
    num_heads = config.integer("num_attention_heads")
    num_kv_heads = config.integer("num_key_value_heads", num_kv_heads or num_heads)
    if num_heads % num_kv_heads:
        raise config.wrong("num_key_value_heads", f"a divisor of num_attention_heads={num_heads}")
    if not config.has("head_dim") and head_dim is None and hidden_size % num_heads:
        raise config.wrong("num_attention_heads", f"a divisor of hidden_size={hidden_size}")
    head_dim = config.integer("head_dim", head_dim or hidden_size // num_heads)
    if head_dim % 2:
        raise config.wrong("head_dim", "an even number, as rotary embedding needs pairs")
    return Attention(
        kind="mha" if num_kv_heads == num_heads else "mqa" if num_kv_heads == 1 else "gqa",
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        value_head_dim=head_dim,
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        qk_norm=qk_norm,
        sinks=sinks,
    )


def read_dense(config: Config, *, bias: bool = False) -> FeedForward:
    """Return the gated MLP of `intermediate_size`."""
    return FeedForward(
        kind="dense",
        intermediate_size=config.integer("intermediate_size"),
        activation=config.activation(),
        bias=bias,
    )


def read_experts_per_token(config: Config, num_experts: int, default: int | None = None) -> int:
    """Return `num_experts_per_tok`, checked against `num_experts`."""
    experts_per_token = config.integer("num_experts_per_tok", default)
    if experts_per_token > num_experts:
        raise config.wrong("num_experts_per_tok", f"at most the {num_experts} experts")
    return experts_per_token


def sliding_windows(config: Config, default: Sequence[bool]) -> tuple[int | None, ...]:
    """Return the window of each layer in tokens, None where it sees all.

    Args:
        config: `layer_types` decides where present, as transformers 5 writes it.
        default: Whether each layer slides, where `layer_types` is absent.
    """
    types = config.texts("layer_types")
    known = {"sliding_attention": True, "full_attention": False}
    if types:
        if len(types) != len(default) or not set(types) <= set(known):
            raise config.wrong(
                "layer_types", f"{len(default)} entries of {' or '.join(sorted(known))}"
            )
        slides = [known[kind] for kind in types]
    else:
        slides = list(default)
    window = config.integer("sliding_window") if any(slides) else None
    return tuple(window if slide else None for slide in slides)


def build_spec(
    config: Config,
    name: str,
    *,
    family: str,
    layers: Sequence[Layer],
    tie_embeddings: bool = False,
    default_norm_eps: float = 1e-6,
    default_dtype: Dtype = "float32",
    rope: Rope | None = None,
) -> ModelSpec:
    """Return the spec of `layers`, with what every family reads the same way.

    Args:
        config: The keys of `config.json`.
        name: Hub id or folder.
        family: Module name of the reader.
        layers: First to last.
        tie_embeddings: The class default, where the config is silent.
        default_norm_eps: The class default, where the config is silent.
        default_dtype: Where the config is silent; PyTorch's own is float32.
        rope: None: read it with the class default theta of 10,000.
    """
    dtype = config.dtype(default_dtype)
    rope = rope or config.rope()
    begin = config.integers("bos_token_id")
    return ModelSpec(
        name=name,
        family=family,
        architecture=config.texts("architectures")[0],
        hidden_size=config.integer("hidden_size"),
        vocab_size=config.integer("vocab_size"),
        layer_runs=tuple(
            LayerRun(count=len(list(run)), layer=layer) for layer, run in groupby(layers)
        ),
        tie_embeddings=config.flag("tie_word_embeddings", tie_embeddings),
        norm_eps=config.number("rms_norm_eps", default_norm_eps),
        rope=rope,
        max_context_tokens=_context_tokens(config, rope),
        dtype=dtype,
        weight_dtypes=read_weight_dtypes(config, dtype),
        kv_dtype=dtype,
        bos_token_id=begin[0] if begin else None,
        eos_token_ids=config.integers("eos_token_id"),
    )


def _context_tokens(config: Config, rope: Rope) -> int:
    """Return the longest context, which a YaRN config may leave at the trained length."""
    tokens = config.integer("max_position_embeddings")
    scaling = rope.scaling or {}
    factor, trained = scaling.get("factor"), scaling.get("original_max_position_embeddings")
    if scaling.get("rope_type") == "yarn" and isinstance(factor, int | float):
        assert isinstance(trained, int | float), "config.rope settles it for yarn"
        tokens = max(tokens, int(factor * trained))
    return tokens
