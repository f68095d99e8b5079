"""Rates are those of a settled device that never pauses, on a device whose clock we play."""

from dataclasses import dataclass, field

import pytest

from rankwright.executor.sustained import QUEUED, CudaMark, sustained_s

ROUND_S = 0.01


@dataclass
class Board:
    """Its rounds take `ROUND_S` once it worked for 0.3 s, a fifth less before and after pauses."""

    now_s: float = 0.0  # of the host
    busy_until_s: float = 0.0
    worked_s: float = 0.0
    pauses: int = 0
    most_queued_s: float = 0.0
    stalls: dict[int, float] = field(default_factory=dict)  # of the host, before a launch
    launches: int = 0

    def launch(self) -> None:
        self.now_s += self.stalls.get(self.launches, 1e-5)
        self.launches += 1
        if self.now_s > self.busy_until_s:
            self.pauses += 1
            self.worked_s = 0.0
            self.busy_until_s = self.now_s
        took_s = ROUND_S if self.worked_s >= 0.3 else 0.8 * ROUND_S
        self.worked_s += took_s
        self.busy_until_s += took_s
        self.most_queued_s = max(self.most_queued_s, self.busy_until_s - self.now_s)

    def mark(self) -> "Place":
        return Place(self, self.busy_until_s)


@dataclass
class Place:
    board: Board
    at_s: float

    def wait(self) -> None:
        self.board.now_s = max(self.board.now_s, self.at_s)

    def until_s(self, later: "Place") -> float:
        assert self.board.now_s >= later.at_s, "read before the device came there"
        return later.at_s - self.at_s


def test_what_a_board_does_before_it_has_settled_is_not_counted() -> None:
    board = Board()
    assert sustained_s(board.launch, board.mark) == pytest.approx(ROUND_S)
    assert board.worked_s > 1.5
    early = Board()
    assert sustained_s(early.launch, early.mark, settle_s=0, sample_s=0.2) < ROUND_S


def test_a_board_never_pauses_and_is_never_far_behind() -> None:
    board = Board()
    sustained_s(board.launch, board.mark)
    assert board.pauses == 1  # before the first round
    assert board.most_queued_s <= QUEUED * ROUND_S
    assert 1.5 <= board.busy_until_s <= 1.5 + (QUEUED + 1) * ROUND_S


def test_a_host_that_is_held_up_once_does_not_decide() -> None:
    board = Board(stalls={140: 0.2})
    assert sustained_s(board.launch, board.mark) == pytest.approx(ROUND_S)
    assert board.pauses == 2


def test_one_round_is_enough_where_it_takes_longer_than_all_that_was_asked_for() -> None:
    board = Board()
    found_s = sustained_s(board.launch, board.mark, settle_s=0, sample_s=0)
    assert found_s == pytest.approx(0.8 * ROUND_S, rel=0.01)
    assert board.launches <= QUEUED + 1


@pytest.mark.gpu
def test_marks_in_a_stream_tell_how_long_the_work_between_them_took() -> None:
    import torch

    ones = torch.ones(4096, 4096, device="cuda")
    found_s = sustained_s(lambda: ones @ ones, CudaMark, settle_s=0.05, sample_s=0.05)
    flops_per_s = 2 * 4096**3 / found_s
    assert 1e12 < flops_per_s < 1e16
