"""Tokens to the ranks that hold their experts and back: NCCL's ways, and memory that GPUs share.

    torchrun --nproc-per-node 2 benchmarks/bench_dispatch.py

Each row is a number of tokens a rank, of the hidden size and experts of a model. Times are of one
way, the slowest rank's median. *gather* and *scatter*: NCCL's all-gather and reduce-scatter;
*nccl*: counts and tokens by all-to-all, as the executor sends them; *shared*: `ExpertMemory`. What
a CUDA graph can hold is timed in a chain inside one. Whatever differs from what one rank computes
alone is not timed, and the exit status is 1. With `--device cpu`, over gloo, only the first two.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rankwright.executor.expert_memory import ExpertMemory
from rankwright.executor.groups import Group
from rankwright.executor.layers.dispatch import Dispatch
from result import write_result

# Hidden size, experts and experts a token: mistralai/Mixtral-8x7B-v0.1, Qwen/Qwen3-30B-A3B.
MODELS = {"mixtral-8x7b": (4096, 8, 2), "qwen3-30b-a3b": (2048, 128, 8)}
TOKENS = (1, 8, 64, 256, 1024, 4096)
REPEATS, WARM_UP = 30, 5
CHAIN = 16  # calls in a graph

Call = Callable[[], torch.Tensor]


class Case:
    """Tokens of this rank, their experts, and the ways there and back."""

    def __init__(
        self, name: str, num_tokens: int, device: torch.device, dtype: torch.dtype, seed: int
    ) -> None:
        """Draw tokens; equal numbers of experts on every rank."""
        self.dim, num_experts, self.top_k = MODELS[name]
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.held = num_experts // self.ranks
        generator = torch.Generator(device).manual_seed(seed + self.rank)
        self.x = torch.randn(num_tokens, self.dim, generator=generator, device=device).to(dtype)
        self.weights = torch.rand(num_tokens, self.top_k, generator=generator, device=device)
        order = torch.rand(
            num_tokens, self.held * self.ranks, generator=generator, device=device
        ).argsort(1)
        self.slots = order[:, : self.top_k].to(torch.int32).contiguous()
        self.group = Group(tuple(range(self.ranks)), dist.group.WORLD)
        self.slots_of_ranks = tuple(
            (rank * self.held, (rank + 1) * self.held) for rank in range(self.ranks)
        )
        self.starts = torch.arange(self.ranks + 1, dtype=torch.int32, device=device) * self.held

    def expected(self) -> torch.Tensor:
        """Return what comes back where slot `s` makes `s + 1` times a token."""
        factor = (self.weights * (self.slots + 1)).sum(1, keepdim=True)
        return self.x.float() * factor

    def made(self, x: torch.Tensor, weights: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Return what this rank's experts make of rows, `slots` being its own or -1."""
        factor = weights * (slots + self.rank * self.held + 1) * (slots >= 0)
        rows = torch.where((slots >= 0).any(1, keepdim=True), x.float(), 0.0)
        return (rows * factor.sum(1, keepdim=True)).to(x.dtype)

    def nccl(self) -> torch.Tensor:
        """There and back as the executor does."""
        sent = self._sent()
        here = sent.arrived()
        return sent.combine(self.made(here.x_MD, here.weights_MK, here.slots_MK))

    def _sent(self) -> Dispatch:
        return Dispatch(
            self.group, self.slots_of_ranks, self.rank, self.x, self.weights, self.slots
        )

    def shared(self, memory: ExpertMemory) -> torch.Tensor:
        """There and back through shared memory."""
        rows, weights, slots = memory.dispatch(self.x, self.weights, self.slots, self.starts)
        memory.parts(len(rows)).copy_(self.made(rows, weights, slots))
        return memory.combine(self.slots, self.starts, None)

    def calls(self, memory: ExpertMemory | None) -> dict[str, Call]:
        """Return what is timed, by name."""
        gathered = self.x.new_empty(self.ranks * len(self.x), self.dim)
        scattered = torch.empty_like(self.x)

        def gather() -> torch.Tensor:
            dist.all_gather_into_tensor(gathered, self.x)
            return gathered

        def scatter() -> torch.Tensor:
            dist.reduce_scatter_tensor(scattered, gathered)
            return scattered

        found: dict[str, Call] = {
            "gather_us": gather,
            "scatter_us": scatter,
            "nccl_dispatch_us": lambda: self._sent().arrived().x_MD,
            "nccl_both_us": self.nccl_bare,
        }
        if memory is not None:
            found["shared_dispatch_us"] = lambda: memory.dispatch(
                self.x, self.weights, self.slots, self.starts
            )[0]
            found["shared_combine_us"] = lambda: memory.combine(self.slots, self.starts, None)
        return found

    def nccl_bare(self) -> torch.Tensor:
        """There and back without experts."""
        sent = self._sent()
        return sent.combine(sent.arrived().x_MD)


def median_us(name: str, call: Call, device: torch.device) -> float:
    """Return the median microseconds of `call`, the slowest rank's."""
    run: Callable[[], object] = call
    call()
    chain = 1
    if device.type == "cuda" and not name.startswith("nccl"):
        chain = CHAIN
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(chain):
                call()
        run = graph.replay
    times = []
    for _ in range(REPEATS):
        dist.barrier()
        _wait(device)
        run()  # ranks come together in it
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        times.append((time.perf_counter() - start) * 1e6 / chain)
    slowest = torch.tensor(statistics.median(times[WARM_UP:]), device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def row_of(case: Case, memory: ExpertMemory | None, device: torch.device) -> dict[str, Any]:
    """Return the figures of one case; none where it failed its check."""
    outs = [case.nccl()]
    if memory is not None:
        outs.append(case.shared(memory))
    expected = case.expected()
    errors = [float((out.float() - expected).norm() / expected.norm()) for out in outs]
    # A part for each rank and their sum, each rounded once.
    row: dict[str, Any] = {
        "tokens": len(case.x),
        "bytes": case.x.numel() * case.x.element_size(),
        "passed": max(errors) <= 2 * torch.finfo(case.x.dtype).eps,
    }
    good = torch.tensor(int(row["passed"]), device=device)
    dist.all_reduce(good, op=dist.ReduceOp.MIN)
    if not int(good):
        return row | {"passed": False}
    return row | {name: median_us(name, call, device) for name, call in case.calls(memory).items()}


def main() -> int:
    """Return the exit status: 1 where something came back wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, help="folder of the JSON file")
    arguments = parser.parse_args()
    device, dtype = torch.device("cpu"), torch.float32
    if arguments.device == "cuda":
        device, dtype = torch.device("cuda", int(os.environ["LOCAL_RANK"])), torch.bfloat16
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    seed = int.from_bytes(os.urandom(3), "little") + dist.get_rank()
    rows = []
    for name in MODELS:
        dim, _, top_k = MODELS[name]
        memory = None
        if device.type == "cuda":
            group = dist.group.WORLD
            assert group is not None
            memory = ExpertMemory(
                group,
                top_k=top_k,
                dim=dim,
                dtype=dtype,
                moe_tp=1,
                device=device,
                max_tokens=max(arguments.tokens),
            )
        for tokens in arguments.tokens:
            row = row_of(Case(name, tokens, device, dtype, seed), memory, device)
            rows.append({"model": name, **row})
            if dist.get_rank() == 0:
                print(_line(rows[-1]), flush=True)
    if dist.get_rank() == 0:
        content = {"world_size": dist.get_world_size(), "rows": rows}
        name = f"dispatch-{dist.get_world_size()}"
        print(write_result(name, content, folder=arguments.output))
    dist.destroy_process_group()
    return 0 if all(row["passed"] for row in rows) else 1


def _line(row: dict[str, Any]) -> str:
    return "  ".join(
        f"{key}={value:.1f}" if isinstance(value, float) else f"{key}={value}"
        for key, value in row.items()
    )


if __name__ == "__main__":
    raise SystemExit(main())
