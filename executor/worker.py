"""Entry point of a rank: `python -m rankwright.executor.worker --plan plan.json`, under torchrun.

Or a fork of torchrun's agent that calls `main` (backends/agent_main.py).

Makes the groups, loads this rank's shard, captures graphs, and then leads or follows until told to
stop. What goes wrong is written in one line to `$RANKWRIGHT_RUN_DIR/rank-<r>.error`, for the
launcher to show.
"""

import argparse
import faulthandler
import gc
import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from multiprocessing.connection import Client
from pathlib import Path

import torch
import torch.distributed as dist

from rankwright.executor.checkpoint import find_checkpoint
from rankwright.executor.compile_ahead import wait_for_compiler
from rankwright.executor.engine import Follower, Leader
from rankwright.executor.kernel_count import KernelCount
from rankwright.executor.mesh import Mesh
from rankwright.executor.numa import bind_to_gpu
from rankwright.executor.parent_death import end_with_parent
from rankwright.executor.record_load import record_load
from rankwright.executor.runner import Runner
from rankwright.executor.start_device import check_gpu, memory_explained, show_warning
from rankwright.executor.weights import DummySource, SafetensorsSource, WeightSource
from rankwright.planner.plan import Plan
from rankwright.planner.read_plan import read_plan

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run this rank to its end; return after a stop, exit with 1 and an error file otherwise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--load-format", choices=("auto", "dummy"), default="auto")
    parser.add_argument("--model-path", type=Path)
    parser.add_argument("--no-prefix-cache", dest="prefix_cache", action="store_false")
    parser.add_argument("--record-expert-load", type=Path)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    arguments = parser.parse_args(argv)
    # A terminal's Ctrl-C reaches every process; the launcher decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if os.environ.get("RANKWRIGHT_IGNORE_TERM") == "1":
        # Slurm signals every process of a step at once; the launcher drains and then stops us.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with_parent()
    faulthandler.enable()
    warnings.showwarning = show_warning
    rank = int(os.environ["RANK"])
    try:
        run(
            arguments.plan,
            arguments.load_format,
            arguments.model_path,
            arguments.device,
            rank,
            prefix_cache=arguments.prefix_cache,
            record_expert_load=arguments.record_expert_load,
        )
    except BaseException as error:
        _report(rank, error)
        # No clean-up: a collective that waits for a dead peer would keep us here.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def run(
    plan_path: Path,
    load_format: str,
    model_path: Path | None,
    device_kind: str,
    rank: int,
    *,
    prefix_cache: bool = True,
    record_expert_load: Path | None = None,
) -> None:
    """Load rank `rank` of the plan and serve until stopped."""
    started = time.monotonic()
    done = ["nothing"]

    def progress(text: str) -> None:
        print(f"{time.monotonic() - started:7.2f} s  {text}", flush=True)
        done[0] = text

    plan = read_plan(plan_path)
    kernels = KernelCount()
    device = rank_device(plan, rank, device_kind)
    dtype = DTYPES.get(plan.model.dtype)
    if dtype is None:
        raise ValueError(f"the executor cannot compute in {plan.model.dtype}")
    if device.type == "cuda":
        check_gpu(plan, plan.ranks[rank], device)
        torch.cuda.set_device(device)
        bind_to_gpu(device)
        progress("device opened")
        dist.init_process_group("nccl", device_id=device)
    else:
        threads = os.environ.get("OMP_NUM_THREADS")
        if threads is not None:
            torch.set_num_threads(int(threads))
        dist.init_process_group("gloo")
    mesh = Mesh(plan, rank, device)
    mesh.counts_experts = record_expert_load is not None
    progress("groups made")
    folder = None if load_format == "dummy" else find_checkpoint(plan.model.name, model_path)
    source: WeightSource = (
        DummySource(dtype, device, seed=rank)
        if folder is None
        else SafetensorsSource(folder, dtype, device)
    )

    def wait_for_kernels() -> None:
        run_dir = os.environ.get("RANKWRIGHT_RUN_DIR")
        if run_dir is not None and wait_for_compiler(Path(run_dir), progress):
            progress("compiler done")

    with memory_explained(plan, plan.ranks[rank], device, done):
        runner = Runner(
            plan, mesh, source, dtype=dtype, progress=progress, before_steps=wait_for_kernels
        )
        if isinstance(source, SafetensorsSource):
            source.close()
        if device.type == "cuda":
            runner.warm_up(plan.limits, progress)
            progress(f"kernels of all batches: {kernels}")
            for line in kernels.by_kernel():
                print(f"  compiled {line}", flush=True)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    peaks = tuple(mesh.gather_integers(peak))
    # What is there now stays: no collection between two steps need go through all of torch for it.
    gc.collect()
    gc.freeze()
    progress("ready")
    if mesh.is_leader:
        connection = Client(_front_end(), authkey=bytes.fromhex(os.environ["RANKWRIGHT_AUTHKEY"]))
        eos = eos_token_ids(plan, folder)
        Leader(
            plan,
            mesh,
            runner,
            connection,
            eos_token_ids=eos,
            peak_memory_bytes=peaks,
            prefix_cache=prefix_cache,
        ).run()
        connection.close()
    else:
        Follower(mesh, runner).run()
    if record_expert_load is not None:
        record_load(mesh, runner, record_expert_load)
    progress("stopped")
    # Graphs hold NCCL work; they must go before the communicators do.
    del runner
    dist.destroy_process_group()


def eos_token_ids(plan: Plan, folder: Path | None) -> tuple[int, ...]:
    """Return the tokens that end a sequence: generation_config.json's, else the model's.

    Chat models often end turns with a token that only generation_config.json names.
    """
    if folder is not None and (folder / "generation_config.json").exists():
        config = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
        found = config.get("eos_token_id")
        if isinstance(found, int):
            return (found,)
        if isinstance(found, list):
            return tuple(int(token) for token in found)
    return plan.model.eos_token_ids


def rank_device(plan: Plan, rank: int, kind: str = "auto") -> torch.device:
    """Return the device of `rank` as torch calls it; `kind` is auto, or cpu for any plan.

    Raises:
        ValueError: Torch does not see the planned GPU.
    """
    place = plan.ranks[rank]
    gpus = {gpu.index: gpu.device for gpu in plan.cluster.node(place.node).gpus}
    if kind == "cpu" or (kind == "auto" and gpus[place.gpu] == "cpu"):
        return torch.device("cpu")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    ordinal = cuda_ordinal(place.gpu, visible)
    if ordinal is None or ordinal >= torch.cuda.device_count():
        raise ValueError(
            f"rank {rank} is planned on GPU {place.gpu}; PyTorch sees {torch.cuda.device_count()} "
            f"CUDA devices here (CUDA_VISIBLE_DEVICES={visible}); check both"
        )
    return torch.device("cuda", ordinal)


def cuda_ordinal(gpu: int, visible: str | None) -> int | None:
    """Return what CUDA calls GPU `gpu` of this machine, or None where it is hidden.

    A plan counts the machine's GPUs in PCI order; CUDA counts those in `CUDA_VISIBLE_DEVICES`. A
    list of uuids (as job schedulers give) hides numbers: GPUs then stand in the list's order.

    >>> cuda_ordinal(5, None), cuda_ordinal(5, "4,5"), cuda_ordinal(0, "4,5")
    (5, 1, None)
    """
    entries = [entry.strip() for entry in (visible or "").split(",") if entry.strip()]
    if not entries or not all(entry.isdigit() for entry in entries):
        return gpu
    return entries.index(str(gpu)) if str(gpu) in entries else None


def _front_end() -> tuple[str, int]:
    host, port = os.environ["RANKWRIGHT_FRONT_END"].rsplit(":", 1)
    return host, int(port)


def _report(rank: int, error: BaseException) -> None:
    traceback.print_exc()
    folder = os.environ.get("RANKWRIGHT_RUN_DIR")
    if folder is None:
        return
    target = Path(folder) / f"rank-{rank}.error"
    temporary = target.with_suffix(".part")
    text = " ".join(str(error).split()) or type(error).__name__
    temporary.write_text(f"{type(error).__name__}: {text}\n", encoding="utf-8")
    temporary.replace(target)


if __name__ == "__main__":
    main()
