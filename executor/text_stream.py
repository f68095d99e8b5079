"""One request's tokens as text: detokenised while they come, cut at stop strings, timed."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Literal

from rankwright.executor.detokenizer import Detokenizer, StopStrings
from rankwright.executor.messages import Sampling
from rankwright.executor.metrics import RequestTimer
from rankwright.executor.requests import Requests
from rankwright.executor.tokenizer import Tokenizer


class GenerationError(Exception):
    """The engine ended a request with an error, or was stopped."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What came at once; the last piece of a text has a finish reason."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"] | None = None


async def stream_text(
    front_end: Requests,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    stops: Sequence[str] = (),
    timer: RequestTimer | None = None,
) -> AsyncGenerator[Piece, None]:
    """Yield the text that follows `prompt`, ending before the first of `stops`.

    The token that ends a text is among the token ids but not in the text. Close the iterator to
    take the request back (`contextlib.aclosing`).

    Raises:
        GenerationError: The engine ended the request with an error.
        ReplicaLostError: No replica is there.
    """
    detokenizer, cutter = Detokenizer(tokenizer.decode), StopStrings(stops)
    silent = front_end.eos_token_ids | set(sampling.stop_token_ids)
    reason = "disconnect"  # what it is if the reader goes away
    try:
        async with contextlib.aclosing(front_end.submit(prompt, sampling)) as messages:
            async for tokens in messages:
                ids = tokens.token_ids
                if timer is not None:
                    timer.tokens(len(ids))
                if tokens.finish_reason == "error" or tokens.finish_reason == "abort":
                    reason = tokens.finish_reason
                    raise GenerationError(tokens.error or "the request was taken back")
                ended_by_token = tokens.finish_reason == "stop" and ids and ids[-1] in silent
                text = detokenizer.add(ids[:-1] if ended_by_token else ids)
                if tokens.finish_reason is not None:
                    text += detokenizer.finish()
                text = cutter.add(text)
                if cutter.matched is not None:
                    reason = "stop"
                    yield Piece(text, ids, "stop")
                    return
                if tokens.finish_reason is None:
                    yield Piece(text, ids)
                    continue
                reason = tokens.finish_reason
                yield Piece(text + cutter.finish(), ids, tokens.finish_reason)
    finally:
        if timer is not None:
            timer.end(reason)


async def merge(
    streams: Sequence[AsyncGenerator[Piece, None]],
) -> AsyncGenerator[tuple[int, Piece], None]:
    """Yield the pieces of all `streams` as they come, each with the index of its stream.

    The first error of a stream ends all of them; so does closing this iterator.
    """
    if len(streams) == 1:  # the common case, without a task and a queue
        async with contextlib.aclosing(streams[0]) as stream:
            async for piece in stream:
                yield 0, piece
        return
    queue: asyncio.Queue[tuple[int, Piece] | Exception | None] = asyncio.Queue()

    async def pump(index: int, stream: AsyncGenerator[Piece, None]) -> None:
        try:
            async with contextlib.aclosing(stream):
                async for piece in stream:
                    queue.put_nowait((index, piece))
            queue.put_nowait(None)
        except Exception as error:  # raised again where it is read
            queue.put_nowait(error)

    tasks = [asyncio.create_task(pump(i, stream)) for i, stream in enumerate(streams)]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
