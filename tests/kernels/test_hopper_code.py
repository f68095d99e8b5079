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
    all_reduce, decode_attention, decode_config, decode_merge, expert_exchange, filtered_sampling,
    mla_attention, mla_rotary, moe_align, moe_configs, moe_experts, moe_routing, noise,
    part_attention, peer_words, prefill_attention, prefill_config, pushed_sum, rms_norm, rotary,
    sampling, shard_embedding, skinny_linear, swiglu, token_feed, two_shot_sum,
)

def resources(kernel, warps, stages, floats, unspecialized, **constants):
    signature, attributes = {}, {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name] = "constexpr"
            continue
        short = name.removesuffix("_ptr")
        moe = kernel.__module__.rpartition(".")[2].startswith(("moe", "expert"))
        ints = (
            "words epochs table work context windows token tokens pairs counts counted replicas "
            "block_slots starts finished"
        ).split()
        floats_of = (
            "partial lse merged_lse cos_sin temperature best weights pair_weights correction "
            "maxima values top_p found"
        ).split()
        if name in floats:
            signature[name] = "fp32"
        elif name.endswith("_ptr"):
            is_int = short in ints or (moe and short == "slots")
            wide = short in floats_of
            long = short in (
                "positions slots seeds load ids drawn top_k told arrivals".split()
            )
            kind = "fp32" if wide else "i64" if long else "bf16"
            signature[name] = "*" + ("i32" if is_int else kind)
        else:
            signature[name] = "i64" if name == "table_address" else "i32"
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
    rms_norm._rms_norm_kernel, 16, 1, ["eps"], [], DIM=4096, BLOCK_D=4096, HAS_RESIDUAL=True,
    OVERLAP=True)
found["swiglu"] = resources(swiglu._swiglu_kernel, 4, 1, [], [], NUM_COLUMNS=14336, BLOCK=1024,
    OVERLAP=True)
found["rotary"] = resources(
    rotary._rotary_and_cache_kernel, 2, 1, ["eps"], [], BLOCK_TOKENS=64, NUM_HEADS=32,
    NUM_KV_HEADS=8, HALF_DIM=64, BLOCK_H=8, BLOCK_R=64, HAS_NORM=True, OVERLAP=True)
found["sample"] = resources(
    sampling._sample_kernel, 8, 1, [], [], BLOCK=sampling._BLOCK, **noise.CONSTANTS)
found["maxima"] = resources(
    filtered_sampling._group_maxima_kernel, 8, 1, [], [], BLOCK=4096, GROUP=32)
found["sample filtered"] = resources(
    filtered_sampling._sample_filtered_kernel, 16, 1, [], [], BLOCK=4096, BLOCK_G=4096,
    CANDIDATES=4096, FIRST=1024, ONE=filtered_sampling._ONE, **noise.CONSTANTS)
cut = dict(
    TILE=64, MIN_TILES=1, HAS_WINDOWS=False, HAS_SINKS=True, RETURN_LSE=False, LN_2=0.693)
dims = dict(NUM_HEADS=32, HEAD_DIM=128, BLOCK_D=128)
found["merge"] = resources(
    decode_merge._merge_kernel, 4, 1, [], ["window", "num_splits"], BLOCK_S=32, CHUNK=16,
    OVERLAP=True, **cut, **dims)
import torch
shape = decode_config.decode_config(1, 8, 128, 128, 64, torch.bfloat16, 132)
paged = dict(GROUP=4, HEAD_OFFSET=0, BLOCK_TOKENS=64, PRECISION="tf32", **dims)
loose = ["window", "table_stride", "num_splits"]
found["decode"] = resources(
    decode_attention._decode_kernel, shape.num_warps, shape.num_stages, ["scale_log2"], loose,
    BLOCK_M=16, IS_SPLIT=True, OVERLAP=True, **cut | {"TILE": shape.tile}, **paged)
shape = prefill_config.prefill_config(4096, 128, 64, torch.bfloat16)
found["prefill"] = resources(
    prefill_attention._prefill_kernel, shape.num_warps, shape.num_stages, ["scale_log2"], loose,
    BLOCK_M=shape.block_m, TILE=shape.tile, HAS_WINDOW=False, HAS_SINKS=True, LN_2=0.693,
    **paged)
found["part"] = resources(
    part_attention._part_kernel, shape.num_warps, shape.num_stages, ["scale_log2"],
    ["window", "table_stride", "part_index"], BLOCK_M=shape.block_m, TILE=shape.tile, PARTS=2,
    HAS_WINDOW=False, LN_2=0.693, **paged)
found["route"] = resources(
    moe_routing._route_kernel, 1, 1, ["scale"], ["first_slot", "num_slots"], TOP_K=8, NUM_GROUPS=8,
    GROUP_SIZE=32, GROUPS_PER_TOKEN=4, MAX_REPLICAS=2, BLOCK_G=8, BLOCK_S=32, BLOCK_K=8,
    SIGMOID=True, NORMALIZE=True, TOP2=True, HAS_CORRECTION=True, HAS_TABLE=True, HAS_LOAD=True,
    HAS_COUNTED=True,
    TINY=1e-20)
shape = decode_config.mla_decode_config(16, 128, 64, torch.bfloat16, 132)
found["mla"] = resources(
    mla_attention._mla_decode_kernel, shape.num_warps, shape.num_stages, ["scale_log2"], loose,
    NUM_HEADS=16, LATENT=512, ROTARY=64, BLOCK_H=32, BLOCK_L=512, BLOCK_R=64, BLOCK_TOKENS=64,
    TILE=shape.tile, IS_SPLIT=True, MIN_TILES=1, RETURN_LSE=False, LN_2=0.693, PRECISION="tf32")
found["mla with sums"] = resources(
    mla_attention._mla_decode_kernel, shape.num_warps, shape.num_stages, ["scale_log2"], loose,
    NUM_HEADS=16, LATENT=512, ROTARY=64, BLOCK_H=32, BLOCK_L=512, BLOCK_R=64, BLOCK_TOKENS=64,
    TILE=shape.tile, IS_SPLIT=False, MIN_TILES=1, RETURN_LSE=True, LN_2=0.693, PRECISION="tf32")
found["mla rotary"] = resources(
    mla_rotary._mla_rotary_kernel, 2, 1, ["eps"], [], NUM_HEADS=16, HEAD_DIM=192, LATENT=512,
    HALF=32, BLOCK_TOKENS=64, BLOCK_H=16, BLOCK_L=512, BLOCK_R=32)
found["sum of parts"] = resources(
    all_reduce._sum_kernel, 16, 1, ["eps"], ["num_tokens"], PART_OFFSET=0,
    SIGNAL_WORD=0, RANK=0, WORLD=2, DIM=4096, BLOCK_D=4096, HAS_NORM=True, OVERLAP=True)
found["sum in two shots"] = resources(
    two_shot_sum._two_shot_kernel, 16, 1, ["eps"], ["num_tokens"], PART_OFFSET=0,
    ARRIVALS_OFFSET=8192, SIGNAL_WORD=0, RANK=0, WORLD=4, DIM=4096, BLOCK_D=4096, HAS_NORM=True)
found["pushed sum"] = resources(
    pushed_sum._pushed_sum_kernel, 16, 1, ["eps"], [], WORD_OFFSET=8192, MAX_ROWS=8, RANK=0,
    WORLD=2, NUM_WORDS=2048, BLOCK_W=2048, HAS_NORM=True, OVERLAP=True)
to_experts = dict(
    SIGNAL_WORD=0, RANK=0, WORLD=4, MOE_TP=1, TOP_K=8, BLOCK_K=8, DIM=4096, BLOCK_D=4096)
found["dispatch"] = resources(
    expert_exchange._dispatch_kernel, 16, 1, [], ["num_tokens"], SLOTS_WORD=4096, ROWS_OFFSET=8192,
    WEIGHTS_WORD=8192, **to_experts)
found["combine"] = resources(
    expert_exchange._combine_kernel, 16, 1, [], ["num_tokens"], PARTS_OFFSET=8192, HAS_BASE=True,
    **to_experts)
found["tell"] = resources(peer_words._tell_kernel, 1, 1, [], ["peer", "word", "count"])
found["await"] = resources(peer_words._await_kernel, 1, 1, [], ["word", "count"])
found["shard embedding"] = resources(
    shard_embedding._shard_embedding_kernel, 4, 1, [], [], DIM=4096, BLOCK=1024)
found["feed"] = resources(token_feed._feed_tokens_kernel, 4, 1, [], ["num_tokens"], BLOCK=256)
cut = skinny_linear.skinny_config(1, 4096, 4096, torch.device("cpu"))
found["linear 1"] = resources(
    skinny_linear._vector_kernel, cut.num_warps, cut.num_stages, [], [], NUM_INPUTS=4096,
    BLOCK_N=cut.block_n, BLOCK_K=cut.block_k, HAS_BIAS=False, STAGES=cut.num_stages,
    GATED=False, AHEAD_BYTES=16384, AHEAD_PROGRAMS=264, THREADS=32 * cut.num_warps, OVERLAP=True)
cut = skinny_linear.skinny_config(1, 4096, 28672, torch.device("cpu"))
found["gated linear"] = resources(
    skinny_linear._vector_kernel, cut.num_warps, cut.num_stages, [], [], NUM_INPUTS=4096,
    BLOCK_N=cut.block_n, BLOCK_K=cut.block_k, HAS_BIAS=False, STAGES=cut.num_stages,
    GATED=True, AHEAD_BYTES=0, AHEAD_PROGRAMS=0, THREADS=32 * cut.num_warps, OVERLAP=True)
for name, split in (("linear 16", False), ("linear 16 split", True)):
    found[name] = resources(
        skinny_linear._rows_kernel, 4, 4, [], ["num_rows"], BLOCK_M=16, BLOCK_N=64, BLOCK_K=128,
        WHOLE_STEPS=True, IS_SPLIT=split, HAS_BIAS=False, PRECISION="tf32")
found["count"] = resources(moe_align._count_kernel, 4, 1, [], ["num_pairs"], BLOCK=1024)
found["place"] = resources(
    moe_align._place_kernel, 4, 1, [], ["num_pairs", "max_blocks"], NUM_SLOTS=128, BLOCK_S=128,
    BLOCK_ROWS=128, BLOCK=1024)
found["sum"] = resources(moe_experts._sum_kernel, 4, 1, [], [], DIM=2048, TOP_K=8, BLOCK=1024)
for rows, config in moe_configs._RULES.items():
    for name, tile in (("gate_up", config.gate_up), ("down", config.down)):
        gated = name == "gate_up"
        found[f"{name} {rows}"] = resources(
            moe_experts._grouped_gemm_kernel, tile.num_warps, tile.num_stages, ["limit"],
            ["num_pairs", "num_blocks"], N=768 if gated else 2048, K=2048 if gated else 768,
            TOP_K=8 if gated else 1, GATED=gated, CLAMPED=False, WEIGHTED=not gated, HAS_BIAS=False,
            ALIGNED=True, ALPHA=1.702, BLOCK_M=rows, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
            GROUP_M=tile.group_m, PRECISION="tf32")
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
        ("part", "cp.async.cg.shared.global"),
        ("part", "wgmma.mma_async"),
        ("mla with sums", "cp.async.cg.shared.global"),
        ("sum", "ld.global.v4.b32"),
        ("mla", "cp.async.cg.shared.global"),
        ("mla", "mma.sync.aligned.m16n8k16"),
        ("mla rotary", "ld.global.v4.b32"),
        ("sum of parts", "ld.global.v4.b32"),
        ("sum of parts", "atom.global.sys.release.exch.b32"),
        ("sum of parts", "ld.global.sys.acquire.b32"),
        ("sum in two shots", "ld.global.v4.b32"),
        ("sum in two shots", "st.global.v4.b32"),
        ("sum in two shots", "atom.global.sys.release.exch.b32"),
        ("sum in two shots", "ld.global.sys.acquire.b32"),
        ("pushed sum", "ld.global.v4.b32"),
        ("pushed sum", "st.global.v2.b64"),  # two words with their numbers
        ("pushed sum", "ld.volatile.global.b64"),
        ("dispatch", "ld.global.v4.b32"),
        ("dispatch", "st.global.v4.b32"),
        ("dispatch", "atom.global.sys.release.exch.b32"),
        ("dispatch", "ld.global.sys.acquire.b32"),
        ("combine", "ld.global.v4.b32"),
        ("tell", "atom.global.sys.release.exch.b64"),
        ("await", "ld.global.sys.acquire.b64"),
        ("combine", "ld.global.sys.acquire.b32"),
        ("linear 1", "cp.async.cg.shared.global"),
        ("linear 1", "cp.async.bulk.prefetch.L2.global"),
        ("shard embedding", "ld.global.v4.b32"),
        ("gated linear", "cp.async.cg.shared.global"),
        ("gated linear", "ld.global.v4.b32"),
        ("linear 16", "cp.async.cg.shared.global"),
        ("linear 16", "wgmma.mma_async"),
        ("linear 16 split", "cp.async.cg.shared.global"),
        ("linear 16 split", "wgmma.mma_async"),
        ("linear 16 split", "atom.global.gpu.acq_rel.add"),
        ("gate_up 16", "cp.async.cg.shared.global"),
        ("down 16", "cp.async.cg.shared.global"),
        ("gate_up 128", "wgmma.mma_async"),
        ("down 128", "wgmma.mma_async"),
    ],
)
def test_kernel_has_the_instructions_it_was_written_for(
    kernel: str, instruction: str, compiled: dict[str, Any]
) -> None:
    assert instruction in compiled[kernel]["ptx"].replace(", ", ",")


@pytest.mark.parametrize(
    "kernel",
    [
        "rms_norm",
        "swiglu",
        "rotary",
        "decode",
        "merge",
        "sum of parts",
        "pushed sum",
        "linear 1",
        "gated linear",
    ],
)
def test_kernels_that_overlap_write_only_when_the_one_before_is_done(
    kernel: str, compiled: dict[str, Any]
) -> None:
    before, wait, after = compiled[kernel]["ptx"].partition("griddepcontrol.wait")
    assert wait
    assert "griddepcontrol.launch_dependents" in before
    assert not any(store in before for store in ("st.global", "atom.", "cp.async"))
    assert "st.global" in after


@pytest.mark.parametrize(
    "kernel", ["rms_norm", "sum of parts", "pushed sum", "linear 1", "gated linear"]
)
def test_weights_are_read_before_the_kernel_before_is_done(
    kernel: str, compiled: dict[str, Any]
) -> None:
    before, _, _ = compiled[kernel]["ptx"].partition("griddepcontrol.wait")
    assert "ld.global.v4.b32" in before


def test_grouped_products_fit_on_a_multiprocessor(compiled: dict[str, Any]) -> None:
    products = [name for name in compiled if name.startswith(("gate_up", "down"))]
    assert len(products) == 8
    for name in products:
        assert compiled[name]["shared_bytes"] <= 227 * 1024


def test_two_decode_programs_fit_on_a_multiprocessor(compiled: dict[str, Any]) -> None:
    two_tiles_of_keys_and_values = 2 * 2 * 64 * 128 * 2
    assert two_tiles_of_keys_and_values <= compiled["decode"]["shared_bytes"] <= 227 * 1024 // 2
