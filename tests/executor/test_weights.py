import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rankwright.executor.weights import DummySource, SafetensorsSource

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"a.weight": torch.arange(12.0).view(4, 3)}, tmp_path / "one.safetensors")
    save_file({"b.bias": torch.arange(5.0)}, tmp_path / "two.safetensors")
    names = {"a.weight": "one.safetensors", "b.bias": "two.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return tmp_path


def test_a_shard_is_the_rows_and_columns_asked_for(folder: Path) -> None:
    source = SafetensorsSource(folder, torch.float32, CPU)
    assert source.shard("a.weight", (4, 3), (1, 3), (0, 2)).tolist() == [[3, 4], [6, 7]]
    assert source.shard("a.weight", (4, 3), None, (2, 3)).tolist() == [[2], [5], [8], [11]]
    assert source.shard("b.bias", (5,), (3, 5)).tolist() == [3, 4]
    assert "a.weight" in source
    assert "c" not in source


def test_a_missing_tensor_is_named(folder: Path) -> None:
    source = SafetensorsSource(folder, torch.float32, CPU)
    with pytest.raises(ValueError, match=r"no tensor 'lm_head\.weight' among 2; the checkpoint"):
        source.shard("lm_head.weight", (4, 3))


def test_a_wrong_shape_is_told_with_both_shapes(folder: Path) -> None:
    source = SafetensorsSource(folder, torch.float32, CPU)
    with pytest.raises(ValueError, match=r"'a\.weight' has shape \(4, 3\), config.* \(4, 4\)"):
        source.shard("a.weight", (4, 4))


def test_a_file_that_the_index_names_must_exist(folder: Path) -> None:
    (folder / "two.safetensors").unlink()
    with pytest.raises(ValueError, match=r"names two\.safetensors, which is missing"):
        SafetensorsSource(folder, torch.float32, CPU)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(100)}, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-50])
    with pytest.raises(ValueError, match=r"model\.safetensors is no readable safetensors file"):
        SafetensorsSource(tmp_path, torch.float32, CPU)


def test_a_folder_without_weights_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no \.safetensors file; .*--load-format dummy"):
        SafetensorsSource(tmp_path, torch.float32, CPU)


def test_dummy_weights_have_the_shape_of_the_shard_and_unit_norms() -> None:
    source = DummySource(torch.float32, CPU)
    shard = source.shard("a.weight", (1000, 40), (0, 500), (10, 20))
    assert shard.shape == (500, 10)
    assert shard.std().item() == pytest.approx(0.02, rel=0.1)
    assert source.shard("model.norm.weight", (8,)).tolist() == [1.0] * 8
    embedding = source.shard("model.embed_tokens.weight", (1000, 40))
    assert embedding.std().item() == pytest.approx(1, rel=0.1)
