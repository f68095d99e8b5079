"""Binds a choice of unlike replicas to GPUs: a plan of each part, and what they do together."""

from collections.abc import Sequence

from rankwright.cost_model.predict import Replicas
from rankwright.cost_model.prediction import Estimate
from rankwright.planner.bind import bind_plan
from rankwright.planner.binding import WORTHWHILE
from rankwright.planner.certify import certify
from rankwright.planner.environment import find_environment
from rankwright.planner.figures import figure
from rankwright.planner.ilp import Choice
from rankwright.planner.part_columns import Column, Columns
from rankwright.planner.part_program import PartsChoice, choose_parts
from rankwright.planner.parts_plan import AlikePlan, PartsPlan, PartsPrediction, part_label
from rankwright.planner.placement import Place, bind_ranks, replica_places
from rankwright.planner.plan import Certificate, Plan, RankPlan
from rankwright.planner.runners_up import split_of
from rankwright.planner.search import Search
from rankwright.planner.twins import Gpus, Twins


def bind_parts(
    search: Search, twins: Twins, columns: Columns, choice: PartsChoice, alike: Plan
) -> PartsPlan:
    """Return the plan of `choice`.

    Args:
        search: Of the whole machine.
        twins: Its GPUs.
        columns: Of which the choice was made.
        choice: Replicas of each part.
        alike: The best plan of alike replicas, which it is compared with.
    """
    certificate = certify(
        search.workload.objective,
        choice.value,
        choice.ending,
        num_candidates=columns.num_candidates,
        num_illegal=columns.num_illegal,
        binding_constraint=_binding(search, twins, columns, choice),
    )
    homes = _homes(twins, choice)
    choices = [
        _alone(column, count, choice)
        for column, count in zip(choice.columns, choice.counts, strict=True)
    ]
    ranks = [
        _ranks(column, one, sets)
        for column, one, sets in zip(choice.columns, choices, homes, strict=True)
    ]
    settings = find_environment(search.cluster, tuple(rank for part in ranks for rank in part))
    parts = [
        _part(search, column, one, mine, certificate).model_copy(update={"environment": settings})
        for column, one, mine in zip(choice.columns, choices, ranks, strict=True)
    ]
    return PartsPlan(
        num_gpus=sum(part.num_gpus for part in parts),
        workload=search.workload,
        parts=tuple(parts),
        prediction=_prediction(parts),
        certificate=certificate,
        alike=_compare(alike, parts, choice),
        assumptions=alike.assumptions,
    )


def _homes(twins: Twins, choice: PartsChoice) -> list[list[Gpus]]:
    """Return the sets of GPUs of each part's replicas: of each class, the next that are free."""
    left = [list(members) for members in twins.classes]
    homes: list[list[Gpus]] = []
    for column, count in zip(choice.columns, choice.counts, strict=True):
        sets: list[Gpus] = []
        for _ in range(count):
            taken = [(free[:size], free) for free, size in zip(left, column.counts, strict=True)]
            sets.append(tuple(gpu for mine, _ in taken for gpu in mine))
            for mine, free in taken:
                del free[: len(mine)]
        homes.append(sets)
    return homes


def _alone(column: Column, count: int, choice: PartsChoice) -> Choice:
    """Return the replicas of one part as the choice of a plan of their own."""
    value = column.requests_per_s * column.search.workload.output_tokens * count
    return Choice(column.candidate, (count,), value, choice.ending)


def _ranks(column: Column, alone: Choice, sets: Sequence[Gpus]) -> tuple[RankPlan, ...]:
    """Return the ranks of the replicas of `column`, one on each of `sets`.

    The set that the column was priced on can be laid over each of them, GPU by GPU.
    """
    (group,) = column.candidate.pool.replicas
    (stages,) = replica_places([Replicas(group.stages, 1, group.spread)])
    replicas: list[list[tuple[Place, ...]]] = []
    for gpus in sets:
        over = dict(zip(column.gpus, gpus, strict=True))
        replicas.append([tuple((node, over[gpu]) for node, gpu in stage) for stage in stages])
    shares = [[kind.shares for kind in group.stages]] * len(sets)
    return bind_ranks(column.search.model, split_of(alone), replicas, shares)


def _part(
    search: Search,
    column: Column,
    alone: Choice,
    ranks: tuple[RankPlan, ...],
    certificate: Certificate,
) -> Plan:
    """Return the plan of one part, of its share of the requests in flight."""
    (group,) = column.candidate.pool.replicas
    load = search.workload
    if load.concurrency is not None:
        share = column.candidate.batch_size * alone.num_replicas
        load = load.model_copy(update={"concurrency": share})
    return bind_plan(
        column.search,
        alone,
        [Replicas(group.stages, alone.num_replicas, group.spread)],
        ranks,
        certificate=certificate,
        assumptions=(),
        cluster=search.cluster,
        workload=load,
    )


def _prediction(parts: Sequence[Plan]) -> PartsPrediction:
    """Return what requests see of the slowest part, and the tokens/s of all.

    Errors of the parts come from the same constants, so that the ends of their intervals add up.
    """
    each = [part.prediction for part in parts]
    rates = [one.output_tokens_per_s for one in each]
    return PartsPrediction(
        ttft_s=max((one.ttft_s for one in each), key=_value),
        tpot_s=max((one.tpot_s for one in each), key=_value),
        output_tokens_per_s=Estimate(
            value=sum(rate.value for rate in rates),
            low=sum(rate.low for rate in rates),
            high=sum(rate.high for rate in rates),
        ),
        memory_bytes_per_gpu=max((one.memory_bytes_per_gpu for one in each), key=_value),
    )


def _value(one: Estimate) -> float:
    return one.value


def _binding(search: Search, twins: Twins, columns: Columns, choice: PartsChoice) -> str:
    """Return what keeps more from being served, by what the program gives without it."""
    load, total = search.workload, search.cluster.num_gpus
    used = sum(
        column.num_gpus * count for column, count in zip(choice.columns, choice.counts, strict=True)
    )
    gpus = f"all {total} GPUs are used" if used == total else f"{used} of {total} GPUs are used"
    if load.concurrency is not None:
        freed = load.model_copy(update={"concurrency": 2 * load.concurrency})
        more = choose_parts(
            columns.best, twins, freed, settle=False, time_limit_s=search.time_limit_s
        )
        if more is not None and more.value > choice.value * (1 + WORTHWHILE):
            return (
                f"concurrency of {load.concurrency}: with {freed.concurrency} requests in flight "
                f"replicas at these or smaller batches would give {figure(more.value)} tokens/s "
                f"instead of {figure(choice.value)}; {gpus}"
            )
    return f"number of GPUs: {gpus}, and no other mix of replicas on them serves more"


def _compare(alike: Plan, parts: Sequence[Plan], choice: PartsChoice) -> AlikePlan:
    """Return the best plan of alike replicas beside the parts."""
    value, num_gpus = alike.certificate.objective_value, sum(part.num_gpus for part in parts)
    label = part_label(alike)
    gain = choice.value / value - 1
    verdict = (
        f"unlike replicas serve {gain:.1%} more: {figure(choice.value)} tokens/s on "
        f"{num_gpus} GPUs against {figure(value)} on {alike.num_gpus} of {label} at batch "
        f"{alike.limits.max_num_seqs}"
    )
    return AlikePlan(
        label=label,
        num_gpus=alike.num_gpus,
        batch_size=alike.limits.max_num_seqs,
        objective_value=value,
        ttft_s=alike.prediction.ttft_s.value,
        tpot_s=alike.prediction.tpot_s.value,
        verdict=verdict,
    )
