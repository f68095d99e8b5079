import subprocess

import jinja2
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rankwright.templates.fill import comment, fill, shell_word, yaml_string


@pytest.mark.parametrize("shell", ["bash", "sh"])
def test_a_quoted_text_is_one_shell_word(shell: str) -> None:
    texts = [
        "",
        "a b",
        "it's",
        '"',
        "$HOME",
        "${x}",
        "`id`",
        "$(id)",
        "\\",
        "\\\\",
        "a\nb",
        "!x",
        "*",
        "\u20ac",
    ]
    words = " ".join(map(shell_word, texts))
    done = subprocess.run(
        [shell, "-c", f"printf '%s\\0' {words}"], capture_output=True, check=True, encoding="utf-8"
    )
    assert done.stdout.split("\0")[:-1] == texts


@given(st.text().filter(str.isprintable))
def test_a_quoted_text_is_one_yaml_string(text: str) -> None:
    assert yaml.safe_load(f"key: {yaml_string(text)}") == {"key": text}


def test_text_that_yaml_would_fold_is_refused() -> None:
    with pytest.raises(ValueError, match="control character"):
        yaml_string("a\x85b")


@given(st.text())
def test_a_comment_stays_on_its_line(text: str) -> None:
    assert len(f"# {comment(text)}.".splitlines()) == 1
    assert yaml.safe_load(f"# {comment(text)}.\nkey: 1\n") == {"key": 1}


def test_a_value_that_is_not_given_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError):
        fill("slurm/rankwright.sbatch.j2", version="0")
