"""The rendered files, whole. `RANKWRIGHT_UPDATE_GOLDEN=1 pytest tests/templates` renews them."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from tests.templates.plans import cpu_plan, plan

from rankwright.planner.plan import Plan
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
            "time_limit": "08:00:00",
            "container_image": "docker://registry.example.com/rankwright:0.1.0",
            "log_dir": "/shared/my logs",
            "model_path": "/shared/models/llama",
            "port": 9000,
        },
    ),
    "cpu_venv.sbatch": (cpu_plan, "slurm", {"venv": "/shared/venv"}),
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
        },
    ),
    "cpu.yaml": (cpu_plan, "kubernetes", {"model_host_path": "/srv/models/smollm2"}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_rendered_file_is_the_golden_one(name: str) -> None:
    make, target, options = CASES[name]
    files = render(make(), target, None, **options)
    (text,) = (text for file, text in files.items() if file != "plan.json")
    golden = GOLDEN / name
    if os.environ.get("RANKWRIGHT_UPDATE_GOLDEN") == "1":
        golden.write_text(text)
    assert text == golden.read_text(), (
        f"{golden.name} differs; if it should, set RANKWRIGHT_UPDATE_GOLDEN=1 and read the diff"
    )


def test_no_golden_file_is_left_over() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == set(CASES)
