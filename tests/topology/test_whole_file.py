"""Files appear whole or not at all; what is no file stays what it is."""

import os
import stat
from pathlib import Path

import pytest

from rankwright.topology.whole_file import write_whole


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")
    write_whole(path, "new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["plan.json"]


def test_a_pipe_is_written_to_and_stays_one(tmp_path: Path) -> None:
    pipe, link = tmp_path / "pipe", tmp_path / "plan.json"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_whole(link, "text")
        assert os.read(reader, 100) == b"text"
    finally:
        os.close(reader)
    assert link.is_symlink()
    assert stat.S_ISFIFO(os.stat(pipe).st_mode)


def test_a_pipe_without_a_name_is_written_to() -> None:
    reader, writer = os.pipe()
    try:
        write_whole(f"/dev/fd/{writer}", "text")
        assert os.read(reader, 100) == b"text"
    finally:
        os.close(reader)
        os.close(writer)


def test_a_link_stays_one_and_its_file_is_written(tmp_path: Path) -> None:
    link, target = tmp_path / "plan.json", tmp_path / "shared.json"
    target.write_text("old")
    link.symlink_to(target)
    write_whole(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no /dev/full here")
def test_a_full_device_is_an_error_with_the_name_that_was_given(tmp_path: Path) -> None:
    link = tmp_path / "plan.json"
    link.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught:
        write_whole(link, "text")
    assert caught.value.filename == str(link)


@pytest.mark.parametrize("name", ["", "no/such/folder/plan.json", "x" * 300])
def test_what_cannot_be_written_is_named_as_it_was_given(tmp_path: Path, name: str) -> None:
    with pytest.raises(OSError, match=r".") as caught:
        write_whole(tmp_path / name, "text")
    assert caught.value.filename == str(tmp_path / name)
    assert os.listdir(tmp_path) == []
