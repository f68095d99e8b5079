"""The page of every option says what the commands say."""

from pathlib import Path

from rankwright.cli.help_page import help_page

PAGE = Path(__file__).parents[2] / "docs/cli.md"


def test_the_page_of_options_is_true() -> None:
    assert PAGE.read_text(encoding="utf-8") == help_page(), (
        "run `python -m rankwright.cli.help_page > docs/cli.md`"
    )
