"""A shape in a pool, with those of its stages that cost alike looked at once.

A search asks for the costs of the same stages at every batch and chunk: what does not depend on
them is found here, once for each pool.
"""

from dataclasses import dataclass

from rankwright.cost_model.layout import SlotKind
from rankwright.cost_model.predict import StageModels
from rankwright.cost_model.stage import StageModel
from rankwright.planner.memory_table import MemoryTable
from rankwright.planner.pools import Pool
from rankwright.planner.shapes import Shape
from rankwright.planner.unlike_slots import Rank, UnlikeSlots
from rankwright.topology.cluster import Gpu


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of one shape in one pool: the slowest of its models and the smallest GPU count.

    Args:
        index: Which stage; of several that are alike, the first.
        models: One of each kind of slot that it may be on.
        model_ids: What tells these models from others.
        gpu: The one of which least may be used.
        budget_bytes: What may be used of it.
        ranks: Those that count where GPUs of one slot are of several kinds; see `UnlikeSlots`.
    """

    index: int
    models: tuple[StageModel, ...]
    model_ids: tuple[int, ...]
    gpu: Gpu
    budget_bytes: int
    ranks: tuple[Rank, ...]


@dataclass(frozen=True, slots=True)
class Home:
    """A shape in a pool.

    Args:
        shape: How the model is cut.
        stages: Those that differ: the first, the last, and those on other kinds of slot.
        of_stage: Which of `stages` each stage is.
        kinds: What tells its slots from those of other pools.
    """

    shape: Shape
    stages: tuple[Stage, ...]
    of_stage: tuple[int, ...]
    kinds: tuple[int, ...]


def find_home(
    shape: Shape, pool: Pool, models: StageModels, memory: MemoryTable, unlike: UnlikeSlots
) -> Home:
    """Return the stages of `shape` in `pool`.

    Args:
        shape: How the model is cut.
        pool: Where.
        models: Makes the models of stages.
        memory: Knows what may be used of a GPU.
        unlike: Knows which ranks count on unlike GPUs.
    """
    alike: dict[tuple[object, ...], int] = {}
    stages: list[Stage] = []
    of_stage: list[int] = []
    for index in range(shape.pp):
        kinds = {id(group.stages[index]): group.stages[index] for group in pool.replicas}
        key = (index == 0, index == shape.pp - 1, *kinds)
        if key not in alike:
            alike[key] = len(stages)
            stages.append(_find_stage(shape, index, tuple(kinds.values()), models, memory, unlike))
        of_stage.append(alike[key])
    slots = tuple(id(kind) for group in pool.replicas for kind in group.stages)
    return Home(shape, tuple(stages), tuple(of_stage), slots)


def _find_stage(
    shape: Shape,
    index: int,
    kinds: tuple[SlotKind, ...],
    models: StageModels,
    memory: MemoryTable,
    unlike: UnlikeSlots,
) -> Stage:
    found = tuple(
        models.stage(kind, shape.ep, shape.attention, shape.cp, shape.cp_exchange) for kind in kinds
    )
    gpu = min((kind.gpu for kind in kinds), key=memory.budget_bytes)
    ranks = tuple(unlike.ranks_of(shape, kinds))
    return Stage(index, found, tuple(map(id, found)), gpu, memory.budget_bytes(gpu), ranks)
