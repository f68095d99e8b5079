"""The cells of the split matrix: each family with each product of up to three parallel forms.

A cell is legal if the planner has a split of it on up to 8 ranks. The matrix has one of these
splits, drawn by a fixed seed, for each legal cell of one and two forms; each product of three is
run by every fifth family that has it. `python -m tests.executor.split_cells` prints them.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from random import Random

from tests.executor.conftest import COMMON, MODELS
from tests.executor.moe_models import MOE_MODELS

from rankwright.cost_model.model_spec import ModelSpec
from rankwright.cost_model.read_model import read_model
from rankwright.cost_model.split import Split
from rankwright.planner.plan import ExpertSlots
from rankwright.planner.shapes import Pins, find_shapes
from rankwright.topology.shorthand import parse_cluster

MOST_RANKS = 8
MOST_FORMS = 3
DENSE_FAMILIES = ("llama", "llama-tied-mqa", "mistral", "qwen2", "qwen3")
MOE_FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v2", "deepseek_v3")
FAMILIES = DENSE_FAMILIES + MOE_FAMILIES
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}
# Products that also run with replicas of experts in slots, and moves of them while serving.
WIDE = (("EP",), ("TP", "EP"), ("EP", "attention DP"))

Forms = tuple[str, ...]


@dataclass(frozen=True)
class Case:
    """One split of one family, with its experts in slots or not."""

    family: str
    split: Split
    slots: ExpertSlots | None = None

    def __str__(self) -> str:
        return f"{self.family} {self.split.label()}{' slots' if self.slots else ''}"


def forms_of(split: Split) -> Forms:
    """Return which forms the split is a product of; none: one rank."""
    degrees = {"TP": split.moe_tp, "EP": split.ep, "PP": split.pp, "DP": split.dp}
    names = [name for name, degree in degrees.items() if degree > 1]
    if split.cp > 1:
        names.append("CP ring" if split.cp_exchange == "ring" else "CP")
    return (*names, *(["attention DP"] if split.attention == "dp" else []))


@cache
def spec_of(family: str) -> ModelSpec:
    """Return the model's shapes, without its weights."""
    from transformers import AutoConfig

    changes = MODELS.get(family) or MOE_MODELS[family]
    options = {**COMMON, "model_type": family, **changes}
    config = AutoConfig.for_model(**options).to_dict()
    config["architectures"] = [ARCHITECTURES[options["model_type"]]]
    return read_model(config)


@cache
def legal_splits(family: str) -> tuple[Split, ...]:
    """Return every split of up to three forms that the planner may choose on up to 8 ranks."""
    return tuple(sorted(_legal_splits(spec_of(family)), key=Split.label))


def _legal_splits(spec: ModelSpec) -> Iterator[Split]:
    cluster = parse_cluster(f"{MOST_RANKS}xcpu")
    for pins in (Pins(attention="tp"), Pins(attention="dp")):
        for shape in find_shapes(spec, cluster, pins=pins).legal:
            for dp in range(1, MOST_RANKS // shape.num_gpus + 1):
                split = Split(
                    tp=shape.tp,
                    pp=shape.pp,
                    ep=shape.ep,
                    cp=shape.cp,
                    dp=dp,
                    attention=shape.attention,
                    cp_exchange=shape.cp_exchange,
                    stage_layers=_even_stages(spec.num_layers, shape.pp),
                )
                if len(forms_of(split)) <= MOST_FORMS:
                    yield split


def _even_stages(num_layers: int, pp: int) -> tuple[int, ...]:
    return tuple(num_layers // pp + (stage < num_layers % pp) for stage in range(pp))


@cache
def cells(family: str) -> dict[Forms, tuple[Split, ...]]:
    """Return the splits of each product of forms that is legal here, fewest forms first."""
    found: dict[Forms, list[Split]] = {}
    for split in legal_splits(family):
        found.setdefault(forms_of(split), []).append(split)
    order = sorted(found, key=lambda forms: (len(forms), forms))
    return {forms: tuple(found[forms]) for forms in order}


@cache
def every_case() -> tuple[Case, ...]:
    """Return the matrix: of each cell that it has, the split that fewest other families have.

    Nine of ten products take one of the fewest ranks first: two cores run all of them in turn.
    """
    used = Counter[str]()
    asked = Counter[Forms]()
    found: list[Case] = []
    for family in FAMILIES:
        rng = Random(family)
        for number, (forms, splits) in enumerate(cells(family).items()):
            asked[forms] += 1
            # Every fifth family that has a product of three, another for each product.
            if len(forms) == MOST_FORMS and (asked[forms] + number) % 5:
                continue
            few = len(forms) > 1 and rng.random() < 0.9
            drawn = rng.sample(splits, len(splits))
            ranked = [(split.num_gpus * few, used[split.label()]) for split in drawn]
            split = drawn[ranked.index(min(ranked))]
            used[split.label()] += 1
            stages = rng.sample(split.stage_layers, split.pp)
            split = split.model_copy(update={"stage_layers": tuple(stages)})
            found.append(Case(family, split))
            if forms in WIDE:
                found.append(Case(family, split, _slots(spec_of(family), split.ep)))
    return tuple(found)


def _slots(spec: ModelSpec, ep: int) -> ExpertSlots:
    """Return slots of one rank's share of the experts and one more, dealt in turn; some twice."""
    blocks = [layer.feed_forward for layer in spec.layers if layer.feed_forward.kind == "moe"]
    layers = []
    for block in blocks:
        each = -(-block.num_experts // ep) + 1
        held = [slot % block.num_experts for slot in range(each * ep)]
        layers.append(tuple(tuple(held[rank * each :][:each]) for rank in range(ep)))
    return ExpertSlots(layers=tuple(layers), rebalance_steps=16)


def usual_cases(num_of_family: int) -> list[Case]:
    """Return the part of the matrix that runs by default: other forms of each family."""
    chosen: list[Case] = []
    for family in FAMILIES:
        cases = [case for case in every_case() if case.family == family]
        for _ in range(num_of_family):
            seen = Counter(forms_of(case.split) for case in chosen)
            slots = sum(case.slots is not None for case in chosen)
            rng = Random(f"{family} {len(chosen)}")
            drawn = rng.sample(cases, len(cases))
            ranked = [
                (case in chosen, seen[forms_of(case.split)], case.slots is not None and slots > 0)
                for case in drawn
            ]
            chosen.append(drawn[ranked.index(min(ranked))])
    return chosen


def _table() -> Iterator[str]:
    by_cell: dict[tuple[str, Forms], list[Case]] = {}
    for case in every_case():
        by_cell.setdefault((case.family, forms_of(case.split)), []).append(case)
    every = sorted({forms for _, forms in by_cell}, key=lambda forms: (len(forms), forms))
    yield "| forms | " + " | ".join(FAMILIES) + " |"
    yield "| --- " * (1 + len(FAMILIES)) + "|"
    for forms in every:
        row = []
        for family in FAMILIES:
            here = by_cell.get((family, forms), [])
            row.append(", ".join(str(case).removeprefix(f"{family} ") for case in here))
        yield f"| {' x '.join(forms) or 'one rank'} | " + " | ".join(row) + " |"


if __name__ == "__main__":
    print("\n".join(_table()))
