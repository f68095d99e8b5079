"""Each block knows which weights are multiplied with after its own."""

import pytest
from tests.cost_model.configs import FAMILY_CONFIGS
from tests.executor.meta_stage import Asked, meta_stage

from rankwright.cost_model.read_model import read_model
from rankwright.executor.layers.attention import PagedAttention
from rankwright.executor.layers.feed_forward import GatedMlp


@pytest.mark.parametrize("is_last", [True, False])
def test_in_a_dense_model_all_do(is_last: bool) -> None:
    stage = meta_stage(read_model(FAMILY_CONFIGS["llama"]), Asked(), is_last=is_last)
    following = []
    for layer in stage.layers:
        attention, mlp = layer.attention, layer.feed_forward
        assert isinstance(attention, PagedAttention)
        assert isinstance(mlp, GatedMlp)
        assert attention._qkv.next_weight is attention._output.weight_DC
        assert attention._output.next_weight is mlp._gate_up.weight_CD
        following += [attention._qkv.weight_CD, mlp._down.next_weight]
    assert all(
        weight is after for weight, after in zip(following[2::2], following[1:-1:2], strict=True)
    )
    assert following[-1] is (stage.head.weight_VD if stage.head else None)


def test_before_experts_none_is_known() -> None:
    stage = meta_stage(read_model(FAMILY_CONFIGS["mixtral"]), Asked())
    for layer in stage.layers:
        assert isinstance(layer.attention, PagedAttention)
        assert layer.attention._qkv.next_weight is layer.attention._output.weight_DC
        assert layer.attention._output.next_weight is None
