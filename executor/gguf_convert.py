"""Turn a GGUF file into a Hugging Face folder, so that everything else reads one format.

The `gguf` library parses the file and dequantises the blocks; this module knows the names, the
order of rotary halves and the tokenizer settings of Hugging Face. Weights are written in float32:
a dequantised value (scale times a small integer, plus an offset) is exact there and would be
rounded in bfloat16, so greedy tokens stay those of the GGUF file.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf.quants import dequantize
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

Array = npt.NDArray[np.float32]

# Source of the names: llama.cpp, gguf-py/gguf/tensor_mapping.py, the rows of MODEL_ARCH.LLAMA.
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}

# How text is cut before BPE, by llama.cpp's name for it (src/llama-vocab.cpp): whether each digit
# stands alone before GPT-2's own pattern is applied.
_DIGITS_APART = {"gpt-2": False, "smollm": True}

_CONTROL_TOKEN = int(gguf.TokenType.CONTROL)


def convert_gguf(source: Path, folder: Path) -> Path:
    """Return `folder`, a Hugging Face folder with the model of the GGUF file `source`.

    The folder appears at once when complete; one that exists already is left as it is.

    Raises:
        ValueError: The file is no GGUF, or of an architecture or tokenizer not known here.
    """
    if folder.exists():
        return folder
    try:
        reader = gguf.GGUFReader(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source} cannot be read as a GGUF file: {error}") from None
    fields = _Fields(reader, source)
    config = model_config(fields)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        tensors = dict(_named_weights(reader, config))
        config["tie_word_embeddings"] = "lm_head.weight" not in tensors
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        build_tokenizer(fields).save(str(partial / "tokenizer.json"))
        _write_json(partial / "config.json", config)
        _write_json(partial / "tokenizer_config.json", tokenizer_config(fields, config))
        special = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        _write_json(partial / "generation_config.json", special)
        partial.chmod(0o755)  # mkdtemp makes it private, and safetensors its file
        (partial / "model.safetensors").chmod(0o644)
        try:
            os.rename(partial, folder)
        except OSError:
            if not folder.exists():  # else another process was first, with the same content
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


class _Fields:
    """Look-up of a GGUF file's metadata, with an error that names the file and the field."""

    def __init__(self, reader: gguf.GGUFReader, source: Path) -> None:
        self.source = source
        self._fields = reader.fields
        self._read: dict[str, Any] = {}  # a vocabulary takes half a second to read

    def __getitem__(self, name: str) -> Any:
        if name not in self._read:
            if name not in self._fields:
                raise ValueError(f"{self.source} has no metadata field {name}")
            self._read[name] = self._fields[name].contents()
        return self._read[name]

    def get(self, name: str, default: Any) -> Any:
        return self[name] if name in self._fields else default


def model_config(fields: _Fields) -> dict[str, Any]:
    """Return `config.json`, without `tie_word_embeddings`, which the weights decide.

    Raises:
        ValueError: Another architecture than `llama`, or rotary embedding of part of a head.
    """
    architecture = fields["general.architecture"]
    if architecture != "llama":
        raise ValueError(
            f"{fields.source} holds a model of architecture {architecture!r}; "
            "only 'llama' can be converted: use a safetensors checkpoint"
        )
    hidden, heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
    head_dim = fields.get("llama.attention.key_length", hidden // heads)
    if fields.get("llama.rope.dimension_count", head_dim) != head_dim:
        raise ValueError(f"{fields.source} rotates only part of each head, which is not supported")
    # Stored in single precision: back to the shortest decimal that means the same number.
    eps = float(str(np.float32(fields["llama.attention.layer_norm_rms_epsilon"])))
    eos = fields["tokenizer.ggml.eos_token_id"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": eps,
        "rope_theta": fields.get("llama.rope.freq_base", 10000.0),
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": eos,
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id", eos),
        "torch_dtype": "float32",
    }


def _named_weights(reader: gguf.GGUFReader, config: dict[str, Any]) -> Iterator[tuple[str, Array]]:
    for tensor in reader.tensors:
        name = tensor.name
        weight = np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
        if name in _TOP_NAMES:
            yield _TOP_NAMES[name], weight
            continue
        _, layer, rest = name.split(".", 2)
        if rest not in _LAYER_NAMES:
            raise ValueError(f"tensor {name} belongs to no part of a Llama model")
        if rest == "attn_q.weight":
            weight = rotary_halves(weight, config["num_attention_heads"])
        elif rest == "attn_k.weight":
            weight = rotary_halves(weight, config["num_key_value_heads"])
        yield f"model.layers.{layer}.{_LAYER_NAMES[rest]}", weight


def rotary_halves(weight: Array, num_heads: int) -> Array:
    """Return a projection's rows (head * dim, hidden) with each head's rotary pairs as two halves.

    llama.cpp rotates neighbours (0, 1), (2, 3), ...; Hugging Face rotates row `i` with row
    `i + dim / 2`. llama.cpp's converter therefore interleaves the rows (`permute` in
    convert_hf_to_gguf.py), and this undoes it.

    >>> rotary_halves(np.array([[0], [2], [1], [3]], np.float32), num_heads=1).ravel().tolist()
    [0.0, 1.0, 2.0, 3.0]
    """
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, columns))


def build_tokenizer(fields: _Fields) -> Tokenizer:
    """Return the byte-level BPE tokenizer that the file's metadata describe.

    Raises:
        ValueError: Another kind of tokenizer, or a way of cutting text not known here.
    """
    model = fields["tokenizer.ggml.model"]
    cut = fields.get("tokenizer.ggml.pre", "gpt-2")
    if model != "gpt2" or cut not in _DIGITS_APART:
        raise ValueError(
            f"{fields.source} has a tokenizer of kind {model!r} that cuts text as {cut!r}; "
            f"known is 'gpt2' with one of {sorted(_DIGITS_APART)}"
        )
    tokens = fields["tokenizer.ggml.tokens"]
    left_right = (merge.split(" ") for merge in fields["tokenizer.ggml.merges"])
    tokenizer = Tokenizer(
        BPE(
            {token: index for index, token in enumerate(tokens)},
            [(left, right) for left, right in left_right],
        )
    )
    kinds = fields["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == _CONTROL_TOKEN
        ]
    )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = (  # type: ignore[assignment]  # a write-only property
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
        if _DIGITS_APART[cut]
        else byte_level
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return tokenizer


def tokenizer_config(fields: _Fields, config: dict[str, Any]) -> dict[str, Any]:
    """Return `tokenizer_config.json`: special tokens and the chat template."""
    tokens = fields["tokenizer.ggml.tokens"]
    answer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[config["bos_token_id"]],
        "eos_token": tokens[config["eos_token_id"]],
        "pad_token": tokens[config["pad_token_id"]],
        "add_bos_token": fields.get("tokenizer.ggml.add_bos_token", False),
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
    }
    template = fields.get("tokenizer.chat_template", None)
    return answer if template is None else answer | {"chat_template": template}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
