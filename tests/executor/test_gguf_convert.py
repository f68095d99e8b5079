"""A small GGUF file written here, and the real one against transformers' own reading of it."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from rankwright.executor.gguf_convert import convert_gguf, rotary_halves

HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, VOCAB = 32, 64, 2, 4, 2, 12
TOKENS = ["<|end|>", "a", "b", "ab", "Ġ", "1", "2", "Ġa", "Ġab", "ĠĠ", "c", "d"]
MERGES = ["a b", "Ġ a", "Ġ ab", "Ġ Ġ"]


def write_gguf(path: Path, architecture: str = "llama", cut: str = "smollm") -> dict[str, Any]:
    """Write a random model quantised as the real one is; return the arrays before quantisation."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] + [1] * (VOCAB - 1))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (VOCAB, HIDDEN), "output_norm": (HIDDEN,), "output": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        kv = HIDDEN * KV_HEADS // HEADS
        shapes |= {
            f"blk.{layer}.attn_norm": (HIDDEN,),
            f"blk.{layer}.attn_q": (HIDDEN, HIDDEN),
            f"blk.{layer}.attn_k": (kv, HIDDEN),
            f"blk.{layer}.attn_v": (kv, HIDDEN),
            f"blk.{layer}.attn_output": (HIDDEN, HIDDEN),
            f"blk.{layer}.ffn_norm": (HIDDEN,),
            f"blk.{layer}.ffn_gate": (FFN, HIDDEN),
            f"blk.{layer}.ffn_up": (FFN, HIDDEN),
            f"blk.{layer}.ffn_down": (HIDDEN, FFN),
        }
    arrays = {}
    for name, shape in shapes.items():
        array = random.standard_normal(shape).astype(np.float32)
        arrays[name] = array
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", array)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            packed = gguf.quants.quantize(array, kind)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return arrays


def test_weights_get_their_hugging_face_names_and_values(tmp_path: Path) -> None:
    arrays = write_gguf(tmp_path / "model.gguf")
    folder = convert_gguf(tmp_path / "model.gguf", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    assert len(tensors) == len(arrays)
    np.testing.assert_array_equal(tensors["model.norm.weight"], arrays["output_norm"])
    down = tensors["model.layers.1.mlp.down_proj.weight"]
    # Q8_0 rounds to 1/127 of the largest of 32 values: half a step is below 4 sigma / 127 / 2.
    np.testing.assert_allclose(down, arrays["blk.1.ffn_down"], atol=4 / 127 / 2)
    key = tensors["model.layers.0.self_attn.k_proj.weight"]
    expected = rotary_halves(arrays["blk.0.attn_k"], KV_HEADS)
    np.testing.assert_allclose(key, expected, atol=4 / 127 / 2)


def test_rotary_pairs_become_halves_in_each_head() -> None:
    # Two heads of four rows; llama.cpp's neighbours (0, 1) are Hugging Face's rows 0 and 2.
    rows = np.arange(8, dtype=np.float32).reshape(8, 1)
    assert rotary_halves(rows, 2).ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_weights_are_those_that_transformers_reads_from_the_same_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf")
    model = AutoModelForCausalLM.from_pretrained(
        convert_gguf(tmp_path / "model.gguf", tmp_path / "model"), dtype=torch.float32
    )
    theirs = load_gguf_checkpoint(
        str(tmp_path / "model.gguf"), return_tensors=True, model_to_load=model
    )
    state = model.state_dict()
    assert set(theirs["tensors"]) == set(state)
    for name, tensor in theirs["tensors"].items():
        assert torch.equal(tensor, state[name]), name
    assert theirs["config"]["rope_theta"] == model.config.rope_parameters["rope_theta"]


def test_config_says_what_the_metadata_say(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf")
    folder = convert_gguf(tmp_path / "model.gguf", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (HEADS, KV_HEADS)
    assert (config["head_dim"], config["rope_theta"]) == (HIDDEN // HEADS, 5000.0)
    assert config["rms_norm_eps"] == 1e-5
    assert config["tie_word_embeddings"] is False
    assert config["vocab_size"] == VOCAB


@pytest.mark.parametrize(
    ("cut", "text", "pieces"),
    [
        ("smollm", " ab", ["Ġab"]),
        ("smollm", "12", ["1", "2"]),
        ("smollm", "ab  1<|end|>", ["ab", "ĠĠ", "1", "<|end|>"]),
        # GPT-2's pattern leaves one blank to the number: two blanks are then no piece.
        ("gpt-2", "ab  1", ["ab", "Ġ", "Ġ", "1"]),
    ],
)
def test_tokenizer_cuts_as_the_file_says(
    tmp_path: Path, cut: str, text: str, pieces: list[str]
) -> None:
    write_gguf(tmp_path / "model.gguf", cut=cut)
    folder = convert_gguf(tmp_path / "model.gguf", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids) == pieces
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.eos_token_id == 0


def test_a_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert convert_gguf(tmp_path / "absent.gguf", tmp_path / "model") == tmp_path / "model"
    assert list((tmp_path / "model").iterdir()) == []


@pytest.mark.parametrize(
    ("architecture", "cut", "message"),
    [
        ("gemma", "smollm", "architecture 'gemma'"),
        ("llama", "tekken", "cuts text as 'tekken'"),
    ],
)
def test_what_is_not_known_is_refused_and_leaves_nothing(
    tmp_path: Path, architecture: str, cut: str, message: str
) -> None:
    write_gguf(tmp_path / "model.gguf", architecture, cut)
    with pytest.raises(ValueError, match=message):
        convert_gguf(tmp_path / "model.gguf", tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"not a model" * 10)
    with pytest.raises(ValueError, match="cannot be read as a GGUF file"):
        convert_gguf(tmp_path / "model.gguf", tmp_path / "model")


def test_smollm2_answers(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model: Any = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    text = tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text == "The capital of France is Paris."
