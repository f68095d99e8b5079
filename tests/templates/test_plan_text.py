import json

from hypothesis import given
from hypothesis import strategies as st
from tests.templates.plans import plan, spec

from rankwright.planner.plan import Plan
from rankwright.templates.plan_text import plan_text


def test_every_rank_and_every_field_has_its_line() -> None:
    lines = plan_text(plan()).splitlines()
    assert sum('"rank":' in line for line in lines) == 16
    assert sum(line.startswith(' "') for line in lines) == len(Plan.model_fields)


@given(st.text())
def test_any_plan_is_read_back_from_printable_ascii(name: str) -> None:
    odd = plan(model=spec(name))
    text = plan_text(odd)
    assert text.isascii()
    assert text.replace("\n", "").isprintable()
    assert json.loads(text) == json.loads(odd.model_dump_json())
    assert Plan.model_validate_json(text) == odd
