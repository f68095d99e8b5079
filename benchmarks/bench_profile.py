"""Where the time of a step goes on the GPU, by class of operation, beside the cost model's terms.

    torchrun --nproc-per-node 1 benchmarks/bench_profile.py --model meta-llama/Llama-3.1-8B
    torchrun --nproc-per-node 2 benchmarks/bench_profile.py --model meta-llama/Llama-3.1-8B --tp 2

Steps of a replica under load, recorded by torch.profiler on the leader's GPU. Recording slows
launches down, so `step_ms` is measured without it, and `idle_share` is what the recorded kernels
leave of that: 1 - busy / step. `idle_share_of_window` and `gaps` are of the recording itself.
"""

import argparse
import os
import tempfile
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from client import Client, Timeline
from gpu_trace import Event, read_trace, summarise, whole_steps
from rankwright.cost_model.ops import StepTokens
from rankwright.cost_model.predict import StageModels, choose_replicas
from rankwright.executor.runner import Runner
from rankwright.executor.step_batch import StepBatch
from rankwright.planner.plan import Plan
from replica import add_arguments, describe, name_of, run, show, start
from result import write_result

# (batch, prompt tokens): decode steps.
DECODES = ((1, 512), (64, 512))
# Prompts, one request each, whose only step is recorded.
PREFILLS = (4096,)
# Tokens of each request before the recording, in it, and in all: starting it takes a while.
BEFORE, WITHIN, OUTPUT = 32, 64, 320
RECORDING = "recording"


class RecordedRunner:
    """A runner that records this process' GPU from one message of the client to the next.

    In the leader's thread, as the profiler wants to be started and stopped in one.
    """

    def __init__(self, runner: Runner, orders: Connection, activity: ProfilerActivity) -> None:
        self._runner = runner
        self._orders = orders
        self._activity = activity
        self._recording: profile | None = None
        self._num_steps = 0
        # A process' first recording takes seconds to start.
        with profile(activities=[activity]):
            pass

    def __getattr__(self, name: str) -> Any:  # noqa: D105
        return getattr(self._runner, name)

    def execute(self, batch: StepBatch, *more: Any) -> Any:
        """Run a batch; start or end the recording before it where that was asked."""
        if self._orders.poll():
            self._orders.recv()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if self._recording is None:
                self._begin()
            else:
                self._end()
        self._num_steps += 1
        return self._runner.execute(batch, *more)

    def _begin(self) -> None:
        self._recording = profile(activities=[self._activity])
        self._recording.start()
        self._num_steps = 0
        self._orders.send(RECORDING)

    def _end(self) -> None:
        assert self._recording is not None
        self._recording.stop()
        # A file: the client cannot take the events from a pipe while it waits for tokens.
        number, name = tempfile.mkstemp(suffix=".json")
        os.close(number)
        self._recording.export_chrome_trace(name)
        self._recording = None
        self._orders.send((Path(name), self._num_steps))


def profile_all(client: Client, recorder: Connection, plan: Plan) -> list[dict[str, Any]]:
    """Return a row for each of the decode batches and prompts that the plan has room for."""
    limits = plan.limits
    rows = []
    for batch, prompt in DECODES:
        if batch <= limits.max_num_seqs and prompt + OUTPUT < limits.max_model_len:
            rows.append(profile_decode(client, recorder, plan, batch, prompt))
    for prompt in PREFILLS:
        if prompt + 1 < limits.max_model_len:
            rows.append(profile_prefill(client, recorder, plan, prompt))
    return rows


def receive(recorder: Connection) -> tuple[list[Event], int]:
    """Return the events of a recording that has ended, and how many steps it holds."""
    path, num_steps = recorder.recv()
    events = read_trace(path)
    path.unlink()
    return events, num_steps


class Window:
    """Has the steps recorded from `BEFORE` tokens on, `WITHIN` of them once recording has begun."""

    def __init__(self, recorder: Connection) -> None:
        self._recorder = recorder
        self._due = BEFORE
        self._state: Literal["before", "starting", "recording", "after"] = "before"

    def on_token(self, line: Timeline) -> None:
        """Look whether it is time."""
        count = min(len(times) for times in line.tokens.values())
        if self._state == "starting" and self._recorder.poll():
            assert self._recorder.recv() == RECORDING
            self._state, self._due = "recording", count + WITHIN
        elif self._state == "before" and count >= self._due:
            self._recorder.send("start")
            self._state = "starting"
        elif self._state == "recording" and count >= self._due:
            self._recorder.send("stop")
            self._state = "after"

    def close(self) -> tuple[list[Event], int]:
        """Return the events, and how many steps were issued meanwhile."""
        if self._state != "after":
            raise RuntimeError(f"the requests ended while the recording was {self._state}")
        return receive(self._recorder)


def profile_decode(
    client: Client, recorder: Connection, plan: Plan, batch: int, prompt: int
) -> dict[str, Any]:
    """Return the row of steady decode steps of `batch` sequences."""
    lengths = [(prompt, OUTPUT)] * batch
    client.run([(prompt, 8)] * batch)
    step_s = client.run(lengths).decode_step_s()
    window = Window(recorder)
    client.run(lengths, window.on_token)
    events, num_steps = whole_steps(*window.close())
    row = summarise(events, num_steps)
    tokens = StepTokens(decode=batch, decode_context=prompt + BEFORE + WITHIN / 2)
    return {
        "what": "decode",
        "batch": batch,
        "prompt_tokens": prompt,
        "step_ms": step_s * 1e3,
        "idle_share": 1 - row["busy_us_per_step"] / (step_s * 1e6),
        **row,
        "cost_model": cost_model_parts(plan, tokens),
    }


def profile_prefill(
    client: Client, recorder: Connection, plan: Plan, prompt: int
) -> dict[str, Any]:
    """Return the row of the step that computes one prompt and its first token."""
    client.run([(prompt, 1)])
    ttft_s = client.run([(prompt, 1)]).first_token_s()[0]
    recorder.send("start")
    client.run([(prompt, 1)])
    recorder.send("stop")
    client.run([(1, 1)])  # what comes after ends the recording
    assert recorder.recv() == RECORDING
    events, _ = receive(recorder)
    # Each prompt token attends to half of them on average.
    tokens = StepTokens(prefill=prompt, prefill_context=prompt / 2, prompts=1)
    return {
        "what": "prefill",
        "batch": 1,
        "prompt_tokens": prompt,
        "ttft_ms": ttft_s * 1e3,
        **summarise(events, 1),
        "cost_model": cost_model_parts(plan, tokens),
    }


def cost_model_parts(plan: Plan, tokens: StepTokens) -> list[dict[str, Any]]:
    """Return the cost model's terms of one step of the leader's stage."""
    split = plan.split
    models = StageModels(plan.model, plan.cluster, "rankwright")
    replicas = choose_replicas(plan.cluster, split)[0]
    pipeline = models.pipeline(replicas, split.stage_layers, split.ep, split.attention)
    return [
        {"name": part.name, "us_per_step": part.seconds * 1e6, "bound": part.bound}
        for part in pipeline.parts(0, tokens)
    ]


def show_profile(row: dict[str, Any]) -> None:
    """Print a row with its tables."""
    show(row)
    for table in ("classes", "kernels", "gaps", "cost_model"):
        print(f"  {table}")
        for line in row[table]:
            print(f"    {line['us_per_step']:9.1f} us/step  ", end="")
            if "times_per_step" in line:
                print(f"{line['times_per_step']:7.1f} x {line['mean_us']:8.2f} us  ", end="")
            print(line["name"], flush=True)


def main() -> None:
    """Start this rank, and profile on the leader of replica 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_arguments(parser)
    arguments = parser.parse_args()
    replica = start(arguments)
    ours, theirs = get_context("spawn").Pipe()
    rows = run(
        replica,
        profile_all,
        theirs,
        replica.plan,
        runner=RecordedRunner(replica.runner, ours, ProfilerActivity.CUDA),
    )
    if replica.mesh.is_leader and replica.mesh.place.replica == 0:
        for row in rows:
            show_profile(row)
        content = {**describe(replica, arguments.model), "rows": rows}
        name = name_of("profile", replica, arguments.model)
        print(write_result(name, content, folder=arguments.output))
    del replica
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
