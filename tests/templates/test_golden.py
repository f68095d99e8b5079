"""The rendered files, whole but for the plan in them.

`RANKWRIGHT_UPDATE_GOLDEN=1 pytest tests/templates` renews them.
"""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from tests.templates.plans import cpu_plan, mixed_plan, moe_spec, plan, with_split

from rankwright.planner.plan import Plan
from rankwright.templates.engines.table import ENGINES
from rankwright.templates.plan_text import plan_text
from rankwright.templates.render import render

GOLDEN = Path(__file__).parent / "golden"

CASES: dict[str, tuple[Callable[[], Plan], str, Mapping[str, object]]] = {
    "two_nodes.sbatch": (plan, "slurm", {}),
    "one_node_all_options.sbatch": (
        lambda: plan((8,), tp=8, pp=1),
        "slurm",
        {
            "name": "llama",
            "partition": "gpu",
            "account": "science",
            "qos": "high",
            "constraint": "h100&ib",
            "switches": "1@00:10:00",
            "time_limit": "08:00:00",
            "container_image": "docker://registry.example.com/rankwright:0.1.0",
            "log_dir": "/shared/my logs",
            "model_path": "/shared/models/llama",
            "port": 9000,
        },
    ),
    "cpu_venv.sbatch": (cpu_plan, "slurm", {"venv": "/shared/venv"}),
    "two_kinds_of_gpu.sbatch": (
        mixed_plan,
        "slurm",
        {"gpu_types": "h100-sxm=h100,a100-sxm-80gb=a100"},
    ),
    "two_machines.yaml": (plan, "kubernetes", {}),
    "uneven_machines.yaml": (lambda: plan((8, 4, 4), tp=4, pp=1), "kubernetes", {}),
    "one_machine_all_options.yaml": (
        lambda: plan((8,), tp=8, pp=1),
        "kubernetes",
        {
            "name": "llama",
            "namespace": "serving",
            "image": "registry.example.com/rankwright:0.1.0",
            "model_pvc": "weights",
            "model_path": "/models/llama",
            "port": 9000,
            "gpu_resource": "nvidia.com/gpu.shared",
            "monitor": True,
            "max_replicas": 4,
        },
    ),
    "cpu.yaml": (cpu_plan, "kubernetes", {"model_host_path": "/srv/models/smollm2"}),
    "group_with_rdma.yaml": (
        plan,
        "kubernetes",
        {"flavor": "leaderworkerset", "rdma_resource": "rdma/ib", "model_pvc": "weights"},
    ),
    "kuberay.yaml": (
        plan,
        "kubernetes",
        {"flavor": "rayservice", "name": "llama", "model_pvc": "weights"},
    ),
    "two_nodes_vllm.sh": (plan, "vllm", {}),
    "experts_sglang.sh": (
        lambda: with_split(plan((8,), tp=8, pp=1, model=moe_spec()), ep=4, attention="dp"),
        "sglang",
        {},
    ),
    "two_nodes_vllm.yaml": (plan, "vllm", {"on": "kubernetes", "model_pvc": "weights"}),
    "two_nodes_trtllm.sbatch": (plan, "trtllm", {"on": "slurm"}),
}


def readable(text: str, made: Plan) -> str:
    """`text` without the plan in it, which is long and has tests of its own."""
    plan_lines = plan_text(made).splitlines()
    lines = text.splitlines()
    for indent in ("", "    "):
        embedded = [indent + line for line in plan_lines]
        for start in range(len(lines) - len(embedded) + 1):
            if lines[start : start + len(embedded)] == embedded:
                lines[start : start + len(embedded)] = [f"{indent}<the plan>"]
                break
    return re.sub(r"-plan-[0-9a-f]{8}\b", "-plan-<hash>", "\n".join(lines) + "\n")


@pytest.mark.parametrize("name", CASES)
def test_the_rendered_file_is_the_golden_one(name: str) -> None:
    make, target, options = CASES[name]
    made = make()
    files = render(made, target, None, **options)
    (whole,) = (text for file, text in files.items() if file != "plan.json")
    text = readable(whole, made)
    golden = GOLDEN / name
    if os.environ.get("RANKWRIGHT_UPDATE_GOLDEN") == "1":
        golden.write_text(text)
    assert text == golden.read_text(), (
        f"{golden.name} differs; if it should, set RANKWRIGHT_UPDATE_GOLDEN=1 and read the diff"
    )
    assert (target in ENGINES and "on" not in options) or text.count("<the plan>") == 1


def test_no_golden_file_is_left_over() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == set(CASES)
