"""Sends requests to a leader over its own protocol, and notes when each token comes back.

It runs in a process of its own, as a front end does: in the leader's it would take turns with it at
Python's lock. Nothing here imports torch.
"""

import itertools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from rankwright.executor.messages import (
    Abort,
    Hello,
    Message,
    News,
    Sampling,
    Stop,
    Submit,
    Tokens,
    decode,
    encode,
)

# What the message to a `CappedLeader` begins with; those of the front end are JSON.
CAP = b"cap "


@dataclass
class Timeline:
    """When each request was sent and each of its tokens came back, seconds.

    `begun_s` is before the first request was put into a message, with all prompts made.
    """

    sent: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, list[float]] = field(default_factory=dict)
    begun_s: float = 0.0

    def decode_step_s(self) -> float:
        """Median time between tokens while every request of the batch is decoding.

        Raises:
            ValueError: The first was done before the last began.
        """
        start = max(times[0] for times in self.tokens.values())
        stop = min(times[-1] for times in self.tokens.values())
        gaps = []
        for times in self.tokens.values():
            inside = [moment for moment in times if start < moment <= stop]
            gaps += [after - before for before, after in itertools.pairwise(inside)]
        if not gaps:
            raise ValueError(
                f"no step decoded all {len(self.tokens)} requests at once; ask for more output "
                "tokens, or for fewer requests"
            )
        return statistics.median(gaps)

    def total_s(self) -> float:
        """From the first request to the last token."""
        return max(times[-1] for times in self.tokens.values()) - min(self.sent.values())

    def first_token_s(self) -> list[float]:
        """From each request to its first token."""
        return [self.tokens[name][0] - sent for name, sent in self.sent.items()]


class Client:
    """One end of a connection whose other end a leader has."""

    def __init__(self, connection: Connection, vocab_size: int) -> None:
        self._connection = connection
        self._vocab_size = vocab_size
        self._count = 0
        while not isinstance(decode(connection.recv_bytes()), Hello):
            pass

    def run(
        self,
        lengths: Sequence[tuple[int, int]],
        on_token: Callable[[Timeline], None] = lambda line: None,
    ) -> Timeline:
        """Send requests at once, and return when all of their tokens are there.

        Args:
            lengths: Prompt and output tokens of each request.
            on_token: Called with what came back until now, whenever a message came.
        """
        return self.keep(lengths, len(lengths), on_token)

    def keep(
        self,
        lengths: Sequence[tuple[int, int]],
        in_flight: int,
        on_token: Callable[[Timeline], None] = lambda line: None,
        *,
        until: int | None = None,
    ) -> Timeline:
        """Send requests so that `in_flight` are always running; return when all are done.

        Args:
            lengths: Prompt and output tokens of each request.
            in_flight: How many are sent at once; the next one follows when one is done.
            on_token: Called with what came back until now, whenever a message came.
            until: Done is when the first so many are; the others are aborted then. None: all.
        """
        line = Timeline()
        rng = random.Random(self._count)
        messages: dict[str, bytes] = {}
        prompts = [tuple(rng.randrange(self._vocab_size) for _ in range(one)) for one, _ in lengths]
        line.begun_s = time.perf_counter()
        for prompt, (_, output_tokens) in zip(prompts, lengths, strict=True):
            sampling = Sampling(temperature=0, max_tokens=output_tokens, ignore_eos=True)
            name = f"r{self._count}"
            messages[name] = encode(Submit(request_id=name, prompt=prompt, sampling=sampling))
            self._count += 1
        awaited = set(itertools.islice(messages, until))
        waiting = iter(messages.items())
        unfinished: set[str] = set()

        def send_next() -> None:
            for name, message in itertools.islice(waiting, in_flight - len(unfinished)):
                unfinished.add(name)
                line.sent[name] = time.perf_counter()
                line.tokens[name] = []
                self._connection.send_bytes(message)

        def receive() -> None:
            answer = decode(self._connection.recv_bytes())
            now = time.perf_counter()
            for tokens in tokens_of(answer):
                if tokens.error is not None:
                    raise RuntimeError(tokens.error)
                line.tokens[tokens.request_id] += [now] * len(tokens.token_ids)
                if tokens.finish_reason is not None:
                    unfinished.discard(tokens.request_id)
                    awaited.discard(tokens.request_id)

        send_next()
        while awaited:
            receive()
            send_next()
            on_token(line)
        for name in unfinished:
            self._connection.send_bytes(encode(Abort(request_id=name)))
        while unfinished:  # one that ends by itself meanwhile says so too
            receive()
        return line

    def cap_cache(self, blocks: int | None) -> None:
        """Leave so many blocks of each rank's cache to requests; for a `CappedLeader`."""
        self._connection.send_bytes(CAP + (b"" if blocks is None else str(blocks).encode()))

    def stop(self) -> None:
        """End the replica, and read what it still says."""
        self._connection.send_bytes(encode(Stop()))
        while True:
            try:
                self._connection.recv_bytes()
            except (EOFError, OSError):
                return


def tokens_of(message: Message) -> tuple[Tokens, ...]:
    """Return the tokens in a message of a leader."""
    if isinstance(message, News):
        return tuple(message.each())
    return (message,) if isinstance(message, Tokens) else ()


def drive(
    function: Callable[..., Any],
    connection: Connection,
    results: Connection,
    vocab_size: int,
    arguments: tuple[Any, ...],
) -> None:
    """Send what `function(client, *arguments)` returns, or why it failed; then end the replica."""
    client = Client(connection, vocab_size)
    try:
        results.send((function(client, *arguments), None))
    except Exception as error:
        results.send((None, repr(error)))
    client.stop()
