"""Starts the replica that an engine benchmark measures: this rank of a plan, random weights."""

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import client
from rankwright.cost_model.read_model import read_model
from rankwright.cost_model.workload import Workload
from rankwright.executor.engine import Follower, Leader
from rankwright.executor.mesh import Mesh
from rankwright.executor.runner import Runner
from rankwright.executor.weights import DummySource
from rankwright.executor.worker import rank_device
from rankwright.planner.make_plan import Pins, make_plan
from rankwright.planner.plan import Plan
from rankwright.topology.probe import probe
from result import copy_bytes_per_s


@dataclass
class Replica:
    """This rank, ready to run: its part of a plan, its weights, its captured graphs."""

    plan: Plan
    mesh: Mesh
    runner: Runner
    copy_bytes_per_s: float
    load_s: float
    peak_memory_bytes: list[int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every engine benchmark is told."""
    parser.add_argument("--model", default="meta-llama/Llama-3.1-8B")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--dp", type=int, default=1)
    parser.add_argument("--ep", type=int, default=1)
    parser.add_argument("--cp", type=int, default=1)
    parser.add_argument("--cp-exchange", choices=("gather", "ring"), default="gather")
    parser.add_argument("--attention", choices=("tp", "dp"), default="tp")
    parser.add_argument("--max-batch", type=int, default=256, help="sequences of one replica")
    parser.add_argument("--no-graphs", action="store_true")
    parser.add_argument("--output", type=Path, help="folder of the JSON file")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try it")


def pinned_plan(arguments: argparse.Namespace, workload: Workload) -> Plan:
    """Return the plan with the degrees that were asked for."""
    names = ("tp", "pp", "dp", "ep", "cp", "attention", "cp_exchange")
    pins = Pins(**{name: getattr(arguments, name) for name in names})
    cluster = probe(require_gpu=arguments.device == "cuda")
    return make_plan(read_model(arguments.model), cluster, workload, pins=pins)


def start(arguments: argparse.Namespace, plan: Plan | None = None) -> Replica:
    """Load this rank of `plan`, or of one for short requests with the pins."""
    if plan is None:
        workload = Workload(
            input_tokens=1024, output_tokens=256, concurrency=arguments.max_batch * arguments.dp
        )
        plan = pinned_plan(arguments, workload)
    rank = int(os.environ["RANK"])
    device = rank_device(plan, rank)
    on_gpu = device.type == "cuda"
    bytes_per_s = 0.0
    if on_gpu:
        torch.cuda.set_device(device)
        bytes_per_s = copy_bytes_per_s(device)
        torch.cuda.empty_cache()
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    mesh = Mesh(plan, rank, device)
    before_load = time.perf_counter()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    graphs = on_gpu and not arguments.no_graphs
    runner = Runner(plan, mesh, DummySource(dtype, device), dtype=dtype, use_graphs=graphs)
    runner.warm_up(plan.limits)
    if on_gpu:
        torch.cuda.synchronize()
    load_s = time.perf_counter() - before_load
    return Replica(plan, mesh, runner, bytes_per_s, load_s, mesh.gather_integers(peak_bytes()))


def peak_bytes() -> int:
    """Return the most that PyTorch allocated on this rank's GPU; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def run(
    replica: Replica,
    function: Callable[..., Any],
    *arguments: Any,
    runner: Any = None,
    leader: type[Leader] = Leader,
) -> Any:
    """Serve until `function(client, *arguments)` returns in a process of its own.

    Args:
        replica: What serves; a rank that does not lead follows, and None is returned.
        function: Importable by its name.
        arguments: Picklable.
        runner: What the leader runs instead of the replica's runner.
        leader: Its class.

    Returns:
        What the function returned.

    Raises:
        RuntimeError: The function failed.
    """
    mesh, plan = replica.mesh, replica.plan
    if not mesh.is_leader:
        Follower(mesh, replica.runner).run()
        return None
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    results, results_there = context.Pipe(duplex=False)
    child = context.Process(
        target=client.drive,
        args=(function, theirs, results_there, plan.model.vocab_size, arguments),
    )
    child.start()
    # Ours would keep them open: a leader whose client died must notice.
    theirs.close()
    results_there.close()
    leader(plan, mesh, runner or replica.runner, ours, eos_token_ids=()).run()
    ours.close()
    returned, error = results.recv() if results.poll(60) else (None, "the client is gone")
    child.join()
    if error is not None:
        raise RuntimeError(f"the benchmark's client failed: {error}")
    return returned


def describe(replica: Replica, model: str) -> dict[str, Any]:
    """Return what a result file says of the replica."""
    plan = replica.plan
    return {
        "model": model,
        "dtype": "bfloat16",
        "weights": "random",
        "split": plan.split.model_dump(mode="json"),
        "num_kv_blocks": plan.kv_cache.num_blocks,
        "copy_bytes_per_s": replica.copy_bytes_per_s,
        "load_and_capture_s": replica.load_s,
        "peak_memory_bytes": replica.peak_memory_bytes,
        "predicted": plan.prediction.model_dump(
            mode="json", include={"ttft_s", "tpot_s", "memory_bytes_per_gpu", "batch_size"}
        ),
    }


def name_of(kind: str, replica: Replica, model: str) -> str:
    """Return the name of a result: what was measured, the split and the model."""
    label = replica.plan.split.label().lower().replace(" ", "-")
    return f"{kind}-{label}-{model.rstrip('/').split('/')[-1].lower()}"


def show(row: dict[str, Any]) -> None:
    """Print the plain values of a row."""
    print(
        "  ".join(
            f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
            for key, value in row.items()
            if not isinstance(value, list | dict)
        ),
        flush=True,
    )
