"""Parameters and weight bytes equal those of transformers' own modules."""

from typing import Any

import pytest
from tests.cost_model.configs import FAMILY_CONFIGS, LLAMA

from rankwright.cost_model.memory import stage_weight_bytes
from rankwright.cost_model.model_spec import ModelSpec, WeightDtypes
from rankwright.cost_model.parameters import Tensor, count_parameters, tensor_bytes
from rankwright.cost_model.read_model import read_model
from rankwright.cost_model.split import Split


def whole_bytes(spec: ModelSpec) -> int:
    return stage_weight_bytes(spec, Split(stage_layers=(spec.num_layers,)), stage=0)


def correction_values(spec: ModelSpec) -> int:
    """DeepSeek-V3's router correction: a float32 buffer in transformers, so no parameter."""
    return sum(
        layer.feed_forward.num_experts
        for layer in spec.layers
        if layer.feed_forward.router.correction_bias
    )


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_bytes_and_counts_equal_transformers(family: str) -> None:
    torch: Any = pytest.importorskip("torch")
    transformers: Any = pytest.importorskip("transformers")
    values = FAMILY_CONFIGS[family]
    spec = read_model(values)
    given = {
        key: value
        for key, value in values.items()
        if key not in ("model_type", "torch_dtype", "architectures")
    }
    config = transformers.AutoConfig.for_model(values["model_type"], **given)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert type(model).__name__ == values["architectures"][0]
    parameters = list(model.parameters())
    expected_bytes = sum(p.numel() * p.element_size() for p in parameters)
    assert whole_bytes(spec) == expected_bytes + 4 * correction_values(spec)
    assert count_parameters(spec) == sum(p.numel() for p in parameters) + correction_values(spec)


@pytest.mark.parametrize(
    ("name", "checkpoint_bytes"),
    [
        # metadata.total_size of model.safetensors.index.json on the hub
        ("openai/gpt-oss-20b", 13_761_264_768),
        ("openai/gpt-oss-120b", 65_248_815_744),
        # two bytes for each of the published parameters
        ("meta-llama/Llama-3.1-8B", 2 * 8_030_261_248),
        ("deepseek-ai/DeepSeek-V2-Lite", 2 * 15_706_484_224),
    ],
)
def test_bytes_equal_the_published_checkpoint(name: str, checkpoint_bytes: int) -> None:
    assert whole_bytes(read_model(name)) == checkpoint_bytes


def test_fp8_blocks_add_a_float32_scale_for_each_128_by_128() -> None:
    blocks = WeightDtypes(attention="float8", scale_rows=128, scale_group=128)
    assert tensor_bytes(Tensor("q", "attention", 256, 130), blocks) == 256 * 130 + 4 * 2 * 2
    one = WeightDtypes(attention="float8", scale_rows=None, scale_group=None)
    assert tensor_bytes(Tensor("q", "attention", 256, 130), one) == 256 * 130 + 4


def test_awq_adds_a_scale_and_a_zero_point_for_each_group() -> None:
    values = LLAMA | {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 16}}
    dtypes = read_model(values).weight_dtypes
    # 10 rows of 48 inputs: 240 bytes of weights; 10 x 3 groups of 16 + 4 bits: 75 bytes.
    assert tensor_bytes(Tensor("gate", "feed_forward", 10, 48), dtypes) == 240 + 75
    # Embedding and norms stay as they are.
    assert tensor_bytes(Tensor("embedding", "embedding", 10, 48), dtypes) == 960


def test_deepseek_v3_weighs_what_fp8_says() -> None:
    # 671.03 G parameters, a byte each; embedding, head and routers take one more.
    assert whole_bytes(read_model("deepseek-ai/DeepSeek-V3")) == pytest.approx(673.15e9, rel=1e-4)
