"""Plans that no GPU or kernel can run are refused before anything starts.

There is no GPU here: plans name GPUs that are not there, and what PyTorch says of a GPU is a mock.
"""

from typing import Any

import pytest
import torch
from tests.executor.plans import cpu_plan
from tests.executor.test_launch import SPEC

from rankwright.cost_model.model_spec import ModelSpec
from rankwright.executor import start_checks
from rankwright.executor.backends.tools import MissingToolError
from rankwright.executor.preflight import make_options
from rankwright.executor.start_checks import check_capability, check_start
from rankwright.executor.start_device import check_gpu
from rankwright.executor.start_memory import StartMemoryError
from rankwright.kernels import decode_config, limits, prefill_config
from rankwright.planner.plan import Plan
from rankwright.topology.cluster import Link
from rankwright.topology.devices import DEVICES


def with_attention(**changes: Any) -> ModelSpec:
    (run,) = SPEC.layer_runs
    attention = run.layer.attention.model_copy(update=changes)
    layer = run.layer.model_copy(update={"attention": attention})
    return SPEC.model_copy(update={"layer_runs": (run.model_copy(update={"layer": layer}),)})


def with_cache(plan: Plan, **changes: int) -> Plan:
    return plan.model_copy(update={"kv_cache": plan.kv_cache.model_copy(update=changes)})


def check(plan: Plan, **options: Any) -> tuple[str, ...]:
    return check_start(plan, make_options(plan, **options))


@pytest.mark.parametrize("cp", [1, 2])
def test_a_cache_that_cannot_hold_one_request_is_refused(cp: int) -> None:
    plan = cpu_plan(SPEC, cp=cp, num_blocks=16 // cp, block_tokens=16, max_model_len=256)
    assert check(plan) == ()
    with pytest.raises(ValueError, match=rf"{240 if cp == 1 else 224} tokens, and .* is 256; "):
        check(with_cache(plan, num_blocks=16 // cp - 1))


def test_blocks_that_kernels_cannot_read_are_refused() -> None:
    with pytest.raises(ValueError, match=r"block_tokens is 48; .* a power of two from 16"):
        check(with_cache(cpu_plan(SPEC), block_tokens=48))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 320, "value_head_dim": 320}, "layer 0 has a head size of 320; .* 1 to 256"),
        (
            {"kind": "mla", "kv_lora_rank": 1024, "rope_head_dim": 64},
            "latents of 1024 and 64 rotary columns; its kernel takes up to 512 and 64",
        ),
    ],
)
def test_a_head_size_without_a_kernel_is_refused_on_gpus_only(
    changes: dict[str, Any], message: str
) -> None:
    plan = cpu_plan(with_attention(**changes), device="h100-sxm")
    with pytest.raises(ValueError, match=message):
        check(plan)
    assert check(plan, device="cpu") == ()


def test_kernels_have_a_shape_for_each_head_size_of_the_table() -> None:
    shapes = {(dim, size) for dim in limits.PADDED_HEAD_DIMS for size in (2, 4)}
    assert set(decode_config._SHAPES) == shapes
    assert set(prefill_config._SHAPES) == shapes
    with pytest.raises(ValueError, match="a head size of 257"):
        decode_config.decode_config(1, 1, 257, 1, 16, torch.bfloat16, 132)


def test_a_gpu_without_bfloat16_is_refused_by_its_row_of_the_table() -> None:
    bfloat16 = SPEC.model_copy(update={"dtype": "bfloat16"})
    for key, device in DEVICES.items():
        plan = cpu_plan(bfloat16, device=key)
        if device.compute_capability is not None and device.compute_capability < (8, 0):
            with pytest.raises(ValueError, match=r"does not compute in bfloat16, .* float16"):
                check(plan)
            halves = SPEC.model_copy(update={"dtype": "float16"})
            (note,) = check(cpu_plan(halves, device=key))
            assert "Triton promises to support 8.0 and above" in note
        else:
            assert check(plan) == ()


def test_sums_over_pcie_are_warned_of_in_one_line() -> None:
    plan = cpu_plan(SPEC, tp=4, device="h100-pcie")
    (node,) = plan.cluster.nodes
    pairs = [(a, b) for b in range(4) for a in range(b)]

    def linked(kind: str) -> Plan:
        links = tuple(Link(a=a, b=b, kind=kind, bytes_per_s=5e10, latency_s=1e-6) for a, b in pairs)
        cluster = plan.cluster.model_copy(
            update={"nodes": (node.model_copy(update={"links": links}),)}
        )
        return plan.model_copy(update={"cluster": cluster})

    assert check(linked("NV12")) == ()
    (note,) = check(linked("SYS"))
    assert "GPUs 0 and 1 of node 0 share every layer without NVLink between them (SYS" in note


def test_triton_that_is_missing_is_said_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mock: Python says that there is no Triton."""
    monkeypatch.setattr(start_checks, "find_spec", lambda name: None)
    plan = cpu_plan(SPEC, device="h100-sxm")
    with pytest.raises(MissingToolError, match="Triton is not installed here"):
        check(plan)
    check(plan, device="cpu")
    check(cpu_plan(SPEC))


def test_a_rank_looks_at_its_gpu_before_it_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mock: PyTorch's answers about a GPU."""
    capability, free_bytes = (7, 0), 10**12
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_bytes, 10**12))
    plan = cpu_plan(SPEC.model_copy(update={"dtype": "bfloat16"}), device="h100-sxm")
    gpu = torch.device("cuda", 0)
    with pytest.raises(ValueError, match=r"Tesla V100 \(compute capability 7.0\) does not"):
        check_gpu(plan, plan.ranks[0], gpu)
    capability = (8, 0)
    check_gpu(plan, plan.ranks[0], gpu)
    free_bytes = 1000
    with pytest.raises(StartMemoryError, match="out of memory before the weights load"):
        check_gpu(plan, plan.ranks[0], gpu)
    capability, free_bytes = (7, 5), 10**12
    halves = cpu_plan(SPEC.model_copy(update={"dtype": "float16"}), device="h100-sxm")
    with pytest.warns(UserWarning, match="kernels may fail to compile"):
        check_gpu(halves, halves.ranks[0], gpu)


def test_ampere_needs_no_warning() -> None:
    assert check_capability("bfloat16", (8, 0), "A100") is None
