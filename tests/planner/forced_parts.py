"""Plans of parts whose shapes a test asks for."""

from collections.abc import Sequence

from rankwright.cost_model.model_spec import ModelSpec
from rankwright.cost_model.workload import Workload
from rankwright.planner.bind_parts import bind_parts
from rankwright.planner.make_plan import plan_of_search
from rankwright.planner.part_columns import find_columns
from rankwright.planner.part_program import PartsChoice
from rankwright.planner.parts_plan import PartsPlan
from rankwright.planner.search import Search
from rankwright.planner.solver import Ending
from rankwright.planner.twins import Twins
from rankwright.topology.cluster import Cluster


def forced_parts(
    model: ModelSpec, cluster: Cluster, load: Workload, shapes: Sequence[tuple[str, int]]
) -> PartsPlan:
    """Return a plan with so many replicas of each of `shapes`, such as `("TP2", 1)`.

    Each runs at the largest of its batches with which the requests in flight are not exceeded.
    """
    search = Search(model, cluster, load)
    twins = Twins(cluster.nodes[0])
    found = find_columns(search, twins)
    left = (load.concurrency or 10**6) // sum(count for _, count in shapes)
    columns = tuple(
        max(
            (
                one
                for one in found.best
                if one.candidate.shape.label() == label and one.candidate.batch_size <= left
            ),
            key=lambda one: one.candidate.batch_size,
        )
        for label, _ in shapes
    )
    counts = tuple(count for _, count in shapes)
    rates = [one.requests_per_s * load.output_tokens for one in columns]
    value = sum(rate * count for rate, count in zip(rates, counts, strict=True))
    ending = Ending("optimal", value, value, "asked for", 0.0)
    choice = PartsChoice(columns, counts, ending)
    return bind_parts(search, twins, found, choice, plan_of_search(search, top=1))
