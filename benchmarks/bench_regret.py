"""Every plan of many scenarios, measured on this machine's GPUs, beside the one that was chosen.

    python benchmarks/bench_regret.py --parts FOLDER [--seconds 500] [--models llama]
    OMP_NUM_THREADS=1 python benchmarks/bench_regret.py --tiny --parts FOLDER
    python benchmarks/bench_regret.py --cluster 2xh200-sxm --simulate --parts FOLDER

torchrun starts the real engine, random weights, once for a way to cut the model, and a client keeps
as many requests on their way as each plan would, in a KV cache as large as the plan's. Every plan
of every scenario is measured; a second pass, in new starts, measures those that may be the best
again. Each run is kept under `--parts`, so that a call measures only what is missing, and stops at
`--seconds`; a scenario counts once all of its plans are there. Plans of one GPU run two at a time.

`--simulate` runs the real scheduler on a virtual clock instead, by the cost model's seconds: what
the regret would be if steps took what is predicted.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from client import Client
from rankwright.cost_model.model_spec import ModelSpec
from rankwright.cost_model.read_model import read_model
from rankwright.cost_model.workload import Workload
from rankwright.planner.make_plan import make_plan
from rankwright.planner.plan import Plan
from rankwright.planner.read_plan import read_plan, write_plan
from rankwright.topology.cluster import Cluster
from rankwright.topology.probe import probe
from rankwright.topology.shorthand import parse_cluster
from regret_judge import contenders, judge, noise, summarise, value_of
from regret_load import SPREAD, figures, make_load
from regret_parts import read_parts, write_part
from regret_rules import rules_of_thumb
from regret_scenarios import (
    CHUNK_TOKENS,
    Job,
    Option,
    Scenario,
    default_scenarios,
    find_options,
    option_of,
    pins_of,
    plan,
)
from result import RESULTS, write_result

# Requests measured in a run for each that is on its way; see `regret_load.py` for what that gives.
ROUNDS = 1.0
PASSES = 2
# Left at the end for the judgement, and for the start of an engine without which none begins.
_CLOSING_S, _START_S = 5.0, 30.0
_LAUNCH_TIMEOUT_S = 420.0
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


@dataclass(frozen=True, slots=True)
class Task:
    """A run as a worker is told of it: what, and how many replicas share it."""

    job: Job
    dp: int


@dataclass(frozen=True, slots=True)
class Study:
    """All that is asked: scenarios with their plans, what was chosen, and what rules would."""

    cluster: Cluster
    models: dict[str, ModelSpec]
    options: dict[Scenario, list[Option]]
    chosen: dict[Scenario, Option | None]
    rules: dict[Scenario, dict[str, Option | None]]

    def launches(self, number: int, parts: Path) -> list[list[tuple[str, Option, Job]]]:
        """Return what pass `number` has to run, by start of an engine, likely winners first."""
        measured = _passes(parts)
        groups: dict[tuple[object, ...], dict[Job, tuple[str, Option, Job]]] = {}
        promise: dict[tuple[object, ...], float] = {}
        for one, found in self.options.items():
            wanted = found
            if number > 1:
                wanted = contenders(one, found, self.chosen[one], measured)
            best = max(value_of(one, option.predicted) for option in found)
            for option in wanted:
                split = option.split
                key = one.model, split.tp, split.pp, split.ep, split.cp, split.attention
                job = option.job(one)
                groups.setdefault(key, {}).setdefault(job, (one.model, option, job))
                share = value_of(one, option.predicted) / best
                promise[key] = max(promise.get(key, 0.0), share)
        known, names = read_parts(parts), list(self.models)
        order = sorted(groups, key=lambda key: (names.index(str(key[0])), -promise[key]))
        missing = [
            [run for job, run in groups[key].items() if number not in known.get(job, {})]
            for key in order
        ]
        return [runs for runs in missing if runs]


def main() -> None:
    """Plan, measure what is missing, and judge; or be one rank of a measurement."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parts", type=Path, required=True, help="folder of single runs")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--models", default="", help="measure those with one of these in the name")
    parser.add_argument("--cluster", help="shorthand, instead of this machine")
    parser.add_argument("--seconds", type=float, default=3600.0, help="stop after so long")
    parser.add_argument("--passes", type=int, default=PASSES, help="the first measures all")
    parser.add_argument("--dry-run", action="store_true", help="say what is missing")
    parser.add_argument("--simulate", action="store_true", help="on a virtual clock, no GPU")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on two CPU ranks")
    parser.add_argument(
        "--rounds", type=float, default=ROUNDS, help="requests of a run for each one in flight"
    )
    parser.add_argument("--worker", type=Path, help="a start of an engine; set by this script")
    arguments = parser.parse_args()
    if arguments.worker is not None:
        work(arguments.worker)
        return
    arguments.until = time.time() + arguments.seconds - _CLOSING_S
    arguments.parts.mkdir(parents=True, exist_ok=True)
    if arguments.tiny:
        cluster = parse_cluster("2xcpu")
        scenarios = tiny_scenarios(arguments.parts)
    else:
        cluster = parse_cluster(arguments.cluster) if arguments.cluster else probe(require_gpu=True)
        scenarios = default_scenarios()
    names = [name.lower() for name in arguments.models.split(",")]
    scenarios = [one for one in scenarios if any(name in one.model.lower() for name in names)]
    run(make_study(scenarios, cluster), arguments)


def tiny_scenarios(folder: Path) -> list[Scenario]:
    """Return scenarios of a model that two CPU ranks run in seconds; its config is in `folder`."""
    path = folder / "tiny" / "config.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(_TINY), encoding="utf-8")
    model = str(path.parent)
    return [
        Scenario(model, 32, 16, 4),
        Scenario(model, 32, 16, 4, tpot_limit_s=0.05, memory_budget_gb=1),
        Scenario(model, 32, 16, 1, "latency"),
    ]


def make_study(scenarios: Sequence[Scenario], cluster: Cluster) -> Study:
    """Return every plan of `scenarios`, the planner's choices and the rules'."""
    study = Study(cluster, {one.model: read_model(one.model) for one in scenarios}, {}, {}, {})
    for one in scenarios:
        model = study.models[one.model]
        found = find_options(one, model, cluster)
        made = plan(one, model, cluster)
        study.chosen[one] = None if made is None else option_of(made, one)
        study.rules[one] = rules_of_thumb(one, model, cluster)
        for pick in (study.chosen[one], *study.rules[one].values()):
            if pick is not None and pick not in found:
                found.append(pick)
        study.options[one] = found
    return study


def run(study: Study, arguments: argparse.Namespace) -> None:
    """Measure every plan of `study` and write how the chosen ones fared."""
    runs = {option.job(one) for one, found in study.options.items() for option in found}
    print(
        f"{len(study.options)} scenarios, {sum(map(len, study.options.values()))} plans, "
        f"{len(runs)} runs",
        flush=True,
    )
    failed: list[str] = []
    for number in range(1, arguments.passes + 1):
        for todo in study.launches(number, arguments.parts):
            (name, option, _), *_ = todo
            print(f"pass {number}, {name} {option.label}: {len(todo)} to run", flush=True)
            if arguments.dry_run:
                continue
            if arguments.simulate:
                simulate(study, number, todo, arguments)
            elif time.time() + _START_S > arguments.until:
                failed.append(f"pass {number}, {name} {option.label}: no time left")
            elif why := measure(study, number, todo, arguments):
                failed.append(f"pass {number}, {name} {option.label}: {why}")
                print(failed[-1], flush=True)
    measured = _passes(arguments.parts)
    rows = [
        judge(one, study.chosen[one], found, study.rules[one], measured)
        for one, found in study.options.items()
    ]
    for row in rows:
        print(json.dumps({key: value for key, value in row.items() if key != "plans"}), flush=True)
    summary = summarise(rows) | {"noise": noise(measured), "not_run": failed}
    print(json.dumps(summary, indent=1))
    if arguments.dry_run:
        return
    content = {
        "weights": "random",
        "chunk_tokens": CHUNK_TOKENS,
        "length_spread": SPREAD,
        "rounds": arguments.rounds,
        "passes": arguments.passes,
        "summary": summary,
        "rows": rows,
    }
    kind = "-simulated" if arguments.simulate else "-tiny" if arguments.tiny else ""
    print(write_result(f"regret{kind}", content, folder=arguments.output))


def _passes(parts: Path) -> dict[Job, list[dict[str, float]]]:
    """Return what each job gave, in the order of its passes."""
    return {
        job: [row for _, row in sorted(rows.items())] for job, rows in read_parts(parts).items()
    }


def measure(
    study: Study,
    number: int,
    todo: list[tuple[str, Option, Job]],
    arguments: argparse.Namespace,
) -> str | None:
    """Run `todo` in one start of the engine; return why it did not end, None where it did."""
    made = _engine_plan(study, todo)
    folder = arguments.parts / f"launch-{os.getpid()}-{time.time_ns()}"
    folder.mkdir()
    write_plan(made, folder / "plan.json")
    told = {
        "parts": str(arguments.parts),
        "pass": number,
        "rounds": arguments.rounds,
        "until": arguments.until,
        # Those that take all GPUs first: the others are shared out over the replicas.
        "tasks": [
            {"job": asdict(job), "dp": option.split.dp}
            for _, option, job in sorted(todo, key=lambda one: -one[1].split.dp)
        ],
    }
    (folder / "tasks.json").write_text(json.dumps(told), encoding="utf-8")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(made.num_gpus), __file__),
        *("--parts", str(arguments.parts), "--worker", str(folder)),
    ]
    started = time.monotonic()
    limit_s = min(_LAUNCH_TIMEOUT_S, max(1.0, arguments.until - time.time()) + _START_S)
    try:
        done = subprocess.run(command, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        return f"not done after {limit_s:.0f} s"
    print(f"took {time.monotonic() - started:.0f} s", flush=True)
    return f"exit code {done.returncode}" if done.returncode else None


def _engine_plan(study: Study, todo: list[tuple[str, Option, Job]]) -> Plan:
    """Return the plan of one start: all of the memory, and room for the largest batch."""
    jobs = [job for _, _, job in todo]
    split = max((option.split for _, option, _ in todo), key=lambda one: one.dp)
    made = make_plan(
        study.models[todo[0][0]],
        study.cluster,
        Workload(
            input_tokens=max(job.input_tokens for job in jobs),
            output_tokens=max(job.output_tokens for job in jobs),
            concurrency=split.dp,
        ),
        pins=pins_of(split),
    )
    longest = max(job.input_tokens + job.output_tokens for job in jobs)
    limits = made.limits.model_copy(
        update={
            "max_num_seqs": max(job.batch_size for job in jobs),
            "max_batched_tokens": CHUNK_TOKENS,
            "max_model_len": min(made.limits.max_model_len, 2 * longest),
        }
    )
    return made.model_copy(update={"limits": limits})


def simulate(
    study: Study,
    number: int,
    todo: list[tuple[str, Option, Job]],
    arguments: argparse.Namespace,
) -> None:
    """Run `todo` on a virtual clock."""
    from simulated_replica import simulated_replica  # the executor's scheduler

    for name, option, job in todo:
        for replica in range(option.split.dp):
            load = make_load(
                job.input_tokens,
                job.output_tokens,
                job.batch_size,
                rounds=arguments.rounds,
                replica=replica,
                dp=option.split.dp,
            )
            engine = simulated_replica(
                study.models[name], study.cluster, option.split, job.kv_blocks
            )
            row = figures(engine.keep(load.lengths, load.in_flight, until=load.until), load)
            write_part(
                arguments.parts, job, row, number=number, replica=replica, dp=option.split.dp
            )


def work(folder: Path) -> None:
    """Be one rank: load it, and on the leader of each replica measure every job."""
    # Torch only here: planning and judging need none.
    import torch
    import torch.distributed as dist

    from capped_leader import CappedLeader
    from rankwright.executor.mesh import Mesh
    from rankwright.executor.runner import Runner
    from rankwright.executor.weights import DummySource
    from rankwright.executor.worker import DTYPES, rank_device
    from replica import Replica
    from replica import run as serve

    made = read_plan(folder / "plan.json")
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
    place = mesh.place.replica
    serve(replica, measure_tasks, folder, place, made.split.dp, leader=CappedLeader)
    del replica, runner
    dist.destroy_process_group()


def measure_tasks(client: Client, folder: Path, place: int, num_replicas: int) -> None:
    """Measure the jobs of replica `place` of a start, and keep each when it is done."""
    told = json.loads((folder / "tasks.json").read_text(encoding="utf-8"))
    tasks = [Task(Job(**one["job"]), one["dp"]) for one in told["tasks"]]
    longest = max(tasks, key=lambda one: one.job.input_tokens).job.input_tokens
    # What the warm-up of the engine has left cold.
    client.run([(max(1, longest // part), 8) for part in range(1, 9)])
    for index, task in enumerate(tasks):
        # Replicas in groups as large as the plan has; each group takes its turn.
        group, replica = divmod(place, task.dp)
        if index % (num_replicas // task.dp) != group:
            continue
        if time.time() > told["until"]:
            return
        job = task.job
        load = make_load(
            job.input_tokens,
            job.output_tokens,
            job.batch_size,
            rounds=told["rounds"],
            replica=replica,
            dp=task.dp,
        )
        client.cap_cache(job.kv_blocks)
        row = figures(client.keep(load.lengths, load.in_flight, until=load.until), load)
        write_part(Path(told["parts"]), job, row, number=told["pass"], replica=replica, dp=task.dp)


if __name__ == "__main__":
    main()
