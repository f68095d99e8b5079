"""Small models with random weights, saved as transformers saves them, and a pool of ranks."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from operator import eq
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.executor.moe_models import MOE_MODELS
from tests.executor.ranks import Ranks, ranks

# One row a family and trait: GQA everywhere, tied and untied embeddings, odd vocabularies, feed-
# forward widths that ranks cannot share evenly, biases, head norms, sliding windows, rope scaling.
COMMON: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 74,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.4,  # large, so that attention matters to the logits
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"vocab_size": 211, "tie_word_embeddings": False, "attention_bias": True},
    "llama-tied-mqa": {
        "model_type": "llama",
        "vocab_size": 127,
        "tie_word_embeddings": True,
        "num_key_value_heads": 1,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "mistral": {"vocab_size": 199, "tie_word_embeddings": False, "sliding_window": 9},
    "qwen2": {"vocab_size": 203, "tie_word_embeddings": True, "num_key_value_heads": 2},
    "qwen3": {"vocab_size": 197, "tie_word_embeddings": False, "head_dim": 16},
    "qwen3-tied": {
        "model_type": "qwen3",
        "vocab_size": 150,
        "tie_word_embeddings": True,
        "head_dim": 8,
    },
}


@dataclass
class Reference:
    """A model of transformers, and the folder it is saved in."""

    folder: Path
    model: Any
    vocab_size: int
    _greedy: dict[tuple[tuple[int, ...], int], list[int]] = field(default_factory=dict)
    _drawn_from: dict[tuple[tuple[int, ...], int], np.ndarray] = field(default_factory=dict)

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """[T, V] of one sequence."""
        with torch.inference_mode():
            return self.model(torch.tensor([tokens]), use_cache=False).logits[0].float()

    def greedy(self, prompt: list[int], count: int, said: Sequence[int] = ()) -> list[int]:
        """The next `count` tokens, whatever they are.

        What somebody `said` they are saves time where it is right, as one pass then tells all.
        """
        key = (tuple(prompt), count)
        if key not in self._greedy:
            tokens: list[int] = []
            guess = list(said[:count])
            while len(tokens) < count:
                best = self.logits([*prompt, *tokens, *guess]).argmax(-1).tolist()
                best = best[len(prompt) + len(tokens) - 1 :]
                right = sum(1 for _ in takewhile(bool, map(eq, guess, best)))
                tokens += best[: right + 1]
                guess = []
            self._greedy[key] = tokens[:count]
        return self._greedy[key]

    def drawn_from(self, prompt: list[int], count: int) -> np.ndarray:
        """[count, V]: the logits whose best are the `greedy` tokens."""
        key = (tuple(prompt), count)
        if key not in self._drawn_from:
            tokens = [*prompt, *self.greedy(prompt, count)]
            self._drawn_from[key] = self.logits(tokens[:-1])[-count:].numpy()
        return self._drawn_from[key]


def make_reference(
    folder: Path,
    seed: int,
    options: dict[str, Any],
    *,
    change: Callable[[Any], None] = lambda model: None,
) -> Reference:
    """Save a model of random weights, changed by `change`; `options` are those of its config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(**options)
    # Plain loops: the grouped product of experts refuses odd widths.
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )
    model = model.float().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name or parameter_name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("correction_bias"):  # DeepSeek-V3's, of the size of its scores
                buffer.add_(torch.rand_like(buffer) * 0.5)
        change(model)
    model.save_pretrained(folder)
    return Reference(folder, model, config.vocab_size)


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    return {
        name: make_reference(
            tmp_path_factory.mktemp(name), seed, {**COMMON, "model_type": name, **changes}
        )
        for seed, (name, changes) in enumerate(MODELS.items())
    }


@pytest.fixture(scope="session")
def moe_references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    return {
        name: make_reference(
            tmp_path_factory.mktemp("moe"), seed, {**COMMON, "model_type": name, **changes}
        )
        for seed, (name, changes) in enumerate(MOE_MODELS.items())
    }


@pytest.fixture(scope="session")
def pool() -> Iterator[Ranks]:
    with ranks() as made:
        yield made


@pytest.fixture(scope="session")
def smollm2_reference(smollm2: Path) -> Reference:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    return Reference(smollm2, model, model.config.vocab_size)
