"""What the GPUs can give: tokens/s of a GPU against tokens/s of a user, where neither can gain.

More requests at once share each reading of the weights, so that a GPU makes more tokens and every
user waits longer for the next one. The front over all splits and batches shows what a limit costs.
"""

from collections.abc import Iterable

from rankwright.planner.candidate import Candidate
from rankwright.planner.plan import ParetoPoint
from rankwright.planner.search import Search


def find_front(search: Search) -> tuple[ParetoPoint, ...]:
    """Return the front of `search`, from the fastest for a user to the cheapest for a GPU.

    Every batch is looked at: concurrency, request rate and the TPOT limit of the workload are left
    aside. Memory, pins and the TTFT limit hold.
    """
    every = {"concurrency": None, "request_rate": None, "tpot_limit_s": None}
    workload = search.workload.model_copy(update={**every, "objective": "throughput"})
    wide = search.changed(workload=workload, every_level=True)
    return front_of(
        point
        for candidate in wide.candidates
        if not candidate.broken
        and len(candidate.pool.replicas) == 1
        # Where prompts wait for room in the steps, fewer requests are really running.
        and candidate.serving[0].flow.waiting < 1
        for point in [_point(candidate, workload.output_tokens)]
    )


def front_of(points: Iterable[ParetoPoint]) -> tuple[ParetoPoint, ...]:
    """Return the points that no other beats: none is as good in both figures and better in one.

    Of equal ones, the first.
    """
    ordered = sorted(
        points, key=lambda one: (-one.tokens_per_s_per_user, -one.tokens_per_s_per_gpu)
    )
    front: list[ParetoPoint] = []
    for point in ordered:
        if not front or point.tokens_per_s_per_gpu > front[-1].tokens_per_s_per_gpu:
            front.append(point)
    return tuple(front)


def _point(candidate: Candidate, output_tokens: int) -> ParetoPoint:
    rate = candidate.serving[0].requests_per_s * output_tokens
    return ParetoPoint(
        label=candidate.shape.label(),
        num_gpus=candidate.shape.num_gpus,
        batch_size=candidate.batch_size,
        tokens_per_s_per_gpu=rate / candidate.shape.num_gpus,
        tokens_per_s_per_user=1 / candidate.tpot_s,
        ttft_s=candidate.ttft_s,
    )
