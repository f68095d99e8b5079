"""What a step costs the host, beside the GPU that it must keep busy.

    python benchmarks/bench_host.py

No GPU and no model. `step` rows: the parts of a step that decodes, one batch ahead as on GPUs, with
the real scheduler, encoding, and buffers that graphs read. `loop` rows: the real leader with its
messages to a client in another process, and a runner that computes nothing: it makes this rank's
part of the batch and fills the buffers, and its tokens are there at once. Launches are not in
either; they take a GPU to measure.

A GPU is idle only where a rank's share is longer than a step. Processor time, not time on the
clock, of which a busy machine takes some; `tell` alone is on the clock: from before the leader
writes until another process has the message, where both look without sleeping, as beside GPUs.
"""

import argparse
import gc
import multiprocessing
import os
import random
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from client import Client, drive
from rankwright.executor.continuation import continued
from rankwright.executor.drawn import Drawn
from rankwright.executor.engine import Leader
from rankwright.executor.graph_inputs import GraphInputs
from rankwright.executor.mesh import Mesh
from rankwright.executor.messages import Sampling, encode
from rankwright.executor.rank_batch import Parts, rank_batch
from rankwright.executor.runner import Runner
from rankwright.executor.scheduler import Scheduler
from rankwright.executor.shared_channel import SharedChannel
from rankwright.executor.step_batch import Continuation, StepBatch
from rankwright.planner.plan import Plan
from replica import show
from result import write_result

BATCHES = (1, 8, 64, 128, 256)
CONTEXT = 1024
BLOCK_TOKENS = 64
ROUNDS = 130
LONGEST = 8192
MAX_BATCHED_TOKENS = 8192
# Steps of a loop that are counted, and those before them.
COUNTED, BEFORE = 150, 20


class Spent:
    """Processor time of each part in each round."""

    def __init__(self) -> None:
        self.all_us: dict[str, list[float]] = {}

    def __call__(self, part: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return what the function does, and note how long it took."""
        begun_s = time.process_time()
        found = function(*arguments)
        self.all_us.setdefault(part, []).append((time.process_time() - begun_s) * 1e6)
        return found


def decoding(batch: int) -> Scheduler:
    """Return a scheduler with `batch` sequences whose prompts are computed."""
    blocks = batch * (CONTEXT // BLOCK_TOKENS + 4)
    scheduler = Scheduler(
        num_blocks=blocks,
        block_tokens=BLOCK_TOKENS,
        max_num_seqs=batch,
        max_batched_tokens=batch * CONTEXT,
        max_model_len=CONTEXT + 4 * BLOCK_TOKENS,
        ahead=1,
        prefix_cache=True,
    )
    sampling = Sampling(temperature=0, max_tokens=3 * BLOCK_TOKENS, ignore_eos=True)
    for index in range(batch):
        # Contexts of all lengths: as many reach the end of a block in one step as in another.
        length = CONTEXT - index % BLOCK_TOKENS
        scheduler.add(f"request-{index}", range(index, index + length), sampling)
    return scheduler


def step_row(batch: int) -> tuple[dict[str, Any], bytes]:
    """Return the parts of a step of `batch` sequences, and the longest message of one."""
    scheduler, spent = decoding(batch), Spent()
    inputs = GraphInputs(max(BATCHES), LONGEST // BLOCK_TOKENS, torch.device("cpu"))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert first is not None
    assert second is not None
    scheduler.complete(first[1], [7] * batch)
    heard, before = second[0], second[1]
    longest = b""
    for _ in range(ROUNDS):
        decided = spent("schedule", scheduler.schedule)
        assert decided is not None
        made, sampled = decided
        assert made.continues is not None
        message = spent("encode", made.continues.encode)
        heard = spent("decode", hear, heard, message)
        part = spent("part", rank_batch, made, Parts(BLOCK_TOKENS))
        spent("fill", inputs.fill, part, batch)
        news = spent("complete", scheduler.complete, before, [7] * len(before))
        spent("news", encode, news)
        before = sampled
        longest = max(longest, message, key=len)
    means = {name: statistics.mean(values) for name, values in spent.all_us.items()}
    return {
        "what": "step",
        "batch": batch,
        "leader_us": sum(means[name] for name in means if name != "decode"),
        "leader_least_us": sum(min(spent.all_us[name]) for name in means if name != "decode"),
        "follower_us": sum(means[name] for name in ("decode", "part", "fill")),
        "message_bytes": len(longest),
        **{f"{name}_us": value for name, value in means.items()},
    }, longest


def hear(before: StepBatch, message: bytes) -> StepBatch:
    """Return the batch that a follower makes of a message."""
    return continued(before, Continuation.decode(message))


# What is looked at, and the share of its sequences that a step must have to count. Where requests
# come and go, a few are missing at most times; long prompts keep most waiting for theirs.
LEAST_SHARES = {"steady": 1.0, "coming and going": 0.75, "prompts in chunks": 0.0}


class IdleRunner:
    """A runner that computes nothing, and notes what the leader spends from step to step.

    Args:
        least: Sequences of a step that counts.
    """

    def __init__(self, least: int) -> None:
        self._inputs = GraphInputs(max(BATCHES), LONGEST // BLOCK_TOKENS, torch.device("cpu"))
        self._least = least
        self._last_s = 0.0
        self.spent_us: list[float] = []
        self.num_prompts = 0

    def execute(self, batch: StepBatch) -> Drawn:
        """Do what a rank's host does before its launches."""
        now_s = time.process_time()
        if batch.num_sequences >= self._least:
            self.spent_us.append((now_s - self._last_s) * 1e6)
            self.num_prompts += not batch.decode_only
        self._last_s = now_s
        part = rank_batch(batch, Parts(BLOCK_TOKENS))
        if batch.decode_only:
            self._inputs.fill(part, part.num_tokens)
        return Drawn(torch.zeros(batch.num_samples, dtype=torch.int64))

    def finish(self) -> None:
        """Nothing is under way."""


def load_requests(client: Client, kind: str, batch: int) -> None:
    """Keep `batch` requests running."""
    rng = random.Random(0)
    steps = COUNTED + BEFORE
    if kind == "steady":
        client.run([(64, steps)] * batch)
    elif kind == "coming and going":
        lengths = [(rng.randint(32, 64), rng.randint(20, 100)) for _ in range(3 * batch)]
        client.keep(lengths, batch)
    else:
        client.keep([(3000, 40)] * (2 * batch), batch)


def loop_row(kind: str, batch: int) -> dict[str, Any]:
    """Return what the leader's process spends on a step while `batch` requests run."""
    limits = SimpleNamespace(
        max_num_seqs=batch, max_batched_tokens=MAX_BATCHED_TOKENS, max_model_len=LONGEST
    )
    split = SimpleNamespace(cp=1, attention="tp")
    blocks = batch * 4000 // BLOCK_TOKENS + 100
    cache = SimpleNamespace(num_blocks=blocks, block_tokens=BLOCK_TOKENS)
    plan = SimpleNamespace(kv_cache=cache, split=split, limits=limits)
    mesh = SimpleNamespace(
        num_stages=1,
        attention_ranks=1,
        split=split,
        place=SimpleNamespace(replica=0),
        control=SimpleNamespace(size=1),
        tell=lambda data: None,
        finish=lambda: None,
    )
    runner = IdleRunner(max(1, int(batch * LEAST_SHARES[kind])))
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    results, results_there = context.Pipe(duplex=False)
    child = context.Process(
        target=drive, args=(load_requests, theirs, results_there, 32000, (kind, batch))
    )
    child.start()
    # Ours would keep them open: a leader whose client died must notice.
    theirs.close()
    results_there.close()
    leader = Leader(
        cast(Plan, plan), cast(Mesh, mesh), cast(Runner, runner), ours, eos_token_ids=(), ahead=1
    )
    gc.collect()
    gc.freeze()  # as a rank does before it serves
    leader.run()
    ours.close()  # the client reads until then
    gc.unfreeze()
    _, error = results.recv()
    child.join()
    assert error is None, error
    spent_us = runner.spent_us[BEFORE:]
    return {
        "what": f"loop, {kind}",
        "batch": batch,
        "steps": len(spent_us),
        "steps_with_prompts": runner.num_prompts,
        "mean_us": statistics.mean(spent_us),
        "median_us": statistics.median(spent_us),
        "p99_us": statistics.quantiles(spent_us, n=100)[-1],
    }


def listen(path: str, times: Connection, count: int) -> None:
    """Send when each message was there."""
    channel = SharedChannel(Path(path), 1, 0, spin_s=10.0)
    times.send(0.0)
    found = []
    for _ in range(count):
        channel.read()
        found.append(time.monotonic())
    times.send(found)


def tell_us(message: bytes) -> float:
    """Return the median microseconds until another process has the message."""
    writer, path = SharedChannel.create(1, spin_s=10.0)
    ours, theirs = multiprocessing.Pipe()
    count = 200
    reader = multiprocessing.get_context("spawn").Process(
        target=listen, args=(str(path), theirs, count)
    )
    reader.start()
    ours.recv()
    path.unlink()
    sent = []
    for _ in range(count):
        time.sleep(0.001)
        sent.append(time.monotonic())
        writer.write(message)
    there = ours.recv()
    reader.join()
    late_s = [float(b - a) for a, b in zip(sent, there, strict=True)]
    return statistics.median(late_s) * 1e6


def main() -> None:
    """Time, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, help="folder of the JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for batch in BATCHES:
        row, message = step_row(batch)
        rows.append({**row, "tell_us": tell_us(message)})
        show(rows[-1])
    for kind in LEAST_SHARES:
        for batch in BATCHES:
            rows.append(loop_row(kind, batch))
            show(rows[-1])
    content = {"load_average": os.getloadavg()[0], "cpus": os.cpu_count(), "rows": rows}
    print(write_result("host", content, folder=arguments.output))


if __name__ == "__main__":
    main()
