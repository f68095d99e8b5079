"""Every split gives the logits and greedy tokens of single-process transformers.

Greedy tokens of each split are compared for two models, and those of SmolLM2 for four splits;
`RANKWRIGHT_MATRIX=whole` compares all.
"""

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.executor.conftest import MODELS, Reference
from tests.executor.plans import cpu_plan
from tests.executor.ranks import Ranks

from rankwright.cost_model.read_model import read_model

CASES = "tests.executor.cases"
WHOLE = os.environ.get("RANKWRIGHT_MATRIX") == "whole"
SPLITS: dict[str, dict[str, Any]] = {
    "TP1": {},
    "TP2": {"tp": 2},
    "TP4": {"tp": 4},
    "uneven TP3": {"tp": 3},
    "PP2": {"pp": 2},
    "uneven PP3": {"pp": 3, "stage_layers": (1, 2, 1)},
    "TP2 PP2": {"tp": 2, "pp": 2},
    "DP2": {"dp": 2},
    "attention DP2": {"tp": 2, "attention": "dp"},
    "CP2": {"cp": 2},
    "TP2 CP2": {"tp": 2, "cp": 2},
    "TP2 CP2 ring": {"tp": 2, "cp": 2, "cp_exchange": "ring"},
}


def prompts(vocab_size: int, lengths: tuple[int, ...]) -> list[list[int]]:
    rng = random.Random(sum(lengths))
    return [[rng.randrange(3, vocab_size) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("split", SPLITS)
def test_logits_equal_transformers(
    references: dict[str, Reference], pool: Ranks, model: str, split: str
) -> None:
    reference = references[model]
    plan = cpu_plan(read_model(reference.folder), **SPLITS[split], block_tokens=16)
    sequences = prompts(reference.vocab_size, (1, 23, 40))
    results = pool.run(
        plan.num_gpus, CASES, "logits", plan.model_dump_json(), str(reference.folder), sequences
    )
    samplers = [result for result in results if result is not None]
    assert len(samplers) == plan.split.dp
    for result in samplers:
        for ours, tokens in zip(result, sequences, strict=True):
            theirs = reference.logits(tokens).numpy()
            assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


def test_the_reference_is_what_transformers_generates_whatever_was_said(
    references: dict[str, Reference],
) -> None:
    reference = references["llama"]
    (text,) = prompts(reference.vocab_size, (9,))
    generated = reference.model.generate(
        torch.tensor([text]),
        attention_mask=torch.ones(1, len(text), dtype=torch.int64),
        max_new_tokens=8,
        min_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[0, len(text) :].tolist()
    wrong = [*generated[:3], (generated[3] + 1) % reference.vocab_size, *generated[4:]]
    # The count differs, as what was found is kept.
    for count, said in ((8, ()), (7, generated), (6, wrong), (5, generated[:2])):
        assert reference.greedy(text, count, said) == generated[:count]


SERVED = [
    *(("TP1", 0), ("TP2 PP2", 0), ("uneven TP3", 0), ("uneven PP3", 0), ("DP2", 0)),
    *(("TP2", 1), ("attention DP2", 0), ("attention DP2", 1), ("CP2", 0)),
]
# What is decided ahead does not depend on the model.
SERVED_BY_ONE = [("TP2 PP2", 1), ("uneven PP3", 1)]


@pytest.mark.parametrize(
    ("model", "split", "ahead"),
    [
        *(
            (model, *case)
            for row, case in enumerate(SERVED)
            for column, model in enumerate(MODELS)
            if WHOLE or (row + column) % 3 == 0
        ),
        *(("qwen2", *case) for case in SERVED_BY_ONE),
    ],
)
def test_greedy_tokens_equal_transformers_while_requests_come_and_go(
    references: dict[str, Reference], pool: Ranks, model: str, split: str, ahead: int
) -> None:
    reference = references[model]
    # Room for four of six sequences: some wait, and some are sent back and computed again.
    plan = cpu_plan(
        read_model(reference.folder),
        **SPLITS[split],
        num_blocks=20,
        max_num_seqs=4,
        max_batched_tokens=16,
    )
    texts = prompts(reference.vocab_size, (1, 17, 30, 5, 12, 40))
    lengths = [64, 20, 64, 3, 64, 31]
    requests = [
        (f"r{i}", text, {"temperature": 0.0, "max_tokens": length})
        for i, (text, length) in enumerate(zip(texts, lengths, strict=True))
    ]
    results = pool.run(
        plan.num_gpus,
        CASES,
        "serve",
        plan.model_dump_json(),
        str(reference.folder),
        requests,
        "r2",
        "cpu",
        torch.float32,
        ahead,
    )
    tokens: dict[str, list[int]] = {}
    for result in results:
        tokens.update(result or {})
    for (name, text, _), length in zip(requests, lengths, strict=True):
        found = tokens[name]
        assert found == reference.greedy(text, len(found), found)
        # One was withdrawn after three tokens; what came until then is right.
        assert 3 <= len(found) < length if name == "r2" else len(found) == length


@pytest.mark.parametrize("ahead", [0, 1])
def test_both_stages_of_a_pipeline_compute_at_the_same_time(
    references: dict[str, Reference], pool: Ranks, tmp_path: Path, ahead: int
) -> None:
    reference = references["qwen2"]
    plan = cpu_plan(read_model(reference.folder), pp=2, stage_layers=(1, 3))
    texts = prompts(reference.vocab_size, (4, 9))
    requests = [
        (f"r{i}", text, {"temperature": 0.0, "max_tokens": 24}) for i, text in enumerate(texts)
    ]
    begun = tmp_path / "begun"
    begun.write_bytes(bytes(8))
    # Two requests, a batch each: both decode from about the sixth batch to the fortieth.
    results = pool.run(
        2,
        CASES,
        "stages_at_once",
        plan.model_dump_json(),
        str(reference.folder),
        requests,
        ahead,
        str(begun),
        (12, 36),
    )
    assert results == [[], [True] * 24]


def test_ranks_may_hold_any_shares_that_a_plan_gives_them(
    references: dict[str, Reference], pool: Ranks
) -> None:
    reference = references["qwen3"]
    plan = cpu_plan(read_model(reference.folder), tp=3)
    # Of 8 query and 4 KV heads, 74 columns and 197 rows; groups of heads are cut between ranks.
    shares = [
        {"query_heads": (0, 5), "kv_heads": (0, 3), "ffn_columns": (0, 9), "vocab": (0, 150)},
        {"query_heads": (5, 6), "kv_heads": (2, 3), "ffn_columns": (9, 10), "vocab": (150, 151)},
        {"query_heads": (6, 8), "kv_heads": (3, 4), "ffn_columns": (10, 74), "vocab": (151, 197)},
    ]
    ranks = tuple(
        rank.model_copy(update=share) for rank, share in zip(plan.ranks, shares, strict=True)
    )
    plan = plan.model_copy(update={"ranks": ranks})
    (text,) = prompts(reference.vocab_size, (30,))
    requests = [("r0", text, {"temperature": 0.0, "max_tokens": 48})]
    for function, asked in (("logits", [text]), ("serve", requests)):
        results = pool.run(3, CASES, function, plan.model_dump_json(), str(reference.folder), asked)
        found = results[0]
        if function == "serve":
            assert found["r0"] == reference.greedy(text, 48, found["r0"])
        else:
            theirs = reference.logits(text).numpy()
            assert np.abs(found[0] - theirs).max() <= 1e-4 * np.abs(theirs).max()


def test_seeded_sampling_does_not_depend_on_the_split_or_the_batch(
    references: dict[str, Reference], pool: Ranks
) -> None:
    reference = references["qwen2"]
    texts = prompts(reference.vocab_size, (4, 9, 6))
    sampling = {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "seed": 7, "max_tokens": 24}
    requests = [(f"r{i}", text, sampling) for i, text in enumerate(texts)]
    seen = []
    for split, ahead in (("TP1", 0), ("TP2 PP2", 0), ("TP2", 1)):
        plan = cpu_plan(read_model(reference.folder), **SPLITS[split])
        for chosen in (requests, requests[1:2]):
            results = pool.run(
                plan.num_gpus,
                CASES,
                "serve",
                plan.model_dump_json(),
                str(reference.folder),
                chosen,
                None,
                "cpu",
                torch.float32,
                ahead,
            )
            seen.append(results[0]["r1"])
    assert all(tokens == seen[0] for tokens in seen)
    assert seen[0] != reference.greedy(texts[1], 24)


SMOLLM2_SPLITS: dict[str, dict[str, Any]] = {
    "TP2": {"tp": 2},
    "TP4": {"tp": 4},
    "TP5": {"tp": 5},
    "PP2": {"pp": 2},
}
if WHOLE:
    SMOLLM2_SPLITS |= {"TP3": {"tp": 3}, "TP3 PP2": {"tp": 3, "pp": 2}, "DP2": {"dp": 2}}


@pytest.mark.parametrize("split", SMOLLM2_SPLITS)
def test_smollm2_gives_the_greedy_tokens_of_transformers(
    smollm2: Any, smollm2_reference: Reference, pool: Ranks, split: str
) -> None:
    plan = cpu_plan(read_model(smollm2), **SMOLLM2_SPLITS[split], num_blocks=32)
    requests = [
        (f"r{i}", prompt, {"temperature": 0.0, "max_tokens": 12})
        for i, prompt in enumerate(prompts(smollm2_reference.vocab_size, (11, 30)))
    ]
    # Not warmed up: made-up batches take longer on this model than the requests.
    results = pool.run(
        plan.num_gpus,
        CASES,
        "tokens_and_logits",
        plan.model_dump_json(),
        str(smollm2),
        requests,
    )
    tokens: dict[str, list[int]] = {}
    for answered, _ in results:
        tokens |= answered
    for name, prompt, _ in requests:
        assert tokens[name] == smollm2_reference.greedy(prompt, 12, tokens[name])


def test_a_context_that_fits_on_no_rank_is_served_by_several(
    references: dict[str, Reference], pool: Ranks
) -> None:
    reference = references["qwen2"]
    (text,) = prompts(reference.vocab_size, (100,))
    requests = [("long", text, {"temperature": 0.0, "max_tokens": 20})]
    plan = cpu_plan(read_model(reference.folder), cp=2, num_blocks=5)
    assert plan.kv_cache.num_tokens == 80 < len(text)
    answer, _ = pool.run(2, CASES, "serve", plan.model_dump_json(), str(reference.folder), requests)
    assert answer["long"] == reference.greedy(text, 20, answer["long"])
