"""torchrun's agent: its order, and which ranks are its forks; test_launch.py starts real ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.executor.plans import cpu_plan
from tests.executor.test_launch import SPEC

from rankwright.executor.backends import agent_main
from rankwright.executor.backends.agent import Agent, Order, Rendezvous
from rankwright.executor.preflight import make_options
from rankwright.executor.session import ranks_fork

ORDER = Order(
    rendezvous=Rendezvous(2, 1, "head", 29500),
    num_ranks=2,
    environment={"A": "1\n"},
    command=None,
    arguments=["--plan", "a b"],
)


def test_an_order_is_a_line_that_can_be_read() -> None:
    line = ORDER.encode()
    assert line.count(b"\n") == 1
    assert Order.decode(line) == ORDER


def test_an_agent_without_an_order_leaves_nothing_behind() -> None:
    with Agent() as agent:
        assert agent.run_dir.stat().st_mode & 0o077 == 0
        assert (agent.run_dir / "torchrun.log").exists()
    assert agent.process.returncode is not None
    assert not agent.run_dir.exists()


def test_an_agent_whose_parent_is_gone_ends_and_removes_its_folder() -> None:
    agent = Agent()
    assert agent.process.stdin is not None
    agent.process.stdin.close()
    assert agent.process.wait(60) == 0
    assert not agent.run_dir.exists()


@pytest.mark.parametrize(
    ("device", "asked", "expected"),
    [
        ("cpu", None, True),
        ("cpu", "0", False),
        ("h100-sxm", None, False),
        ("h100-sxm", "1", True),
    ],
)
def test_ranks_of_cpus_are_forks_and_those_of_gpus_where_asked(
    device: str, asked: str | None, expected: bool
) -> None:
    plan = cpu_plan(SPEC, tp=2, device=device)
    environment = {} if asked is None else {"RANKWRIGHT_FORK_RANKS": asked}
    assert ranks_fork(plan, make_options(plan), environment) is expected
    assert ranks_fork(plan, make_options(plan, device="cpu"), {})


def test_the_agent_does_not_ask_cuda_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask() -> int:
        pytest.fail("no fork of a process that asked CUDA can use it")

    monkeypatch.setattr(torch.cuda, "_is_compiled", lambda: True)
    monkeypatch.setattr(torch.cuda, "_device_count_nvml", lambda: ORDER.num_ranks)
    monkeypatch.setattr(torch._C, "_cuda_getDeviceCount", ask, raising=False)
    assert agent_main._configuration(ORDER).numa_options is None
    assert "PYTORCH_NVML_BASED_CUDA_CHECK" not in os.environ


def test_the_agent_starts_before_the_planner_is_imported() -> None:
    program = (
        "import sys, rankwright.cli.launch as _, rankwright.cli.generate as _\n"
        "print([name for name in ('pulp', 'rankwright.planner.make_plan') if name in sys.modules])"
    )
    assert printed_by(program) == "[]"


def test_what_a_rank_on_cpus_imports_leaves_out_what_only_compilers_need() -> None:
    program = (
        "import sys, rankwright.executor.worker as _\n"
        "print([name for name in ('torch._dynamo', 'sympy', 'transformers', 'torch._inductor')"
        " if name in sys.modules])"
    )
    assert printed_by(program) == "[]"


def printed_by(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()
