"""Thousands of odd texts through the quoting of templates, each read back by what would read it.

One script has them all, so that a real shell reads thousands in the time that it takes to start.
"""

import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from tests.templates.odd_texts import ATTACKS, MARK, printable

from rankwright.templates.checks.engine_objects import expanded
from rankwright.templates.checks.mismatch import shell_words
from rankwright.templates.fill import comment, container_string, shell_bare, shell_word, yaml_string

NUM_TEXTS = 5000
SPECIAL = "a/-.$`\"'\\;&|<>(){}[]*?!#~ \n\t:,=@%^+\r\x07\x1b\x7f\x85\u2028\U0001f600"


def texts() -> list[str]:
    """The attacks, and random sequences of them and of special characters; no two alike."""
    draw = random.Random(7)
    pieces = [*ATTACKS, *SPECIAL]
    found = dict.fromkeys(ATTACKS)
    while len(found) < NUM_TEXTS:
        found["".join(draw.choices(pieces, k=draw.randint(1, 6)))] = None
    return [text.replace("\x00", "") for text in found]  # no program's argument holds a NUL


def run(shell: str, script: str, folder: Path) -> str:
    """What `script` prints; a payload that is executed is an error."""
    path = folder / "script"
    path.write_text(script, encoding="utf-8", newline="")
    subprocess.run([shell, "-n", str(path)], check=True, capture_output=True)
    done = subprocess.run([shell, str(path)], cwd=folder, capture_output=True, check=True)
    assert [each.name for each in folder.iterdir()] == ["script"], "a payload was executed"
    assert done.stderr == b""
    return done.stdout.decode()  # as it is: text mode would change a carriage return


@pytest.mark.parametrize("shell", ["bash", "sh"])
@pytest.mark.parametrize("quote", [shell_word, shell_bare])
def test_each_is_one_word_of_a_shell_as_it_was(
    shell: str, quote: Callable[[str], str], tmp_path: Path
) -> None:
    found = texts()
    script = "".join(f"printf '%s\\0' {quote(text)}\n" for text in found)
    assert run(shell, script, tmp_path).split("\0")[:-1] == found


def test_the_checker_reads_words_as_bash_does(tmp_path: Path) -> None:
    found = [text for text in map(printable, texts()) if text]
    assert [shell_words(shell_word(text)) for text in found] == [[text] for text in found]
    script = "".join(f"printf '%s\\0' {shell_word(text)}\n" for text in found)
    assert run("bash", script, tmp_path).split("\0")[:-1] == found


def test_each_is_one_yaml_string_as_it_was_or_refused() -> None:
    found = [text for text in texts() if text.isprintable()]
    document = "".join(f"- {yaml_string(text)}\n" for text in found)
    assert yaml.safe_load(document) == found
    for text in set(texts()) - set(found):
        with pytest.raises(ValueError, match="control character"):
            yaml_string(text)


def test_each_is_as_it_was_once_kubernetes_has_put_variables_in_place() -> None:
    found = [text for text in texts() if text.isprintable()]
    document = "".join(f"- {container_string(text)}\n" for text in found)
    given = yaml.safe_load(document)
    assert [expanded(word, {"HOME": "/root"}) for word in given] == found


@pytest.mark.parametrize("shell", ["bash", "sh"])
def test_none_gets_out_of_a_comment(shell: str, tmp_path: Path) -> None:
    script = "".join(f"# {comment(text)}\n" for text in texts())
    assert run(shell, script, tmp_path) == ""
    assert len(script.splitlines()) == NUM_TEXTS
    assert yaml.safe_load(script + "key: 1\n") == {"key": 1}


def test_a_payload_that_is_executed_would_be_seen(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="was executed"):
        run("sh", f"printf '%s\\0' \"$(touch {MARK})\"\n", tmp_path)
