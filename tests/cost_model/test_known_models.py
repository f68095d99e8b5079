"""The table of known models: every row reads, and counts agree with the published ones."""

from typing import cast

import pytest

from rankwright.cost_model.known_models import KNOWN_MODELS
from rankwright.cost_model.parameters import count_active_parameters, count_parameters
from rankwright.cost_model.read_model import read_model
from rankwright.cost_model.shards import tp_is_legal

PUBLISHED = {name: row for name, row in KNOWN_MODELS.items() if "parameters" in row}

# Ids that must be there, as users type them.
EXPECTED = [
    "meta-llama/Llama-3.1-8B",
    "meta-llama/Llama-3.1-8B-Instruct",
    "meta-llama/Meta-Llama-3.1-8B",
    "meta-llama/Llama-3.1-70B",
    "meta-llama/Llama-3.1-405B",
    "meta-llama/Llama-3.1-405B-Instruct",
    "meta-llama/Llama-3.2-1B",
    "meta-llama/Llama-3.2-3B",
    "meta-llama/Llama-3.3-70B-Instruct",
    "meta-llama/Llama-2-7b-hf",
    "meta-llama/Llama-2-13b-hf",
    "meta-llama/Llama-2-70b-hf",
    "mistralai/Mistral-7B-v0.1",
    "mistralai/Mistral-7B-Instruct-v0.3",
    "mistralai/Mistral-Small-24B-Instruct-2501",
    "Qwen/Qwen2.5-0.5B",
    "Qwen/Qwen2.5-1.5B",
    "Qwen/Qwen2.5-3B",
    "Qwen/Qwen2.5-7B",
    "Qwen/Qwen2.5-14B",
    "Qwen/Qwen2.5-32B",
    "Qwen/Qwen2.5-72B",
    "Qwen/Qwen2.5-72B-Instruct",
    "Qwen/Qwen3-0.6B",
    "Qwen/Qwen3-1.7B",
    "Qwen/Qwen3-4B",
    "Qwen/Qwen3-8B",
    "Qwen/Qwen3-14B",
    "Qwen/Qwen3-32B",
    "Qwen/Qwen3-30B-A3B",
    "Qwen/Qwen3-235B-A22B",
    "mistralai/Mixtral-8x7B-v0.1",
    "mistralai/Mixtral-8x22B-v0.1",
    "deepseek-ai/DeepSeek-V2-Lite",
    "deepseek-ai/DeepSeek-V2",
    "deepseek-ai/DeepSeek-V3",
    "deepseek-ai/DeepSeek-R1",
    "openai/gpt-oss-20b",
    "openai/gpt-oss-120b",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
]


@pytest.mark.parametrize("name", EXPECTED)
def test_well_known_ids_are_known(name: str) -> None:
    assert name in KNOWN_MODELS


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_every_row_reads_and_fits_its_own_name(name: str) -> None:
    spec = read_model(name)
    assert spec.name == name
    assert spec.eos_token_ids
    assert tp_is_legal(spec, 1) is None


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_agree_with_the_published_within_half_a_percent(name: str) -> None:
    row = PUBLISHED[name]
    assert row["parameters_source"]
    assert count_parameters(read_model(name)) == pytest.approx(
        cast("int", row["parameters"]), rel=0.005
    )


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
        ("meta-llama/Llama-3.1-405B", 405_853_388_800),
        ("mistralai/Mixtral-8x7B-v0.1", 46_702_792_704),
        ("Qwen/Qwen3-8B", 8_190_735_360),
        ("Qwen/Qwen3-235B-A22B", 235_093_634_560),
        ("deepseek-ai/DeepSeek-V2", 235_741_434_880),
    ],
)
def test_counts_that_are_published_in_full_agree_to_the_last_one(
    name: str, parameters: int
) -> None:
    assert count_parameters(read_model(name)) == parameters


@pytest.mark.parametrize(
    ("name", "active"),
    [
        ("openai/gpt-oss-120b", 5.13e9),  # arXiv:2508.10925, table 1
        ("openai/gpt-oss-20b", 3.61e9),
        ("Qwen/Qwen3-235B-A22B", 22e9),  # by name
        ("mistralai/Mixtral-8x7B-v0.1", 12.9e9),  # arXiv:2401.04088, 13B
        ("deepseek-ai/DeepSeek-V3", 37e9),  # arXiv:2412.19437
    ],
)
def test_active_parameters_agree_with_the_published_within_two_percent(
    name: str, active: float
) -> None:
    assert count_active_parameters(read_model(name)) == pytest.approx(active, rel=0.02)


def test_a_dense_model_uses_all_but_its_embedding() -> None:
    spec = read_model("Qwen/Qwen3-8B")
    table = spec.vocab_size * spec.hidden_size
    assert count_active_parameters(spec) == count_parameters(spec) - table
