"""A model's folder is found without the network, and what is missing is named."""

import json
import re
from pathlib import Path

import pytest

from rankwright.executor.checkpoint import (
    check_weights,
    find_checkpoint,
    find_model_folder,
    read_sampling_defaults,
)


def cached(cache: Path, commit: str, *, main: bool) -> Path:
    repository = cache / "models--org--model"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").touch()
    if main:
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
    return snapshot


def test_a_folder_is_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    assert find_checkpoint(str(tmp_path)) == tmp_path
    assert find_checkpoint("org/model", tmp_path) == tmp_path


@pytest.mark.parametrize("main", [True, False])
def test_a_hub_id_is_found_in_the_cache(tmp_path: Path, main: bool) -> None:
    snapshot = cached(tmp_path / "hub", "abc123", main=main)
    for environment in ({"HF_HOME": str(tmp_path)}, {"HF_HUB_CACHE": str(tmp_path / "hub")}):
        assert find_checkpoint("org/model", environment=environment) == snapshot


def test_a_model_that_is_nowhere_says_where_it_was_looked_for(tmp_path: Path) -> None:
    environment = {"HF_HUB_CACHE": str(tmp_path)}
    assert find_model_folder("org/model", environment=environment) is None
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))) as error:
        find_checkpoint("org/model", environment=environment)
    assert "--model-path" in str(error.value)
    assert "--load-format dummy" in str(error.value)


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no folder"):
        find_checkpoint("org/model", tmp_path / "nowhere")


def test_every_file_of_the_index_must_be_there(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    (tmp_path / "1.safetensors").touch()
    with pytest.raises(ValueError, match=r"lacks 1 of 2 weight files, first 2\.safetensors"):
        check_weights(tmp_path)
    (tmp_path / "2.safetensors").touch()
    assert [path.name for path in check_weights(tmp_path)] == ["1.safetensors", "2.safetensors"]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_a_malformed_index_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="is malformed"):
        check_weights(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model-Q4.gguf", "GGUF"),
        ("pytorch_model.bin", "safe_serialization"),
        ("consolidated.00.pth", "Meta"),
        ("readme", "no \\*.safetensors"),
    ],
)
def test_weights_of_another_format_are_named(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=message):
        check_weights(tmp_path)


def test_sampling_follows_the_models_authors(tmp_path: Path) -> None:
    assert read_sampling_defaults(None) == ({}, [])
    assert read_sampling_defaults(tmp_path) == ({}, [])
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"temperature": 0.6, "top_k": -1, "repetition_penalty": 1.1, "min_p": 0})
    )
    defaults, (note,) = read_sampling_defaults(tmp_path)
    assert defaults == {"temperature": 0.6, "top_k": 0}
    assert "repetition_penalty=1.1" in note
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(ValueError, match="is not JSON"):
        read_sampling_defaults(tmp_path)
