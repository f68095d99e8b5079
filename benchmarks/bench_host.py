"""What a decode step costs the host, beside the GPU that it must keep busy.

    python benchmarks/bench_host.py

No GPU and no model: the real scheduler with sequences that decode, one batch ahead as on GPUs, the
real encoding, the channel between processes, and the buffers that graphs read. A GPU is idle only
where the leader's share, or a follower's, is longer than a step. Seconds of processor time, least
of the rounds; `tell` is time on the clock from before the leader writes until another process has
it, where both look without sleeping, as beside GPUs.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from rankwright.executor.graph_inputs import GraphInputs
from rankwright.executor.messages import Sampling, encode
from rankwright.executor.rank_batch import Parts, rank_batch
from rankwright.executor.scheduler import Scheduler
from rankwright.executor.shared_channel import SharedChannel
from rankwright.executor.step_batch import StepBatch
from replica import show
from result import write_result

BATCHES = (1, 64, 128, 256)
CONTEXT = 1024
BLOCK_TOKENS = 64
ROUNDS = 60


class Spent:
    """Least processor time of each part over the rounds."""

    def __init__(self) -> None:
        self.least_us: dict[str, float] = {}

    def __call__(self, part: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return what the function does, and note how long it took."""
        begun_s = time.process_time()
        found = function(*arguments)
        spent_us = (time.process_time() - begun_s) * 1e6
        self.least_us[part] = min(spent_us, self.least_us.get(part, spent_us))
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
        scheduler.add(f"request-{index}", range(index, index + CONTEXT), sampling)
    return scheduler


def step_row(batch: int) -> tuple[dict[str, Any], bytes]:
    """Return the parts of a step of `batch` sequences, and its message."""
    scheduler, spent = decoding(batch), Spent()
    inputs = GraphInputs(max(BATCHES), 130, torch.device("cpu"))
    started = scheduler.schedule()
    assert started is not None
    before = started[1]
    message = b""
    for _ in range(ROUNDS):
        decided = spent("schedule", scheduler.schedule)
        assert decided is not None
        made, sampled = decided
        message = spent("encode", made.encode)
        read = spent("decode", StepBatch.decode, message)
        part = spent("part", rank_batch, read, Parts(BLOCK_TOKENS))
        spent("fill", inputs.fill, part, batch)
        news = spent("complete", scheduler.complete, before, [7] * len(before))
        spent("news", encode, news)
        before = sampled
    parts = spent.least_us
    leader = sum(parts[name] for name in parts if name != "decode")
    follower = sum(parts[name] for name in ("decode", "part", "fill"))
    return {
        "what": "step",
        "batch": batch,
        "leader_us": leader,
        "follower_us": follower,
        "message_bytes": len(message),
        **{f"{name}_us": value for name, value in parts.items()},
    }, message


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
    print(write_result("host", {"rows": rows}, folder=arguments.output))


if __name__ == "__main__":
    main()
