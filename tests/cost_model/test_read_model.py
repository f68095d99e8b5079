"""Any way to name a model gives its spec; what is wrong in a config is named."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.cost_model.configs import (
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    GPT_OSS,
    LLAMA,
    MISTRAL,
    MIXTRAL,
    QWEN2,
    QWEN3_MOE,
)

from rankwright.cost_model.families import FAMILIES, reader_of
from rankwright.cost_model.model_spec import ModelSpec
from rankwright.cost_model.read_model import read_config, read_model

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("architecture", sorted(FAMILIES))
def test_every_row_has_a_reader(architecture: str) -> None:
    assert callable(reader_of(architecture))


def test_llama_405b_is_read_from_the_table() -> None:
    spec = read_model("meta-llama/Llama-3.1-405B")
    attention = spec.layers[0].attention
    assert (spec.num_layers, spec.hidden_size, spec.vocab_size) == (126, 16384, 128256)
    assert (attention.kind, attention.num_heads, attention.num_kv_heads) == ("gqa", 128, 8)
    assert attention.head_dim == 128
    assert spec.rope.theta == 500000
    assert spec.rope.scaling == LLAMA3_SCALING
    assert spec.max_context_tokens == 131072
    assert not spec.tie_embeddings


def test_case_and_organisation_may_be_left_out() -> None:
    assert read_model("qwen3-8b").name == "Qwen/Qwen3-8B"


def test_a_chat_model_ends_at_each_of_its_end_tokens() -> None:
    spec = read_model("meta-llama/Llama-3.1-8B-Instruct")
    assert spec.eos_token_ids == (128001, 128008, 128009)
    assert spec.bos_token_id == 128000


def test_a_folder_a_file_and_a_dict_read_alike(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    specs = [read_model(source) for source in (tmp_path, str(tmp_path / "config.json"), LLAMA)]
    assert specs[0].name == specs[1].name == str(tmp_path)
    assert len({spec.model_copy(update={"name": ""}).model_dump_json() for spec in specs}) == 1
    assert read_config(tmp_path) == LLAMA


def test_the_end_tokens_of_generation_config_win(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert read_model(tmp_path).eos_token_ids == (7, 8)


def test_a_spec_survives_json() -> None:
    spec = read_model("openai/gpt-oss-20b")
    assert ModelSpec.model_validate_json(spec.model_dump_json()) == spec


def test_old_and_new_spelling_read_alike() -> None:
    old = LLAMA | {"rope_theta": 500000.0, "rope_scaling": LLAMA3_SCALING}
    new = {key: value for key, value in LLAMA.items() if key != "torch_dtype"} | {
        "dtype": "bfloat16",
        "rope_parameters": LLAMA3_SCALING | {"rope_theta": 500000.0},
    }
    assert read_model(old) == read_model(new)


def test_the_old_type_key_and_a_default_rope_are_understood() -> None:
    linear = read_model(LLAMA | {"rope_scaling": {"type": "linear", "factor": 2}})
    assert linear.rope.scaling == {"rope_type": "linear", "factor": 2}
    plain = LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    assert read_model(plain).rope.scaling is None
    assert read_model(plain).rope.theta == 1e6


def test_yarn_lengthens_the_context() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    assert read_model(LLAMA | {"rope_scaling": scaling}).max_context_tokens == 1024


def test_a_silent_config_is_float32_as_in_pytorch() -> None:
    spec = read_model({key: value for key, value in LLAMA.items() if key != "torch_dtype"})
    assert spec.dtype == spec.weight_dtypes.attention == spec.kv_dtype == "float32"


def test_mistral_slides_by_default_and_not_when_null() -> None:
    assert read_model(MISTRAL).layers[0].attention.sliding_window == 4096
    null = read_model(MISTRAL | {"sliding_window": None})
    assert null.layers[0].attention.sliding_window is None
    assert null.layers[0].attention.head_dim == 16


def test_qwen2_slides_from_max_window_layers_on() -> None:
    config = QWEN2 | {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}
    windows = [layer.attention.sliding_window for layer in read_model(config).layers]
    assert windows == [None, 64, 64]
    assert read_model(QWEN2).layers[2].attention.sliding_window is None


def test_layer_types_decide_where_present() -> None:
    types = ["full_attention", "sliding_attention", "full_attention"]
    config = QWEN2 | {"layer_types": types, "sliding_window": 64}
    windows = [layer.attention.sliding_window for layer in read_model(config).layers]
    assert windows == [None, 64, None]


def test_mixtral_normalises_the_chosen_experts() -> None:
    block = read_model(MIXTRAL).layers[0].feed_forward
    assert (block.kind, block.num_experts, block.experts_per_token) == ("moe", 4, 2)
    assert block.router.normalize


def test_qwen3_moe_counts_its_experts_under_the_name_that_transformers_5_saves() -> None:
    saved = {key: value for key, value in QWEN3_MOE.items() if key != "num_experts"}
    assert read_model(saved | {"num_local_experts": 6}) == read_model(QWEN3_MOE)


def test_qwen3_moe_has_experts_where_the_config_says() -> None:
    spec = read_model(QWEN3_MOE)
    assert [layer.feed_forward.kind for layer in spec.layers] == [
        "dense",
        "moe",
        "dense",
        "dense",
        "dense",
    ]
    assert spec.layers[1].feed_forward.intermediate_size == 24
    assert spec.layers[0].feed_forward.intermediate_size == 80
    assert all(layer.attention.qk_norm for layer in spec.layers)


def test_deepseek_v3_has_latent_attention_fp8_and_three_dense_layers() -> None:
    spec = read_model("deepseek-ai/DeepSeek-V3")
    attention = spec.layers[0].attention
    assert [(run.count, run.layer.feed_forward.kind) for run in spec.layer_runs] == [
        (3, "dense"),
        (58, "moe"),
    ]
    assert (attention.head_dim, attention.value_head_dim) == (192, 128)
    assert (attention.q_lora_rank, attention.kv_lora_rank, attention.rope_head_dim) == (
        1536,
        512,
        64,
    )
    router = spec.layers[5].feed_forward.router
    assert (router.scoring, router.scale, router.num_groups) == ("sigmoid", 2.5, 8)
    assert (router.group_score, router.correction_bias) == ("top2_sum", True)
    dtypes = spec.weight_dtypes
    assert (dtypes.attention, dtypes.embedding, dtypes.other) == ("float8", "bfloat16", "bfloat16")
    assert (dtypes.scale_rows, dtypes.scale_group, dtypes.scale_dtype) == (128, 128, "float32")
    assert spec.rope.interleaved
    assert spec.max_context_tokens == 163840


def test_deepseek_v2_chooses_groups_by_their_best_expert() -> None:
    router = read_model(DEEPSEEK_V2).layers[1].feed_forward.router
    assert (router.scoring, router.group_score, router.num_groups) == ("softmax", "max", 4)
    assert not router.normalize
    greedy = read_model(DEEPSEEK_V2 | {"topk_method": "greedy"}).layers[1].feed_forward.router
    assert greedy.num_groups == greedy.groups_per_token == 1


def test_gpt_oss_alternates_windows_and_has_sinks_and_biases() -> None:
    spec = read_model("openai/gpt-oss-20b")
    attention, block = spec.layers[0].attention, spec.layers[0].feed_forward
    assert [layer.attention.sliding_window for layer in spec.layers[:3]] == [128, None, 128]
    assert attention.sinks
    assert attention.qkv_bias
    assert attention.output_bias
    assert block.bias
    assert block.router.bias
    assert block.activation_limit == 7.0
    assert spec.weight_dtypes.feed_forward == "mxfp4"
    assert spec.weight_dtypes.attention == "bfloat16"
    assert spec.rope.scaling is not None
    assert spec.rope.scaling["truncate"] is False


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"quant_method": "awq", "bits": 4, "group_size": 64},
            ("int4", 64, 1, "float16", 4),
        ),
        (
            {"quant_method": "gptq", "bits": 8, "group_size": -1},
            ("int8", None, 1, "float16", 8),
        ),
        ({"quant_method": "fp8"}, ("float8", None, None, "float32", 0)),
        (
            {"quant_method": "fp8", "weight_block_size": [128, 64]},
            ("float8", 64, 128, "float32", 0),
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "group_0": {
                        "weights": {"type": "float", "num_bits": 8, "strategy": "channel"},
                    }
                },
            },
            ("float8", None, 1, "bfloat16", 0),
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "group_0": {
                        "weights": {
                            "type": "int",
                            "num_bits": 4,
                            "strategy": "group",
                            "group_size": 32,
                            "symmetric": False,
                        },
                    }
                },
            },
            ("int4", 32, 1, "bfloat16", 4),
        ),
    ],
)
def test_quantisation_becomes_formats_and_scales(
    settings: dict[str, Any], expected: tuple[object, ...]
) -> None:
    dtypes = read_model(LLAMA | {"quantization_config": settings}).weight_dtypes
    assert dtypes.method == settings["quant_method"]
    assert dtypes.attention == dtypes.feed_forward == expected[0]
    assert (
        dtypes.scale_group,
        dtypes.scale_rows,
        dtypes.scale_dtype,
        dtypes.zero_point_bits,
    ) == expected[1:]
    assert dtypes.embedding == dtypes.head == dtypes.other == "bfloat16"


def without(config: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != key}


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        (without(LLAMA, "hidden_size"), ["'hidden_size' is missing", "whole number"]),
        (LLAMA | {"hidden_size": 0}, ["'hidden_size' is 0", "at least 1"]),
        (LLAMA | {"hidden_size": 10**15}, ["'hidden_size' is 1000000000000000", "at most"]),
        (LLAMA | {"num_hidden_layers": 10**9}, ["'num_hidden_layers'", "at most 10,000"]),
        (LLAMA | {"vocab_size": 10**12}, ["'vocab_size'", "at most 100,000,000"]),
        (LLAMA | {"hidden_size": "48"}, ["'hidden_size' is '48'"]),
        (LLAMA | {"vocab_size": True}, ["'vocab_size' is True"]),
        (LLAMA | {"num_key_value_heads": 4}, ["num_key_value_heads", "divisor"]),
        (LLAMA | {"num_attention_heads": 5}, ["num_key_value_heads", "divisor"]),
        (LLAMA | {"head_dim": 7}, ["'head_dim' is 7", "even"]),
        (LLAMA | {"torch_dtype": "float12"}, ["'torch_dtype' is 'float12'", "bfloat16"]),
        (LLAMA | {"hidden_act": "tanh"}, ["'hidden_act' is 'tanh'", "silu"]),
        (LLAMA | {"rope_theta": -1}, ["'rope_theta' is -1"]),
        (LLAMA | {"rope_scaling": {"type": "spiral"}}, ["rope_scaling", "spiral", "yarn"]),
        (LLAMA | {"rope_scaling": {"type": "yarn"}}, ["rope_scaling", "'factor'"]),
        (LLAMA | {"rope_scaling": 3}, ["'rope_scaling' is 3", "object"]),
        (LLAMA | {"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
        (LLAMA | {"rms_norm_eps": 0}, ["rms_norm_eps"]),
        (LLAMA | {"rms_norm_eps": float("nan")}, ["rms_norm_eps", "nan"]),
        (LLAMA | {"rope_scaling": LLAMA3_SCALING | {"factor": 0}}, ["rope_scaling", "'factor'"]),
        (LLAMA | {"eos_token_id": "end"}, ["eos_token_id"]),
        (LLAMA | {"tie_word_embeddings": "yes"}, ["tie_word_embeddings", "true or false"]),
        (without(LLAMA, "architectures"), ["'architectures' is missing"]),
        (LLAMA | {"architectures": "Llama"}, ["architectures", "list"]),
        (QWEN2 | {"layer_types": ["full_attention"]}, ["layer_types", "3 entries"]),
        (MIXTRAL | {"num_experts_per_tok": 9}, ["num_experts_per_tok", "4 experts"]),
        (DEEPSEEK_V2 | {"topk_method": "best"}, ["topk_method", "group_limited_greedy"]),
        (DEEPSEEK_V3 | {"n_group": 3}, ["n_group", "divisor"]),
        (DEEPSEEK_V3 | {"topk_group": 5}, ["topk_group", "n_group=4"]),
        (DEEPSEEK_V3 | {"qk_rope_head_dim": 7}, ["qk_rope_head_dim", "even"]),
        (GPT_OSS | {"swiglu_limit": -1}, ["swiglu_limit"]),
        (LLAMA | {"quantization_config": {"quant_method": "magic"}}, ["'quant_method'", "awq"]),
        (LLAMA | {"quantization_config": {}}, ["'quant_method' is missing"]),
        (
            LLAMA | {"quantization_config": {"quant_method": "awq", "bits": 3}},
            ["'bits' is 3", "4 or 8"],
        ),
        (
            LLAMA | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [1]}},
            ["weight_block_size", "[128, 128]"],
        ),
        (
            LLAMA | {"quantization_config": {"quant_method": "compressed-tensors"}},
            ["config_groups"],
        ),
    ],
)
def test_a_bad_config_is_one_line_that_names_the_key(
    config: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the parts below match the message
        read_model(config)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_an_unknown_architecture_names_those_that_are_read() -> None:
    with pytest.raises(ValueError, match=r"'FalconForCausalLM' is not supported.*LlamaForCausalLM"):
        read_model(LLAMA | {"architectures": ["FalconForCausalLM"]})


def test_an_unknown_id_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"meta-llama/Llama-3\.1-70B") as caught:
        read_model("meta-llama/Llama-3.1-71B")
    assert "local folder" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody-of-this-name/model", "a\0b"])
def test_a_name_that_is_no_path_is_an_unknown_model(name: str) -> None:
    with pytest.raises(ValueError, match="neither a known id nor a local path"):
        read_model(name)


def test_a_folder_without_config_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json"):
        read_model(tmp_path)


@pytest.mark.parametrize(("text", "reason"), [("{", "is not JSON"), ("[1]", "no JSON object")])
def test_a_broken_file_says_so(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=reason):
        read_model(tmp_path)


def test_a_relative_folder_is_named_by_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan carries the name, and is run from elsewhere."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA))
    monkeypatch.chdir(tmp_path)
    assert read_model("model").name == str(tmp_path / "model")
    assert read_model(Path("model/config.json")).name == str(tmp_path / "model")
