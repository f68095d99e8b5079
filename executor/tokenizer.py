"""Text to token ids and back, and chat messages to a prompt.

Reads `tokenizer.json` with the `tokenizers` library and renders the chat template with jinja2's
sandbox (a template comes with a model, and is code of strangers). transformers would do both, but
importing it takes seconds, and the command line would wait for it.
"""

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, cast

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import tokenizers

from rankwright.executor.checkpoint import read_json


class Tokenizer(Protocol):
    """What serving needs of a tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of `text`, with the model's first token if `add_special_tokens`."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of `token_ids`, without special tokens."""
        ...

    def render_chat(self, messages: Sequence[dict[str, str]], **variables: object) -> str:
        """Return the prompt of a chat; ValueError where the template refuses it."""
        ...


class HubTokenizer:
    """The tokenizer of a Hugging Face folder."""

    def __init__(self, folder: Path) -> None:
        """Read `tokenizer.json`, `tokenizer_config.json` and the chat template in `folder`.

        Raises:
            ValueError: There is no `tokenizer.json`, or a file is malformed.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(_no_tokenizer(folder))
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is no tokenizer: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = read_json(folder / "tokenizer_config.json")
        # Some Llama tokenizers say in the config, not in tokenizer.json, that a text begins with
        # BOS; transformers then rebuilds the post-processor (LlamaTokenizerFast).
        bos = _token_text(config.get("bos_token"))
        self._bos_id = (
            self._tokenizer.token_to_id(bos) if bos and config.get("add_bos_token") else None
        )
        self._variables = {
            name: text
            for name, value in config.items()
            if name.endswith("_token") and (text := _token_text(value)) is not None
        }
        source = _chat_template(folder, config)
        self._template = None if source is None else _compile(source, folder)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of `text`."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        if add_special_tokens and self._bos_id is not None and ids[:1] != [self._bos_id]:
            ids = [self._bos_id, *ids]
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of `token_ids`, without special tokens."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text

    def render_chat(self, messages: Sequence[dict[str, str]], **variables: object) -> str:
        """Return the prompt of a chat, ending where the assistant's answer begins.

        Raises:
            ValueError: There is no template, or it refuses the messages.
        """
        if self._template is None:
            raise ValueError("the model has no chat template; use a plain completion")
        try:
            return self._template.render(
                {
                    **self._variables,
                    "messages": list(messages),
                    "add_generation_prompt": True,
                    **variables,
                }
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"the chat template refuses the messages: {error}") from None


class ByteTokenizer:
    """One token a byte, for models without a tokenizer (random weights in a benchmark).

    >>> ByteTokenizer().decode([104, 105, 1000])
    'hi<1000>'
    """

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the UTF-8 bytes of `text`."""
        return list(text.encode())

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of bytes; ids above 255 stand as numbers in angle brackets."""
        data = b"".join(
            bytes([token]) if token < 256 else f"<{token}>".encode() for token in token_ids
        )
        return data.decode(errors="replace")

    def render_chat(self, messages: Sequence[dict[str, str]], **variables: object) -> str:
        """Return the messages, one a line, after their role."""
        lines = [f"{message['role']}: {message['content']}" for message in messages]
        return "\n".join([*lines, "assistant:"])


def load_tokenizer(folder: Path | None) -> Tokenizer:
    """Return the tokenizer in `folder`; one token a byte where there is no folder.

    Raises:
        ValueError: The folder has no fast tokenizer, or a malformed one.
    """
    return ByteTokenizer() if folder is None else HubTokenizer(folder)


def _no_tokenizer(folder: Path) -> str:
    slow = next(
        (name for name in ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
         if (folder / name).is_file()),
        None,
    )  # fmt: skip
    if slow is None:
        return f"{folder} has no tokenizer.json; copy it there from the model's repository"
    return (
        f"{folder} has only a slow tokenizer ({slow}); write tokenizer.json once with "
        f"transformers: AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained(...)"
    )


def _token_text(value: object) -> str | None:
    """Text of a special token, which a config gives as a string or as an object."""
    if isinstance(value, dict):
        value = cast("dict[str, object]", value).get("content")
    return value if isinstance(value, str) else None


def _chat_template(folder: Path, config: dict[str, object]) -> str | None:
    """Source of the template: a file of its own in newer models, else in the config."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    value = config.get("chat_template")
    if value is None:
        value = read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(value, list):  # several, by name
        named = {
            str(item["name"]): item["template"] for item in cast("list[dict[str, object]]", value)
        }
        value = named.get("default")
    return value if isinstance(value, str) else None


class _Generation(jinja2.ext.Extension):
    """Lets `{% generation %}` stand: training masks need it, a prompt does not."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it as a plain set

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Return what stands between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(source: str, folder: Path) -> jinja2.Template:
    # Settings and names as in transformers/utils/chat_template_utils.py, which authors test with.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template in {folder} is malformed: {error}") from None


def _to_json(value: object, ensure_ascii: bool = False, indent: int | None = None) -> str:
    # jinja2's own filter escapes for HTML, which a prompt must not have.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format_: str) -> str:
    return datetime.datetime.now().strftime(format_)
