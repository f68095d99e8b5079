"""The same equalities on GPUs: Triton kernels, CUDA graphs and NCCL."""

from typing import Any

import numpy as np
import pytest
import torch
from tests.executor.conftest import MODELS, Reference
from tests.executor.plans import cpu_plan
from tests.executor.ranks import Ranks
from tests.executor.test_parallel_equality import CASES, prompts

from rankwright.cost_model.read_model import read_model

pytestmark = pytest.mark.gpu
SPLITS: dict[str, dict[str, Any]] = {
    "TP1": {},
    "TP2": {"tp": 2},
    "PP2": {"pp": 2},
    "DP2": {"dp": 2},
    "CP2": {"cp": 2},
    "CP2 ring": {"cp": 2, "cp_exchange": "ring"},
}


def plan_for(reference: Reference, split: str) -> Any:
    plan = cpu_plan(
        read_model(reference.folder),
        **SPLITS[split],
        device="h100-sxm",
        num_blocks=20,
        max_num_seqs=4,
        max_batched_tokens=16,
    )
    if torch.cuda.device_count() < plan.num_gpus:
        pytest.skip(f"needs {plan.num_gpus} GPUs, {torch.cuda.device_count()} here")
    return plan


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("split", SPLITS)
def test_float32_logits_equal_transformers(
    references: dict[str, Reference], pool: Ranks, model: str, split: str
) -> None:
    reference = references[model]
    plan = plan_for(reference, split)
    sequences = prompts(reference.vocab_size, (1, 13, 20))
    results = pool.run(
        plan.num_gpus,
        CASES,
        "logits",
        plan.model_dump_json(),
        str(reference.folder),
        sequences,
        "cuda",
        backend="nccl",
    )
    for result in (result for result in results if result is not None):
        for ours, tokens in zip(result, sequences, strict=True):
            theirs = reference.logits(tokens).numpy()
            assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("split", SPLITS)
def test_bfloat16_logits_are_as_near_to_float32_as_those_of_transformers(
    references: dict[str, Reference], pool: Ranks, model: str, split: str
) -> None:
    reference = references[model]
    plan = plan_for(reference, split)
    sequences = prompts(reference.vocab_size, (1, 13, 20))
    results = pool.run(
        plan.num_gpus,
        CASES,
        "logits",
        plan.model_dump_json(),
        str(reference.folder),
        sequences,
        "cuda",
        torch.bfloat16,
        backend="nccl",
    )
    half = type(reference.model).from_pretrained(reference.folder, dtype=torch.bfloat16).cuda()
    for result in (result for result in results if result is not None):
        for ours, tokens in zip(result, sequences, strict=True):
            exact = reference.logits(tokens).numpy()
            with torch.inference_mode():
                theirs = half(torch.tensor([tokens]).cuda()).logits[0].float().cpu().numpy()
            error = np.linalg.norm(ours - exact) / np.linalg.norm(exact)
            peer_error = np.linalg.norm(theirs - exact) / np.linalg.norm(exact)
            # Other orders of summation round differently; twice the peer's error is the same class.
            assert error <= 2 * peer_error


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("split", SPLITS)
def test_greedy_tokens_from_graphs_equal_transformers(
    references: dict[str, Reference], pool: Ranks, model: str, split: str
) -> None:
    reference = references[model]
    plan = plan_for(reference, split)
    texts = prompts(reference.vocab_size, (1, 17, 30, 5, 12, 40))
    requests = [
        (f"r{i}", text, {"temperature": 0.0, "max_tokens": 48}) for i, text in enumerate(texts)
    ]
    results = pool.run(
        plan.num_gpus,
        CASES,
        "serve",
        plan.model_dump_json(),
        str(reference.folder),
        requests,
        None,
        "cuda",
        backend="nccl",
    )
    tokens: dict[str, list[int]] = {}
    for result in results:
        tokens.update(result or {})
    for name, text, _ in requests:
        assert tokens[name] == reference.greedy(text, 48, tokens[name])


@pytest.mark.parametrize("model", ["deepseek_v2", "deepseek_v3"])
@pytest.mark.parametrize("split", ["CP2", "CP2 ring"])
def test_latents_in_parts_give_the_logits_of_transformers(
    moe_references: dict[str, Reference], pool: Ranks, model: str, split: str
) -> None:
    test_float32_logits_equal_transformers(moe_references, pool, model, split)
