"""Typed access to the keys of a `config.json`, with errors that name the key.

Knows both spellings: `rope_theta`, `rope_scaling`, `torch_dtype` as written up to transformers 4,
and `rope_parameters`, `dtype` as written by transformers 5.
"""

import math
from collections.abc import Mapping
from typing import Literal, cast

from rankwright.cost_model.dtypes import Dtype
from rankwright.cost_model.model_spec import Rope

_DTYPES: dict[str, Dtype] = {
    "float32": "float32",
    "float": "float32",
    "float16": "float16",
    "half": "float16",
    "bfloat16": "bfloat16",
}
_ROPE_TYPES = ("default", "linear", "yarn", "llama3")
# Keys of the rope dictionaries that are not part of the scaling.
_NOT_SCALING = {"rope_theta", "type", "rope_type", "partial_rotary_factor"}

# What no model comes near, so that it must be a slip: sizes beyond it would take hours to add up.
_LARGEST_SIZE = 100_000_000
_LARGEST = {"num_hidden_layers": 10_000, "num_attention_heads": 100_000, "hidden_size": 1_000_000}


def _is_positive(value: object) -> bool:
    """Return whether `value` is a number above 0; JSON readers let `NaN` and `Infinity` in."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and value > 0
    )


class Config:
    """The keys of one `config.json`. A wrong value raises `ValueError` naming key and model."""

    def __init__(self, values: Mapping[str, object], name: str) -> None:
        """Wrap `values`; `name` is what errors call the model."""
        self.values = values
        self.name = name

    def wrong(self, key: str, expected: str) -> ValueError:
        """Return the error that says what is in `key` and what was expected."""
        found = f"is {self.values[key]!r}" if key in self.values else "is missing"
        return ValueError(f"config of {self.name}: {key!r} {found}, expected {expected}")

    def has(self, key: str) -> bool:
        """Return whether `key` is there and not null."""
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1) -> int:
        """Return the whole number in `key`; `default` where it is absent or null."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.wrong(key, f"a whole number of at least {minimum}")
        maximum = _LARGEST.get(key, _LARGEST_SIZE)
        if value > maximum:
            raise self.wrong(key, f"a whole number of at most {maximum:,}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return the number above 0 in `key`; `default` where it is absent or null."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if not _is_positive(value):
            raise self.wrong(key, "a number above 0")
        return float(cast("float", value))

    def flag(self, key: str, default: bool) -> bool:
        """Return the truth value in `key`; `default` where it is absent or null."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def text(self, key: str, default: str) -> str:
        """Return the text in `key`; `default` where it is absent or null."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.wrong(key, "a text")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """Return the list of texts in `key`; empty where it is absent or null."""
        items = self._items(key)
        texts = tuple(item for item in items if isinstance(item, str))
        if isinstance(self.values.get(key), str) or len(texts) < len(items):
            raise self.wrong(key, "a list of texts")
        return texts

    def integers(self, key: str) -> tuple[int, ...]:
        """Return the whole number, or the list of them, in `key`; empty where it is absent."""
        items = self._items(key)
        numbers = tuple(
            item for item in items if isinstance(item, int) and not isinstance(item, bool)
        )
        if len(numbers) < len(items):
            raise self.wrong(key, "a whole number or a list of them")
        return numbers

    def _items(self, key: str) -> list[object]:
        """Return what is in the list in `key`; one item where it is no list, none if absent."""
        value = self.values.get(key)
        if value is None:
            return []
        return cast("list[object]", value) if isinstance(value, list | tuple) else [value]

    def mapping(self, key: str) -> Mapping[str, object] | None:
        """Return the object in `key`; None where it is absent or null."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise self.wrong(key, "an object")
        return cast("Mapping[str, object] | None", value)

    def dtype(self, default: Dtype = "float32") -> Dtype:
        """Return the number format in `dtype` or `torch_dtype`; `default` if neither is there."""
        key = "dtype" if self.has("dtype") else "torch_dtype"
        text = self.text(key, default).removeprefix("torch.")
        if text not in _DTYPES:
            raise self.wrong(key, f"one of {', '.join(sorted(_DTYPES))}")
        return _DTYPES[text]

    def activation(self) -> Literal["silu", "gelu", "gelu_tanh", "relu"]:
        """Return the activation in `hidden_act` by its one name."""
        names: dict[str, Literal["silu", "gelu", "gelu_tanh", "relu"]] = {
            "silu": "silu",
            "swish": "silu",
            "gelu": "gelu",
            "gelu_new": "gelu_tanh",
            "gelu_pytorch_tanh": "gelu_tanh",
            "relu": "relu",
        }
        text = self.text("hidden_act", "silu")
        if text not in names:
            raise self.wrong("hidden_act", f"one of {', '.join(sorted(names))}")
        return names[text]

    def rope(self, default_theta: float = 10000.0, *, interleaved: bool = False) -> Rope:
        """Return the rotary embedding, from `rope_parameters` or `rope_theta` and `rope_scaling`.

        `scaling` always holds its kind under `rope_type`; the default kind becomes None.
        """
        key = "rope_parameters" if self.has("rope_parameters") else "rope_scaling"
        found = dict(self.mapping(key) or {})
        theta = found.get("rope_theta", self.values.get("rope_theta"))
        if theta is None:
            theta = default_theta
        if not _is_positive(theta):
            raise self.wrong(key if "rope_theta" in found else "rope_theta", "a number above 0")
        theta = float(cast("float", theta))
        partial = found.get("partial_rotary_factor", self.values.get("partial_rotary_factor", 1.0))
        if partial not in (1, None):
            raise ValueError(
                f"config of {self.name}: 'partial_rotary_factor' is {partial!r}; only 1.0, rotary "
                "over the whole head, is supported"
            )
        kind = found.get("rope_type", found.get("type", "default"))
        if kind not in _ROPE_TYPES:
            raise self.wrong(key, f"a rope_type of {', '.join(_ROPE_TYPES)}")
        if kind == "default":
            return Rope(theta=theta, interleaved=interleaved)
        scaling: dict[str, float | int | str | bool | list[float]] = {"rope_type": str(kind)}
        for name, value in found.items():
            if name in _NOT_SCALING or value is None:
                continue
            if not isinstance(value, int | float | str | bool | list):
                raise self.wrong(key, f"a plain value in {name!r}")
            scaling[name] = value
        needed = {"llama3": ("factor", "low_freq_factor", "high_freq_factor")}
        for name in needed.get(str(kind), ("factor",)):
            if not _is_positive(scaling.get(name)):
                raise self.wrong(key, f"a number in {name!r}, which rope_type {kind!r} needs")
        # Without it transformers takes the context length (modeling_rope_utils.py, 5.17); settle
        # it here, so that the executor needs no second rule.
        if kind in ("yarn", "llama3"):
            original = self.values.get("original_max_position_embeddings")
            scaling.setdefault(
                "original_max_position_embeddings",
                original if isinstance(original, int) else self.integer("max_position_embeddings"),
            )
        return Rope(theta=theta, scaling=scaling, interleaved=interleaved)
