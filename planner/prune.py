"""Leaves out of the integer program what cannot be its answer, which is nearly all of it."""

from collections.abc import Sequence

from rankwright.cost_model.workload import Workload
from rankwright.planner.candidate import Candidate
from rankwright.planner.goals import ratio_of

# Relative to the best value. Far above the solver's tolerances and what counts as equal (1e-6).
_SURELY_WORSE = 1e-5


def prune(candidates: Sequence[Candidate], workload: Workload) -> list[Candidate]:
    """Return the candidates without those that another of their shape and pool beats in all.

    What another equals in what the objective counts, in how far it breaks each limit and, under a
    concurrency, in batch, can never be needed: a few of a hundred columns are left.
    """
    by_home: dict[tuple[object, ...], list[Candidate]] = {}
    for candidate in candidates:
        if "rate" in candidate.broken or (
            workload.objective in ("cost", "energy") and len(candidate.pool.replicas) > 1
        ):
            continue  # a ratio is never better over two kinds of GPU than over the better one
        shape, placements = candidate.shape, candidate.pool.replicas
        home = (
            *(*shape.degrees, candidate.replicas),
            *((group.count, group.spread, *map(id, group.stages)) for group in placements),
            candidate.batch_size if workload.concurrency is not None else None,
        )
        by_home.setdefault(home, []).append(candidate)
    kept: list[Candidate] = []
    for members in by_home.values():
        # Shortest requests first: of two that are equal in all that counts, the first one stays.
        members.sort(key=lambda member: member.request_s(workload.output_tokens))
        front: list[tuple[tuple[float, ...], Candidate]] = []
        for member in members:
            merits = _merits(member, workload)
            if any(_covers(other, merits) for other, _ in front):
                continue
            front = [entry for entry in front if not _covers(merits, entry[0])]
            front.append((merits, member))
        kept += [member for _, member in front]
    return kept


def _merits(candidate: Candidate, workload: Workload) -> tuple[float, ...]:
    """Return what counts in the program, each with more being worse."""
    merits = [-state.requests_per_s for state in candidate.serving]
    # Inside a limit it does not matter how far.
    merits += [max(1.0, part) for part in limit_shares(candidate, workload)]
    if workload.objective == "latency":
        merits.append(candidate.request_s(workload.output_tokens))
    return tuple(merits)


def limit_shares(candidate: Candidate, workload: Workload) -> list[float]:
    """Return memory, TTFT and TPOT as shares of what may be; those without a limit are left out."""
    shares = [candidate.memory_bytes / candidate.budget_bytes]
    if workload.ttft_limit_s is not None:
        shares.append(candidate.ttft_s / workload.ttft_limit_s)
    if workload.tpot_limit_s is not None:
        shares.append(candidate.tpot_s / workload.tpot_limit_s)
    return shares


def _covers(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True))


def contenders(
    candidates: Sequence[Candidate], workload: Workload, replicas: int | None = None
) -> list[Candidate]:
    """Return the candidates without those that are surely worse than one that keeps every limit.

    Those that would be better if a limit were wider stay: to refuse them is for the program.

    Args:
        candidates: Columns.
        workload: Objective, limits and load.
        replicas: Number of replicas, if pinned.
    """
    values = [best_value(candidate, workload, replicas) for candidate in candidates]
    sign = -1.0 if workload.objective == "latency" else 1.0
    sure = [
        sign * value
        for candidate, value in zip(candidates, values, strict=True)
        if value is not None and max(limit_shares(candidate, workload)) <= 1
    ]
    if not sure:
        return list(candidates)
    least = max(sure) - _SURELY_WORSE * abs(max(sure))
    return [
        candidate
        for candidate, value in zip(candidates, values, strict=True)
        if value is not None and sign * value >= least
    ]


def best_value(
    candidate: Candidate, workload: Workload, replicas: int | None = None
) -> float | None:
    """Return the objective of the best number of replicas; None where none can serve the load.

    The program's own rows for one column, limits left aside: more replicas are never worse, so that
    as many as may be are taken, fastest first.
    """
    in_flight, batch = workload.concurrency, candidate.batch_size
    fewest, most = 1, candidate.max_replicas
    if in_flight is not None:
        if replicas is None:
            most = min(most, in_flight if batch == 1 else (in_flight - 1) // (batch - 1))
        if workload.objective == "latency":
            fewest = -(-in_flight // batch)
    fixed = replicas or candidate.replicas
    if fixed is not None:
        fewest, most = max(fewest, fixed), min(most, fixed)
    if fewest > most:
        return None
    if workload.objective == "latency":
        return candidate.request_s(workload.output_tokens)
    if workload.objective in ("cost", "energy"):
        return ratio_of(candidate, 0, workload)
    rooms = zip(candidate.serving, candidate.pool.replicas, strict=True)
    served, left = 0.0, most
    for rate, room in sorted(((state.requests_per_s, group.count) for state, group in rooms))[::-1]:
        served += rate * min(left, room)
        left -= min(left, room)
    if in_flight is not None:
        fastest = max(state.requests_per_s for state in candidate.serving)
        served = min(served, in_flight / batch * fastest)
    return served * workload.output_tokens
