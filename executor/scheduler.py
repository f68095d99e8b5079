"""`Scheduler`: which sequences the next step computes. Pure bookkeeping on the leader, no tensors.

Continuous batching: every step decodes one token of each running sequence that waits for nothing,
then fills the token budget with prefill chunks of those that have prompt left. A sequence that
finds no free block sends the youngest one back to the queue, to be computed again from its tokens.
With a pipeline of depth `d` up to `d` batches are in flight; a sequence is in one batch that will
be sampled at a time, and its next token is scheduled once that one has come back.

One batch ahead (`ahead`), a step is decided while those before still run: the tokens of its
sequences are not known yet, so they are taken to go on, and the batch names the rows of the step
`d` before that its input tokens will come from (`StepBatch.from_row`). What a sequence that has
ended got too much is dropped when it comes back, and only then are its blocks free.

With attention DP each rank of a stage has sequences of its own (a part, see `CacheRoom`): a request
joins the part with most blocks free when it starts, and the token budget is shared out.
"""

import secrets
from collections import deque
from collections.abc import Iterable
from itertools import chain

from rankwright.cost_model.serving import LEAST_CHUNK, LEAST_CHUNK_ALONE
from rankwright.executor.cache_room import CacheRoom
from rankwright.executor.decided_batch import decided_batch
from rankwright.executor.going_on import GoingOn
from rankwright.executor.messages import EndReason, News, Sampling
from rankwright.executor.sequence import Sequence
from rankwright.executor.step_batch import StepBatch


class Scheduler:
    """Decides batches and takes in their tokens.

    Args:
        num_blocks: Blocks of the KV cache of each part.
        block_tokens: Tokens of a block.
        max_num_seqs: Sequences running at once at most.
        max_batched_tokens: Tokens of one step at most; prompts are cut into chunks of that size.
        max_model_len: Prompt and output of one request at most, tokens.
        eos_token_ids: Tokens that end a sequence.
        depth: Stages of the pipeline, each with a batch.
        ahead: Batches decided before the tokens that they go on from are known: 0 or 1.
        num_parts: Ranks with sequences of their own.
        prefix_cache: Share blocks of equal tokens.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_tokens: int,
        max_num_seqs: int,
        max_batched_tokens: int,
        max_model_len: int,
        eos_token_ids: Iterable[int] = (),
        depth: int = 1,
        ahead: int = 0,
        num_parts: int = 1,
        prefix_cache: bool = False,
    ) -> None:
        assert ahead in (0, 1)
        self.room = CacheRoom(
            num_blocks, block_tokens, num_parts=num_parts, prefix_cache=prefix_cache
        )
        self.max_num_seqs = max_num_seqs
        self.max_batched_tokens = max_batched_tokens
        # One sequence alone must always fit, or it would wait for ever.
        self.max_model_len = min(max_model_len, num_blocks * block_tokens)
        self.eos_token_ids = frozenset(eos_token_ids)
        self.depth = depth
        self.ahead = ahead
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_steps = 0
        self.num_generated = 0
        self.num_prompt_tokens = 0
        self.num_reused_tokens = 0  # not computed, because blocks that hold them were known
        self._by_id: dict[str, Sequence] = {}
        self._going_on = GoingOn(self.room)
        # Prompt tokens of the other batches of a round.
        self._prompts_of_last: deque[int] = deque(maxlen=depth - 1)

    @property
    def max_in_flight(self) -> int:
        """Batches that may be on their way at once."""
        return self.depth + self.ahead

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self.waiting or self.running)

    def add(self, request_id: str, prompt: Iterable[int], sampling: Sampling) -> None:
        """Queue a request.

        Raises:
            ValueError: The prompt leaves no room for a token, or the id is in use.
        """
        tokens = list(prompt)
        if not tokens or len(tokens) >= self.max_model_len:
            raise ValueError(
                f"the prompt has {len(tokens)} tokens; expected 1 to {self.max_model_len - 1}, "
                f"because prompt and output together hold at most {self.max_model_len}"
            )
        if request_id in self._by_id:
            raise ValueError(f"request id {request_id!r} is in use")
        stop_ids = frozenset(sampling.stop_token_ids)
        sequence = Sequence(
            request_id=request_id,
            tokens=tokens,
            num_prompt=len(tokens),
            sampling=sampling,
            seed=secrets.randbits(62) if sampling.seed is None else sampling.seed,
            max_tokens=min(len(tokens) + sampling.max_tokens, self.max_model_len),
            stop_ids=stop_ids if sampling.ignore_eos else stop_ids | self.eos_token_ids,
        )
        self._by_id[request_id] = sequence
        self.waiting.append(sequence)
        self.num_prompt_tokens += len(tokens)

    def abort(self, request_id: str) -> bool:
        """Forget a request; return whether it was there."""
        sequence = self._by_id.get(request_id)
        if sequence is None:
            return False
        self._finish(sequence)
        return True

    def schedule(self) -> tuple[StepBatch, list[Sequence]] | None:
        """Return the next batch and the sequences it samples, in order; None: nothing to do now."""
        # Each part may fill its share of the step.
        num_parts = len(self.room.pools)
        budgets = [max(1, self.max_batched_tokens // num_parts)] * num_parts
        onward = None
        if self.ahead and self.depth == 1 and len(self.running) <= budgets[0]:
            onward = self._going_on.find(self.running, self._decodes)
        decodes = self._decoding(budgets) if onward is None else onward.sequences
        for sequence in decodes if num_parts > 1 else ():
            budgets[sequence.part] -= 1
        if num_parts == 1:
            budgets[0] -= len(decodes)
        share = self._prompt_share(LEAST_CHUNK if decodes else LEAST_CHUNK_ALONE)
        chunks = self._prefill_chunks([min(one, share) for one in budgets], keep=decodes)
        if not decodes and not chunks:
            return None
        self._prompts_of_last.append(sum(count for _, count in chunks))
        if onward is None or chunks:
            return self._batch(decodes, chunks)
        self.num_steps += 1
        return self._going_on.go_on(self.num_steps - 1, onward)

    def _decoding(self, budgets: list[int]) -> list[Sequence]:
        """Return the sequences that the next batch decodes, with blocks for a token more."""
        decodes: list[Sequence] = []
        left = budgets.copy()
        # A share of the sequences a batch, so that the batches in flight fill the pipeline evenly.
        share = -(-len(self.running) // self.depth)
        for sequence in list(self.running):
            if len(decodes) == share:
                break
            if not self._decodes(sequence) or not left[sequence.part]:
                continue
            # Victims are younger, so none of those chosen already.
            if self.room.is_full(sequence) and not self._reserve(sequence, 1, keep=[]):
                # Who could give it blocks is in flight: issue no more until they are back, or the
                # younger ones would run on while it waits.
                break
            decodes.append(sequence)
            left[sequence.part] -= 1
        return decodes

    def _decodes(self, sequence: Sequence) -> bool:
        """Whether its next token is to be computed from one that is known, or will be in time."""
        # Asked of every sequence in every step: properties would take most of the time.
        pending = sequence.num_pending
        num_tokens = len(sequence.tokens) + pending
        if num_tokens - sequence.num_cached != 1 or num_tokens == sequence.num_prompt:
            return False
        if not pending:
            return True
        return (
            pending <= self.ahead
            # One of each batch that goes round the stages: its turn has come.
            and sequence.drawn_step == self.num_steps - self.depth
            # It will have reached its length: nothing to go on with.
            and num_tokens < sequence.max_tokens
        )

    def _prompt_share(self, least: int) -> int:
        """Return how many prompt tokens of each part the next batch takes at most.

        In a pipeline batches take turns in the stages, and each waits for the longest: prompts are
        shared out evenly over those of a round.
        """
        most = self.max_batched_tokens
        if self.depth == 1:
            return most
        left = sum(self._prompts_of_last)
        for sequence in chain(self.running, self.waiting):
            if not sequence.in_flight and not self._decodes(sequence):
                left += len(sequence.tokens) - sequence.num_cached
            if left >= self.depth * most:
                return most
        return min(most, max(least, -(-left // (self.depth * len(self.room.pools)))))

    def _prefill_chunks(
        self, budgets: list[int], *, keep: list[Sequence]
    ) -> list[tuple[Sequence, int]]:
        chunks: list[tuple[Sequence, int]] = []
        if not self.waiting and len(keep) == len(self.running):
            return chunks  # all of them decode
        oldest = {sequence.part: sequence for sequence in reversed(self.running)}
        for sequence in list(self.running):
            if not sequence.blocks:
                continue  # sent back to the queue just now
            left = len(sequence.tokens) - sequence.num_cached
            budget = budgets[sequence.part]
            if budget and not sequence.in_flight and left > 0 and not self._decodes(sequence):
                count = min(left, budget)
                # Only the oldest may take from others: two half prompts must not swap for ever.
                may_take = sequence is oldest[sequence.part]
                if self._reserve(sequence, count, keep=keep if may_take else None):
                    chunks.append((sequence, count))
                    budgets[sequence.part] -= count
        while self.waiting and len(self.running) < self.max_num_seqs:
            sequence = self.waiting[0]
            part = self._emptiest_part(budgets)
            if part is None:
                break
            sequence.part = part
            if not self.room.begin(sequence, self.running):
                break
            count = min(len(sequence.tokens) - sequence.num_cached, budgets[part])
            if not self._reserve(sequence, count, keep=None):
                self.room.take_back(sequence)
                break
            self.num_reused_tokens += sequence.num_cached
            self.waiting.popleft()
            self.running.append(sequence)
            chunks.append((sequence, count))
            budgets[part] -= count
        return chunks

    def _emptiest_part(self, budgets: list[int]) -> int | None:
        """Return the part with most blocks to give that may take a sequence and tokens more."""
        most = -(-self.max_num_seqs // len(self.room.pools))
        open_parts = [
            part
            for part, budget in enumerate(budgets)
            if budget and sum(other.part == part for other in self.running) < most
        ]
        return max(
            open_parts, key=lambda part: self.room.unreserved(part, self.running), default=None
        )

    def _reserve(self, sequence: Sequence, count: int, *, keep: list[Sequence] | None) -> bool:
        """Give the sequence blocks for `count` more tokens and return whether that worked.

        Younger sequences are preempted for it, but for those in `keep`; with None, nobody is.
        """
        while self.room.missing(sequence, count) > 0:
            victim = None if keep is None else self._victim(sequence, keep)
            if victim is None:
                return False
            self._preempt(victim)
        self.room.grow(sequence, count)
        return True

    def _victim(self, sequence: Sequence, keep: list[Sequence]) -> Sequence | None:
        """The youngest of its part that is not in flight and younger than `sequence`."""
        place = self.running.index(sequence)
        for other in reversed(self.running[place + 1 :]):
            if (
                other.part == sequence.part
                and not other.in_flight
                and other.blocks
                and other not in keep
            ):
                return other
        return None

    def _preempt(self, victim: Sequence) -> None:
        self.room.take_back(victim)
        self.running.remove(victim)
        self.waiting.appendleft(victim)

    def _batch(
        self, decodes: list[Sequence], chunks: list[tuple[Sequence, int]]
    ) -> tuple[StepBatch, list[Sequence]]:
        entries = [(sequence, 1) for sequence in decodes] + chunks
        batch, sampled = decided_batch(self.num_steps, entries, num_decodes=len(decodes))
        for sequence, _ in entries:
            if sequence.num_cached >= (sequence.num_known + 1) * self.room.block_tokens:
                self.room.know(sequence)
        for sequence in sampled:
            sequence.num_pending += 1
        self._going_on.note(batch, sampled)
        self.num_steps += 1
        return batch, sampled

    def complete(self, sampled: list[Sequence], token_ids: list[int]) -> News:
        """Take in the tokens of a batch; return what to tell the front end."""
        self._going_on.note_complete(sampled)
        names: list[str] = []
        told: list[int] = []
        ends: list[tuple[int, EndReason]] = []
        # A loop over every sequence in every step: it has nothing in it that can be elsewhere.
        for sequence, token in zip(sampled, token_ids, strict=True):
            sequence.num_pending -= 1
            if sequence.finished:  # aborted, or ended by the token before this one
                if not sequence.in_flight:
                    self.room.take_back(sequence)
                continue
            tokens = sequence.tokens
            tokens.append(token)
            if token in sequence.stop_ids or len(tokens) >= sequence.max_tokens:
                reason = self._end_reason(sequence, token)
                if reason is not None:
                    self._finish(sequence)
                    ends.append((len(names), reason))
            names.append(sequence.request_id)
            told.append(token)
        self.num_generated += len(told)
        return News(request_ids=tuple(names), token_ids=tuple(told), ends=tuple(ends))

    def _end_reason(self, sequence: Sequence, token: int) -> EndReason | None:
        stops = token in sequence.stop_ids and sequence.num_output >= sequence.sampling.min_tokens
        if stops:
            return "stop"
        return "length" if len(sequence.tokens) >= sequence.max_tokens else None

    def _finish(self, sequence: Sequence) -> None:
        sequence.finished = True
        self._going_on.note_end()
        self._by_id.pop(sequence.request_id, None)
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        if not sequence.in_flight:
            self.room.take_back(sequence)
