"""The pages list every environment variable of ours that the code reads, and no other."""

import ast
import re
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("topology", "cost_model", "planner", "kernels", "executor", "templates")
PRODUCT = (*FOLDERS, "src/rankwright")
NAME = re.compile(r"RANKWRIGHT_[A-Z_]+")


def names_read(folders: Iterable[str]) -> set[str]:
    """Names that stand where a mapping is asked: `x["NAME"]`, `x.get("NAME")`, or in a constant.

    Markers that end a shell's here-document look alike and stand elsewhere.
    """
    found: set[str] = set()
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                match node:
                    case ast.Call(func=ast.Attribute(attr="get"), args=[ast.Constant(value), *_]):
                        found.add(str(value))
                    case ast.Subscript(slice=ast.Constant(value)):
                        found.add(str(value))
                    case ast.Assign(targets=[ast.Name(id="VARIABLE")], value=ast.Constant(value)):
                        found.add(str(value))
    return {name for name in found if NAME.fullmatch(name)}


def names_listed(page: str) -> list[str]:
    """First cells of the tables' rows."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^\| `(RANKWRIGHT_[A-Z_]+)(?:=[^`]*)?`", text, flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("page", "folders"),
    [("docs/environment.md", PRODUCT), ("CONTRIBUTING.md", ("tests", "benchmarks"))],
)
def test_the_page_lists_what_the_code_reads(page: str, folders: tuple[str, ...]) -> None:
    listed = names_listed(page)
    assert len(listed) == len(set(listed))
    own = names_read(folders) - (set() if folders == PRODUCT else names_read(PRODUCT))
    assert set(listed) == own
