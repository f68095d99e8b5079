"""`Scheduler`: which sequences the next step computes. Pure bookkeeping on the leader, no tensors.

Continuous batching: every step decodes one token of each running sequence that waits for nothing,
then fills the token budget with prefill chunks of those that have prompt left. A sequence that
finds no free block sends the youngest one back to the queue, to be computed again from its tokens.
With a pipeline of depth `d` up to `d` batches are in flight; a sequence is in one batch that will
be sampled at a time, and its next token is scheduled once that one has come back.

One batch ahead (`ahead`), a step is decided while the one before still runs: its tokens are not
known yet, so a sequence is taken to go on, and the batch names the row of the step before that its
input token will come from (`StepBatch.from_row`). What a sequence that has ended got too much is
dropped when it comes back, and only then are its blocks free.

With attention DP each rank of a stage has sequences, and a pool of blocks, of its own (a part): a
request joins the part with most blocks free when it starts, and the token budget is shared out.

With `prefix_cache`, full blocks stay known by their tokens, and a sequence that starts (again)
takes those that its tokens begin with instead of computing them. Steps run in the order in which
they are issued, so a block is known as soon as the step that fills it is issued.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from rankwright.executor.block_pool import ROOT, BlockPool, chain_hash
from rankwright.executor.messages import FinishReason, Sampling, Tokens
from rankwright.executor.step_batch import StepBatch, from_row


@dataclass(slots=True, eq=False)
class Sequence:
    """One request on its way: its tokens, how many are in the cache, and the blocks it holds."""

    request_id: str
    tokens: list[int]
    num_prompt: int
    sampling: Sampling
    seed: int
    max_tokens: int  # prompt and output
    num_cached: int = 0  # scheduled into the cache, in flight or done
    blocks: list[int] = field(default_factory=list)
    part: int = 0  # whose pool they are of
    hashes: list[bytes] = field(default_factory=list)  # of its full blocks, as far as needed
    num_known: int = 0  # blocks that the pool knows
    num_pending: int = 0  # tokens that batches in flight draw for it
    drawn_step: int = -1  # the last batch that samples it, and its row there
    drawn_row: int = -1
    finished: bool = False

    @property
    def num_output(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def in_flight(self) -> bool:
        """Whether a batch that samples it has not come back."""
        return self.num_pending > 0

    @property
    def num_tokens(self) -> int:
        """Its tokens, those in flight too."""
        return len(self.tokens) + self.num_pending


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
        ahead: Batches decided before the tokens that they go on from are known: 0 or 1. In a
            pipeline 0: the first stage has no tokens but those that came back.
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
        assert ahead == 0 or (ahead, depth) == (1, 1)
        self.pools = tuple(BlockPool(num_blocks) for _ in range(num_parts))
        self.block_tokens = block_tokens
        self.max_num_seqs = max_num_seqs
        self.max_batched_tokens = max_batched_tokens
        # One sequence alone must always fit, or it would wait for ever.
        self.max_model_len = min(max_model_len, num_blocks * block_tokens)
        self.eos_token_ids = frozenset(eos_token_ids)
        self.depth = depth
        self.ahead = ahead
        self.prefix_cache = prefix_cache
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_steps = 0
        self.num_generated = 0
        self.num_prompt_tokens = 0
        self.num_reused_tokens = 0  # not computed, because blocks that hold them were known
        self._by_id: dict[str, Sequence] = {}

    @property
    def max_in_flight(self) -> int:
        """Batches that may be on their way at once."""
        return self.depth + self.ahead

    @property
    def num_free_blocks(self) -> int:
        """Blocks of all parts that nobody holds."""
        return sum(pool.num_free for pool in self.pools)

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
        seed = (
            sampling.seed
            if sampling.seed is not None
            else int(np.random.default_rng().integers(2**62))
        )
        sequence = Sequence(
            request_id=request_id,
            tokens=tokens,
            num_prompt=len(tokens),
            sampling=sampling,
            seed=seed,
            max_tokens=min(len(tokens) + sampling.max_tokens, self.max_model_len),
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
        budgets = [max(1, self.max_batched_tokens // len(self.pools)) for _ in self.pools]
        decodes: list[Sequence] = []
        # A share of the sequences a batch, so that the batches in flight fill the pipeline evenly.
        share = -(-len(self.running) // self.depth)
        for sequence in list(self.running):
            if len(decodes) == share:
                break
            if not self._decodes(sequence) or not budgets[sequence.part]:
                continue
            # Victims are younger, so none of those chosen already.
            if not self._reserve(sequence, 1, keep=[]):
                # Who could give it blocks is in flight: issue no more until they are back, or the
                # younger ones would run on while it waits.
                break
            decodes.append(sequence)
            budgets[sequence.part] -= 1
        chunks = self._prefill_chunks(budgets, keep=decodes)
        if not decodes and not chunks:
            return None
        return self._batch(decodes, chunks)

    def _decodes(self, sequence: Sequence) -> bool:
        """Whether its next token is to be computed from one that is known, or will be in time."""
        if sequence.num_tokens - sequence.num_cached != 1 or (
            sequence.num_tokens == sequence.num_prompt
        ):
            return False
        if not sequence.in_flight:
            return True
        return (
            sequence.num_pending <= self.ahead
            # The tokens of the step before are on the device, those of older ones are not.
            and sequence.drawn_step == self.num_steps - 1
            # It will have reached its length: nothing to go on with.
            and sequence.num_tokens < sequence.max_tokens
        )

    def _prefill_chunks(
        self, budgets: list[int], *, keep: list[Sequence]
    ) -> list[tuple[Sequence, int]]:
        chunks: list[tuple[Sequence, int]] = []
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
            known = self._known_blocks(sequence)
            # The whole prompt must find room, or two half prompts could wait for each other.
            if not self._room(part, len(sequence.tokens) + 1, known):
                break
            self.pools[part].share(known)
            sequence.blocks = known
            sequence.num_known = len(known)
            sequence.num_cached = len(known) * self.block_tokens
            count = min(len(sequence.tokens) - sequence.num_cached, budgets[part])
            if not self._reserve(sequence, count, keep=None):
                self._take_back(sequence)
                break
            self.num_reused_tokens += sequence.num_cached
            self.waiting.popleft()
            self.running.append(sequence)
            chunks.append((sequence, count))
            budgets[part] -= count
        return chunks

    def _known_blocks(self, sequence: Sequence) -> list[int]:
        """Return the blocks that the sequence's tokens begin with; its last token is computed."""
        if not self.prefix_cache:
            return []
        count = (len(sequence.tokens) - 1) // self.block_tokens
        self._hash_blocks(sequence, count)
        return self.pools[sequence.part].find(sequence.hashes[:count])

    def _hash_blocks(self, sequence: Sequence, count: int) -> None:
        """Have the hashes of its first `count` blocks."""
        for index in range(len(sequence.hashes), count):
            before = sequence.hashes[-1] if sequence.hashes else ROOT
            first = index * self.block_tokens
            tokens = sequence.tokens[first : first + self.block_tokens]
            sequence.hashes.append(chain_hash(before, tokens))

    def _know_blocks(self, sequence: Sequence) -> None:
        """Tell the pool of blocks that are full of tokens that are known here."""
        count = min(sequence.num_cached, len(sequence.tokens)) // self.block_tokens
        if not self.prefix_cache or count <= sequence.num_known:
            return
        self._hash_blocks(sequence, count)
        for index in range(sequence.num_known, count):
            self.pools[sequence.part].know(sequence.blocks[index], sequence.hashes[index])
        sequence.num_known = count

    def _emptiest_part(self, budgets: list[int]) -> int | None:
        """Return the part with most blocks to give that may take a sequence and tokens more."""
        most = -(-self.max_num_seqs // len(self.pools))
        open_parts = [
            part
            for part, budget in enumerate(budgets)
            if budget and sum(other.part == part for other in self.running) < most
        ]
        return max(open_parts, key=self._unreserved, default=None)

    def _unreserved(self, part: int) -> int:
        """Return the free blocks of `part` that its running sequences' own tokens do not need."""
        reserved = sum(
            max(0, -(-(other.num_tokens + 1) // self.block_tokens) - len(other.blocks))
            for other in self.running
            if other.part == part
        )
        return max(self.pools[part].num_free - reserved, 0)

    def _room(self, part: int, tokens: int, known: list[int]) -> bool:
        """Whether a sequence of `tokens` finds room, with `known` blocks that it shares."""
        unheld = self.pools[part].num_unheld(known)
        needed = -(-tokens // self.block_tokens) - len(known) + unheld
        return needed <= self._unreserved(part) or not any(
            other.part == part for other in self.running
        )

    def _reserve(self, sequence: Sequence, count: int, *, keep: list[Sequence] | None) -> bool:
        """Give the sequence blocks for `count` more tokens and return whether that worked.

        Younger sequences are preempted for it, but for those in `keep`; with None, nobody is.
        """
        pool = self.pools[sequence.part]
        needed = -(-(sequence.num_cached + count) // self.block_tokens) - len(sequence.blocks)
        while needed > pool.num_free:
            victim = None if keep is None else self._victim(sequence, keep)
            if victim is None:
                return False
            self._preempt(victim)
        if needed > 0:
            sequence.blocks += pool.take(needed)
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
        self._take_back(victim)
        self.running.remove(victim)
        self.waiting.appendleft(victim)

    def _batch(
        self, decodes: list[Sequence], chunks: list[tuple[Sequence, int]]
    ) -> tuple[StepBatch, list[Sequence]]:
        entries = [(sequence, 1) for sequence in decodes] + chunks
        tokens: list[int] = []
        rows: list[int] = []
        sampled: list[Sequence] = []
        for sequence, count in entries:
            if sequence.in_flight:
                tokens.append(from_row(sequence.drawn_row))
            else:
                tokens += sequence.tokens[sequence.num_cached : sequence.num_cached + count]
            sequence.num_cached += count
            self._know_blocks(sequence)
            if sequence.num_cached == sequence.num_tokens:
                sequence.drawn_step, sequence.drawn_row = self.num_steps, len(sampled)
                sampled.append(sequence)
                rows.append(len(tokens) - 1)
        width = max(len(sequence.blocks) for sequence, _ in entries)
        tables = np.zeros((len(entries), width), dtype=np.int32)
        for index, (sequence, _) in enumerate(entries):
            tables[index, : len(sequence.blocks)] = sequence.blocks
        sampling = [sequence.sampling for sequence in sampled]
        batch = StepBatch(
            step=self.num_steps,
            num_decodes=len(decodes),
            query_lens_S=np.array([count for _, count in entries], dtype=np.int64),
            context_lens_S=np.array([sequence.num_cached for sequence, _ in entries], np.int64),
            token_ids_T=np.array(tokens, dtype=np.int64),
            block_tables_SN=tables,
            parts_S=np.array([sequence.part for sequence, _ in entries], dtype=np.int64),
            sample_rows_R=np.array(rows, dtype=np.int64),
            temperature_R=np.array([one.temperature for one in sampling], dtype=np.float32),
            top_p_R=np.array([one.top_p for one in sampling], dtype=np.float32),
            top_k_R=np.array([one.top_k for one in sampling], dtype=np.int64),
            seeds_R=np.array([sequence.seed for sequence in sampled], dtype=np.int64),
            sample_positions_R=np.array([sequence.num_tokens for sequence in sampled], np.int64),
        )
        for sequence in sampled:
            sequence.num_pending += 1
        self.num_steps += 1
        return batch, sampled

    def complete(self, sampled: list[Sequence], token_ids: list[int]) -> list[Tokens]:
        """Take in the tokens of a batch; return what to tell the front end."""
        assert len(sampled) == len(token_ids)
        news: list[Tokens] = []
        for sequence, token in zip(sampled, token_ids, strict=True):
            sequence.num_pending -= 1
            if sequence.finished:  # aborted, or ended by the token before this one
                if not sequence.in_flight:
                    self._release(sequence)
                continue
            sequence.tokens.append(token)
            self.num_generated += 1
            reason = self._finish_reason(sequence, token)
            if reason is not None:
                self._finish(sequence)
            news.append(
                Tokens(request_id=sequence.request_id, token_ids=(token,), finish_reason=reason)
            )
        return news

    def _finish_reason(self, sequence: Sequence, token: int) -> FinishReason:
        sampling = sequence.sampling
        if sequence.num_output >= sampling.min_tokens and (
            token in sampling.stop_token_ids
            or (token in self.eos_token_ids and not sampling.ignore_eos)
        ):
            return "stop"
        return "length" if len(sequence.tokens) >= sequence.max_tokens else None

    def _finish(self, sequence: Sequence) -> None:
        sequence.finished = True
        self._by_id.pop(sequence.request_id, None)
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        if not sequence.in_flight:
            self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        self._take_back(sequence)

    def _take_back(self, sequence: Sequence) -> None:
        """Take its blocks; the last first, as more sequences begin alike than end alike."""
        self.pools[sequence.part].give(reversed(sequence.blocks))
        sequence.blocks = []
        sequence.num_cached = sequence.num_known = 0
