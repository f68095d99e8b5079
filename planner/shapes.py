"""Every way to cut one replica, and why the others are not legal."""

from collections.abc import Iterator
from dataclasses import dataclass

from rankwright.cost_model.layout import SlotKind, find_slots
from rankwright.cost_model.model_spec import ModelSpec
from rankwright.cost_model.predict import ep_is_legal
from rankwright.cost_model.shards import tp_is_legal
from rankwright.topology.cluster import Cluster

# Wider groups only pay on machines with more than 64 GPUs behind one switch (NVL72), which the
# device table has no row for as one machine.
MAX_TP = 64
# More stages than this never won where fewer fit: a stage more saves weights that are already a
# small part, and costs a hand-over a token. Deeper ones are tried when nothing shallower fits.
USUAL_PP = 16


@dataclass(frozen=True, slots=True)
class Pins:
    """Degrees that the user has fixed; None leaves one to the planner."""

    tp: int | None = None
    pp: int | None = None
    ep: int | None = None
    dp: int | None = None
    cp: int | None = None

    def __post_init__(self) -> None:
        """Refuse degrees that no plan can have."""
        for name in ("tp", "pp", "ep", "dp", "cp"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} is pinned: expected 1 or more")
        if self.cp is not None and self.cp > 1:
            raise ValueError(
                f"cp={self.cp} is pinned: context parallelism is not supported yet; use cp=1"
            )

    def describe(self) -> str:
        """Return what is pinned, such as `tp=8 pp=2`; empty when nothing is."""
        pairs = {name: getattr(self, name) for name in ("tp", "pp", "ep", "dp", "cp")}
        return " ".join(f"{name}={value}" for name, value in pairs.items() if value is not None)


@dataclass(frozen=True, slots=True)
class Shape:
    """A legal cut of one replica, and the slots that its stages can be on."""

    tp: int
    pp: int
    ep: int
    kinds: tuple[SlotKind, ...]

    @property
    def num_gpus(self) -> int:
        """GPUs of one replica."""
        return self.tp * self.pp

    def label(self) -> str:
        """Return the shape as in tables, such as `TP8 PP2`."""
        parts = {"TP": self.tp, "PP": self.pp, "EP": self.ep}
        return " ".join(f"{name}{size}" for name, size in parts.items() if size > 1) or "TP1"


@dataclass(frozen=True, slots=True)
class Illegal:
    """A cut that cannot be, and why."""

    label: str
    reason: str


@dataclass(frozen=True, slots=True)
class Shapes:
    """All shapes of one model on one cluster."""

    legal: tuple[Shape, ...]
    illegal: tuple[Illegal, ...]


def find_shapes(
    model: ModelSpec,
    cluster: Cluster,
    *,
    pins: Pins | None = None,
    allow_pipeline: bool = True,
    max_pp: int = USUAL_PP,
) -> Shapes:
    """Return every legal (tp, pp, ep) of one replica, and the others with their reasons.

    Args:
        model: What is cut.
        cluster: Where its ranks must fit.
        pins: Degrees to keep.
        allow_pipeline: Whether a replica may have several stages.
        max_pp: Stages at most; a pinned `pp` goes beyond.
    """
    pins = pins or Pins()
    legal: list[Shape] = []
    illegal: list[Illegal] = []
    widest = min(MAX_TP, cluster.num_gpus)
    for tp in [pins.tp] if pins.tp else range(1, widest + 1):
        reason = tp_is_legal(model, tp)
        kinds = find_slots(cluster, tp) if reason is None else ()
        if reason is None and not kinds:
            reason = _no_slot(cluster, tp)
        if reason is not None:
            illegal.append(Illegal(f"TP{tp}", reason))
            continue
        for pp, pp_reason in _stages(model, kinds, pins, allow_pipeline, max_pp):
            if pp_reason is not None:
                illegal.append(Illegal(f"TP{tp} PP{pp}", pp_reason))
                continue
            for ep in _expert_groups(model, tp, pins):
                ep_reason = ep_is_legal(model, tp, ep)
                if ep_reason is None:
                    legal.append(Shape(tp, pp, ep, kinds))
                else:
                    illegal.append(Illegal(f"TP{tp} PP{pp} EP{ep}", ep_reason))
    return Shapes(tuple(legal), tuple(illegal))


def _stages(
    model: ModelSpec,
    kinds: tuple[SlotKind, ...],
    pins: Pins,
    allow_pipeline: bool,
    max_pp: int,
) -> Iterator[tuple[int, str | None]]:
    slots = sum(kind.count for kind in kinds)
    tp = kinds[0].group.size
    if pins.pp is not None:
        choices = [pins.pp]
    else:
        deepest = min(slots, model.num_layers, max_pp)
        choices = list(range(1, deepest + 1)) if allow_pipeline else [1]
        # Beyond eight stages, only those that leave no GPU over or cut the layers evenly.
        choices = [pp for pp in choices if pp <= 8 or slots % pp == 0 or model.num_layers % pp == 0]
    for pp in choices:
        if pp > 1 and not allow_pipeline:
            yield pp, "pipeline parallelism is not allowed"
        elif pp > model.num_layers:
            yield pp, f"{model.num_layers} layers do not fill {pp} stages"
        elif pp > slots:
            yield pp, f"{pp} stages of {tp} GPUs need {pp} groups, the cluster has {slots}"
        else:
            yield pp, None


def _expert_groups(model: ModelSpec, tp: int, pins: Pins) -> list[int]:
    if pins.ep is not None:
        return [pins.ep]
    if all(run.layer.feed_forward.kind == "dense" for run in model.layer_runs):
        return [1]
    return [ep for ep in range(1, tp + 1) if tp % ep == 0]


def _no_slot(cluster: Cluster, tp: int) -> str:
    sizes = sorted({len(node.gpus) for node in cluster.nodes})
    if tp > cluster.num_gpus:
        return f"tp={tp} needs {tp} GPUs, the cluster has {cluster.num_gpus}"
    return f"tp={tp} is no multiple of a machine's GPUs ({', '.join(map(str, sizes))})"
