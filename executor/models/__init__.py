"""Model families: each maps a Hugging Face checkpoint onto the sharded layers.

To add one, add a file and a row here. Rows are loaded when asked for.
"""

import difflib
from importlib import import_module

from rankwright.executor.models.names import TensorNames

# Architecture in config.json -> module that holds its `NAMES`.
FAMILIES: dict[str, str] = {
    "DeepseekV2ForCausalLM": "deepseek",
    "DeepseekV3ForCausalLM": "deepseek",
    "GptOssForCausalLM": "gpt_oss",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "MixtralForCausalLM": "mixtral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}


def tensor_names(architecture: str) -> TensorNames:
    """Return where the checkpoints of `architecture` keep their tensors.

    Raises:
        ValueError: The executor cannot run that architecture.
    """
    if architecture not in FAMILIES:
        near = difflib.get_close_matches(architecture, FAMILIES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"the executor cannot run {architecture!r} yet; it runs "
            f"{', '.join(sorted(FAMILIES))}{hint}"
        )
    names: TensorNames = import_module(f"rankwright.executor.models.{FAMILIES[architecture]}").NAMES
    return names
