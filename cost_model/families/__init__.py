"""One reader a model family: `config.json` to `ModelSpec`.

A new family is one file here and one row in `FAMILIES`. A reader is a module with
`read(config: Config, name: str) -> ModelSpec`; it loads on first use.
"""

from collections.abc import Callable
from importlib import import_module

from rankwright.cost_model.families.config import Config
from rankwright.cost_model.model_spec import ModelSpec

Reader = Callable[[Config, str], ModelSpec]

# Class name in "architectures" of config.json -> module in this folder.
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


def reader_of(architecture: str) -> Reader:
    """Return the reader of `architecture`.

    Raises:
        ValueError: no family reads it; the message names those that are read.
    """
    if architecture not in FAMILIES:
        raise ValueError(
            f"architecture {architecture!r} is not supported; supported are "
            f"{', '.join(sorted(FAMILIES))}"
        )
    module = import_module(f"rankwright.cost_model.families.{FAMILIES[architecture]}")
    reader: Reader = module.read
    return reader
