"""Binds replicas, stages, CP and TP ranks to machines and GPUs.

The `tp * cp` GPUs of a stage were cut out of islands by `cost_model/layout.py`, and pipelines
strung inside machines where they fit; here each gets its numbers. Ranks count TP first, then CP,
then stages, then replicas: `rank = ((replica * pp + stage) * cp + cp_rank) * tp + tp_rank`.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, islice

from rankwright.cost_model.layout import SlotKind, replica_slots
from rankwright.cost_model.model_spec import ModelSpec
from rankwright.cost_model.predict import Replicas
from rankwright.cost_model.shards import Shares, column_range, even_range, head_ranges
from rankwright.cost_model.split import Split
from rankwright.planner.plan import Range, RankPlan

Place = tuple[int, int]


def place_ranks(model: ModelSpec, split: Split, groups: Sequence[Replicas]) -> tuple[RankPlan, ...]:
    """Return every rank with its GPU and its part of the model.

    Args:
        model: What is cut.
        split: How.
        groups: Kinds of slot of the replicas, and how many replicas are on each.
    """
    shares = [
        [kind.shares for kind in group.stages] for group in groups for _ in range(group.count)
    ]
    # A replica over several machines comes between those on each: in a job the ranks of a machine
    # have numbers in a row.
    placed = sorted(
        zip(replica_places(groups), shares, strict=True),
        key=lambda one: [node for places in one[0] for node, _ in places],
    )
    return bind_ranks(model, split, [places for places, _ in placed], [held for _, held in placed])


def bind_ranks(
    model: ModelSpec,
    split: Split,
    replicas: Iterable[Sequence[Sequence[Place]]],
    shares: Sequence[Sequence[Shares | None]] = (),
) -> tuple[RankPlan, ...]:
    """Return every rank with its part of the model, each where `replicas` says.

    Args:
        model: What is cut.
        split: How.
        replicas: For each replica, the places of each stage's ranks.
        shares: For each replica, the parts of each stage's ranks; None, or nothing: equal ones.
    """
    shards: dict[Shares | None, list[tuple[Range, ...]]] = {}
    stops = list(accumulate(split.stage_layers))
    stages: list[Range] = [
        (stop - count, stop) for stop, count in zip(stops, split.stage_layers, strict=True)
    ]
    ranks: list[RankPlan] = []
    for replica, slots in enumerate(replicas):
        for stage, places in enumerate(slots):
            held = shares[replica][stage] if shares else None
            if held not in shards:
                shards[held] = [_shard(model, split, rank, held) for rank in range(split.tp)]
            for index, (node, gpu) in enumerate(places):
                cp_rank, tp_rank = divmod(index, split.tp)
                query_heads, kv_heads, ffn_columns, experts, vocab = shards[held][tp_rank]
                ranks.append(
                    RankPlan(
                        rank=len(ranks),
                        node=node,
                        gpu=gpu,
                        replica=replica,
                        stage=stage,
                        cp_rank=cp_rank,
                        tp_rank=tp_rank,
                        layers=stages[stage],
                        query_heads=query_heads,
                        kv_heads=kv_heads,
                        ffn_columns=ffn_columns,
                        experts=experts,
                        vocab=vocab,
                    )
                )
    assert len(ranks) == split.num_gpus, f"{len(ranks)} ranks placed for {split.label()}"
    return tuple(ranks)


def replica_places(groups: Sequence[Replicas]) -> Iterator[list[tuple[Place, ...]]]:
    """Yield, for each replica, the places of each stage's ranks."""
    for group in groups:
        kinds = group.stages
        if len(set(map(id, kinds))) > 1:
            yield from _mixed_places(kinds, group.count)
            continue
        kind = kinds[0]
        for slots in islice(replica_slots(kind, len(kinds), group.spread), group.count):
            yield [kind.places(slot) for slot in slots]


def _mixed_places(kinds: tuple[SlotKind, ...], count: int) -> Iterator[list[tuple[Place, ...]]]:
    """Yield the places of `count` replicas over several kinds of slot, which are taken in order."""
    used: dict[int, int] = {}
    for _ in range(count):
        places: list[tuple[Place, ...]] = []
        for kind in kinds:
            slot = used.get(id(kind), 0)
            used[id(kind)] = slot + 1
            places.append(kind.places(slot))
        yield places


def _shard(
    model: ModelSpec, split: Split, tp_rank: int, shares: Shares | None
) -> tuple[Range, ...]:
    """Return the query heads, KV heads, FFN columns, experts and vocabulary rows of `tp_rank`.

    A plan has one of each for all layers. Where layers differ (DeepSeek's first layers are dense,
    the others have experts), the columns are those of the experts and the heads those of the first
    layer; the executor cuts a layer that differs by the same rule.
    """
    layers = [run.layer for run in model.layer_runs]
    heads_tp, heads_rank = (1, 0) if split.attention == "dp" else (split.tp, tp_rank)
    query_heads, kv_heads = head_ranges(layers[0].attention, heads_tp, heads_rank, shares)
    moe = next((layer.feed_forward for layer in layers if layer.feed_forward.kind == "moe"), None)
    sizes = shares.columns if shares else None
    vocab = column_range(model.vocab_size, split.tp, tp_rank, shares.vocab if shares else None)
    if moe is None:
        width = layers[0].feed_forward.intermediate_size
        columns = column_range(width, split.tp, tp_rank, sizes)
        return query_heads, kv_heads, columns, (0, 0), vocab
    ep_rank, moe_tp_rank = divmod(tp_rank, split.moe_tp)
    columns = column_range(moe.intermediate_size, split.moe_tp, moe_tp_rank, sizes)
    experts = even_range(moe.num_experts, split.ep, ep_rank)
    return query_heads, kv_heads, columns, experts, vocab
