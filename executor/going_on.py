"""`GoingOn`: finds that a step decodes what the step before samples, without asking each sequence.

Asking each of 256 sequences takes the scheduler longer than all else that a step costs the host.
Where one batch is decided ahead of the only one in flight, those that the one in flight samples
are, but for the few that end, those that decode next; what differs is in arrays (`Continuation`).
In every other case nothing is found, and the scheduler asks.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rankwright.executor.cache_room import CacheRoom
from rankwright.executor.continuation import continued
from rankwright.executor.sequence import Sequence
from rankwright.executor.step_batch import Continuation, Int32, Int64, StepBatch


@dataclass(frozen=True, slots=True)
class Onward:
    """Sequences that go on by a token each, with blocks for it, in the order of their rows."""

    sequences: list[Sequence]
    kept_R: Int32 | None
    context_lens_S: Int64  # before the step


class GoingOn:
    """Follows the batches of a scheduler.

    Args:
        room: Where its sequences have their blocks.
    """

    def __init__(self, room: CacheRoom) -> None:
        self._room = room
        self._before: StepBatch | None = None
        self._sampled: list[Sequence] = []
        self._max_tokens_R = np.zeros(0, dtype=np.int64)
        self._in_flight: deque[list[Sequence]] = deque()
        self._has_ended = False

    def note(self, batch: StepBatch, sampled: list[Sequence]) -> None:
        """Take in a batch that was decided by asking."""
        self._before, self._sampled = batch, sampled
        self._max_tokens_R = np.array([one.max_tokens for one in sampled], dtype=np.int64)
        self._has_ended = False
        self._in_flight.append(sampled)

    def note_complete(self, sampled: list[Sequence]) -> None:
        """Take in that a batch has come back."""
        if self._in_flight and self._in_flight[0] is sampled:
            self._in_flight.popleft()

    def note_end(self) -> None:
        """Take in that a sequence has ended, or was taken back."""
        self._has_ended = True

    def find(self, running: list[Sequence], decodes: Callable[[Sequence], bool]) -> Onward | None:
        """Return which sequences the next step decodes; None where each must be asked.

        Blocks that they need are theirs then.

        Args:
            running: All that run.
            decodes: Whether one of those that the batch before does not sample decodes.
        """
        before = self._before
        if before is None or not self._sampled or len(self._in_flight) != 1:
            return None
        # Each has a token on its way, and ends with it where that makes it as long as it may be.
        goes_on_R = before.sample_positions_R + 1 < self._max_tokens_R
        sequences, kept_R = self._sampled, None
        if self._has_ended:
            goes_on_R &= [not one.finished for one in sequences]
        if not goes_on_R.all():
            kept_R = np.flatnonzero(goes_on_R).astype(np.int32)
            sequences = [sequences[row] for row in kept_R.tolist()]
            if not sequences:
                return None
        if len(sequences) < len(running) and any(
            decodes(one) for one in running if one.drawn_step != before.step
        ):
            return None
        lens_S = before.sample_positions_R if kept_R is None else before.sample_positions_R[kept_R]
        for row in np.flatnonzero(lens_S % self._room.block_tokens == 0).tolist():
            if self._room.is_full(sequences[row]):
                if self._room.missing(sequences[row], 1) > 0:
                    return None
                self._room.grow(sequences[row], 1)
        return Onward(sequences, kept_R, lens_S)

    def go_on(self, step: int, onward: Onward) -> tuple[StepBatch, list[Sequence]]:
        """Return the batch of step `step`, the sequences that it samples, and note it."""
        before, sequences = self._before, onward.sequences
        assert before is not None
        size = self._room.block_tokens
        if onward.kept_R is not None:
            self._max_tokens_R = self._max_tokens_R[onward.kept_R]
            self._has_ended = False
            for row, one in enumerate(sequences):
                one.drawn_row = row
        grown = [
            (row, len(sequences[row].blocks) - 1, sequences[row].blocks[-1])
            for row in np.flatnonzero(onward.context_lens_S % size == 0).tolist()
        ]
        grown_3G = np.array(grown, dtype=np.int32).reshape(-1, 3).T
        how = Continuation(step, onward.kept_R, np.ascontiguousarray(grown_3G))
        batch = continued(before, how)
        for one in sequences:
            one.num_pending += 1
            one.num_cached += 1
            one.drawn_step = step
        # A token after a block is full: the token that filled it is known now.
        for row in np.flatnonzero(batch.context_lens_S % size == 1 % size).tolist():
            self._room.know(sequences[row])
        self._before, self._sampled = batch, sequences
        self._in_flight.append(sequences)
        return batch, sequences
