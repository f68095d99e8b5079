"""MoE families: every split of experts gives the logits and tokens of transformers."""

from typing import Any

import numpy as np
import pytest
from tests.executor.conftest import COMMON, Reference, make_reference
from tests.executor.plans import cpu_plan
from tests.executor.ranks import Ranks
from tests.executor.test_parallel_equality import prompts

from rankwright.cost_model.read_model import read_model

CASES = "tests.executor.cases"
# Sizes that ranks cannot share evenly: 6 experts over 4, expert widths of 37 and 22 columns.
MOE_MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {
        "vocab_size": 131,
        "num_hidden_layers": 3,
        "intermediate_size": 37,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "sliding_window": 9,
    },
    "qwen3_moe": {
        "vocab_size": 128,
        "head_dim": 8,
        "intermediate_size": 50,
        "moe_intermediate_size": 22,
        "num_experts": 12,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "gpt_oss": {
        "vocab_size": 101,
        "head_dim": 16,
        "intermediate_size": 22,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "sliding_window": 9,
        "pad_token_id": 0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 64,
            "truncate": False,
        },
    },
    "deepseek_v2": {
        "vocab_size": 97,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 8,
        "q_lora_rank": None,
        "kv_lora_rank": 20,
        "qk_nope_head_dim": 10,
        "qk_rope_head_dim": 6,
        "head_dim": 6,
        "v_head_dim": 12,
        "moe_intermediate_size": 22,
        "n_routed_experts": 12,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 1.5,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "mscale": 0.7,
            "mscale_all_dim": 0.8,
            "original_max_position_embeddings": 64,
        },
    },
    "deepseek_v3": {
        "vocab_size": 97,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 8,
        "q_lora_rank": 28,
        "kv_lora_rank": 20,
        "qk_nope_head_dim": 10,
        "qk_rope_head_dim": 6,
        "v_head_dim": 12,
        "attention_bias": True,
        "moe_intermediate_size": 22,
        "n_routed_experts": 12,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
    },
    "qwen3_moe, weights as they are": {
        "model_type": "qwen3_moe",
        "vocab_size": 90,
        "num_hidden_layers": 2,
        "head_dim": 8,
        "moe_intermediate_size": 22,
        "num_experts": 5,
        "num_experts_per_tok": 5,
        "norm_topk_prob": False,
        "attention_bias": True,
    },
}
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
}


@pytest.fixture(scope="session")
def moe_references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    return {
        name: make_reference(
            tmp_path_factory.mktemp("moe"), seed, {**COMMON, "model_type": name, **changes}
        )
        for seed, (name, changes) in enumerate(MOE_MODELS.items())
    }


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
        assert tokens[name] == reference.greedy(text, 48)


FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v2", "deepseek_v3")
WHOLE = [(model, split) for model in FAMILIES for split in SPLITS] + [
    (model, "attention DP2 EP2") for model in FAMILIES
]


@pytest.mark.parametrize(
    ("model", "split"),
    [*WHOLE, ("qwen3_moe, weights as they are", "TP1"), ("qwen3_moe, weights as they are", "EP2")],
)
def test_logits_equal_transformers(
    moe_references: dict[str, Reference], pool: Ranks, model: str, split: str
) -> None:
    reference = moe_references[model]
    plan = cpu_plan(read_model(reference.folder), **(SPLITS | ATTENTION_DP)[split])
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
    ],
)
def test_greedy_tokens_equal_transformers_while_requests_come_and_go(
    moe_references: dict[str, Reference], pool: Ranks, model: str, split: str
) -> None:
    run_tokens(pool, moe_references[model], **(SPLITS | ATTENTION_DP)[split])
