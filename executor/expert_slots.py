"""Wide expert parallelism: which expert is in which slot, and moving them while serving.

Every rank of an EP group has a fixed number of slots in each MoE layer; a hot expert is in several,
and tokens take turns over them. The router counts how often each expert is chosen. Every so many
steps the counts of the interval before, placed anew by the planner's integer program in a thread of
its own, become moves: weights go from rank to rank between two steps, and the table that the
routing kernel reads changes with them. What a token computes does not change, only where.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from rankwright.executor.mesh import Mesh
from rankwright.kernels.moe_routing import SlotTable
from rankwright.planner.experts import peak_load, place_experts

Slots = tuple[tuple[int, ...], ...]  # experts in the slots of each rank
Matrices = tuple[torch.Tensor, ...]  # each [slots, ...]

# A new placement is worth its moves when the busiest rank has so much less to do.
_WORTH = 0.97
# Of the integer program, for each layer; it runs beside the steps.
_SOLVE_S = 1.0
_REMEMBERED = 256  # intervals


class LayerSlots:
    """The slots of one MoE layer, as the routing kernel reads them.

    Attributes:
        slots: Experts in the slots of each rank of the EP group.
        table: The same by expert, on the device; its tensors stay where they are.
        load_E: int64 counts of how often each expert was chosen.
    """

    def __init__(self, slots: Slots, num_experts: int, device: torch.device) -> None:
        most = sum(map(len, slots)) - num_experts + 1  # replicas, all others having one
        self.slots = slots
        self.table = SlotTable(
            torch.zeros(num_experts, most, dtype=torch.int32, device=device),
            torch.ones(num_experts, dtype=torch.int32, device=device),
        )
        self.load_E = torch.zeros(num_experts, dtype=torch.int64, device=device)
        self.set(slots)

    def set(self, slots: Slots) -> None:
        """Make `slots` what the routing kernel reads from its next run on."""
        num_experts, most = self.table.slots.shape
        places: list[list[int]] = [[] for _ in range(num_experts)]
        for number, expert in enumerate(expert for rank in slots for expert in rank):
            places[expert].append(number)
        rows = [where + [0] * (most - len(where)) for where in places]
        self.table.slots.copy_(torch.tensor(rows, dtype=torch.int32))
        self.table.replicas.copy_(torch.tensor([len(p) for p in places], dtype=torch.int32))
        self.slots = slots


def imbalance(loads: Sequence[float], slots: Slots) -> float:
    """Return the load of the busiest rank over the mean.

    >>> imbalance([3, 1], ((0,), (1,)))
    1.5
    """
    total = sum(loads)
    return peak_load(loads, slots) * len(slots) / total if total else 1.0


def keep_in_place(old: Slots, new: Slots) -> Slots:
    """Return `new` with ranks and slots ordered so that few experts move.

    >>> keep_in_place(((0, 1), (2, 3)), ((3, 2), (1, 4)))
    ((4, 1), (2, 3))
    """
    left = list(new)
    out: list[tuple[int, ...]] = []
    for held in old:
        best = max(left, key=lambda rank: len(set(rank) & set(held)))
        left.remove(best)
        coming = list(best)
        slots: list[int | None] = []
        for expert in held:
            slots.append(expert if expert in coming else None)
            if expert in coming:
                coming.remove(expert)
        out.append(tuple(coming.pop(0) if slot is None else slot for slot in slots))
    return tuple(out)


def move_experts(mesh: Mesh, matrices: Matrices, old: Slots, new: Slots) -> None:
    """Move the weights of one layer from the slots in `old` to those in `new`.

    All ranks of the EP group must call this together. What arrives waits beside the slots until all
    has been sent, as a slot may be read and written.
    """
    me = mesh.ep.ranks.index(mesh.place.rank)
    operations: list[dist.P2POp] = []
    arrived: list[tuple[int, Matrices]] = []
    holders = {
        expert: [rank for rank, held in enumerate(old) if expert in held]
        for rank_slots in new
        for expert in rank_slots
    }
    turn = 0
    for rank, (before, after) in enumerate(zip(old, new, strict=True)):
        for slot, (was, expert) in enumerate(zip(before, after, strict=True)):
            if was == expert:
                continue
            turn += 1
            local = rank in holders[expert]
            source = rank if local else holders[expert][turn % len(holders[expert])]
            if me not in (rank, source):
                continue
            here = old[source].index(expert)
            if local:
                arrived.append((slot, tuple(matrix[here].clone() for matrix in matrices)))
            elif me == source:
                operations += [
                    dist.P2POp(dist.isend, matrix[here], mesh.ep.ranks[rank], mesh.ep.process_group)
                    for matrix in matrices
                ]
            else:
                room = tuple(torch.empty_like(matrix[slot]) for matrix in matrices)
                arrived.append((slot, room))
                operations += [
                    dist.P2POp(dist.irecv, part, mesh.ep.ranks[source], mesh.ep.process_group)
                    for part in room
                ]
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
    for slot, parts in arrived:
        for matrix, part in zip(matrices, parts, strict=True):
            matrix[slot] = part


def all_loads(mesh: Mesh, loads: Sequence[torch.Tensor]) -> list[list[int]]:
    """Return what all ranks of the stage counted: equal numbers, or with attention DP each its own.

    All of them must call this together.
    """
    if loads and mesh.attention_ranks > 1:
        counted = torch.cat(list(loads))
        dist.all_reduce(counted, group=mesh.tp.process_group)
        return [load.tolist() for load in counted.split([len(load) for load in loads])]
    return [load.tolist() for load in loads]


class Rebalancer:
    """Counts, places and moves the experts of one stage.

    Attributes:
        totals: Of each MoE layer, how often each expert was chosen in the intervals that ended.
        imbalances: Of each interval that ended, for each MoE layer: the busiest rank's load over
            the mean, with the slots that were in force.
    """

    def __init__(
        self,
        mesh: Mesh,
        layers: Sequence[tuple[LayerSlots, Matrices]],
        *,
        every: int,
        place: Callable[..., Slots] = place_experts,
    ) -> None:
        """Rebalance `layers` every `every` steps; all ranks of the stage must do the same steps."""
        self._mesh = mesh
        self._layers = layers
        self._every = every
        self._place = place
        self._steps = 0
        self._thread: threading.Thread | None = None
        self._placed: list[Slots] | None = None
        self.totals = [[0] * len(slots.load_E) for slots, _ in layers]
        self.imbalances: deque[list[float]] = deque(maxlen=_REMEMBERED)

    def reset(self) -> None:
        """Forget what was counted, as after a warm-up."""
        if self._thread is not None:
            self._thread.join()
        self._thread = self._placed = None
        self._steps = 0
        self.imbalances.clear()
        for (slots, _), total in zip(self._layers, self.totals, strict=True):
            slots.load_E.zero_()
            total[:] = [0] * len(total)

    def step(self) -> None:
        """Note that a step is over; now and then move experts."""
        self._steps += 1
        if self._steps % self._every:
            return
        if self._steps > self._every:
            self._apply(self._agree())
        loads = all_loads(self._mesh, [slots.load_E for slots, _ in self._layers])
        for (slots, _), total, load in zip(self._layers, self.totals, loads, strict=True):
            slots.load_E.zero_()
            total[:] = map(sum, zip(total, load, strict=True))
        current = [slots.slots for slots, _ in self._layers]
        self.imbalances.append(
            [imbalance(load, held) for load, held in zip(loads, current, strict=True)]
        )
        if self._mesh.place.tp_rank == 0:
            self._thread = threading.Thread(target=self._solve, args=(loads, current), daemon=True)
            self._thread.start()

    def _solve(self, loads: list[list[int]], current: list[Slots]) -> None:
        """Place every layer anew; where that gains little, keep what is."""
        placed = []
        for load, held in zip(loads, current, strict=True):
            found = self._place(load, len(held), len(held[0]), time_limit_s=_SOLVE_S)
            gains = peak_load(load, found) < _WORTH * peak_load(load, held)
            placed.append(keep_in_place(held, found) if gains else held)
        self._placed = placed

    def _agree(self) -> list[Slots]:
        """Return what rank 0 placed, on every rank of the stage."""
        shape = (len(self._layers), *torch.tensor(self._layers[0][0].slots).shape)
        chosen = torch.zeros(shape, dtype=torch.int32)
        if self._thread is not None:
            self._thread.join()
            # A solver that failed leaves everything where it is.
            placed = self._placed or [slots.slots for slots, _ in self._layers]
            chosen = torch.tensor(placed, dtype=torch.int32)
            self._thread = self._placed = None
        chosen = chosen.to(self._mesh.device)
        dist.broadcast(chosen, self._mesh.tp.ranks[0], group=self._mesh.tp.process_group)
        return [tuple(tuple(rank) for rank in layer) for layer in chosen.tolist()]

    def _apply(self, placed: list[Slots]) -> None:
        for (slots, matrices), new in zip(self._layers, placed, strict=True):
            if new != slots.slots:
                move_experts(self._mesh, matrices, slots.slots, new)
                slots.set(new)
