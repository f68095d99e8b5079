"""Whole-engine latency and throughput on this machine's GPUs, beside the memory-bandwidth floor.

    torchrun --nproc-per-node 1 benchmarks/bench_engine.py --model meta-llama/Llama-3.1-8B
    torchrun --nproc-per-node 2 benchmarks/bench_engine.py --model meta-llama/Llama-3.1-8B --tp 2

Random weights of the model's shapes, the real leader with its scheduler and its socket messages, so
that a figure is what a user of one replica sees before HTTP. The floor of a decode step is the
weights that a rank reads once (all but the embedding's unused rows) plus the KV cache of the batch,
over the copy bandwidth measured in the same run.
"""

import argparse
import itertools
import os
import statistics
import threading
import time
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist

from rankwright.cost_model.memory import (
    embedding_weight_bytes,
    stage_kv_bytes_per_token,
    stage_weight_bytes,
)
from rankwright.cost_model.read_model import read_model
from rankwright.cost_model.workload import Workload
from rankwright.executor.engine import Follower, Leader
from rankwright.executor.mesh import Mesh
from rankwright.executor.messages import Hello, Sampling, Stop, Submit, Tokens, decode, encode
from rankwright.executor.runner import Runner
from rankwright.executor.weights import DummySource
from rankwright.planner.make_plan import Pins, make_plan
from rankwright.planner.plan import Plan
from rankwright.topology.probe import probe
from result import copy_bytes_per_s, write_result

# (batch, prompt tokens, output tokens)
SCENARIOS = ((1, 512, 128), (8, 512, 96), (32, 512, 64), (128, 512, 64))
PREFILLS = (512, 2048, 4096)


@dataclass
class Timeline:
    """When each request was sent and each of its tokens came back, seconds."""

    sent: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, list[float]] = field(default_factory=dict)


class Client:
    """Talks to a leader in this process over its own protocol."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._count = 0
        while not isinstance(decode(connection.recv_bytes()), Hello):
            pass

    def run(self, batch: int, prompt_tokens: int, output_tokens: int, vocab_size: int) -> Timeline:
        """Send `batch` requests at once and wait for all of their tokens."""
        line = Timeline()
        generator = torch.Generator().manual_seed(self._count)
        for _ in range(batch):
            name = f"r{self._count}"
            self._count += 1
            prompt = torch.randint(vocab_size, (prompt_tokens,), generator=generator).tolist()
            sampling = Sampling(temperature=0, max_tokens=output_tokens, ignore_eos=True)
            line.sent[name] = time.perf_counter()
            line.tokens[name] = []
            self._connection.send_bytes(
                encode(Submit(request_id=name, prompt=tuple(prompt), sampling=sampling))
            )
        unfinished = set(line.sent)
        while unfinished:
            message = decode(self._connection.recv_bytes())
            if isinstance(message, Tokens):
                assert message.error is None, message.error
                line.tokens[message.request_id] += [time.perf_counter()] * len(message.token_ids)
                if message.finish_reason is not None:
                    unfinished.discard(message.request_id)
        return line

    def stop(self) -> None:
        """End the replica."""
        self._connection.send_bytes(encode(Stop()))


def decode_step_s(line: Timeline) -> float:
    """Median time between tokens while every request of the batch is decoding."""
    start = max(times[0] for times in line.tokens.values())
    stop = min(times[-1] for times in line.tokens.values())
    gaps = []
    for times in line.tokens.values():
        inside = [moment for moment in times if start < moment <= stop]
        gaps += [after - before for before, after in itertools.pairwise(inside)]
    return statistics.median(gaps)


def measure(client: Client, plan: Plan, bytes_per_s: float) -> list[dict[str, object]]:
    """Run every scenario twice and keep the second; return a row for each."""
    rows: list[dict[str, object]] = []
    split, vocab = plan.split, plan.model.vocab_size
    weights = max(
        stage_weight_bytes(plan.model, split, stage=stage)
        - (
            embedding_weight_bytes(plan.model, tp=split.tp)
            if stage == 0 and not (plan.model.tie_embeddings and split.pp == 1)
            else 0
        )
        for stage in range(split.pp)
    )
    for batch, prompt, output in SCENARIOS:
        if batch > plan.limits.max_num_seqs or prompt + output > plan.limits.max_model_len:
            continue
        client.run(batch, prompt, 8, vocab)
        line = client.run(batch, prompt, output, vocab)
        step_s = decode_step_s(line)
        kv = max(
            stage_kv_bytes_per_token(plan.model, split, stage=stage) for stage in range(split.pp)
        )
        # In a pipeline a token passes all stages, one after another.
        floor_s = split.pp * (weights + batch * (prompt + output / 2) * kv) / bytes_per_s
        last = max(times[-1] for times in line.tokens.values())
        rows.append(
            {
                "what": "decode",
                "batch": batch,
                "prompt_tokens": prompt,
                "step_ms": step_s * 1e3,
                "floor_ms": floor_s * 1e3,
                "share_of_floor": floor_s / step_s,
                "output_tokens_per_s_of_a_replica": batch
                * output
                / (last - min(line.sent.values())),
            }
        )
    for prompt in PREFILLS:
        if prompt + 2 > plan.limits.max_model_len:
            continue
        client.run(1, prompt, 2, vocab)
        times = []
        for _ in range(5):
            line = client.run(1, prompt, 2, vocab)
            times += [line.tokens[name][0] - sent for name, sent in line.sent.items()]
        rows.append(
            {
                "what": "ttft",
                "batch": 1,
                "prompt_tokens": prompt,
                "ttft_ms": statistics.median(times) * 1e3,
            }
        )
    return rows


def main() -> None:
    """Plan with the pins, start this rank, measure on the leader of replica 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="meta-llama/Llama-3.1-8B")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--dp", type=int, default=1)
    parser.add_argument("--no-graphs", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rank = int(os.environ["RANK"])
    plan = make_plan(
        read_model(arguments.model),
        probe(require_gpu=True),
        Workload(input_tokens=4096, output_tokens=128, concurrency=128 * arguments.dp),
        pins=Pins(tp=arguments.tp, pp=arguments.pp, dp=arguments.dp),
    )
    device = torch.device("cuda", plan.ranks[rank].gpu)
    torch.cuda.set_device(device)
    bytes_per_s = copy_bytes_per_s(device)
    dist.init_process_group("nccl", device_id=device)
    mesh = Mesh(plan, rank, device)
    before_load = time.perf_counter()
    dtype = torch.bfloat16
    runner = Runner(
        plan, mesh, DummySource(dtype, device), dtype=dtype, use_graphs=not arguments.no_graphs
    )
    runner.warm_up(plan.limits)
    torch.cuda.synchronize()
    load_s = time.perf_counter() - before_load
    peaks = mesh.gather_integers(torch.cuda.max_memory_allocated())
    if not mesh.is_leader:
        Follower(mesh, runner).run()
    else:
        ours, theirs = Pipe()
        rows: list[dict[str, object]] = []

        def drive() -> None:
            client = Client(ours)
            rows.extend(measure(client, plan, bytes_per_s))
            client.stop()
            while True:
                try:
                    ours.recv_bytes()
                except (EOFError, OSError):
                    return

        thread = threading.Thread(target=drive)
        thread.start()
        Leader(plan, mesh, runner, theirs, eos_token_ids=()).run()
        theirs.close()
        thread.join()
        if rank == 0:
            for row in rows:
                print(
                    "  ".join(
                        f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}"
                        for k, v in row.items()
                    ),
                    flush=True,
                )
            write_result(
                f"engine-{plan.split.label().lower().replace(' ', '-')}-"
                f"{arguments.model.split('/')[-1].lower()}",
                {
                    "model": arguments.model,
                    "dtype": "bfloat16",
                    "weights": "random",
                    "split": plan.split.model_dump(mode="json"),
                    "num_kv_blocks": plan.kv_cache.num_blocks,
                    "copy_bytes_per_s": bytes_per_s,
                    "load_and_capture_s": load_s,
                    "peak_memory_bytes": peaks,
                    "predicted": plan.prediction.model_dump(
                        mode="json",
                        include={"ttft_s", "tpot_s", "memory_bytes_per_gpu", "batch_size"},
                    ),
                    "rows": rows,
                },
                folder=arguments.output,
            )
    del runner
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
