"""One search: shapes, their candidates, and the program over them.

Kept apart from `make_plan` so that the same search can be run again with one thing changed: that is
how a binding constraint is shown to bind, and how a suggested change is shown to help.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby

from rankwright.cost_model.model_spec import ModelSpec
from rankwright.cost_model.workload import Workload
from rankwright.planner.candidate import Candidate
from rankwright.planner.candidates import Evaluator
from rankwright.planner.ilp import Choice, choose
from rankwright.planner.prune import prune
from rankwright.planner.shapes import Illegal, Pins, Shape, Shapes, find_shapes
from rankwright.planner.solver import TIME_LIMIT_S
from rankwright.topology.cluster import Cluster


@dataclass(frozen=True)
class Search:
    """Everything that a plan depends on, and what was found.

    Args:
        model: What runs.
        cluster: Where.
        workload: What is asked.
        memory_budget_bytes: Bytes of each GPU that may be used; None: what is free.
        pins: Degrees to keep.
        allow_pipeline: Whether a replica may have several stages.
        engine: Whose efficiency constants to use.
        time_limit_s: Of each solve.
        every_level: Whether to look at small batches too where only large ones can be best.
        num_sharing: Unlike replicas, at most, that the requests in flight may be shared by.
        stored: `model` as its checkpoint has it, where the engine holds wider weights.
    """

    model: ModelSpec
    cluster: Cluster
    workload: Workload
    memory_budget_bytes: int | None = None
    pins: Pins = field(default_factory=Pins)
    allow_pipeline: bool = True
    engine: str = "rankwright"
    every_level: bool = False
    num_sharing: int = 1
    time_limit_s: float = TIME_LIMIT_S
    stored: ModelSpec | None = None

    @cached_property
    def evaluator(self) -> Evaluator:
        """Prices candidates."""
        return Evaluator(
            self.model,
            self.cluster,
            self.workload,
            memory_budget_bytes=self.memory_budget_bytes,
            pins=self.pins,
            engine=self.engine,
            every_level=self.every_level,
            num_sharing=self.num_sharing,
        )

    @cached_property
    def shapes(self) -> Shapes:
        """Legal and illegal shapes; deep pipelines only where no shallow one fits in memory."""
        usual = self._find_shapes(None)
        if self.pins.pp is None and not any(self._fits(shape) for shape in usual.legal):
            return self._find_shapes(self.model.num_layers)
        return usual

    @cached_property
    def candidates(self) -> list[Candidate]:
        """Every shape at every batch level."""
        found: list[Candidate] = []
        # Shapes come by the GPUs of a stage, and those of other widths share no times: dropping
        # them halves the memory that a search over racks takes.
        for _, shapes in groupby(self.shapes.legal, lambda shape: (shape.tp, shape.cp)):
            for shape in shapes:
                found += self.evaluator.candidates(shape)
            self.evaluator.forget()
        return found

    @cached_property
    def _columns(self) -> list[Candidate]:
        """The candidates that none of their shape beats in all, whichever shapes are left out."""
        return prune(self.candidates, self.workload)

    @property
    def illegal(self) -> tuple[Illegal, ...]:
        """Shapes that the model or the cluster forbids."""
        return self.shapes.illegal

    def best(
        self,
        without: frozenset[str] = frozenset(),
        *,
        barred: frozenset[tuple[object, ...]] = frozenset(),
        settle: bool = True,
    ) -> Choice | None:
        """Return the best choice; None when nothing fits.

        Args:
            without: Labels of shapes to leave out.
            barred: Identities of candidates to leave out.
            settle: Whether to choose well among equals.
        """
        allowed = [
            candidate
            for candidate in (self.candidates if barred else self._columns)
            if candidate.shape.label() not in without and candidate.identity not in barred
        ]
        return choose(
            allowed,
            self.workload,
            # One too many is as illegal as any number more, and no number for a solver.
            self.pins.dp and min(self.pins.dp, self.cluster.num_gpus + 1),
            settle=settle,
            time_limit_s=self.time_limit_s,
        )

    def changed(self, **changes: object) -> "Search":
        """Return the same search with other inputs."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def _find_shapes(self, max_pp: int | None) -> Shapes:
        options = {} if max_pp is None else {"max_pp": max_pp}
        return find_shapes(
            self.model,
            self.cluster,
            pins=self.pins,
            allow_pipeline=self.allow_pipeline,
            engine=self.engine,
            request_tokens=self.workload.input_tokens + self.workload.output_tokens,
            **options,
        )

    def _fits(self, shape: Shape) -> bool:
        """Return whether one request fits with even stages; no proof, only a reason to look deeper.

        What does not fit so may still fit with uneven stages; then it is found all the same.
        """
        table = self.evaluator.memory
        gpu = max((kind.gpu for kind in shape.kinds), key=table.budget_bytes)
        weights, kv = table.layer_bytes(shape)
        fixed = table.extra_bytes(shape, shape.pp - 1, 1, 512, gpu)
        layers = (sum(weights) + self.evaluator.kv_tokens(shape, 1) * sum(kv)) / shape.pp
        return layers + fixed <= table.budget_bytes(gpu)
