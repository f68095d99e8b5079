"""What the regret benchmark asks: scenarios, the plans of each, and how the chosen one fared.

A scenario is a model, a load, at times a limit, and a memory budget that makes smaller cards out of
the GPUs that there are. Its plans are every split of the GPUs that fits, at the batch that the
memory or the load allows and, where a limit may ask for fewer requests at once, at a half and a
quarter of it. Equal (model, split, load, batch) of several scenarios are measured once.
"""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

from rankwright.cost_model.model_spec import ModelSpec
from rankwright.cost_model.split import Split
from rankwright.cost_model.workload import Workload
from rankwright.planner import candidates
from rankwright.planner.make_plan import NoFeasiblePlanError, Pins, make_plan
from rankwright.planner.plan import Plan
from rankwright.planner.shapes import find_shapes
from rankwright.topology.cluster import Cluster

# Tokens of a step, in every plan: one process per split measures all of its loads and batches.
CHUNK_TOKENS = 2048
_GB = 10**9


@dataclass(frozen=True, slots=True)
class Scenario:
    """One question to the planner."""

    model: str
    input_tokens: int
    output_tokens: int
    concurrency: int
    objective: Literal["throughput", "latency"] = "throughput"
    tpot_limit_s: float | None = None
    memory_budget_gb: float | None = None

    @property
    def budget_bytes(self) -> int | None:
        """Bytes of each GPU that a plan may use."""
        return None if self.memory_budget_gb is None else int(self.memory_budget_gb * _GB)

    def workload(self, *, limited: bool = True) -> Workload:
        """Return the load, with its limit or without."""
        return Workload(
            input_tokens=self.input_tokens,
            output_tokens=self.output_tokens,
            concurrency=self.concurrency,
            objective=self.objective,
            tpot_limit_s=self.tpot_limit_s if limited else None,
        )

    def describe(self) -> str:
        """Return the scenario in one line."""
        parts = [
            f"{self.model}: {self.input_tokens}+{self.output_tokens} tokens",
            f"{self.concurrency} in flight, best {self.objective}",
        ]
        if self.tpot_limit_s is not None:
            parts.append(f"TPOT {self.tpot_limit_s * 1e3:g} ms")
        if self.memory_budget_gb is not None:
            parts.append(f"{self.memory_budget_gb:g} GB a GPU")
        return ", ".join(parts)


# (model, limit on TPOT in ms, budgets in GB): cards of 24, 48 and 80 GB, and the GPU as it is.
_MODELS = (
    ("meta-llama/Llama-3.1-8B", 11, (24, 48, None)),
    ("Qwen/Qwen3-32B", 28, (48, 80, None)),
    ("Qwen/Qwen3-30B-A3B", 12, (48, 80, None)),
)
# (prompt, output, in flight)
_LOADS = ((1024, 128, 64), (128, 256, 128), (6000, 64, 8))


def default_scenarios() -> list[Scenario]:
    """Return the scenarios of the published figures: 39, of three models."""
    found: list[Scenario] = []
    for model, tpot_ms, budgets in _MODELS:
        for budget in budgets:
            found += [Scenario(model, *load, memory_budget_gb=budget) for load in _LOADS]
            found.append(
                Scenario(model, *_LOADS[0], tpot_limit_s=tpot_ms / 1e3, memory_budget_gb=budget)
            )
        found.append(Scenario(model, 1024, 128, 1, "latency"))
    return found


@dataclass(frozen=True, slots=True)
class Job:
    """One run: a split of a model under so many requests at once in each replica."""

    model: str
    split: str
    input_tokens: int
    output_tokens: int
    batch_size: int


@dataclass(frozen=True, slots=True)
class Option:
    """One plan of a scenario: its split, its batch, and whether it is the planner's choice."""

    label: str
    split: Split
    batch_size: int

    def job(self, scenario: Scenario) -> Job:
        """Return the run that tells how it does."""
        return Job(
            scenario.model,
            self.label,
            scenario.input_tokens,
            scenario.output_tokens,
            self.batch_size,
        )


def pins_of(split: Split) -> Pins:
    """Return what fixes everything but layers and batch."""
    return Pins(split.tp, split.pp, split.ep, split.dp, split.cp, split.attention)


def plan(
    scenario: Scenario,
    model: ModelSpec,
    cluster: Cluster,
    pins: Pins | None = None,
    *,
    limited: bool = True,
) -> Plan | None:
    """Return the planner's answer; None where nothing fits."""
    levels, candidates.CHUNK_LEVELS = candidates.CHUNK_LEVELS, (CHUNK_TOKENS,)
    try:
        return make_plan(
            model,
            cluster,
            scenario.workload(limited=limited),
            memory_budget_bytes=scenario.budget_bytes,
            pins=pins,
        )
    except NoFeasiblePlanError:
        return None
    finally:
        candidates.CHUNK_LEVELS = levels


def find_options(scenario: Scenario, model: ModelSpec, cluster: Cluster) -> list[Option]:
    """Return every plan of `scenario` that fits in memory."""
    found: list[Option] = []
    for shape in find_shapes(model, cluster).legal:
        for dp in range(1, cluster.num_gpus // shape.num_gpus + 1):
            pins = Pins(shape.tp, shape.pp, shape.ep, dp, shape.cp, shape.attention)
            made = plan(scenario, model, cluster, pins, limited=False)
            if made is None:
                continue
            most = min(made.limits.max_num_seqs, ceil(scenario.concurrency / dp))
            batches = {most}
            if scenario.tpot_limit_s is not None:
                batches |= {max(1, most // 2), max(1, most // 4)}
            found += [Option(made.split.label(), made.split, batch) for batch in sorted(batches)]
    return found


def option_of(made: Plan, scenario: Scenario) -> Option:
    """Return what a plan amounts to when it runs."""
    batch = min(made.limits.max_num_seqs, ceil(scenario.concurrency / made.split.dp))
    return Option(made.split.label(), made.split, batch)


def score(scenario: Scenario, row: Mapping[str, Any] | None) -> float | None:
    """Return how good a measured run is, more being better; None where it was not or is too slow.

    The limit holds for the median request.
    """
    if row is None:
        return None
    if scenario.tpot_limit_s is not None and row["tpot_s"] > scenario.tpot_limit_s:
        return None
    if scenario.objective == "latency":
        return 1 / float(row["request_s"])
    return float(row["output_tokens_per_s"])


def judge(
    scenario: Scenario,
    chosen: Option | None,
    options: Iterable[Option],
    rules: Mapping[str, Option | None],
    measured: Mapping[Job, Mapping[str, Any]],
) -> dict[str, Any]:
    """Return one row of the result: the best measured plan, and how far each choice is from it."""
    scores = {
        (one.label, one.batch_size): value
        for one in options
        if (value := score(scenario, measured.get(one.job(scenario)))) is not None
    }
    best = max(scores, key=scores.__getitem__) if scores else None

    def miss(option: Option | None) -> dict[str, Any] | None:
        if option is None:
            return None
        row = measured.get(option.job(scenario))
        value = score(scenario, row)
        return {
            "split": option.label,
            "batch_size": option.batch_size,
            "measured": row is not None,
            "breaks_limit": row is not None and value is None,
            "regret": None if value is None or best is None else 1 - value / scores[best],
        }

    return {
        "scenario": scenario.describe(),
        "chosen": miss(chosen),
        "best": None if best is None else {"split": best[0], "batch_size": best[1]},
        "rules": {name: miss(option) for name, option in rules.items()},
        "plans_measured": len(scores),
    }


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures over all scenarios: of the planner, and of each rule."""
    picks: dict[str, list[dict[str, Any] | None]] = {"planner": [row["chosen"] for row in rows]}
    for row in rows:
        for name, pick in row["rules"].items():
            picks.setdefault(name, []).append(pick)
    return {name: _summary(of_name) for name, of_name in picks.items()}


def _summary(picks: list[dict[str, Any] | None]) -> dict[str, Any]:
    made = [pick for pick in picks if pick is not None and pick["measured"]]
    regrets = [pick["regret"] for pick in made if pick["regret"] is not None]
    return {
        "scenarios": len(picks),
        "measured": len(made),
        "without_a_plan": sum(pick is None for pick in picks),
        "mean_regret": statistics.fmean(regrets) if regrets else None,
        "worst_regret": max(regrets, default=None),
        "limits_broken": sum(pick["breaks_limit"] for pick in made),
    }
