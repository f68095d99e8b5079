"""Times the way between machines: every machine with every other, some pairs at a time."""

from collections.abc import Callable, Iterator

from rankwright.executor.measure_pairs import message_rate, ping_pong_s
from rankwright.executor.measure_ranks import Ranks
from rankwright.topology.measurements import NodePairRate

_MIB = 2**20
_MESSAGE_BYTES = {"cuda": 64 * _MIB, "cpu": 4 * _MIB}
# Each round pairs every machine with another one. Fifteen find a slow port or cable, which all
# partners of its machine feel, and cost seconds where all rounds of 1,024 machines cost minutes.
_MAX_ROUNDS = 15

# One figure that one rank has: machines, what, value.
_Part = tuple[int, int, str, float]


def time_network(ranks: Ranks, say: Callable[[str], None]) -> list[NodePairRate]:
    """Return how fast messages go between machines, the rows on rank 0.

    The pairs of a round are timed at the same time, as they would talk in a plan's steps.
    """
    if ranks.num_nodes == 1:
        return []
    parts: list[_Part] = []
    for number, round_ in enumerate(rounds_of(ranks.num_nodes)):
        if number == _MAX_ROUNDS:
            break
        say(f"messages between machines, round {number + 1}")
        pair = next((pair for pair in round_ if ranks.node in pair), None)
        parts += _of_pair(ranks, pair)
    made: dict[tuple[int, int], dict[str, float]] = {}
    for a, b, what, value in ranks.all_of(parts):
        row = made.setdefault((a, b), {})
        row[what] = row.get(what, 0.0) + value  # the rates of several ranks add up
    return [NodePairRate(a=a, b=b, **row) for (a, b), row in sorted(made.items())]


def rounds_of(count: int) -> Iterator[list[tuple[int, int]]]:
    """Yield disjoint pairs of `count` machines, all pairs in all (the circle method).

    >>> list(rounds_of(4))
    [[(0, 3), (1, 2)], [(0, 2), (1, 3)], [(0, 1), (2, 3)]]
    """
    others = list(range(1, count + count % 2))  # the last stands for a pause if they are odd
    for _ in others:
        line = [0, *others]
        pairs = [(line[at], line[-1 - at]) for at in range(len(line) // 2)]
        yield sorted((min(pair), max(pair)) for pair in pairs if max(pair) < count)
        others = [others[-1], *others[:-1]]


def _of_pair(ranks: Ranks, pair: tuple[int, int] | None) -> list[_Part]:
    """Return what this rank knows of its pair; ranks without one wait with the others."""
    lanes = [] if pair is None else list(zip(*map(ranks.of_node, pair), strict=False))
    lane = next((lane for lane in lanes if ranks.rank in lane), None)
    first = lane is not None and lane == lanes[0]
    size = _MESSAGE_BYTES[ranks.device.type]
    steps: list[tuple[str, bool, Callable[[int, int], float]]] = [
        ("latency_s", True, lambda a, b: ping_pong_s(ranks, a, b)),
        ("single_bytes_per_s", True, lambda a, b: message_rate(ranks, a, b, size, 2)),
        ("forth_bytes_per_s", False, lambda a, b: message_rate(ranks, a, b, size, 2)),
        ("back_bytes_per_s", False, lambda a, b: message_rate(ranks, b, a, size, 2)),
    ]
    parts: list[_Part] = []
    for what, alone, timed in steps:
        ranks.wait_all()
        if lane is None or (alone and not first):
            continue
        value = timed(*lane)
        if ranks.rank == lane[0]:
            assert pair is not None
            parts.append((*pair, what, value))
    ranks.wait_all()
    return parts
