import pytest
from tests.cost_model.configs import MIXTRAL

from rankwright.cost_model.held_weights import held_by, is_widened
from rankwright.cost_model.memory import stage_weight_bytes
from rankwright.cost_model.predict import predict
from rankwright.cost_model.read_model import read_model
from rankwright.cost_model.split import Split
from rankwright.cost_model.workload import Workload
from rankwright.planner.make_plan import make_plan
from rankwright.topology.shorthand import parse_cluster

PLAIN = read_model(MIXTRAL)


def quantised(**settings: object) -> dict[str, object]:
    return {**MIXTRAL, "quantization_config": settings}


@pytest.mark.parametrize(
    ("settings", "is_read"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, True),
        ({"quant_method": "fp8"}, True),
        ({"quant_method": "mxfp4"}, True),
        ({"quant_method": "awq", "bits": 4}, False),
        ({"quant_method": "gptq", "bits": 8}, False),
    ],
)
def test_what_is_read_is_held_wide(settings: dict[str, object], is_read: bool) -> None:
    spec = read_model(quantised(**settings))
    held = held_by(spec, "rankwright")
    assert is_widened(spec.weight_dtypes) == is_read
    assert held_by(spec, "vllm") == spec
    assert held_by(held, "rankwright") == held
    split = Split(stage_layers=(spec.num_layers,))
    as_plain = stage_weight_bytes(held, split, stage=0) == stage_weight_bytes(PLAIN, split, stage=0)
    assert as_plain == is_read


@pytest.mark.parametrize(
    ("weights", "is_read"),
    [
        ({"num_bits": 8, "type": "float", "strategy": "channel"}, True),
        ({"num_bits": 8, "type": "int", "strategy": "channel"}, True),
        ({"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False}, False),
        ({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}, False),
    ],
)
def test_of_compressed_tensors_8_bits_without_zero_points_are_read(
    weights: dict[str, object], is_read: bool
) -> None:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    spec = read_model(quantised(quant_method="compressed-tensors", config_groups=groups))
    assert is_widened(spec.weight_dtypes) == is_read


def test_plan_and_prediction_count_wide_weights_and_say_so() -> None:
    spec = read_model("openai/gpt-oss-20b")
    cluster, load = parse_cluster("1xh100-sxm"), Workload(input_tokens=200, output_tokens=20)
    plan = make_plan(spec, cluster, load)
    assert plan.model.weight_dtypes.feed_forward == "bfloat16"
    (said,) = plan.assumptions
    assert said.startswith("weights: stored as mxfp4 (mxfp4), and widened to bfloat16")
    parts = {part.name: part.bytes for part in plan.prediction.memory_parts}
    assert parts["weights"] > 40e9  # 20.9e9 parameters, two bytes each
    stored = predict(spec, cluster, load, plan.split, engine="vllm").memory_parts
    assert next(part.bytes for part in stored if part.name == "weights") < 16e9
    again = predict(spec, cluster, load, plan.split)
    assert again.tpot_s == plan.prediction.tpot_s
