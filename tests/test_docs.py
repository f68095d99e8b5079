"""What the pages tell people to type exists, and what they link to is there."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from rankwright.cli import COMMANDS
from rankwright.cli.help_page import help_page

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
HELP = {page.split("\n", 1)[0]: page for page in help_page().split("\n## rankwright")[1:]}


def commands() -> Iterator[tuple[str, str]]:
    """Every `rankwright ...` line of the pages, in a block or between backticks."""
    for page in PAGES:
        if page.name == "cli.md":
            continue
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"(?:^|`)rankwright ([^`\n]*)", text, flags=re.MULTILINE):
            yield page.name, line.split("#")[0].strip()


@pytest.mark.parametrize(("page", "line"), list(commands()))
def test_commands_in_the_pages_exist(page: str, line: str) -> None:
    words = line.split()
    name = next((word for word in words if not word.startswith("-")), None)
    assert name is None or name in COMMANDS
    known = HELP["" if name is None else f" {name}"]
    for option in re.findall(r"(?<!\S)--?[a-z][a-z-]*", line):
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", known), option


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize(
    "code", re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.DOTALL)
)
def test_python_in_the_pages_runs(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    kept = [line for line in code.splitlines() if ".launch(" not in line]  # would serve for ever
    exec("\n".join(kept), {})
    assert capsys.readouterr().out


def test_every_folder_is_on_the_map() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    for folder in (ROOT / "src/rankwright").iterdir():
        if folder.is_symlink():
            assert f"| `{folder.name}` |" in page
