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

_SCALING_NUMBERS = {
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
}
_Scaling = dict[str, float | int | str | bool | list[float]]

# What no model comes near, so that it must be a slip: sizes beyond it would take hours to add up.
_LARGEST_SIZE = 100_000_000
_LARGEST_NUMBER = 1e12  # of bases, factors and limits
_LONGEST_QUOTE = 80  # characters of a wrong value in an error message
_LARGEST = {"num_hidden_layers": 10_000, "num_attention_heads": 100_000, "hidden_size": 1_000_000}


def _is_positive(value: object) -> bool:
    """Return whether `value` is a number above 0; JSON readers let `NaN` and `Infinity` in."""
    return _is_finite(value) and cast("float", value) > 0


def _is_finite(value: object) -> bool:
    """Return whether `value` is a number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        return False


def _shown(value: object) -> str:
    """Return `value` as an error message quotes it: on one line, and not for pages."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # thousands of digits; thousands of levels
        text = f"a {type(value).__name__} too long to print"
    return text if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]}..."


class Config:
    """The keys of one `config.json`. A wrong value raises `ValueError` naming key and model."""

    def __init__(self, values: Mapping[str, object], name: str) -> None:
        """Wrap `values`; `name` is what errors call the model."""
        self.values = values
        self.name = name

    def wrong(self, key: str, expected: str) -> ValueError:
        """Return the error that says what is in `key` and what was expected."""
        found = f"is {_shown(self.values[key])}" if key in self.values else "is missing"
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
        if not _is_positive(value) or cast("float", value) > _LARGEST_NUMBER:
            raise self.wrong(key, f"a number above 0, at most {_LARGEST_NUMBER:g}")
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
        if any(abs(number) > _LARGEST_SIZE for number in numbers):
            raise self.wrong(key, f"whole numbers of at most {_LARGEST_SIZE:,}")
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
        if not _is_positive(theta) or cast("float", theta) > _LARGEST_NUMBER:
            where = key if "rope_theta" in found else "rope_theta"
            raise self.wrong(
                where, f"a number above 0 in 'rope_theta', at most {_LARGEST_NUMBER:g}"
            )
        theta = float(cast("float", theta))
        partial = found.get("partial_rotary_factor", self.values.get("partial_rotary_factor", 1.0))
        if partial not in (1, None):
            raise ValueError(
                f"config of {self.name}: 'partial_rotary_factor' is {_shown(partial)}; only 1.0, "
                "rotary over the whole head, is supported"
            )
        kind = found.get("rope_type", found.get("type", "default"))
        if not isinstance(kind, str) or kind not in _ROPE_TYPES:
            raise self.wrong(key, f"a rope_type of {', '.join(_ROPE_TYPES)}")
        if kind == "default":
            return Rope(theta=theta, interleaved=interleaved)
        return Rope(
            theta=theta, scaling=self._rope_scaling(key, kind, found), interleaved=interleaved
        )

    def _rope_scaling(self, key: str, kind: str, found: Mapping[str, object]) -> _Scaling:
        """Return the settings of rope type `kind` in `found`, which is what `key` holds."""
        scaling: _Scaling = {"rope_type": kind}
        for name, value in found.items():
            if name in _NOT_SCALING or value is None:
                continue
            if name in _SCALING_NUMBERS:
                if not _is_finite(value) or not 0 <= cast("float", value) <= _LARGEST_NUMBER:
                    raise self.wrong(key, f"a number of 0 to {_LARGEST_NUMBER:g} in {name!r}")
            elif not isinstance(value, str | bool) and not _is_finite(value):
                raise self.wrong(key, f"a plain value in {_shown(name)}")
            scaling[str(name)] = cast("float | str | bool", value)
        needed = {"llama3": ("factor", "low_freq_factor", "high_freq_factor")}
        for name in needed.get(kind, ("factor",)):
            if not _is_positive(scaling.get(name)):
                raise self.wrong(key, f"a number in {name!r}, which rope_type {kind!r} needs")
        if kind == "llama3":
            low, high = (cast("float", scaling[f"{end}_freq_factor"]) for end in ("low", "high"))
            if low >= high:
                raise self.wrong(key, "a 'low_freq_factor' below its 'high_freq_factor'")
        # Without it transformers takes the context length (modeling_rope_utils.py, 5.17); settle
        # it here, so that the executor needs no second rule.
        if kind in ("yarn", "llama3"):
            context = "original_max_position_embeddings"
            if context not in scaling:
                scaling[context] = self.integer(context, self.integer("max_position_embeddings"))
            if not 1 <= cast("float", scaling[context]) <= _LARGEST_SIZE:
                raise self.wrong(key, f"1 to {_LARGEST_SIZE:,} tokens in {context!r}")
        return scaling
