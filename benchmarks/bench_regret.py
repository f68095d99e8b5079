"""Every plan of many scenarios, measured on this machine's GPUs, beside the one that was chosen.

    python benchmarks/bench_regret.py --parts FOLDER [--models llama,qwen] [--output FOLDER]
    OMP_NUM_THREADS=1 python benchmarks/bench_regret.py --tiny --parts FOLDER

For each (model, split) torchrun starts the real engine with random weights once; a client keeps as
many requests in flight as each plan would, and notes tokens/s, TPOT and TTFT of the steady middle
of the run. Each run is kept under `--parts`, so that a second call measures only what is missing;
`--dry-run` says what that is. Rates of several replicas add up, latencies are the worst replica's.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from client import Client, Timeline
from rankwright.cost_model.model_spec import ModelSpec
from rankwright.cost_model.read_model import read_model
from rankwright.cost_model.workload import Workload
from rankwright.planner.make_plan import make_plan
from rankwright.planner.plan import Plan
from rankwright.planner.read_plan import read_plan, write_plan
from rankwright.topology.cluster import Cluster
from rankwright.topology.probe import probe
from rankwright.topology.shorthand import parse_cluster
from regret_rules import rules_of_thumb
from regret_scenarios import (
    CHUNK_TOKENS,
    Job,
    Option,
    Scenario,
    default_scenarios,
    find_options,
    judge,
    option_of,
    pins_of,
    plan,
    summarise,
)
from result import RESULTS, write_result

# Requests of a run, for each that is in flight; the first and the last in flight are left out.
ROUNDS = 4
LEAST_REQUESTS = 6
# Lengths lie evenly within this share of what was asked, so that requests do not march in step:
# with a tenth all prompts of a round came at once, and steps between them were decoding alone.
SPREAD = 0.5
_LAUNCH_TIMEOUT_S = 300
_TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "torch_dtype": "float32",
}


def main() -> None:
    """Plan, measure what is missing, and judge; or be one rank of a measurement."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parts", type=Path, required=True, help="folder of single runs")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--models", default="", help="measure those with one of these in the name")
    parser.add_argument("--cluster", help="shorthand, instead of this machine; with --dry-run")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on two CPU ranks")
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, help="requests of a run for each one in flight"
    )
    parser.add_argument("--worker", type=Path, help="jobs of one plan; set by this script")
    arguments = parser.parse_args()
    if arguments.worker is not None:
        work(arguments.worker, arguments.rounds)
        return
    arguments.parts.mkdir(parents=True, exist_ok=True)
    if arguments.tiny:
        cluster = parse_cluster("2xcpu")
        scenarios = _tiny_scenarios(arguments.parts)
    else:
        cluster = parse_cluster(arguments.cluster) if arguments.cluster else probe(require_gpu=True)
        scenarios = default_scenarios()
    names = [name.lower() for name in arguments.models.split(",")]
    scenarios = [one for one in scenarios if any(name in one.model.lower() for name in names)]
    study(scenarios, cluster, arguments)


def _tiny_scenarios(folder: Path) -> list[Scenario]:
    path = folder / "tiny" / "config.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(_TINY), encoding="utf-8")
    model = str(path.parent)
    return [
        Scenario(model, 32, 16, 4),
        Scenario(model, 32, 16, 4, tpot_limit_s=0.05, memory_budget_gb=1),
        Scenario(model, 32, 16, 1, "latency"),
    ]


def study(scenarios: list[Scenario], cluster: Cluster, arguments: argparse.Namespace) -> None:
    """Measure every plan of `scenarios` and write how the chosen ones fared."""
    models = {one.model: read_model(one.model) for one in scenarios}
    options: dict[Scenario, list[Option]] = {}
    chosen: dict[Scenario, Option | None] = {}
    rules: dict[Scenario, dict[str, Option | None]] = {}
    for one in scenarios:
        model = models[one.model]
        options[one] = find_options(one, model, cluster)
        made = plan(one, model, cluster)
        chosen[one] = None if made is None else option_of(made, one)
        rules[one] = rules_of_thumb(one, model, cluster)
        extra = [chosen[one], *rules[one].values()]
        options[one] += [pick for pick in extra if pick is not None and pick not in options[one]]
    launches: dict[tuple[str, str], dict[Job, Option]] = {}
    for one, found in options.items():
        for option in found:
            launches.setdefault((one.model, option.label), {})[option.job(one)] = option
    print(
        f"{len(scenarios)} scenarios, {sum(map(len, options.values()))} plans, "
        f"{sum(map(len, launches.values()))} runs of {len(launches)} (model, split)",
        flush=True,
    )
    measured: dict[Job, dict[str, Any]] = {}
    for (name, label), jobs in launches.items():
        known = _read_parts(arguments.parts)
        missing = {job: option for job, option in jobs.items() if job not in known}
        print(
            f"{name} {label}: {len(jobs) - len(missing)} known, {len(missing)} to run", flush=True
        )
        if missing and not arguments.dry_run:
            measure(models[name], cluster, missing, arguments)
    measured = _read_parts(arguments.parts)
    rows = [judge(one, chosen[one], options[one], rules[one], measured) for one in scenarios]
    for row in rows:
        print(json.dumps(row), flush=True)
    summary = summarise(rows)
    print(json.dumps(summary, indent=1))
    if arguments.dry_run:
        return
    content = {
        "weights": "random",
        "chunk_tokens": CHUNK_TOKENS,
        "length_spread": SPREAD,
        "rounds": arguments.rounds,
        "summary": summary,
        "rows": rows,
        "runs": [asdict(job) | row for job, row in measured.items()],
    }
    name = "regret-tiny" if arguments.tiny else "regret"
    print(write_result(name, content, folder=arguments.output))


def measure(
    model: ModelSpec, cluster: Cluster, jobs: dict[Job, Option], arguments: argparse.Namespace
) -> None:
    """Run the jobs of one model and split in one start of the engine; keep what they gave."""
    job, option = max(jobs.items(), key=lambda item: item[0].batch_size)
    made = _engine_plan(model, cluster, jobs, option)
    folder = arguments.parts / f"launch-{os.getpid()}-{int(time.time())}"
    folder.mkdir()
    write_plan(made, folder / "plan.json")
    (folder / "jobs.json").write_text(json.dumps([asdict(one) for one in jobs]), encoding="utf-8")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(made.num_gpus), __file__),
        *("--parts", str(arguments.parts), "--worker", str(folder)),
        *("--rounds", str(arguments.rounds)),
    ]
    started = time.monotonic()
    try:
        done = subprocess.run(command, timeout=_LAUNCH_TIMEOUT_S, check=False)
        failed = f"exit code {done.returncode}" if done.returncode else None
    except subprocess.TimeoutExpired:
        failed = f"not done after {_LAUNCH_TIMEOUT_S} s"
    if failed is not None:
        print(f"{job.model} {job.split} failed: {failed}; its runs are missing", flush=True)
        return
    replicas = [json.loads(path.read_text()) for path in sorted(folder.glob("replica-*.json"))]
    for index, one in enumerate(jobs):
        row = _joined([rows[index] for rows in replicas])
        name = f"run-{folder.name}-{index}.json"
        (arguments.parts / name).write_text(
            json.dumps({"job": asdict(one), "row": row}), encoding="utf-8"
        )
    print(f"{job.model} {job.split}: {time.monotonic() - started:.0f} s", flush=True)


def _engine_plan(
    model: ModelSpec, cluster: Cluster, jobs: dict[Job, Option], option: Option
) -> Plan:
    """Return the plan of one start: all of the memory, and room for the largest batch."""
    most = max(job.batch_size for job in jobs)
    longest = max(job.input_tokens + job.output_tokens for job in jobs)
    made = make_plan(
        model,
        cluster,
        Workload(
            input_tokens=max(job.input_tokens for job in jobs),
            output_tokens=max(job.output_tokens for job in jobs),
            concurrency=option.split.dp,
        ),
        pins=pins_of(option.split),
    )
    limits = made.limits.model_copy(
        update={
            "max_num_seqs": most,
            "max_batched_tokens": CHUNK_TOKENS,
            "max_model_len": min(made.limits.max_model_len, 2 * longest),
        }
    )
    return made.model_copy(update={"limits": limits})


def _joined(rows: list[dict[str, float]]) -> dict[str, float]:
    """Return the figures of all replicas together: rates add up, the slowest one waits longest."""
    return {
        key: sum(row[key] for row in rows)
        if key == "output_tokens_per_s"
        else max(row[key] for row in rows)
        for key in rows[0]
    }


def _read_parts(folder: Path) -> dict[Job, dict[str, Any]]:
    found: dict[Job, dict[str, Any]] = {}
    for path in sorted(folder.glob("run-*.json")):
        part = json.loads(path.read_text(encoding="utf-8"))
        found[Job(**part["job"])] = part["row"]
    return found


def work(folder: Path, rounds: int) -> None:
    """Be one rank: load it, and on the leader of each replica measure every job."""
    # Torch only here: planning and judging need none.
    import torch
    import torch.distributed as dist

    from rankwright.executor.mesh import Mesh
    from rankwright.executor.runner import Runner
    from rankwright.executor.weights import DummySource
    from rankwright.executor.worker import DTYPES, rank_device
    from replica import Replica, run

    made = read_plan(folder / "plan.json")
    jobs = [Job(**one) for one in json.loads((folder / "jobs.json").read_text(encoding="utf-8"))]
    rank = int(os.environ["RANK"])
    device = rank_device(made, rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    mesh = Mesh(made, rank, device)
    dtype = DTYPES[made.model.dtype]
    runner = Runner(made, mesh, DummySource(dtype, device, seed=rank), dtype=dtype)
    if device.type == "cuda":
        runner.warm_up(made.limits)
    replica = Replica(made, mesh, runner, 0.0, 0.0, [])
    rows = run(replica, measure_jobs, jobs, rounds)
    if mesh.is_leader:
        path = folder / f"replica-{mesh.place.replica}.json"
        path.write_text(json.dumps(rows), encoding="utf-8")
    del replica, runner
    dist.destroy_process_group()


def measure_jobs(client: Client, jobs: list[Job], rounds: int) -> list[dict[str, float]]:
    """Return the figures of each job, in this replica."""
    return [_measure_job(client, job, rounds) for job in jobs]


def _measure_job(client: Client, job: Job, rounds: int) -> dict[str, float]:
    batch = job.batch_size
    count = max(rounds * batch, batch + LEAST_REQUESTS)
    rng = random.Random(batch)

    def near(tokens: int) -> int:
        return max(2, round(tokens * rng.uniform(1 - SPREAD, 1 + SPREAD)))

    lengths = [(near(job.input_tokens), near(job.output_tokens)) for _ in range(count)]
    client.keep(lengths[:batch], batch)
    return steady(client.keep(lengths, batch), batch)


def steady(line: Timeline, in_flight: int) -> dict[str, float]:
    """Return the figures of the middle of a run, in which `in_flight` requests were running.

    It starts when as many requests are done as are in flight, and ends with the last one sent: what
    comes after has the engine to itself. Tokens of requests that reach beyond either end count too.
    """
    ends = sorted(times[-1] for times in line.tokens.values())
    start, stop = ends[in_flight - 1], max(line.sent.values())
    tokens = sum(start < moment <= stop for times in line.tokens.values() for moment in times)
    inside = [name for name, sent in line.sent.items() if sent >= start] or list(line.sent)
    steps = []
    for times in line.tokens.values():
        within = [moment for moment in times if start <= moment <= stop]
        if len(within) > 1:
            steps.append((within[-1] - within[0]) / (len(within) - 1))
    first = [line.tokens[name][0] - line.sent[name] for name in inside]
    whole = [line.tokens[name][-1] - line.sent[name] for name in inside]
    return {
        "output_tokens_per_s": tokens / (stop - start),
        "tpot_s": statistics.median(steps),
        "ttft_s": statistics.median(first),
        "request_s": statistics.median(whole),
    }


if __name__ == "__main__":
    main()
