"""`generate`: answer some prompts offline, over the same ranks and socket as the server."""

import asyncio
import contextlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rankwright.executor.backends.agent import Agent
from rankwright.executor.checkpoint import read_sampling_defaults
from rankwright.executor.messages import Sampling
from rankwright.executor.preflight import check_machine, find_model, joined, make_options
from rankwright.executor.progress import Progress
from rankwright.executor.run_options import WORKER, DeviceKind, LoadFormat, RunOptions
from rankwright.executor.session import Session, start
from rankwright.executor.signals import Signals
from rankwright.executor.start_checks import check_start
from rankwright.executor.text_stream import stream_text
from rankwright.executor.tokenizer import Tokenizer
from rankwright.planner.plan import Plan

OnText = Callable[[int, str], None]


@dataclass(frozen=True, slots=True)
class Generation:
    """The answer to one prompt.

    Attributes:
        text: What was generated.
        token_ids: Its tokens, with the one that ended it.
        finish_reason: 'stop': a token or string ended it; 'length': the limit did.
        num_prompt_tokens: Tokens of the prompt.
        ttft_s: From the submission of all prompts to its first token.
        total_s: From the submission of all prompts to its last token.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]
    num_prompt_tokens: int
    ttft_s: float
    total_s: float


def generate(
    plan: Plan,
    prompts: Sequence[str | Sequence[int]],
    sampling: Sampling | Mapping[str, Any] | None = None,
    *,
    chat: bool = False,
    system: str | None = None,
    stops: Sequence[str] = (),
    on_text: OnText | None = None,
    load_format: LoadFormat = "auto",
    model_path: Path | str | None = None,
    backend: str = "auto",
    device: DeviceKind = "auto",
    start_timeout_s: float = 1800.0,
    force: bool = False,
    quiet: bool = False,
    worker: Sequence[str] = WORKER,
    agent: Agent | None = None,
) -> list[Generation]:
    """Return the answers to `prompts`, in their order; ranks start before and end after.

    Args:
        plan: What to run.
        prompts: Texts, or token ids.
        sampling: How tokens are chosen. What a mapping leaves open comes from the model's
            `generation_config.json`, then from `Sampling`.
        chat: Put each text into the model's chat template, as a user's message.
        system: System message before it; needs `chat`.
        stops: Strings that end an answer.
        on_text: Called with the prompt's index and each piece of text as it comes.
        load_format: 'auto': safetensors; 'dummy': random weights.
        model_path: Folder with weights and tokenizer; None: found by the model's name.
        backend: 'local' (torchrun) or 'ray'; 'auto': Ray for several machines, else local.
        device: 'auto': what the plan says.
        start_timeout_s: Until every replica must be ready.
        force: Run also where this machine is not the one the plan was made for.
        quiet: Show no progress.
        worker: Command of a rank.
        agent: Started before, so that it has imported PyTorch by now; None: one of its own.

    Raises:
        ValueError: Something asked for cannot be: this machine, the weights, a prompt.
        ProbeError: This machine cannot be read.
        MissingToolError: What the kernels need is not here.
        LaunchError: A rank failed.
        KeyboardInterrupt: SIGINT or SIGTERM came; the ranks have ended.
    """
    options = make_options(
        plan,
        backend=backend,
        load_format=load_format,
        model_path=model_path,
        device=device,
        start_timeout_s=start_timeout_s,
        worker=worker,
        force=force,
    )
    if not force:
        check_machine(plan, options)
    options, tokenizer = find_model(plan, options)
    notes = check_start(plan, options)
    for note in () if quiet else notes:
        print(f"rankwright: warning: {note}", file=sys.stderr)
    defaults, _ = read_sampling_defaults(options.model_path)
    if not isinstance(sampling, Sampling):
        sampling = Sampling.model_validate({**defaults, **(sampling or {})})
    ids = [encode_prompt(tokenizer, prompt, chat=chat, system=system) for prompt in prompts]
    for index, prompt in enumerate(ids):
        check_length(plan, index, prompt, sampling)
    with joined(plan, options) as options:
        run = _run(plan, options, tokenizer, ids, sampling, stops, on_text, agent, quiet=quiet)
        return asyncio.run(run)


def encode_prompt(
    tokenizer: Tokenizer, prompt: str | Sequence[int], *, chat: bool, system: str | None
) -> list[int]:
    """Return the token ids of a prompt.

    Raises:
        ValueError: There is no chat template, or it refuses the prompt.
    """
    if not isinstance(prompt, str):
        return list(prompt)
    if not chat:
        return tokenizer.encode(prompt)
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": prompt})
    return tokenizer.encode(tokenizer.render_chat(messages), add_special_tokens=False)


def check_length(plan: Plan, index: int, prompt: Sequence[int], sampling: Sampling) -> None:
    """Check that a prompt and its answer fit the plan's context.

    Raises:
        ValueError: They do not, or the prompt is empty or not of the model's vocabulary.
    """
    which, limit = f"prompt {index}", plan.limits.max_model_len
    if not prompt:
        raise ValueError(f"{which} is empty; give at least one token")
    if not 0 <= min(prompt) <= max(prompt) < plan.model.vocab_size:
        raise ValueError(
            f"{which} has token {max(prompt)}, the vocabulary is 0 to {plan.model.vocab_size - 1}"
        )
    if len(prompt) + sampling.max_tokens > limit:
        raise ValueError(
            f"{which} has {len(prompt)} tokens and max_tokens is {sampling.max_tokens}, the plan "
            f"allows {limit} together; shorten it, ask for fewer tokens, or plan with longer ones"
        )


async def _run(
    plan: Plan,
    options: RunOptions,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stops: Sequence[str],
    on_text: OnText | None,
    agent: Agent | None,
    *,
    quiet: bool,
) -> list[Generation]:
    signals = Signals()
    with Progress(plan, quiet=quiet) as progress:
        async with start(plan, options, agent) as session:
            if await signals.before(session.ready(progress.show)):
                raise KeyboardInterrupt
            if not quiet:
                for warning in session.warnings():
                    print(f"rankwright: {warning}", file=sys.stderr)
            progress.ready(plan.model.name)
            started_s = time.monotonic()
            answers = asyncio.gather(
                *(
                    _answer(session, tokenizer, i, prompt, sampling, stops, on_text, started_s)
                    for i, prompt in enumerate(prompts)
                )
            )
            failure = asyncio.create_task(session.failure())
            first: set[asyncio.Future[Any]] = {answers, failure}
            both = asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            try:
                if await signals.before(both):
                    raise KeyboardInterrupt
                # A rank that failed also ends the answers, with less to say about it.
                if session.front_end.lost.is_set() or failure.done():
                    raise await failure
            finally:
                failure.cancel()
                answers.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await answers
                session.front_end.abort_all("the run has ended")
            await session.stop()
            return answers.result()


async def _answer(
    session: Session,
    tokenizer: Tokenizer,
    index: int,
    prompt: Sequence[int],
    sampling: Sampling,
    stops: Sequence[str],
    on_text: OnText | None,
    started_s: float,
) -> Generation:
    text = ""
    ids: list[int] = []
    first_s: float | None = None
    reason: Literal["stop", "length"] = "length"
    stream = stream_text(session.front_end, tokenizer, prompt, sampling, stops=stops)
    async with contextlib.aclosing(stream) as pieces:
        async for piece in pieces:
            if first_s is None and piece.token_ids:
                first_s = time.monotonic() - started_s
            ids.extend(piece.token_ids)
            text += piece.text
            if on_text is not None and piece.text:
                on_text(index, piece.text)
            reason = piece.finish_reason or reason
    total_s = time.monotonic() - started_s
    return Generation(text, tuple(ids), reason, len(prompt), first_s or total_s, total_s)
