"""What a log shows while ranks start."""

import io

import pytest
from tests.executor.plans import cpu_plan
from tests.executor.test_launch import SPEC

from rankwright.executor import progress
from rankwright.executor.progress import Progress


def shown(monkeypatch: pytest.MonkeyPatch, every_s: float, *, quiet: bool = False) -> list[str]:
    monkeypatch.setattr(progress, "_LINE_EVERY_S", every_s)
    stream = io.StringIO()
    with Progress(cpu_plan(SPEC, tp=2), stream=stream, quiet=quiet) as it:
        for text in ("reads weights", "reads weights", "ready"):
            it.show(text)
        it.ready("llama")
    return stream.getvalue().splitlines()


def test_a_log_gets_each_new_line_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(monkeypatch, 0)
    assert [line.rpartition("  ")[2] for line in lines[1:3]] == ["reads weights", "ready"]
    assert len(lines) == 4


def test_a_log_is_not_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    first, last = shown(monkeypatch, 1000)
    assert first == "rankwright: starting 2 ranks (TP2) ..."
    assert last.startswith("rankwright: ready in 0.")
    assert shown(monkeypatch, 0, quiet=True) == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_of_layers_and_then_of_graphs() -> None:
    stream = Terminal()
    with Progress(cpu_plan(SPEC, tp=2), stream=stream) as it:
        it.show("   1.50 s  layer 3 of 4")
        assert it._bar is not None
        (task,) = it._bar.tasks
        assert task.percentage == 75
        it.show("   1.55 s  graph 1 of 4, batch 256")
        assert task.percentage == 25
        it.show("   1.60 s  ready")
        assert task.fields["said"] == "   1.60 s  ready"
        it.ready("llama")
    assert "starting 2 ranks (TP2)" in stream.getvalue()
    assert stream.getvalue().splitlines()[-1].endswith(" s: llama")
