from collections.abc import Callable

import pytest
from tests.templates.plans import cpu_plan, plan

from rankwright.templates.check import check
from rankwright.templates.checks.mismatch import ManifestMismatchError
from rankwright.templates.checks.objects import read_objects
from rankwright.templates.checks.sbatch import slurm_header
from rankwright.templates.render import render

SLURM, KUBERNETES = "rankwright.sbatch", "rankwright.yaml"


def tampered(files: dict[str, str], name: str, old: str, new: str) -> dict[str, str]:
    assert old in files[name]
    return files | {name: files[name].replace(old, new)}


@pytest.mark.parametrize("make", [plan, cpu_plan, lambda: plan((8,), tp=4, pp=1)])
@pytest.mark.parametrize("target", ["slurm", "kubernetes"])
def test_what_was_rendered_passes(target: str, make: Callable[[], object]) -> None:
    made = make()
    check(made, target, render(made, target))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("--nodes=2\n#", "--nodes=3\n#", "nodes: rendered 3, the plan says 2"),
        ("--gpus-per-node=8", "--gpus-per-node=4", "GPUs a node"),
        ("#SBATCH --gpus-per-node=8\n", "", r"GPUs a node: rendered \[0, 0\]"),
        ("#SBATCH --ntasks-per-node=1", "#SBATCH --ntasks-per-node=8", "launchers a node"),
        ("#SBATCH --requeue", "#SBATCH --mem=1", "--mem is given twice"),
        ("--nnodes 2", "--nnodes 1", "launch --nnodes"),
        ("    --nodes=2 ", "    --nodes=1 ", "srun --nodes"),
        ('"num_blocks": 1000', '"num_blocks": 1001', "embedded plan.json"),
        ('NCCL_DEBUG="WARN"', 'NCCL_DEBUG="INFO"', "environment"),
    ],
)
def test_a_changed_script_is_noticed(old: str, new: str, message: str) -> None:
    files = tampered(render(plan(), "slurm"), SLURM, old, new)
    with pytest.raises(ManifestMismatchError, match=message):
        check(plan(), "slurm", files)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("limits:\n              nvidia.com/gpu: 8", "limits:\n              a.b/gpu: 4", "limits"),
        ("nvidia.com/gpu: 8", "nvidia.com/gpu: 4", "GPUs by pod"),
        ('value: "WARN"', 'value: "INFO"', "NCCL_DEBUG"),
        ("            limits:\n              nvidia.com/gpu: 8\n", "", "limits"),
        ("replicas: 1", "replicas: 2", "pods numbered 1"),
        ("start: 1\n", "start: 2\n", "pods: rendered"),
        ("--nnodes 2", "--nnodes 3", "launch --nnodes"),
        ('"num_blocks": 1000', '"num_blocks": 1001', "embedded plan.json"),
        ("replicas: 1", "replicas: 1\n  replicas: 1", "'replicas' is given twice"),
    ],
)
def test_changed_objects_are_noticed(old: str, new: str, message: str) -> None:
    files = tampered(render(plan(), "kubernetes"), KUBERNETES, old, new)
    with pytest.raises(ManifestMismatchError, match=message):
        check(plan(), "kubernetes", files)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("nvidia.com/gpu: 8", "nvidia.com/gpu: 4", "GPUs by pod"),
        ('num-gpus: "8"', 'num-gpus: "16"', "GPUs and CPUs that Ray hands out"),
        ('num-cpus: "9"', 'num-cpus: "8"', "GPUs and CPUs that Ray hands out"),
        ('num-cpus: "0"', 'num-cpus: "4"', "num-cpus of the head"),
        ("maxReplicas: 2", "maxReplicas: 3", "workers: rendered"),
        ("        replicas: 2", "        replicas: 1", "workers: rendered"),
        ("ray_serve:app", "ray_serve:ap", "import_path"),
        ("plan: /etc/rankwright/plan.json", "plan: /tmp/plan.json", "plan of the application"),
        ("mountPath: /etc/rankwright", "mountPath: /etc/plan", "has no plan in"),
        ("      port: 8000\n    app", "      port: 8001\n    app", "ports of HTTP"),
        (
            "        route_prefix: /\n",
            "        route_prefix: /\n        deployments: [{name: Server, num_replicas: 2}]\n",
            "deployments",
        ),
        ('value: "WARN"', 'value: "INFO"', "NCCL_DEBUG"),
        ('"num_blocks": 1000', '"num_blocks": 1001', "embedded plan.json"),
        ('"max_num_seqs": ', '"max_num_seqs": 1', "embedded plan.json"),
    ],
)
def test_a_changed_ray_service_is_noticed(old: str, new: str, message: str) -> None:
    files = tampered(render(plan(), "kubernetes", flavor="rayservice"), KUBERNETES, old, new)
    with pytest.raises(ManifestMismatchError, match=message):
        check(plan(), "kubernetes", files)


def test_a_cpu_plan_must_not_ask_for_gpus() -> None:
    files = render(cpu_plan(), "slurm")
    extra = tampered(files, SLURM, "#SBATCH --mem=0", "#SBATCH --gpus-per-node=1\n#SBATCH --mem=0")
    with pytest.raises(ManifestMismatchError, match=r"rendered \[1, 1\], the plan says \[0, 0\]"):
        check(cpu_plan(), "slurm", extra)


def test_a_mismatch_is_our_mistake_and_not_the_users() -> None:
    assert issubclass(ManifestMismatchError, AssertionError)
    assert not issubclass(ManifestMismatchError, ValueError)


def test_sbatch_lines_after_the_first_command_do_not_count() -> None:
    assert slurm_header("#!/bin/bash\n\n#SBATCH --a=1 --b\nx\n#SBATCH --c=2\n") == {
        "a": "1",
        "b": "",
    }


def test_objects_are_read_in_order() -> None:
    kinds = [each["kind"] for each in read_objects(render(plan(), "kubernetes")[KUBERNETES])]
    assert kinds == [
        *("ConfigMap", "Service", "Service", "StatefulSet", "StatefulSet"),
        *("NetworkPolicy", "PodDisruptionBudget"),
    ]
