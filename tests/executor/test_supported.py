from typing import Any

import pytest
from tests.executor.plans import cpu_plan

from rankwright.cost_model.held_weights import held_by
from rankwright.cost_model.read_model import read_model
from rankwright.executor.models.supported import check_supported

LLAMA = read_model("meta-llama/Llama-3.2-1B")


@pytest.mark.parametrize(
    "name",
    [
        "meta-llama/Llama-3.1-8B",
        "mistralai/Mistral-7B-v0.1",
        "Qwen/Qwen2.5-7B",
        "Qwen/Qwen3-8B",
        "mistralai/Mixtral-8x7B-v0.1",
        "Qwen/Qwen3-30B-A3B",
    ],
)
def test_families_run(name: str) -> None:
    check_supported(cpu_plan(read_model(name)))


@pytest.mark.parametrize("name", ["openai/gpt-oss-20b", "deepseek-ai/DeepSeek-V3"])
def test_quantised_checkpoints_run_where_the_plan_counts_them_wide(name: str) -> None:
    spec = read_model(name)
    check_supported(cpu_plan(held_by(spec, "rankwright")))
    with pytest.raises(ValueError, match=r"as they are stored, .* plan again for engine"):
        check_supported(cpu_plan(spec))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float8"}, r"cannot compute in float8; plan again with --dtype float32"),
        ({"kv_dtype": "float8"}, r"keeps KV in .* bfloat16, and the plan wants float8"),
    ],
)
def test_a_number_format_without_a_kernel_is_refused(changes: dict[str, Any], message: str) -> None:
    spec = LLAMA.model_copy(update=changes)
    with pytest.raises(ValueError, match=message):
        check_supported(cpu_plan(spec))


def test_quantised_weights_are_refused_by_group() -> None:
    weights = LLAMA.weight_dtypes.model_copy(update={"feed_forward": "int4"})
    spec = LLAMA.model_copy(update={"weight_dtypes": weights})
    with pytest.raises(ValueError, match=r"its feed-forward weights are int4; give a checkpoint"):
        check_supported(cpu_plan(spec))
