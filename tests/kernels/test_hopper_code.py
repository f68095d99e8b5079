"""Every kernel compiles for an H100 or H200, here and without one, into the code it was meant for.

The interpreter accepts what the compiler does not; and a kernel that lost its wide loads or its
matrix instructions still gives the right answer.
"""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

# Runs where TRITON_INTERPRET is not set, in one process: it takes seconds to import torch.
COMPILE = """
import json
from triton import next_power_of_2
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from rankwright.kernels import (
    decode_attention, prefill_attention, rms_norm, rotary, sampling, swiglu,
)

def resources(kernel, warps, stages, floats, unspecialized, **constants):
    signature, attributes = {}, {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name] = "constexpr"
            continue
        ints = ("table_ptr", "work_ptr", "context_ptr", "windows_ptr", "token_ptr")
        if name in floats:
            signature[name] = "fp32"
        elif name.endswith("_ptr"):
            wide = name in (
                "partial_ptr", "lse_ptr", "merged_lse_ptr", "cos_sin_ptr", "temperature_ptr",
                "best_ptr")
            long = name in ("positions_ptr", "slots_ptr", "seeds_ptr")
            kind = "fp32" if wide else "i64" if long else "bf16"
            signature[name] = "*" + ("i32" if name in ints else kind)
        else:
            signature[name] = "i32"
        if signature[name].startswith("*") or (
            signature[name] == "i32" and name not in unspecialized
        ):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": warps, "num_stages": stages}
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return {"ptx": compiled.asm["ptx"], "shared_bytes": compiled.metadata.shared}

found = {}
found["rms_norm"] = resources(
    rms_norm._rms_norm_kernel, 16, 1, ["eps"], [], DIM=4096, BLOCK_D=4096, HAS_RESIDUAL=True)
found["swiglu"] = resources(swiglu._swiglu_kernel, 4, 1, [], [], NUM_COLUMNS=14336, BLOCK=1024)
found["rotary"] = resources(
    rotary._rotary_and_cache_kernel, 2, 1, ["eps"], [], BLOCK_TOKENS=64, NUM_HEADS=32,
    NUM_KV_HEADS=8, HALF_DIM=64, BLOCK_H=8, BLOCK_R=64, HAS_NORM=True)
found["sample"] = resources(
    sampling._sample_kernel, 8, 1, [], [], BLOCK=sampling._BLOCK,
    MULTIPLY_1=sampling._MULTIPLY_1, MULTIPLY_2=sampling._MULTIPLY_2,
    WEYL=sampling._WEYL, BELOW_ONE=sampling._BELOW_ONE)
cut = dict(TILE=64, MIN_TILES=1, HAS_WINDOWS=False, RETURN_LSE=False, LN_2=0.693)
dims = dict(NUM_HEADS=32, HEAD_DIM=128, BLOCK_D=128)
found["merge"] = resources(
    decode_attention._merge_kernel, 4, 1, [], ["window", "num_splits"], BLOCK_S=32, CHUNK=16,
    **cut, **dims)
import torch
shape = decode_attention.decode_config(1, 8, 128, 128, 64, torch.bfloat16, 132)
paged = dict(GROUP=4, HEAD_OFFSET=0, BLOCK_TOKENS=64, PRECISION="tf32", **dims)
loose = ["window", "table_stride", "num_splits"]
found["decode"] = resources(
    decode_attention._decode_kernel, shape.num_warps, shape.num_stages, ["scale_log2"], loose,
    BLOCK_M=16, IS_SPLIT=True, **cut | {"TILE": shape.tile}, **paged)
shape = prefill_attention.prefill_config(4096, 128, 64, torch.bfloat16)
found["prefill"] = resources(
    prefill_attention._prefill_kernel, shape.num_warps, shape.num_stages, ["scale_log2"], loose,
    BLOCK_M=shape.block_m, TILE=shape.tile, HAS_WINDOW=False, **paged)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    ("kernel", "instruction"),
    [
        ("rms_norm", "ld.global.v4.b32"),  # 16 bytes a thread
        ("swiglu", "ld.global.v4.b32"),
        ("rotary", "ld.global.v4.b32"),
        ("sample", "ld.global.v4.b32"),
        ("merge", "ld.global.v4.b32"),
        ("decode", "cp.async.cg.shared.global"),  # 16 bytes, ahead of their use
        ("decode", "mma.sync.aligned.m16n8k16"),
        ("prefill", "cp.async.cg.shared.global"),
        ("prefill", "wgmma.mma_async"),  # Hopper's own; mma.sync has half its rate
    ],
)
def test_kernel_has_the_instructions_it_was_written_for(
    kernel: str, instruction: str, compiled: dict[str, Any]
) -> None:
    assert instruction in compiled[kernel]["ptx"].replace(", ", ",")


def test_two_decode_programs_fit_on_a_multiprocessor(compiled: dict[str, Any]) -> None:
    two_tiles_of_keys_and_values = 2 * 2 * 64 * 128 * 2
    assert two_tiles_of_keys_and_values <= compiled["decode"]["shared_bytes"] <= 227 * 1024 // 2
