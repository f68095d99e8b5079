"""What the front end and the leader of each replica say to each other.

One JSON object a message, over an authenticated `multiprocessing.connection` socket. The front end
listens; the leader (rank 0 of a replica) connects, says `Hello`, and then takes requests.
"""

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from rankwright.topology.value import Value

FinishReason = Literal["stop", "length", "abort", "error"] | None
# Why the engine ends a request that nothing is wrong with.
EndReason = Literal["stop", "length"]


class Sampling(Value):
    """How the next token is chosen."""

    temperature: float = Field(default=1.0, ge=0, le=100, description="0: greedy")
    top_k: int = Field(default=0, ge=0, description="0: all tokens")
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int | None = Field(default=None, description="None: drawn by the engine")
    max_tokens: int = Field(default=16, ge=1)
    min_tokens: int = Field(default=0, ge=0)
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = Field(default=False, description="for benchmarks: run to max_tokens")


class Submit(Value):
    """Front end to leader: generate."""

    kind: Literal["submit"] = "submit"
    request_id: str
    prompt: tuple[int, ...] = Field(min_length=1, description="token ids")
    sampling: Sampling = Sampling()


class Abort(Value):
    """Front end to leader: forget a request."""

    kind: Literal["abort"] = "abort"
    request_id: str


class Stop(Value):
    """Front end to leader: end every rank of the replica, once idle if `drain`."""

    kind: Literal["stop"] = "stop"
    drain: bool = False


class Hello(Value):
    """Leader to front end, once, when weights are loaded and graphs captured."""

    kind: Literal["hello"] = "hello"
    replica: int
    num_kv_blocks: int
    block_tokens: int
    max_num_seqs: int
    max_model_len: int
    eos_token_ids: tuple[int, ...] = ()
    peak_memory_bytes: tuple[int, ...] = Field(default=(), description="of each rank, after start")


class Tokens(Value):
    """Leader to front end: new tokens of one request, and why it ended if it did."""

    kind: Literal["tokens"] = "tokens"
    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason = None
    error: str | None = None


class News(Value):
    """Leader to front end: what one step brought, a token of each of its requests.

    In columns: a value and an object for each of 256 requests take longer than the step's schedule.
    """

    kind: Literal["news"] = "news"
    request_ids: tuple[str, ...]
    token_ids: tuple[int, ...]
    ends: tuple[tuple[int, EndReason], ...] = Field(
        default=(), description="which of the requests ended, by their place here, and why"
    )

    def each(self) -> list[Tokens]:
        """Return the news of each request."""
        reasons: dict[int, EndReason] = dict(self.ends)
        rows = zip(self.request_ids, self.token_ids, strict=True)
        return [
            Tokens(request_id=name, token_ids=(token,), finish_reason=reasons.get(place))
            for place, (name, token) in enumerate(rows)
        ]


class Stats(Value):
    """Leader to front end: state after a step, at most ten times a second, also when idle."""

    kind: Literal["stats"] = "stats"
    replica: int
    steps: int
    running: int
    waiting: int
    free_kv_blocks: int
    generated_tokens: int
    prompt_tokens: int
    reused_tokens: int = Field(default=0, description="not computed: their KV blocks were there")


Message = Annotated[
    Submit | Abort | Stop | Hello | Tokens | News | Stats, Field(discriminator="kind")
]
_ADAPTER: TypeAdapter[Message] = TypeAdapter(Message)


def encode(message: Message) -> bytes:
    """Return `message` as JSON bytes."""
    return message.model_dump_json().encode()


def decode(data: bytes) -> Message:
    """Return the message in `data`.

    Raises:
        pydantic.ValidationError: `data` is no message.

    >>> decode(encode(Abort(request_id="a")))
    Abort(kind='abort', request_id='a')
    """
    return _ADAPTER.validate_json(data)
