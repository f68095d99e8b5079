"""MoE families: every split of experts gives the logits and tokens of transformers."""

from typing import Any

import numpy as np
import pytest
from tests.executor.conftest import Reference
from tests.executor.plans import cpu_plan
from tests.executor.ranks import Ranks
from tests.executor.test_parallel_equality import prompts

from rankwright.cost_model.read_model import read_model

CASES = "tests.executor.cases"
SPLITS: dict[str, dict[str, Any]] = {
    "TP1": {},
    "TP2": {"tp": 2},
    "EP2": {"tp": 2, "ep": 2},
    "TP4": {"tp": 4},
    "TP4 EP2": {"tp": 4, "ep": 2},
    "EP4": {"tp": 4, "ep": 4},
    "PP2 EP2": {"pp": 2, "tp": 2, "ep": 2},
}
# With each rank's own sequences: tokens are gathered before the experts, and scattered after.
ATTENTION_DP: dict[str, dict[str, Any]] = {
    "attention DP2 EP2": {"tp": 2, "ep": 2, "attention": "dp"},
    "attention DP4 EP2": {"tp": 4, "ep": 2, "attention": "dp"},
    # Two of the four requests on each rank at most: more rows than there are requests.
    "attention DP3 EP3": {"tp": 3, "ep": 3, "attention": "dp"},
}
# Latents of each context in parts, on ranks that share their heads.
CONTEXT: dict[str, dict[str, Any]] = {
    "CP2": {"cp": 2},
    "CP3 ring": {"cp": 3, "cp_exchange": "ring"},
    "TP2 CP2": {"tp": 2, "cp": 2},
    "attention DP2 EP2 CP2": {"tp": 2, "ep": 2, "cp": 2, "attention": "dp"},
}
EVERY = SPLITS | ATTENTION_DP | CONTEXT


def run_tokens(pool: Ranks, reference: Reference, **split: Any) -> None:
    """Hold the greedy tokens of a split to transformers', while requests come and go."""
    plan = cpu_plan(
        read_model(reference.folder),
        **split,
        num_blocks=20,
        max_num_seqs=4,
        max_batched_tokens=16,
    )
    texts = prompts(reference.vocab_size, (1, 17, 30, 5))
    requests = [
        (f"r{i}", text, {"temperature": 0.0, "max_tokens": 48}) for i, text in enumerate(texts)
    ]
    results = pool.run(
        plan.num_gpus, CASES, "serve", plan.model_dump_json(), str(reference.folder), requests
    )
    tokens: dict[str, list[int]] = {}
    for result in results:
        tokens.update(result or {})
    for name, text, _ in requests:
        assert tokens[name] == reference.greedy(text, 48, tokens[name])


FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v2", "deepseek_v3")
WHOLE = [(model, split) for model in FAMILIES for split in SPLITS] + [
    (model, "attention DP2 EP2") for model in FAMILIES
]


@pytest.mark.parametrize(
    ("model", "split"),
    [
        *WHOLE,
        *(("qwen3_moe, weights as they are", split) for split in ("TP1", "EP2")),
        *(("deepseek_v2", "CP2"), ("deepseek_v3", "TP2 CP2"), ("deepseek_v2", "CP3 ring")),
        ("gpt_oss", "CP3 ring"),
    ],
)
def test_logits_equal_transformers(
    moe_references: dict[str, Reference], pool: Ranks, model: str, split: str
) -> None:
    reference = moe_references[model]
    plan = cpu_plan(read_model(reference.folder), **EVERY[split])
    sequences = prompts(reference.vocab_size, (1, 23, 40))
    results = pool.run(
        plan.num_gpus, CASES, "logits", plan.model_dump_json(), str(reference.folder), sequences
    )
    (result,) = (result for result in results if result is not None)
    for ours, tokens in zip(result, sequences, strict=True):
        theirs = reference.logits(tokens).numpy()
        assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


@pytest.mark.parametrize(
    ("model", "split"),
    [
        ("mixtral", "TP4 EP2"),
        ("qwen3_moe", "PP2 EP2"),
        ("deepseek_v3", "attention DP4 EP2"),
        ("qwen3_moe", "attention DP3 EP3"),
        ("deepseek_v2", "TP2 CP2"),
        ("deepseek_v3", "attention DP2 EP2 CP2"),
    ],
)
def test_greedy_tokens_equal_transformers_while_requests_come_and_go(
    moe_references: dict[str, Reference], pool: Ranks, model: str, split: str
) -> None:
    run_tokens(pool, moe_references[model], **EVERY[split])
