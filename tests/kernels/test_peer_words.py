"""The kernels in one process: memory of three ranks side by side.

Between GPUs they are tested by tests/executor/test_stage_memory.py.
"""

import torch

from rankwright.kernels.peer_words import await_count, tell


def test_a_count_is_written_into_one_word_of_one_rank(device: str) -> None:
    memory = [torch.zeros(4, dtype=torch.int64, device=device) for _ in range(3)]
    table = torch.tensor([one.data_ptr() for one in memory], dtype=torch.int64, device=device)
    tell(table.data_ptr(), 2, 1, 1)
    tell(table.data_ptr(), 1, 3, 2**40)
    assert [one.tolist() for one in memory] == [[0] * 4, [0, 0, 0, 2**40], [0, 1, 0, 0]]


def test_a_count_that_is_there_or_behind_is_not_waited_for(device: str) -> None:
    words = torch.tensor([0, 7, 0, 2**40], device=device)
    await_count(words, 1, 7)
    await_count(words, 1, 3)
    await_count(words, 3, 2**40)
    assert words.tolist() == [0, 7, 0, 2**40]
