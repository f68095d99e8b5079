"""Parts of stored tensors, read by several threads, are what slicing the whole tensor gives."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from rankwright.executor import shard_reader
from rankwright.executor.shard_reader import Range, SafetensorsFile, ShardReader

CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.uint8, torch.bool)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((), (7,), (37, 24), (5, 6, 8), (0, 4))
    tensors = {
        f"{dtype}-{len(shape)}-{sum(shape)}": torch.randint(0, 2, shape, generator=generator).to(
            dtype
        )
        for dtype in DTYPES
        for shape in shapes
    }
    path = tmp_path_factory.mktemp("stored") / "model.safetensors"
    save_file(tensors, path)
    return path, tensors


@given(data=st.data(), threads=st.integers(1, 3), piece_bytes=st.sampled_from([1, 40, 2**20]))
@settings(max_examples=60, deadline=None)
def test_any_part_of_any_tensor_is_read_bit_by_bit(
    stored: tuple[Path, dict[str, torch.Tensor]],
    data: st.DataObject,
    threads: int,
    piece_bytes: int,
) -> None:
    path, tensors = stored
    name = data.draw(st.sampled_from(sorted(tensors)))
    whole = tensors[name]
    ranges: list[Range | None] = []
    for length in whole.shape:
        start = data.draw(st.integers(0, length))
        ranges.append(
            data.draw(st.sampled_from([None, (start, data.draw(st.integers(start, length)))]))
        )
    file = SafetensorsFile(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_reader, "PIECE_BYTES", piece_bytes)
        reader = ShardReader(CPU, threads)
        part = reader.read(file, name, ranges, whole.dtype)
        wider = reader.read(file, name, ranges, torch.float64)
        reader.close()
    file.close()
    expected = whole[tuple(slice(*one) if one else slice(None) for one in ranges)]
    assert part.shape == expected.shape
    assert part.dtype == whole.dtype
    assert torch.equal(bits(part), bits(expected))
    assert torch.equal(wider, expected.double())


def test_no_more_is_read_than_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"a": torch.arange(4000.0).view(1000, 4)}, tmp_path / "a.safetensors")
    file = SafetensorsFile(tmp_path / "a.safetensors")
    reads: list[tuple[int, int]] = []
    preadv = os.preadv

    def counted(number: int, views: list[memoryview], offset: int) -> int:
        reads.append((len(views[0]), offset - file.tensors["a"].offset))
        return preadv(number, views, offset)

    monkeypatch.setattr(os, "preadv", counted)
    reader = ShardReader(CPU, 1)
    part = reader.read(file, "a", ((200, 300), None), torch.float32)
    assert part[0].tolist() == [800, 801, 802, 803]
    assert reads == [(100 * 16, 200 * 16)]
    reader.close()


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(1000)}, path)
    file = SafetensorsFile(path)
    os.truncate(path, path.stat().st_size - 100)
    reader = ShardReader(CPU, 2)
    with pytest.raises(ValueError, match="it was cut while being read"):
        reader.read(file, "a", (None,), torch.float32)
    reader.close()


@pytest.mark.gpu
def test_pinned_buffers_bring_every_byte_to_the_gpu(
    stored: tuple[Path, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, tensors = stored
    monkeypatch.setattr(shard_reader, "PIECE_BYTES", 64)
    gpu = torch.device("cuda", 0)
    file = SafetensorsFile(path)
    reader = ShardReader(gpu, 4)
    for name, whole in tensors.items():
        ranges: list[Range | None] = [(0, (length + 1) // 2) for length in whole.shape]
        expected = whole[tuple(slice(*one) for one in ranges if one)]
        assert torch.equal(bits(reader.read(file, name, ranges, whole.dtype).cpu()), bits(expected))
        assert torch.equal(reader.read(file, name, ranges, torch.float32).cpu(), expected.float())
    reader.close()
