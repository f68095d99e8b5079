"""A byte-level tokenizer small enough to reason about: id 0 ends a text, ids 1 to 256 are bytes."""

import json
from pathlib import Path

import tokenizers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

TEMPLATE = (
    "{% if messages[0]['role'] == 'assistant' %}"
    "{{ raise_exception('the assistant cannot speak first') }}{% endif %}"
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def bytes_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins of the 256 bytes, with ids 1 to 256."""
    return {char: i for i, char in enumerate(sorted(ByteLevel.alphabet()), start=1)}


def write_tokenizer(folder: Path, *, template: str | None = TEMPLATE) -> Path:
    """Write the tokenizer's files to `folder`; return it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizers.Tokenizer(BPE(vocab={"</s>": 0, **bytes_alphabet()}, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, object] = {"eos_token": {"content": "</s>"}}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
