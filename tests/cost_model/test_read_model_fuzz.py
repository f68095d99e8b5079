"""Any `config.json`, however broken, gives a spec or one line that names the key."""

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tests.cost_model.configs import DEEPSEEK_V3, FAMILY_CONFIGS, LLAMA, Config

from rankwright.cost_model.model_spec import ModelSpec
from rankwright.cost_model.read_model import read_model

_YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "mscale_all_dim": 1.0,
}
_LLAMA3 = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_PACKED = {
    "quant_method": "compressed-tensors",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
        }
    },
}
# Keys that not every family's config has, so that their readers are reached too.
_MORE: Config = {
    "rope_scaling": _YARN,
    "rope_parameters": _LLAMA3 | {"rope_theta": 5e5},
    "quantization_config": _PACKED,
    "layer_types": ["full_attention", "full_attention", "sliding_attention"],
    "sliding_window": 64,
    "use_sliding_window": True,
    "head_dim": 16,
    "attention_bias": True,
    "partial_rotary_factor": 1.0,
    "dtype": "float16",
    "_name_or_path": "some/model",
    "original_max_position_embeddings": 64,
}
_QUANTIZED: list[Config] = [
    {"quant_method": "fp8", "weight_block_size": [128, 128]},
    {"quant_method": "awq", "bits": 4, "group_size": 64},
    {"quant_method": "gptq", "bits": 8},
    {"quant_method": "mxfp4"},
    _PACKED,
]
_CONFIGS = list(FAMILY_CONFIGS.values())
_DROP = object()
_ABSURD: list[Any] = [
    *(_DROP, None, True, False, 0, 1, -1, 2, 3, 7, 10**6, 10**9, 10**18, 10**400, 10**5000),
    *(-(10**5000), 0.0, 0.5, -1.5, 1e-320, 1e308, float("nan"), float("inf"), float("-inf")),
    *("", "48", "silu", "yarn", "llama3", "linear", "magic\n\0", "x" * 5000),
    *([], [0], [1, 1], [10**400], [None], ["full_attention"], [[]], [[], {}] * 50),
    *({}, {"factor": 2}, {"rope_type": "yarn", "factor": 1e300}, {"quant_method": "fp8"}),
]


def _places(values: Mapping[str, Any], at: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the path of every key of `values` and of the objects in it."""
    found: list[tuple[str, ...]] = []
    for key, value in values.items():
        found.append((*at, key))
        if isinstance(value, Mapping):
            found += _places(value, (*at, key))
    return found


def _changed(values: Mapping[str, Any], place: tuple[str, ...], value: object) -> Config:
    """Return `values` with `value` at `place`; as it was where the way there is gone."""
    key, *rest = place
    changed = dict(values)
    if rest:
        if isinstance(changed.get(key), Mapping):
            changed[key] = _changed(changed[key], tuple(rest), value)
    elif value is _DROP:
        changed.pop(key, None)
    else:
        changed[key] = value
    return changed


@st.composite
def broken_configs(draw: st.DrawFn) -> Config:
    """A config of some family with one to four keys dropped, or of another type, or absurd."""
    config = dict(draw(st.sampled_from(_CONFIGS)))
    extra = draw(st.lists(st.sampled_from(sorted(_MORE)), unique=True, max_size=3))
    config |= {key: _MORE[key] for key in extra}
    if draw(st.booleans()):
        config["quantization_config"] = draw(st.sampled_from(_QUANTIZED))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.sampled_from(_places(config) or [("hidden_size",)]))
        config = _changed(config, place, draw(st.sampled_from(_ABSURD)))
    return config


_KEYS = {"rope_theta"} | {
    place[-1] for values in (*_CONFIGS, _MORE, *_QUANTIZED) for place in _places(values)
}


def _read(config: Config) -> tuple[ModelSpec | None, ValueError | None]:
    try:
        return read_model(config), None
    except ValueError as error:
        return None, error


@settings(deadline=None, max_examples=400)
@given(config=broken_configs())
@example(config=LLAMA | {"rope_theta": 10**400})
@example(config=LLAMA | {"hidden_size": 10**5000})
@example(config=LLAMA | {"rope_scaling": _YARN | {"original_max_position_embeddings": "64"}})
@example(config=LLAMA | {"rope_scaling": _YARN | {"factor": 1e300}})
@example(config=LLAMA | {"rope_scaling": {"type": "linear", "factor": 2, "other": [[]]}})
@example(config=LLAMA | {"_name_or_path": [10**5000]})
@example(config=LLAMA | {"num_hidden_layers": 10_000})
@example(config=DEEPSEEK_V3 | {"n_group": 8, "topk_group": 1, "num_experts_per_tok": 4})
def test_any_config_is_a_spec_or_one_line_that_names_a_key(config: Config) -> None:
    spec, error = _read(config)
    if spec is None:
        message = str(error)
        assert not isinstance(error, ValidationError), message
        assert "\n" not in message
        assert "architecture " in message or any(repr(key) in message for key in _KEYS), message
        return
    assert 1 <= spec.num_layers <= 10_000
    assert ModelSpec.model_validate_json(spec.model_dump_json()) == spec


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a": ' * 100_000, '{"hidden_size": ' + "9" * 5000 + "}", '{"a": "\ud800"}'],
)
def test_json_that_python_cannot_hold_is_no_config(tmp_path: Any, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=r"config\.json is no"):
        read_model(tmp_path)
