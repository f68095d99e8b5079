import subprocess
import sys

import pytest
import torch

from rankwright.kernels.backend import runs_triton

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from rankwright.kernels.decode_attention import decode_attention
from rankwright.kernels.prefill_attention import prefill_attention
from rankwright.kernels.rms_norm import rms_norm
from rankwright.kernels.rotary import rotary_and_cache
from rankwright.kernels.sampling import sample
from rankwright.kernels.swiglu import swiglu
print(rms_norm(torch.tensor([[3.0, -3.0]]), torch.ones(2), 0.0).tolist())
"""


def test_references_run_where_triton_is_not_installed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[[1.0, -1.0]]"


def test_auto_chooses_by_device(device: str) -> None:
    assert not runs_triton(torch.ones(1), "auto")
    assert runs_triton(torch.ones(1, device=device), "auto") == (device == "cuda")
    assert runs_triton(torch.ones(1), "triton")
    with pytest.raises(ValueError, match="backend='fast'; expected 'auto', 'triton'"):
        runs_triton(torch.ones(1), "fast")  # type: ignore[arg-type]
