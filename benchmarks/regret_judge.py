"""How the chosen plans fared beside the best ones that were measured.

Each plan was measured once, and those that may be the best again, in another start of the engine.
The best of many noisy figures is too good by chance, and a regret against it too large; the regret
whose best is found in one pass and measured in the other (`crossed_regret`) is not, but may take
a plan that is not the best for it. The truth lies between the two; the larger is the headline.
"""

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import sqrt
from typing import Any

from regret_scenarios import Job, Option, Scenario

Passes = Sequence[Mapping[str, float]]
Measured = Mapping[Job, Passes]
# A plan this close to the best, or to keeping the limit, is measured again.
CLOSE = 0.10


def mean_of(passes: Passes, key: str) -> float:
    """Return the mean of a figure over the passes."""
    return statistics.fmean(one[key] for one in passes)


def value_of(scenario: Scenario, row: Mapping[str, float]) -> float:
    """Return how good one measured run is, more being better; limits are not looked at."""
    if scenario.objective == "latency":
        return 1 / row["request_s"]
    return row["output_tokens_per_s"]


def keeps_limit(scenario: Scenario, passes: Passes, slack: float = 0.0) -> bool:
    """Return whether the mean TPOT is within the limit, or over it by no more than `slack`."""
    limit_s = scenario.tpot_limit_s
    return limit_s is None or mean_of(passes, "tpot_s") <= limit_s * (1 + slack)


def score(scenario: Scenario, passes: Passes) -> float | None:
    """Return how good a plan was, the mean of its passes; None where it breaks the limit."""
    if not passes or not keeps_limit(scenario, passes):
        return None
    return statistics.fmean(value_of(scenario, one) for one in passes)


def contenders(
    scenario: Scenario, options: Iterable[Option], chosen: Option | None, measured: Measured
) -> list[Option]:
    """Return the plans that are worth a second run: chosen, close to the best, or so by the limit.

    Only the first pass is looked at, so that what the second one says has not been picked.
    """
    first = {
        option: found[:1] for option in options if (found := measured.get(option.job(scenario)))
    }
    scores = [value for one in first.values() if (value := score(scenario, one)) is not None]
    best = max(scores, default=0.0)
    return [
        option
        for option, found in first.items()
        if option == chosen
        or (
            keeps_limit(scenario, found, CLOSE)
            and value_of(scenario, found[0]) >= (1 - CLOSE) * best
        )
    ]


def judge(
    scenario: Scenario,
    chosen: Option | None,
    options: Sequence[Option],
    rules: Mapping[str, Option | None],
    measured: Measured,
) -> dict[str, Any]:
    """Return one row of the result: what each plan gave, the best, and how far choices are off."""
    passes = {option: measured.get(option.job(scenario), ()) for option in options}
    scores = {
        option: value
        for option, found in passes.items()
        if (value := score(scenario, found)) is not None
    }
    best = max(scores, key=scores.__getitem__) if scores else None

    def miss(option: Option | None) -> dict[str, Any] | None:
        if option is None:
            return None
        found = passes.get(option, ())
        value = score(scenario, found)
        return {
            "split": option.label,
            "batch_size": option.batch_size,
            "measured": bool(found),
            "breaks_limit": bool(found) and value is None,
            "regret": None if value is None or best is None else 1 - value / scores[best],
        }

    others = [value for option, value in scores.items() if best and option.label != best.label]
    return {
        "scenario": scenario.describe(),
        "complete": all(passes.values()),
        "chosen": miss(chosen),
        "crossed_regret": _crossed_regret(scenario, chosen, scores, passes),
        "best": None if best is None else {"split": best.label, "batch_size": best.batch_size},
        "lead_over_next_split": (
            1 - max(others) / scores[best] if best is not None and others else None
        ),
        "rules": {name: miss(option) for name, option in rules.items()},
        "best_of_peer_space": _best_of_peer_space(scores),
        "plans": [_describe(option, found) for option, found in passes.items()],
    }


def _crossed_regret(
    scenario: Scenario,
    chosen: Option | None,
    scores: Mapping[Option, float],
    passes: Mapping[Option, Passes],
) -> float | None:
    """Return the regret against the best of one pass, by the other; the mean of both ways."""
    twice = {
        option: [value_of(scenario, one) for one in passes[option][:2]]
        for option in scores
        if len(passes[option]) > 1
    }
    if chosen not in twice:
        return None
    found = []
    for picking, judging in ((0, 1), (1, 0)):
        best = max(twice, key=lambda option: twice[option][picking])
        found.append(1 - twice[chosen][judging] / twice[best][judging])
    return statistics.fmean(found)


def _best_of_peer_space(scores: Mapping[Option, float]) -> float | None:
    """Return the regret of the best plan that AIConfigurator's search looks at, by measurement.

    It has no pipelines unless they are written down for it (`agg_pp_candidates: [1]`), and no cut
    contexts for these models: whatever it predicts, it can pick nothing better than this.
    """
    inside = [value for option, value in scores.items() if option.split.pp == option.split.cp == 1]
    return 1 - max(inside) / max(scores.values()) if inside else None


def _describe(option: Option, passes: Passes) -> dict[str, Any]:
    keys = ("output_tokens_per_s", "tpot_s", "ttft_s", "request_s")
    return {
        "split": option.label,
        "batch_size": option.batch_size,
        "kv_blocks": option.kv_blocks,
        "predicted": option.predicted,
        "measured": [{key: one[key] for key in keys} for one in passes],
    }


def noise(measured: Measured) -> float | None:
    """Return the standard deviation of one figure of tokens/s, as a share, from those run twice."""
    squares = []
    for passes in measured.values():
        if len(passes) > 1:
            one, two = (run["output_tokens_per_s"] for run in passes[:2])
            squares.append((2 * (one - two) / (one + two)) ** 2 / 2)
    return sqrt(statistics.fmean(squares)) if squares else None


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures over all scenarios of which every plan was measured."""
    whole = [row for row in rows if row["complete"]]
    picks: dict[str, list[dict[str, Any] | None]] = {"planner": [row["chosen"] for row in whole]}
    for row in whole:
        for name, pick in row["rules"].items():
            picks.setdefault(name, []).append(pick)
    crossed = [row["crossed_regret"] for row in whole if row["crossed_regret"] is not None]
    inside = [row["best_of_peer_space"] for row in whole if row["best_of_peer_space"] is not None]
    return {
        "scenarios": len(rows),
        "scenarios_complete": len(whole),
        "best_split": dict(Counter(row["best"]["split"] for row in whole if row["best"])),
        "mean_crossed_regret": statistics.fmean(crossed) if crossed else None,
        "worst_crossed_regret": max(crossed, default=None),
        "best_of_peer_space": {
            "without_a_plan": len(whole) - len(inside),
            "mean_regret": statistics.fmean(inside) if inside else None,
            "worst_regret": max(inside, default=None),
        },
        "choices": {name: _summary(of_name) for name, of_name in picks.items()},
    }


def _summary(picks: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
    made = [pick for pick in picks if pick is not None]
    regrets = [pick["regret"] for pick in made if pick["regret"] is not None]
    return {
        "without_a_plan": len(picks) - len(made),
        "mean_regret": statistics.fmean(regrets) if regrets else None,
        "worst_regret": max(regrets, default=None),
        "best_chosen": sum(regret == 0 for regret in regrets),
        "limits_broken": sum(pick["breaks_limit"] for pick in made),
    }
