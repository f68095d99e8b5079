"""Every way to cut one replica, and why the others are not legal."""

from collections.abc import Iterator
from dataclasses import dataclass

from rankwright.cost_model.layout import SlotKind, find_slots
from rankwright.cost_model.legality import FORMS, cut_is_legal, has_experts, stages_are_legal
from rankwright.cost_model.model_spec import ModelSpec
from rankwright.cost_model.split import AttentionSplit, CpExchange
from rankwright.topology.cluster import Cluster
from rankwright.topology.graph import islands_of_node

# The widest group of one switch: NVL72's.
MAX_TP = 72
# GPUs up to which every width is searched, those that leave GPUs of a machine idle included.
_SMALL_CLUSTER = 16
# A context group reads all weights on each of its ranks, for a part of the tokens. Below this many
# tokens a request, those reads outweigh the attention that is shared.
LONG_REQUEST_TOKENS = 8192
# More stages than this never won where fewer fit: a stage more saves weights that are already a
# small part, and costs a hand-over a token. Deeper ones are tried when nothing shallower fits.
USUAL_PP = 16
_DEGREES = ("tp", "pp", "ep", "dp", "cp")


@dataclass(frozen=True, slots=True)
class Pins:
    """What the user has fixed; None leaves it to the planner."""

    tp: int | None = None
    pp: int | None = None
    ep: int | None = None
    dp: int | None = None
    cp: int | None = None
    attention: AttentionSplit | None = None
    cp_exchange: CpExchange | None = None

    def __post_init__(self) -> None:
        """Refuse degrees that no plan can have."""
        for name in _DEGREES:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} is pinned: expected 1 or more")
        if self.cp == 1 and self.cp_exchange == "ring":
            raise ValueError("cp_exchange=ring and cp=1 are pinned: a ring takes cp=2 or more")

    def describe(self) -> str:
        """Return what is pinned, such as `tp=8 pp=2`; empty when nothing is."""
        pairs = {name: getattr(self, name) for name in (*_DEGREES, "attention", "cp_exchange")}
        return " ".join(f"{name}={value}" for name, value in pairs.items() if value is not None)


@dataclass(frozen=True, slots=True)
class Shape:
    """A legal cut of one replica, and the slots that its stages can be on."""

    tp: int
    pp: int
    ep: int
    kinds: tuple[SlotKind, ...]
    cp: int = 1
    attention: AttentionSplit = "tp"
    cp_exchange: CpExchange = "gather"

    @property
    def degrees(self) -> tuple[int | str, ...]:
        """All but the slots: what tells shapes apart."""
        return self.tp, self.pp, self.ep, self.cp, self.attention, self.cp_exchange

    @property
    def gpus_per_stage(self) -> int:
        """GPUs of one stage."""
        return self.tp * self.cp

    @property
    def num_gpus(self) -> int:
        """GPUs of one replica."""
        return self.gpus_per_stage * self.pp

    def label(self) -> str:
        """Return the shape as in tables, such as `TP8 PP2`."""
        text = _label(self.tp, self.pp, self.ep, self.cp, self.attention) or "TP1"
        return f"{text} ring" if self.cp_exchange == "ring" else text


def _label(tp: int, pp: int = 1, ep: int = 1, cp: int = 1, attention: AttentionSplit = "tp") -> str:
    parts = {"TP": tp, "PP": pp, "EP": ep, "CP": cp}
    words = [f"{name}{size}" for name, size in parts.items() if size > 1]
    return " ".join([*words, *(["attnDP"] if attention == "dp" else [])])


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
    engine: str = "rankwright",
    request_tokens: int | None = None,
) -> Shapes:
    """Return every legal cut of one replica, and the others with their reasons.

    Args:
        model: What is cut.
        cluster: Where its ranks must fit.
        pins: Degrees to keep.
        allow_pipeline: Whether a replica may have several stages.
        max_pp: Stages at most; a pinned `pp` goes beyond.
        engine: What runs it; see `cost_model/legality.py`.
        request_tokens: Of a prompt and its answer; contexts of short ones are not cut. None: any.
    """
    pins = pins or Pins()
    legal: list[Shape] = []
    illegal: list[Illegal] = []
    slots: dict[int, tuple[SlotKind, ...]] = {}
    widths = find_widths(cluster)
    is_short = request_tokens is not None and request_tokens < LONG_REQUEST_TOKENS
    on_cpus = all(gpu.device == "cpu" for node in cluster.nodes for gpu in node.gpus)
    is_cut = pins.cp_exchange == "ring" or (not is_short and _cuts_contexts(model, on_cpus, engine))
    exchanges = _exchanges(pins, on_cpus)
    for tp in [pins.tp] if pins.tp else widths:
        for cp in _context_groups(tp, widths, pins, is_cut=is_cut):
            gpus = tp * cp
            cuts: list[tuple[AttentionSplit, int]] = []
            for attention, ep in _cuts(model, tp, pins):
                label = _label(tp, 1, ep, cp, attention) or "TP1"
                reason = cut_is_legal(
                    model, tp=tp, ep=ep, cp=cp, attention=attention, engine=engine
                )
                if reason is None:
                    cuts.append((attention, ep))
                else:
                    illegal.append(Illegal(label, reason))
            if not cuts:
                continue
            if gpus not in slots:
                slots[gpus] = find_slots(cluster, gpus)
            kinds = slots[gpus]
            if not kinds:
                illegal.append(Illegal(_label(tp, cp=cp) or "TP1", _no_slot(cluster, tp, cp)))
                continue
            for pp, pp_reason in _stages(model, kinds, pins, allow_pipeline, max_pp):
                if pp_reason is not None:
                    illegal.append(Illegal(_label(tp, pp, cp=cp), pp_reason))
                    continue
                for attention, ep in cuts:
                    reason = stages_are_legal(pp, attention, engine)
                    if reason is not None:
                        illegal.append(Illegal(_label(tp, pp, ep, cp, attention), reason))
                        continue
                    legal += [
                        Shape(tp, pp, ep, kinds, cp, attention, cp_exchange)
                        for cp_exchange in exchanges[cp > 1]
                    ]
    return Shapes(tuple(legal), tuple(illegal))


def find_widths(cluster: Cluster) -> list[int]:
    """Return the numbers of GPUs that a stage may have.

    On a small cluster every number. On a large one those that fill machines or islands (divisors of
    their GPUs), powers of two, and whole machines, 2, 4, 8, ... or such as divide their number.
    """
    widest = min(MAX_TP, cluster.num_gpus)
    if cluster.num_gpus <= _SMALL_CLUSTER:
        return list(range(1, widest + 1))
    sizes = {len(node.gpus) for node in cluster.nodes}
    sizes |= {len(island) for node in cluster.nodes for island in islands_of_node(node)}
    counts = {node.count for node in cluster.nodes} | {cluster.num_nodes}
    widths = {2**power for power in range(widest.bit_length()) if 2**power <= max(sizes)}
    for size in sizes:
        widths |= {width for width in range(1, size + 1) if size % width == 0}
        for number in range(2, widest // size + 1):
            if number & (number - 1) == 0 or any(count % number == 0 for count in counts):
                widths.add(number * size)
    return sorted(width for width in widths if width <= widest)


def _cuts_contexts(model: ModelSpec, on_cpus: bool, engine: str) -> bool:
    """Return whether to look at cut contexts without being asked.

    Those of latent attention have been run on CPUs alone, so that on GPUs a pin must ask for them.
    """
    has_latents = any(run.layer.attention.kind == "mla" for run in model.layer_runs)
    return FORMS[engine].context_parallel and (on_cpus or not has_latents)


def _exchanges(pins: Pins, on_cpus: bool) -> tuple[tuple[CpExchange, ...], tuple[CpExchange, ...]]:
    """Return the ways of exchange to look at for a rank alone, and for those of a context group.

    The ring has been run on CPUs alone, so that on GPUs a pin must ask for it.
    """
    if pins.cp_exchange is not None:
        return (() if pins.cp_exchange == "ring" else ("gather",)), (pins.cp_exchange,)
    return ("gather",), ("gather", "ring") if on_cpus else ("gather",)


def _context_groups(tp: int, widths: list[int], pins: Pins, *, is_cut: bool) -> list[int]:
    """Return the context degrees to look at: powers of two, which is how contexts are cut."""
    if pins.cp is not None:
        return [pins.cp]
    if not is_cut:
        return [1]
    degrees = [2**power for power in range(MAX_TP.bit_length())]
    return [cp for cp in degrees if cp == 1 or tp * cp in widths]


def _cuts(model: ModelSpec, tp: int, pins: Pins) -> list[tuple[AttentionSplit, int]]:
    """Return the ways to cut attention and experts over `tp` ranks, legal or not."""
    splits: tuple[AttentionSplit, ...] = ("tp",)
    # Every rank then reads all attention weights, which nothing has been measured to repay where
    # there are no experts: for dense models only when it is asked for.
    if tp > 1 and has_experts(model):
        splits = ("tp", "dp")
    if pins.attention is not None:
        splits = (pins.attention,)
    return [(attention, ep) for attention in splits for ep in _expert_groups(model, tp, pins)]


def _stages(
    model: ModelSpec,
    kinds: tuple[SlotKind, ...],
    pins: Pins,
    allow_pipeline: bool,
    max_pp: int,
) -> Iterator[tuple[int, str | None]]:
    slots = sum(kind.count for kind in kinds)
    size = kinds[0].group.size
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
            yield pp, f"{pp} stages of {size} GPUs need {pp} groups, the cluster has {slots}"
        else:
            yield pp, None


def _expert_groups(model: ModelSpec, tp: int, pins: Pins) -> list[int]:
    if pins.ep is not None:
        return [pins.ep]
    if not has_experts(model):
        return [1]
    return [ep for ep in range(1, tp + 1) if tp % ep == 0]


def _no_slot(cluster: Cluster, tp: int, cp: int) -> str:
    sizes = sorted({len(node.gpus) for node in cluster.nodes})
    asked = f"tp={tp}" if cp == 1 else f"tp={tp} cp={cp}"
    if tp * cp > cluster.num_gpus:
        return f"{asked} needs {tp * cp} GPUs, the cluster has {cluster.num_gpus}"
    return f"{asked} is no multiple of a machine's GPUs ({', '.join(map(str, sizes))})"
