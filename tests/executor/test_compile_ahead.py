"""What a start compiles, found without a GPU, and how ranks wait for it."""

import fcntl
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tests.executor.plans import cpu_plan
from tests.executor.test_launch import SPEC

from rankwright.executor.compile_ahead import unlike_ranks, wait_for_compiler
from rankwright.executor.preflight import make_options
from rankwright.executor.session import compiles_ahead

ROOT = Path(__file__).parents[2]
# In a process of its own: Triton's interpreter is off there, and its GPU an H100 for good.
PROGRAM = """
import json, sys
import torch
from collections import Counter
from triton.backends.compiler import GPUTarget
from rankwright.cost_model.read_model import read_model
from rankwright.executor.compile_ahead import compile_kernel
from rankwright.executor.dry_run import launches_of
from rankwright.executor.kernel_count import KernelCount
from rankwright.kernels import sampling
from rankwright.kernels.gpu_facts import GpuFacts
from tests.executor.plans import cpu_plan

found = {}
for name, model, split in (
    ("dense", "Qwen/Qwen3-8B", {"tp": 2}),
    ("experts", "Qwen/Qwen3-30B-A3B", {}),
):
    plan = cpu_plan(
        read_model(model), device="h100-sxm", block_tokens=64, max_num_seqs=256,
        max_batched_tokens=8192, max_model_len=8192, **split,
    )
    launches = launches_of(
        plan, 0, GpuFacts("NVIDIA H100", 132, (9, 0)), GPUTarget("cuda", 90, 32), torch.bfloat16
    )
    assert len(set(launches)) == len(launches)
    found[name] = Counter(launch.name for launch in launches)
found["imported"] = sorted({"torch._dynamo", "sympy"} & sys.modules.keys())

# What is compiled from a note is what a launch looks for.
count = KernelCount()
(pick,) = (launch for launch in launches if launch.name == "_pick_kernel")
compile_kernel(pick)
found["after preload"] = str(count)
best = torch.empty(3, 38, device="meta")
token = torch.empty(3, 38, dtype=torch.int32, device="meta")
sampling._pick_kernel.device_caches.clear()
sampling._pick_kernel.warmup(
    best, token, torch.empty(3, dtype=torch.int64, device="meta"), 38, BLOCK_W=64, num_warps=1,
    grid=(3,),
)
found["after launch"] = str(count)
print(json.dumps(found))
"""


def test_what_a_start_launches_is_known_without_a_gpu(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = f"{ROOT / 'src'}:{ROOT}"
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    # A prefill kernel of 16, 32, 64 and 128 rows, whatever stands before a prompt in the tables;
    # decode attention in one part and in several.
    dense, experts = found["dense"], found["experts"]
    for kernels in (dense, experts):
        assert (kernels["_prefill_kernel"], kernels["_decode_kernel"]) == (4, 2)
        assert kernels["_sample_kernel"] == kernels["_rotary_and_cache_kernel"] == 1
    # Unsorted, and blocks of 16, 32, 64 and 128 rows, of both products.
    assert experts["_grouped_gemm_kernel"] == 10
    assert sum(dense.values()) <= 19
    assert sum(experts.values()) <= 39
    assert found["imported"] == []
    assert found["after preload"].startswith("compiled 1 in ")
    assert " read 0 in " in found["after preload"]
    assert found["after launch"].startswith("compiled 1 in ")
    assert " read 1 in " in found["after launch"]


# The compiler is forked before anything here touches the GPU, as the agent does it.
ON_A_GPU = """
import os, sys
from pathlib import Path
import torch
import torch.distributed as dist
from rankwright.cost_model.read_model import read_config, read_model
from rankwright.executor.compile_ahead import fork_compiler, wait_for_compiler
from rankwright.executor.kernel_count import KernelCount
from rankwright.executor.mesh import Mesh
from rankwright.executor.runner import Runner
from rankwright.executor.weights import DummySource
from tests.executor.plans import cpu_plan

folder, model = Path(sys.argv[1]), sys.argv[2]
spec = read_model({**read_config(model), "num_hidden_layers": 2})
plan = cpu_plan(
    spec, device="h100-sxm", num_blocks=512, block_tokens=64, max_num_seqs=256,
    max_batched_tokens=8192, max_model_len=8192,
)
(folder / "plan.json").write_text(plan.model_dump_json())
fork_compiler(folder / "plan.json", 0, folder)
assert wait_for_compiler(folder)
count = KernelCount()
device = torch.device("cuda", 0)
torch.cuda.set_device(device)
dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=device)
source = DummySource(torch.bfloat16, device)
runner = Runner(plan, Mesh(plan, 0, device), source, dtype=torch.bfloat16)
runner.warm_up(plan.limits)
print(count)
for line in count.by_kernel():
    print(line)
"""


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["Qwen/Qwen3-8B", "Qwen/Qwen3-30B-A3B"])
def test_after_the_compiler_a_start_on_a_gpu_compiles_nothing(tmp_path: Path, model: str) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    environment["PYTHONPATH"] = f"{ROOT / 'src'}:{ROOT}"
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", ON_A_GPU, str(tmp_path), model],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "compiled 0 in 0.00 s, read " in done.stdout, done.stdout + done.stderr


def test_ranks_wait_for_a_compiler_that_works_and_for_no_other(tmp_path: Path) -> None:
    assert not wait_for_compiler(tmp_path)
    lock = os.open(tmp_path / "kernels.lock", os.O_RDWR | os.O_CREAT)
    assert wait_for_compiler(tmp_path, pytest.fail)  # it has ended
    fcntl.flock(lock, fcntl.LOCK_EX)
    waits, done = threading.Event(), threading.Event()

    def wait() -> None:
        assert wait_for_compiler(tmp_path, lambda text: waits.set())
        done.set()

    threading.Thread(target=wait).start()
    assert waits.wait(30)
    assert not done.is_set()
    os.close(lock)  # as when it ends, however it does
    assert done.wait(30)


def test_of_ranks_with_equal_shares_one_is_looked_at() -> None:
    plan = cpu_plan(SPEC, tp=2, pp=2, dp=2, device="h100-sxm")
    looked_at = unlike_ranks(plan, plan.ranks)
    assert [(rank.stage, rank.tp_rank) for rank in looked_at] == [(0, 0), (1, 0)]


def test_kernels_are_compiled_ahead_for_gpus_where_asked() -> None:
    plan = cpu_plan(SPEC, device="h100-sxm")
    asked = {"RANKWRIGHT_COMPILE_AHEAD": "1"}
    assert compiles_ahead(plan, make_options(plan), asked)
    assert not compiles_ahead(plan, make_options(plan), {})
    assert not compiles_ahead(plan, make_options(plan, device="cpu"), asked)
