"""From a checked request to an answer, whole or in chunks: what the routes share.

Knows the API's values and the streams of the engine, but nothing of HTTP servers.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from rankwright.executor.front_end import ReplicaLostError
from rankwright.executor.http_errors import ApiError
from rankwright.executor.metrics import Metrics
from rankwright.executor.openai_api import (
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatRequest,
    Completion,
    CompletionChoice,
    CompletionRequest,
    FinishReason,
    Usage,
)
from rankwright.executor.requests import Requests
from rankwright.executor.text_stream import GenerationError, Piece, merge, stream_text
from rankwright.executor.tokenizer import Tokenizer

# Longer texts are tokenised on a thread, so that other streams go on meanwhile (about 1 ms).
_LONG_TEXT_CHARS = 4096


@dataclass(slots=True)
class Service:
    """What the routes work with.

    Attributes:
        front_end: The way to the replicas.
        tokenizer: Of the model.
        model_name: Name that requests give.
        vocab_size: Token ids are below it.
        sampling_defaults: For what requests leave open.
        metrics: Of this server.
        draining: Set when it takes no new requests.
        created_s: Unix time, for `/v1/models`.
    """

    front_end: Requests
    tokenizer: Tokenizer
    model_name: str
    vocab_size: int
    sampling_defaults: dict[str, float | int]
    metrics: Metrics
    draining: bool = False
    created_s: int = field(default_factory=lambda: int(time.time()))

    def check_open(self, model: str | None) -> None:
        """Refuse what cannot be answered now.

        Raises:
            ApiError: The model is another one, or the server takes no requests.
        """
        if model is not None and model != self.model_name:
            raise ApiError(
                f"model {model!r} is not served here; {self.model_name!r} is",
                status=404,
                param="model",
                code="model_not_found",
            )
        if self.draining:
            raise ApiError("the server is shutting down", status=503, code="draining")
        if self.front_end.lost.is_set():
            raise ApiError("a replica is gone", status=503, code="replica_lost")
        if not self.front_end.is_ready:
            raise ApiError("the model is still loading", status=503, code="not_ready")

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids of `text`."""
        if len(text) < _LONG_TEXT_CHARS:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(
            self.tokenizer.encode, text, add_special_tokens=add_special_tokens
        )

    def max_tokens(
        self, prompt: list[int], asked: int | None, default: int | None, param: str
    ) -> int:
        """Return how many tokens may follow `prompt`, which came in the field `param`.

        Raises:
            ApiError: The prompt is empty or not of this vocabulary, or it and the answer do not
                fit the context.
        """
        limit = self.front_end.max_model_len
        if not prompt:
            raise ApiError("the prompt has no tokens", param=param, code="empty_prompt")
        if max(prompt) >= self.vocab_size:
            raise ApiError(
                f"token {max(prompt)} is not in the vocabulary of {self.vocab_size}", param=param
            )
        room = limit - len(prompt)
        if room < 1 or (asked is not None and asked > room):
            wanted = "" if asked is None else f" and max_tokens is {asked}"
            raise ApiError(
                f"the context holds {limit} tokens: the prompt has {len(prompt)}{wanted}; "
                "shorten the prompt or ask for fewer tokens",
                param=param if room < 1 else "max_tokens",
                code="context_length_exceeded",
            )
        if asked is not None:
            return asked
        return room if default is None else min(default, room)


@dataclass(frozen=True, slots=True)
class Job:
    """A request that has been checked, ready to run.

    Attributes:
        prompts: Token ids; each is answered `n` times.
        streams: One a choice, in order.
    """

    prompts: list[list[int]]
    streams: list[AsyncGenerator[Piece, None]]

    def usage(self, num_tokens: int) -> Usage:
        """Return the counts after `num_tokens` output tokens."""
        num_prompt = sum(map(len, self.prompts))
        return Usage(
            prompt_tokens=num_prompt,
            completion_tokens=num_tokens,
            total_tokens=num_prompt + num_tokens,
        )


def make_job(
    service: Service,
    body: CompletionRequest | ChatRequest,
    prompts: list[list[int]],
    asked: int | None,
    default: int | None,
    arrived_s: float,
) -> Job:
    """Return the job of a request; nothing runs until its streams are read.

    Args:
        service: What answers it.
        body: The request.
        prompts: Its prompts as token ids.
        asked: How many tokens it wants at most; None: `default`.
        default: None: as many as the context holds.
        arrived_s: `time.monotonic` when it came.

    Raises:
        ApiError: A prompt cannot be answered (`Service.max_tokens`).
    """
    param = "messages" if isinstance(body, ChatRequest) else "prompt"
    limits = [service.max_tokens(prompt, asked, default, param) for prompt in prompts]
    streams = [
        stream_text(
            service.front_end,
            service.tokenizer,
            prompt,
            body.sampling(service.sampling_defaults, max_tokens, choice),
            stops=body.stop,
            timer=service.metrics.watch(len(prompt), arrived_s),
        )
        for prompt, max_tokens in zip(prompts, limits, strict=True)
        for choice in range(body.n)
    ]
    return Job(prompts, streams)


async def gather(job: Job) -> tuple[list[str], list[FinishReason], int]:
    """Return the whole texts, why each ended, and how many tokens came.

    Raises:
        ApiError: The engine failed.
    """
    texts = [""] * len(job.streams)
    reasons: list[FinishReason] = ["length"] * len(job.streams)
    num_tokens = 0
    async with contextlib.aclosing(_pieces(job)) as pieces:
        async for index, piece in pieces:
            texts[index] += piece.text
            num_tokens += len(piece.token_ids)
            if piece.finish_reason is not None:
                reasons[index] = piece.finish_reason
    return texts, reasons, num_tokens


async def completion_events(
    job: Job, head: dict[str, Any], wants_usage: bool
) -> AsyncGenerator[BaseModel, None]:
    """Yield the chunks of a streamed completion."""
    # OpenAI sends `"usage": null` in the other chunks of a stream that ends with the counts.
    nothing: dict[str, Any] = {"usage": None} if wants_usage else {}
    num_tokens = 0
    async with contextlib.aclosing(_pieces(job)) as pieces:
        async for index, piece in pieces:
            num_tokens += len(piece.token_ids)
            if piece.text or piece.finish_reason:
                choice = CompletionChoice(
                    index=index, text=piece.text, logprobs=None, finish_reason=piece.finish_reason
                )
                yield Completion(object="text_completion", **head, choices=[choice], **nothing)
    if wants_usage:
        yield Completion(object="text_completion", **head, choices=[], usage=job.usage(num_tokens))


async def chat_events(
    job: Job, head: dict[str, Any], wants_usage: bool
) -> AsyncGenerator[BaseModel, None]:
    """Yield the chunks of a streamed chat: roles first, then what is said."""
    nothing: dict[str, Any] = {"usage": None} if wants_usage else {}

    def chunk(index: int, delta: ChatDelta, reason: FinishReason | None) -> ChatChunk:
        choice = ChatChunkChoice(index=index, delta=delta, logprobs=None, finish_reason=reason)
        return ChatChunk(object="chat.completion.chunk", **head, choices=[choice], **nothing)

    for index in range(len(job.streams)):
        yield chunk(index, ChatDelta(role="assistant", content=""), None)
    num_tokens = 0
    async with contextlib.aclosing(_pieces(job)) as pieces:
        async for index, piece in pieces:
            num_tokens += len(piece.token_ids)
            if piece.text:
                yield chunk(index, ChatDelta(content=piece.text), None)
            if piece.finish_reason is not None:
                yield chunk(index, ChatDelta(), piece.finish_reason)
    if wants_usage:
        yield ChatChunk(
            object="chat.completion.chunk", **head, choices=[], usage=job.usage(num_tokens)
        )


async def _pieces(job: Job) -> AsyncGenerator[tuple[int, Piece], None]:
    """Yield the pieces of a job; what goes wrong becomes what the client is told."""
    try:
        async with contextlib.aclosing(merge(job.streams)) as pieces:
            async for item in pieces:
                yield item
    except GenerationError as error:
        raise ApiError(f"generation failed: {error}", status=500, code="engine_error") from None
    except ReplicaLostError as error:
        raise ApiError(str(error), status=503, code="replica_lost") from None
