"""A batch gets to its places by one copy, whatever was there before."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankwright.executor.graph_inputs import NUM_HOST_SETS, GraphInputs
from rankwright.executor.rank_batch import RankBatch

LARGEST, MAX_BLOCKS = 12, 5


def batch_of(count: int, width: int, rng: np.random.Generator) -> RankBatch:
    numbers = rng.integers(1, 1000, size=(4, count))
    return RankBatch(
        num_decodes=count,
        token_ids_T=numbers[0] - 500,
        positions_T=numbers[1],
        slots_T=numbers[2],
        context_lens_S=numbers[3],
        block_tables_SN=rng.integers(0, 99, size=(count, width)).astype(np.int32),
        sample_rows_R=np.arange(count),
        sampled_by_R=None,
        prefill_query_starts=[0],
        prefill_context_lens=[],
    )


@given(
    st.lists(
        st.tuples(st.integers(1, LARGEST), st.integers(0, LARGEST), st.integers(1, MAX_BLOCKS)),
        min_size=1,
        max_size=NUM_HOST_SETS + 2,
    )
)
def test_each_batch_is_there_and_padded(shapes: list[tuple[int, int, int]]) -> None:
    inputs = GraphInputs(LARGEST, MAX_BLOCKS, torch.device("cpu"))
    rng = np.random.default_rng(0)
    for count, padding, width in shapes:
        size = min(count + padding, LARGEST)
        batch = batch_of(count, width, rng)
        inputs.fill(batch, size)
        ids, positions, slots = inputs.wide.tolist()
        empty = size - count
        assert ids[:size] == batch.token_ids_T.tolist() + [0] * empty
        assert positions[:size] == batch.positions_T.tolist() + [0] * empty
        assert slots[:size] == batch.slots_T.tolist() + [-1] * empty
        assert inputs.lens[:size].tolist() == batch.context_lens_S.tolist() + [0] * empty
        assert inputs.tables[:count, :width].tolist() == batch.block_tables_SN.tolist()


def test_kernels_find_every_array_aligned() -> None:
    for largest in (1, 2, 12, 256):
        inputs = GraphInputs(largest, 3, torch.device("cpu"))
        start = inputs.wide.data_ptr()
        assert all((one.data_ptr() - start) % 16 == 0 for one in (inputs.lens, inputs.tables))


def test_nothing_is_written_before_the_first_batch() -> None:
    assert (GraphInputs(4, 2, torch.device("cpu")).wide[2] == -1).all()
