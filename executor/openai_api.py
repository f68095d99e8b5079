"""Requests and responses of the OpenAI-compatible API, as values.

Fields of OpenAI's API that the engine does not have are refused by name unless they carry a value
that changes nothing, so that no wish of a client is dropped silently; so are unknown fields.
"""

from typing import Annotated, Any, Literal, Self, cast

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from rankwright.executor.messages import Sampling

# Field: values that change nothing. Source: OpenAI API reference, completions and chat.
_NOT_SUPPORTED: dict[str, tuple[object, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True, False),
    "prediction": (None,),
    "presence_penalty": (None, 0),
    "reasoning_effort": (None,),
    "repetition_penalty": (None, 1),
    "response_format": (None, {"type": "text"}),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
    "web_search_options": (None,),
}
# Fields for OpenAI's own books; no answer depends on them.
_BOOKKEEPING = frozenset(
    {"metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user"}
)
_MESSAGE_NOT_SUPPORTED = ("annotations", "audio", "function_call", "refusal", "tool_calls")

MAX_CHOICES = 128  # as OpenAI: more is a mistake
MAX_STOPS = 16


def _not_supported(name: str) -> PydanticCustomError:
    message = "{name} is not supported; leave it out"
    return PydanticCustomError("not_supported", message, {"name": name})


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_supported(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        data = {k: v for k, v in cast("dict[str, Any]", data).items() if k not in _BOOKKEEPING}
        for name in sorted(_NOT_SUPPORTED.keys() & data.keys()):
            value = data.pop(name)
            # 0 == False, but `logprobs: 0` asks for log probabilities and `false` for none.
            if not any(
                value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
                for neutral in _NOT_SUPPORTED[name]
            ):
                raise _not_supported(name)
        return data


class StreamOptions(BaseModel):
    """How a stream is sent."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    include_usage: bool = False
    continuous_usage_stats: Literal[False] = False
    include_obfuscation: Literal[False] = False


Unit = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0)]


class _Generation(_Request):
    """What completions and chats have in common."""

    model: str | None = Field(default=None, description="None: the model that is served")
    max_tokens: int | None = Field(default=None, ge=1)
    min_tokens: int = Field(default=0, ge=0)
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    temperature: float | None = Field(default=None, ge=0, le=100, allow_inf_nan=False)
    top_p: Unit | None = None
    top_k: int | None = Field(default=None, ge=-1, description="0 or -1: all tokens")
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Annotated[
        list[Text],
        Field(max_length=MAX_STOPS),
        BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop or []),
    ] = Field(default=[])
    stop_token_ids: list[TokenId] = Field(default=[])
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, defaults: dict[str, Any], max_tokens: int, choice: int = 0) -> Sampling:
        """Return how to sample choice `choice` of this request.

        Args:
            defaults: Fields of `Sampling` for what the request leaves open.
            max_tokens: Length limit, resolved.
            choice: Choices differ by their seed.
        """
        said = {
            name: value
            for name in ("temperature", "top_p", "top_k")
            if (value := getattr(self, name)) is not None
        }
        if said.get("top_k") == -1:
            said["top_k"] = 0
        return Sampling.model_validate(
            {
                **defaults,
                **said,
                # Generators take 63 bits on every device.
                "seed": None if self.seed is None else (self.seed + choice) % 2**63,
                "max_tokens": max_tokens,
                # One more than can come: even a last token that would end the text is text.
                "min_tokens": max_tokens + 1 if self.ignore_eos else self.min_tokens,
                "stop_token_ids": tuple(self.stop_token_ids),
            }
        )


TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
# Kinds of prompts, by what they look like: errors then speak of one kind, not of all four.
PROMPT_KINDS = ("text", "token ids", "texts", "lists of token ids")
MAX_PROMPTS = 256


def _prompt_kind(prompt: object) -> str:
    if not isinstance(prompt, list):
        return "text"
    first = cast("list[object]", prompt)[0] if prompt else None
    return {int: "token ids", list: "lists of token ids"}.get(type(first), "texts")


class CompletionRequest(_Generation):
    """Body of `/v1/completions`."""

    prompt: Annotated[
        Annotated[Text, Tag("text")]
        | Annotated[TokenIds, Tag("token ids")]
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS), Tag("texts")]
        | Annotated[
            list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS), Tag("lists of token ids")
        ],
        Discriminator(_prompt_kind),
    ]

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry a prompt: text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        prompt = cast("list[Any]", self.prompt)  # the field's validator knows the kinds
        return [prompt] if isinstance(prompt[0], int) else prompt


class TextPart(BaseModel):
    """A part of a message; only text is understood."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_supported(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        data = dict(cast("dict[str, Any]", data))
        for name in _MESSAGE_NOT_SUPPORTED:
            if data.pop(name, None):
                raise _not_supported(name)
        return data

    def for_template(self) -> dict[str, str]:
        """Return the message as chat templates expect it."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        # Templates know "system"; "developer" is OpenAI's newer word for it.
        message = {"role": "system" if self.role == "developer" else self.role, "content": text}
        return message if self.name is None else {**message, "name": self.name}


class ChatRequest(_Generation):
    """Body of `/v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    chat_template_kwargs: dict[str, Any] = Field(default={})


class Usage(BaseModel):
    """Token counts of a request, over all choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


FinishReason = Literal["stop", "length"]


class CompletionChoice(BaseModel):
    """One text, or a piece of it in a stream."""

    index: int
    text: str
    logprobs: None = None
    finish_reason: FinishReason | None = None


class Completion(BaseModel):
    """Answer of `/v1/completions`, whole or a chunk."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class AssistantMessage(BaseModel):
    """The answer in a chat."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    """One answer in a chat."""

    index: int
    message: AssistantMessage
    logprobs: None = None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """Whole answer of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(BaseModel):
    """What a chunk adds to an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    """A piece of one answer."""

    index: int
    delta: ChatDelta
    logprobs: None = None
    finish_reason: FinishReason | None = None


class ChatChunk(BaseModel):
    """A chunk of a streamed chat."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "rankwright"
    root: str
    max_model_len: int | None = Field(description="prompt and output tokens; None until ready")


class ModelList(BaseModel):
    """Answer of `/v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetail(BaseModel):
    """What was wrong, in OpenAI's form."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """Body of every answer that is an error."""

    error: ErrorDetail
