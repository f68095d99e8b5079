"""What one replica does on every kind of set of GPUs: the columns of the program over parts.

A replica of a plan of parts takes a set of GPUs of the machine whole, and is cut over it as the
planner cuts a replica over a machine of just these GPUs. Sets that are alike (`twins.py`) are
priced once.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from rankwright.cost_model.workload import Workload
from rankwright.planner.candidate import Candidate
from rankwright.planner.search import Search
from rankwright.planner.twins import Counts, Gpus, Twins, part_of

# Equal shares of the requests in flight that batches are looked at for: halves, thirds, quarters.
MOST_SHARING = 4


@dataclass(frozen=True, slots=True)
class Column:
    """One replica on one kind of set of GPUs.

    Args:
        counts: GPUs of each class of twins that it takes.
        gpus: The set that `search` was made for, GPU by GPU where those of the kind stand.
        search: Of a machine of these GPUs alone.
        candidate: Its shape, batch, chunk and layers.
    """

    counts: Counts
    gpus: Gpus
    search: Search
    candidate: Candidate

    @property
    def num_gpus(self) -> int:
        """GPUs that one replica takes."""
        return len(self.gpus)

    @property
    def requests_per_s(self) -> float:
        """Requests/s of one replica that is kept busy."""
        return self.candidate.serving[0].requests_per_s


@dataclass(frozen=True, slots=True)
class Columns:
    """All columns of a problem, and what was looked at to find them.

    Args:
        best: Of each kind of set, what no other replica on it makes needless.
        num_candidates: Legal pairs of shape and batch.
        num_illegal: Cuts that the model forbids.
    """

    best: tuple[Column, ...]
    num_candidates: int
    num_illegal: int


def find_columns(search: Search, twins: Twins) -> Columns:
    """Return the columns of `search`, which is of the one machine that `twins` are of."""
    priced: dict[tuple[object, ...], tuple[Gpus, Search, list[Candidate]]] = {}
    found: list[Column] = []
    candidates, illegal = 0, set[str]()
    for counts in twins.kinds():
        gpus = twins.first(counts)
        alike = twins.signature(gpus)
        if alike not in priced:
            alone = search.changed(cluster=part_of(search.cluster, gpus), num_sharing=MOST_SHARING)
            able = list(whole_replicas(alone))
            candidates += len(able)
            illegal |= {one.label for one in alone.illegal}
            priced[alike] = gpus, alone, front(able, search.workload)
        prototype, alone, best = priced[alike]
        found += [Column(counts, prototype, alone, candidate) for candidate in best]
    return Columns(tuple(found), candidates, len(illegal))


def whole_replicas(search: Search) -> Iterator[Candidate]:
    """Yield the replicas that take every GPU of the search's cluster, limits left aside."""
    for shape in search.shapes.legal:
        if shape.num_gpus == search.cluster.num_gpus:
            yield from search.evaluator.candidates(shape)


def front(candidates: list[Candidate], workload: Workload) -> list[Candidate]:
    """Return those that keep every limit and that no other beats in requests/s and in batch.

    Where nothing limits the requests in flight a larger batch costs nothing, so that one is left.
    """
    able = [candidate for candidate in candidates if not candidate.broken]
    # Of equal ones the one with the shortest request.
    able.sort(
        key=lambda one: (-one.serving[0].requests_per_s, one.request_s(workload.output_tokens))
    )
    if workload.concurrency is None:
        return able[:1]
    kept: list[Candidate] = []
    for candidate in able:
        if not kept or candidate.batch_size < kept[-1].batch_size:
            kept.append(candidate)
    return kept
