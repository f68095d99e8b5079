"""Kernels run on the GPU where there is one, else in Triton's interpreter (tests/conftest.py)."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _mend_the_interpreter() -> None:
    """Correct what Triton 3.6's interpreter gets wrong; compiled kernels are not concerned."""
    patch_lang_tensor = interpreter._patch_lang_tensor
    convert_float = interpreter._convert_float
    create_dot = interpreter.InterpreterBuilder.create_dot

    # Loop bounds become ints by `int(array of one element)`, which numpy >= 2.4 refuses.
    def patched_lang_tensor(tensor: Any, scope: Any) -> None:
        patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    # bfloat16 is held as its 16 bits in integers. It cuts float32 off where GPUs round ...
    def patched_convert_float(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) == (tl.float32, tl.bfloat16):
            bits = np.ascontiguousarray(data).view(np.uint32)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            return np.where(np.isnan(data), 0x7FC0, rounded).astype(np.uint16)
        if (source, target) == (tl.bfloat16, tl.float32):
            return (data.astype(np.uint32) << 16).view(np.float32)
        return convert_float(data, source, target, rounding).reshape(data.shape)

    # ... and matrix products multiply those integers.
    def patched_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (
            self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)
        )
        return create_dot(self, a, b, *rest)

    interpreter._patch_lang_tensor = patched_lang_tensor
    interpreter._convert_float = patched_convert_float
    setattr(interpreter.InterpreterBuilder, "create_dot", patched_dot)  # noqa: B010


if DEVICE == "cpu":
    assert os.environ.get("TRITON_INTERPRET") == "1", "triton was imported before it was set"
    _mend_the_interpreter()


@pytest.fixture
def device() -> str:
    """Where the tensors of a test live: the kernel runs there under `backend="triton"`."""
    return DEVICE


@pytest.fixture(autouse=True)
def _fresh_random_inputs(request: pytest.FixtureRequest) -> None:
    """Draw new inputs in every run; a failure prints the seed that repeats it."""
    seed = int(os.environ.get("RANKWRIGHT_TEST_SEED", torch.seed() % 2**31))
    torch.manual_seed(seed)
    request.node.add_report_section("setup", "seed", f"RANKWRIGHT_TEST_SEED={seed}")


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what `torch.empty` returns with NaN, so that an element nobody wrote fails its test."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        out: torch.Tensor = empty(*args, **kwargs)
        return out.fill_(torch.nan if out.is_floating_point() else torch.iinfo(out.dtype).min)

    monkeypatch.setattr(torch, "empty", poisoned)


def relative_error(
    out: torch.Tensor, reference: torch.Tensor, size: torch.Tensor | None = None
) -> float:
    """Return ||out - reference|| / ||size or reference||; NaN where any element is."""
    difference = (out.double() - reference.double()).norm()
    size = reference if size is None else size
    return float(difference / size.double().norm().clamp(min=1e-30))


@pytest.fixture
def assert_close() -> Callable[..., None]:
    """Compare by norm, to within one rounding of the result's dtype.

    float32 gets 16 of them: sums of some hundred terms run in another order. `score_error` is how
    far the scores of a softmax may be off: exp turns it into that relative error of the weights.
    `size` is how large the terms of a sum are that may cancel: what is left has their roundings.
    """

    def check(
        out: torch.Tensor,
        reference: torch.Tensor,
        score_error: float = 0.0,
        size: torch.Tensor | None = None,
    ) -> None:
        assert out.shape == reference.shape
        assert out.dtype == reference.dtype
        roundings = 16 if out.dtype == torch.float32 else 1
        bound = roundings * torch.finfo(out.dtype).eps + score_error
        assert relative_error(out, reference, size) <= bound

    return check
