"""What the planner calls legal runs and is right: every family over products of parallel forms.

Splits are drawn, by a fixed seed, from the planner's own legal set on up to 8 ranks: each form
alone first, then products of two and three. Each case runs the real runner and engine over gloo:
logits against transformers, and greedy tokens of requests that come and go. A part of the cases
runs by default; `RANKWRIGHT_MATRIX=whole` runs all of them.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

import numpy as np
import pytest
from tests.executor.conftest import COMMON, MODELS, Reference
from tests.executor.moe_models import MOE_MODELS
from tests.executor.plans import cpu_plan
from tests.executor.ranks import Ranks
from tests.executor.test_parallel_equality import prompts

from rankwright.cost_model.model_spec import ModelSpec
from rankwright.cost_model.read_model import read_model
from rankwright.cost_model.split import Split
from rankwright.executor.models.supported import check_supported
from rankwright.planner.shapes import Pins, find_shapes
from rankwright.topology.shorthand import parse_cluster

MOST_RANKS = 8
# Of each family, so that there are more than 150; and how many of them run by default.
NUM_CASES, NUM_USUAL = 18, 2
FAMILIES = ("llama", "llama-tied-mqa", "mistral", "qwen2", "qwen3")
MOE_FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v2", "deepseek_v3")
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


def spec_of(family: str) -> ModelSpec:
    """The model's shapes, without its weights."""
    from transformers import AutoConfig

    changes = MODELS.get(family) or MOE_MODELS[family]
    options = {**COMMON, "model_type": family, **changes}
    config = AutoConfig.for_model(**options).to_dict()
    config["architectures"] = [ARCHITECTURES[options["model_type"]]]
    return read_model(config)


def num_forms(split: Split) -> int:
    """How many parallel forms the split is a product of."""
    degrees = (split.tp // split.ep, split.ep, split.pp, split.dp, split.cp)
    return sum(degree > 1 for degree in degrees) + (split.attention == "dp")


def legal_splits(spec: ModelSpec) -> Iterator[Split]:
    """Every split of up to three forms that the planner may choose on up to 8 ranks."""
    cluster = parse_cluster(f"{MOST_RANKS}xcpu")
    for attention in ("tp", "dp"):
        pins = Pins(attention=attention)  # type: ignore[arg-type]
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
                    stage_layers=even_stages(spec.num_layers, shape.pp),
                )
                if num_forms(split) <= 3:
                    yield split


def even_stages(num_layers: int, pp: int) -> tuple[int, ...]:
    return tuple(num_layers // pp + (stage < num_layers % pp) for stage in range(pp))


@dataclass(frozen=True)
class Case:
    family: str
    split: Split

    def __str__(self) -> str:
        return f"{self.family} {self.split.label()}"


def forms_of(split: Split) -> tuple[bool | str, ...]:
    """Which forms the split is a product of."""
    degrees = (split.moe_tp, split.ep, split.pp, split.dp, split.cp)
    return (*(degree > 1 for degree in degrees), split.attention, split.cp_exchange)


@cache
def cases() -> tuple[Case, ...]:
    """The matrix: for each family every form alone, then products, drawn by a fixed seed."""
    found: list[Case] = []
    for family in FAMILIES + MOE_FAMILIES:
        rng = Random(family)
        spec = spec_of(family)
        splits = sorted(legal_splits(spec), key=lambda split: split.label())
        rng.shuffle(splits)
        # Of each number of forms, one of each set of them before a second of any.
        seen = Counter[tuple[bool | str, ...]]()
        by_count: dict[int, list[tuple[int, int]]] = {1: [], 2: [], 3: []}
        for index, split in enumerate(splits):
            seen[forms_of(split)] += 1
            by_count[max(1, num_forms(split))].append((seen[forms_of(split)], index))
        alone = [index for rank, index in sorted(by_count[1]) if rank == 1]
        pairs, triples = ([index for _, index in sorted(by_count[n])] for n in (2, 3))
        products = [index for both in zip(pairs, triples, strict=False) for index in both]
        for index in [*alone, *products][:NUM_CASES]:
            stages = list(splits[index].stage_layers)
            rng.shuffle(stages)
            found.append(
                Case(family, splits[index].model_copy(update={"stage_layers": tuple(stages)}))
            )
    return tuple(found)


def chosen() -> list[Case]:
    """The cases of this run, smallest first: processes are started as they are needed."""
    every = cases()
    if os.environ.get("RANKWRIGHT_MATRIX") != "whole":
        # Other forms of each family: the strides differ.
        every = tuple(
            every[family * NUM_CASES + (family + 4 * index) % NUM_CASES]
            for family in range(len(every) // NUM_CASES)
            for index in range(NUM_USUAL)
        )
    return sorted(every, key=lambda case: case.split.num_gpus)


def test_the_matrix_is_wide_enough() -> None:
    every = cases()
    assert len({str(case) for case in every}) == len(every) >= 150
    assert len({case.split.label() for case in every}) >= 60
    for family in FAMILIES + MOE_FAMILIES:
        splits = [case.split for case in every if case.family == family]
        assert any(split.tp > 1 and split.attention == "tp" for split in splits)
        assert any(split.attention == "dp" for split in splits)
        assert any(split.pp > 1 for split in splits)
        assert {split.cp_exchange for split in splits if split.cp > 1} == {"gather", "ring"}
        assert any(num_forms(split) == 3 for split in splits)
    assert any(8 % case.split.tp for case in every)


@pytest.mark.parametrize("case", chosen(), ids=str)
def test_a_legal_split_gives_the_logits_and_tokens_of_transformers(
    references: dict[str, Reference],
    moe_references: dict[str, Reference],
    pool: Ranks,
    case: Case,
) -> None:
    known = references | moe_references
    reference, split = known[case.family], case.split
    degrees: dict[str, Any] = split.model_dump(
        include={"tp", "pp", "dp", "ep", "cp", "attention", "cp_exchange", "stage_layers"}
    )
    plan = cpu_plan(
        read_model(reference.folder),
        **degrees,
        # Room for two long sequences a rank, so that others wait or are sent back.
        num_blocks=12,
        max_num_seqs=4,
        max_batched_tokens=40,
    )
    check_supported(plan)
    sequences = prompts(reference.vocab_size, (1, 23, 40))
    lengths = (48, 20, 48, 7)
    requests = [
        (f"r{i}", text, {"temperature": 0.0, "max_tokens": length})
        for i, (text, length) in enumerate(
            zip(prompts(reference.vocab_size, (1, 17, 40, 5)), lengths, strict=True)
        )
    ]
    results = pool.run(
        plan.num_gpus,
        "tests.executor.cases",
        "logits_and_tokens",
        plan.model_dump_json(),
        str(reference.folder),
        sequences,
        requests,
    )
    samplers = [logits for logits, _ in results if logits is not None]
    assert len(samplers) == split.dp
    for logits in samplers:
        for ours, tokens in zip(logits, sequences, strict=True):
            theirs = reference.logits(tokens).numpy()
            assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()
    answers: dict[str, list[int]] = {}
    for _, tokens in results:
        answers.update(tokens or {})
    for (name, text, _), length in zip(requests, lengths, strict=True):
        assert answers[name] == reference.greedy(text, length, answers[name]), name
