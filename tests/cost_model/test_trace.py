"""Traces in both forms, and bad rows named by line and field."""

from pathlib import Path

import pytest

from rankwright.cost_model.trace import TraceRow, read_trace, workload_of

GOOD = (
    TraceRow(arrival_s=0.0, input_tokens=10, output_tokens=5),
    TraceRow(arrival_s=1.5, input_tokens=20, output_tokens=1, cached_tokens=16),
)


def write(folder: Path, text: str) -> Path:
    path = folder / "trace.txt"
    path.write_text(text, encoding="utf-8")
    return path


def test_both_forms_are_read_and_sorted_by_arrival(tmp_path: Path) -> None:
    lines = write(
        tmp_path,
        '{"arrival_s": 1.5, "input_tokens": 20, "output_tokens": 1, "cached_tokens": 16, "id": 7}\n'
        "\n"
        '{"arrival_s": 0, "input_tokens": 10, "output_tokens": 5}\n',
    )
    assert read_trace(lines) == GOOD
    table = write(
        tmp_path,
        "\ufeffinput_tokens, arrival_s,user,output_tokens,cached_tokens\n"
        "20,1.5,ann,1,16\n10, 0,bob,5,0\n",
    )
    assert read_trace(table) == GOOD


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"is empty; expected JSON Lines or CSV with arrival_s"),
        ("arrival_s,input_tokens,output_tokens\n", "has a head and no requests"),
        ("arrival_s,input_tokens\n1,2\n", "line 1: no column output_tokens; found arrival_s"),
        ("arrival_s,input_tokens,output_tokens\n0,5\n", "line 2: expected 3 fields"),
        (
            "arrival_s,input_tokens,output_tokens\n0,5,5\n1,five,5\n",
            r"line 3, field input_tokens: .* integer.*, got 'five'",
        ),
        (
            "arrival_s,input_tokens,output_tokens\n0,5,0\n",
            r"line 2, field output_tokens: .*greater than or equal to 1, got '0'",
        ),
        (
            "arrival_s,input_tokens,output_tokens\n-1,5,1\n",
            r"line 2, field arrival_s: .*greater than or equal to 0",
        ),
        (
            "arrival_s,input_tokens,output_tokens\nnan,5,1\n",
            r"line 2, field arrival_s: .*finite",
        ),
        (
            '{"arrival_s": 0, "input_tokens": 4, "output_tokens": 4}\n{"arrival_s": 0\n',
            "line 2: no JSON",
        ),
        ('{"arrival_s": 0, "input_tokens": 4}\n', "line 1, field output_tokens: Field required"),
        (
            '{"arrival_s": 0, "input_tokens": 4, "output_tokens": 1, "cached_tokens": 5}\n',
            "line 1: cached_tokens 5 exceed the prompt's 4",
        ),
        ('{"arrival_s": 0, "input_tokens": 4, "output_tokens": 1}\n[1]\n', "line 2: expected an"),
    ],
)
def test_a_bad_row_is_named_by_line_and_field(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=message) as caught:
        read_trace(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.csv: No such file"):
        read_trace(tmp_path / "none.csv")
    path = tmp_path / "bytes"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="no UTF-8"):
        read_trace(path)


def test_the_workload_of_a_trace_has_its_means() -> None:
    load = workload_of(GOOD)
    assert (load.input_tokens, load.output_tokens) == (15, 3)
    assert load.request_rate == pytest.approx(1 / 1.5)
    assert load.shared_prefix == pytest.approx(16 / 30)
    at_once = workload_of(tuple(row.model_copy(update={"arrival_s": 0.0}) for row in GOOD))
    assert (at_once.request_rate, at_once.concurrency) == (None, 2)
