"""Other engines on Kubernetes: what is asked for, what is refused, and that the checker sees it."""

import copy
import importlib
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.templates.crd_schemas import crds_folder, problems
from tests.templates.plans import cpu_plan, mixed_plan, moe_spec, plan, spec, with_split

from rankwright.planner.plan import EnvironmentVariable, Plan
from rankwright.templates.check import check
from rankwright.templates.checks.engine_objects import (
    container_environment,
    engine_parts,
    expanded,
    word_flags,
)
from rankwright.templates.checks.mismatch import ManifestMismatchError
from rankwright.templates.checks.objects import read_objects
from rankwright.templates.engines.table import ENGINES
from rankwright.templates.render import render

FILE = "rankwright.yaml"


def one() -> Plan:
    return plan((8,), tp=8, pp=1)


def four() -> Plan:
    return plan((8, 8), tp=4, pp=1)


def two_groups() -> Plan:
    return plan((8, 8, 8, 8), tp=8, pp=2)


def objects(made: Plan, target: str = "vllm", **options: object) -> list[dict[str, Any]]:
    return read_objects(render(made, target, None, on="kubernetes", **options)[FILE])


def of_kind(found: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [each for each in found if each["kind"] == kind]


def container(pod: dict[str, Any]) -> dict[str, Any]:
    (only,) = pod["spec"]["containers"]
    return dict(only)


@pytest.mark.parametrize("target", ENGINES)
def test_a_replica_of_one_machine_is_a_pod_of_a_deployment_with_the_engines_image(
    target: str,
) -> None:
    found = objects(four(), target, name="x")
    (deployment,) = of_kind(found, "Deployment")
    assert deployment["spec"]["replicas"] == 4
    own = container(deployment["spec"]["template"])
    assert own["image"] == ENGINES[target].image
    assert own["resources"]["limits"] == {"nvidia.com/gpu": 4}
    assert own["startupProbe"]["httpGet"] == {"path": "/health", "port": "http"}
    (service,) = of_kind(found, "Service")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    assert of_kind(found, "PodDisruptionBudget")


@pytest.mark.parametrize("target", ENGINES)
def test_an_image_holds_the_version_whose_flags_were_read(target: str) -> None:
    assert f":{'v' if target != 'trtllm' else ''}{ENGINES[target].version}" in ENGINES[target].image


def test_another_image_and_port_and_user_are_those_given() -> None:
    found = objects(one(), image="mine/vllm:1", port=9000, run_as_user=2000)
    (deployment,) = of_kind(found, "Deployment")
    own = container(deployment["spec"]["template"])
    assert own["image"] == "mine/vllm:1"
    assert "--port=9000" in own["args"]
    assert deployment["spec"]["template"]["spec"]["securityContext"]["runAsUser"] == 2000


def test_a_replica_of_several_machines_is_a_head_and_the_rest_for_each() -> None:
    found = objects(two_groups(), name="x")
    sets = of_kind(found, "StatefulSet")
    assert [
        (each["metadata"]["name"], each["spec"]["ordinals"]["start"], each["spec"]["replicas"])
        for each in sets
    ] == [("x-0-head", 0, 1), ("x-0-rest", 1, 1), ("x-1-head", 0, 1), ("x-1-rest", 1, 1)]
    heads = [container_environment(container(each["spec"]["template"]))["HEAD"] for each in sets]
    assert heads == ["x-0-head-0.x-nodes"] * 2 + ["x-1-head-0.x-nodes"] * 2
    selectors = [str(each["spec"]["selector"]) for each in sets]
    assert len(set(selectors)) == len(selectors), "no set takes another's pods"
    (named,) = [each for each in of_kind(found, "Service") if "clusterIP" in each["spec"]]
    assert named["metadata"]["name"] == "x-nodes"


def test_a_group_of_a_leaderworkerset_is_a_replica() -> None:
    (found,) = of_kind(objects(two_groups(), flavor="leaderworkerset"), "LeaderWorkerSet")
    assert (found["spec"]["replicas"], found["spec"]["leaderWorkerTemplate"]["size"]) == (2, 2)
    leader = container(found["spec"]["leaderWorkerTemplate"]["leaderTemplate"])
    assert {"name": "HEAD", "value": "$(LWS_LEADER_ADDRESS)"} in leader["env"]


def test_replicas_on_two_kinds_of_gpu_are_two_deployments() -> None:
    types = "h100-sxm=H100,a100-sxm-80gb=A100"
    found = of_kind(objects(mixed_plan(), gpu_types=types), "Deployment")
    labels = [each["spec"]["template"]["spec"]["nodeSelector"] for each in found]
    assert labels == [{"nvidia.com/gpu.product": name} for name in ("H100", "A100")]
    assert len({str(each["spec"]["selector"]) for each in found}) == 2


def test_tensorrt_llm_reads_its_configuration_from_the_config_map() -> None:
    found = objects(one(), "trtllm")
    (config,) = of_kind(found, "ConfigMap")
    assert "tensor_parallel_size: 8" in config["data"]["parallel_config.yaml"]
    (deployment,) = of_kind(found, "Deployment")
    own = container(deployment["spec"]["template"])
    assert "--config=/etc/rankwright/parallel_config.yaml" in own["args"]
    (mount,) = [each for each in own["volumeMounts"] if each["mountPath"] == "/etc/rankwright"]
    assert mount["name"] == "plan"


def test_weights_in_a_volume_are_served_under_the_plans_name() -> None:
    (deployment,) = of_kind(objects(one(), model_pvc="weights"), "Deployment")
    args = container(deployment["spec"]["template"])["args"]
    assert args[:2] == ["/models", "--served-model-name=meta-llama/Llama-3.1-405B"]


EXTRAS: dict[str, dict[str, object]] = {
    "plain": {},
    "all": {
        "rdma_resource": "rdma/ib",
        "topology_key": "x.io/rack",
        "image_pull_secret": "registry",
        "token_secret": "hub",
        "namespace": "a",
        "device_class": "gpu.nvidia.com",
        "node_selector": "pool=a",
        "model_pvc": "weights",
    },
    "user": {"run_as_user": 2000, "model_host_path": "/srv/it's"},
}


@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("make", [four, two_groups])
@pytest.mark.parametrize("flavor", ["auto", "statefulset", "leaderworkerset"])
@pytest.mark.parametrize("target", ENGINES)
def test_a_server_would_admit_every_object(
    target: str, flavor: str, make: Callable[[], Plan], extras: str
) -> None:
    pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    if flavor == "leaderworkerset" and crds_folder() is None:
        pytest.skip("no CRDs here: RANKWRIGHT_CRDS names no folder that has them")
    if target == "trtllm" and make is two_groups:
        with pytest.raises(ValueError, match="through MPI where a replica has 2 nodes; render"):
            objects(make(), target, flavor=flavor)
        return
    found = objects(make(), target, flavor=flavor, **EXTRAS[extras])
    for item in found:
        assert problems(item) == [], item["kind"]
    for part in engine_parts(found):
        pod = {"apiVersion": "v1", "kind": "Pod", **copy.deepcopy(part.pod)}
        pod["metadata"]["name"] = "x"
        assert problems(pod) == []


def shared_machine() -> Plan:
    return plan((2, 4, 2), tp=4, pp=1)


@pytest.mark.parametrize(
    ("make", "target", "options", "message"),
    [
        (two_groups, "vllm", {"flavor": "deployment"}, "each replica has 2; use statefulset"),
        (plan, "trtllm", {}, "with --on slurm"),
        (shared_machine, "vllm", {}, "a machine that two replicas share"),
        (cpu_plan, "vllm", {}, "the plan is for CPUs"),
        (mixed_plan, "vllm", {}, "cannot be told which of its machines is which"),
        (mixed_plan, "vllm", {"gpu_types": "h100-sxm=a"}, "a100-sxm-80gb has none"),
        (one, "vllm", {"gpu_types": "l4=a"}, "h100-sxm has none"),
        (mixed_plan, "vllm", {"gpu_types": "h100-sxm=a,a100-sxm-80gb=a"}, "option gpu_types="),
        (one, "trtllm", {"monitor": True}, "leave monitor out"),
        (one, "vllm", {"flavor": "job"}, "expected auto, deployment, statefulset or leader"),
        (one, "vllm", {"max_replicas": 2}, "has no option 'max_replicas'"),
        (one, "vllm", {"run_as_user": 0}, "expected the number of a user other than root"),
        (one, "vllm", {"run_as_user": 1, "rdma_resource": "rdma/ib"}, "leave one out"),
        (
            mixed_plan,
            "vllm",
            {"flavor": "leaderworkerset", "gpu_types": "h100-sxm=a,a100-sxm-80gb=b"},
            "makes all replicas alike",
        ),
        (
            lambda: with_split(plan((8,), tp=8, pp=1, model=moe_spec()), ep=4),
            "vllm",
            {},
            "vLLM cannot express ep=4",
        ),
    ],
)
def test_what_cannot_be_expressed_is_refused_with_what_to_do(
    make: Callable[[], Plan], target: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        objects(make(), target, **options)


@pytest.mark.parametrize(
    ("make", "target", "old", "new", "message"),
    [
        (four, "vllm", "replicas: 4", "replicas: 3", "replicas"),
        (four, "vllm", "gpu: 4", "gpu: 2", "GPUs of a pod"),
        (four, "vllm", "seqs=64", "seqs=65", "flags"),
        (four, "sglang", "length=8192", "length=4096", "flags"),
        (four, "sglang", "fraction-static=0.9", "fraction-static=0.8", "memory fraction"),
        (four, "trtllm", "max_tokens: 64000", "max_tokens: 1", "kv_cache_config"),
        (four, "trtllm", "--config=/etc", "--config=/tmp", "--config"),
        (four, "vllm", 'value: "WARN"', 'value: "INFO"', "environment"),
        (four, "vllm", "llama/Llama-3.1-405B", "llama/Llama-3.1-8B", "plan.json|model"),
        (four, "vllm", '"num_blocks": 1000', '"num_blocks": 1001', "embedded plan.json"),
        (four, "vllm", "      port: 8000", "      port: 8001", "port of the Service"),
        (two_groups, "vllm", "--nnodes 2", "--nnodes 3", "flags of several machines"),
        (two_groups, "vllm", '"llama-3-1-405b-1-head-0.', '"x.', "address of the head"),
        (two_groups, "vllm", "start: 1\n", "start: 2\n", "pods of a replica"),
        (two_groups, "vllm", '" --headless', '"', "flags of several machines"),
        (two_groups, "sglang", "$head:$meet", "$head:1", "flags of several machines"),
    ],
)
def test_a_changed_object_is_noticed(
    make: Callable[[], Plan], target: str, old: str, new: str, message: str
) -> None:
    made = make()
    files = render(made, target, None, on="kubernetes")
    check(made, target, files, "kubernetes")
    assert old in files[FILE]
    changed = files | {FILE: files[FILE].replace(old, new)}
    with pytest.raises(ManifestMismatchError, match=message):
        check(made, target, changed, "kubernetes")


def test_a_missing_layer_variable_is_noticed() -> None:
    made = plan(pp=2, model=spec(num_layers=61))
    files = render(made, "sglang", None, on="kubernetes")
    changed = files[FILE].replace('"31,30"', '"30,31"')
    assert changed != files[FILE]
    with pytest.raises(ManifestMismatchError, match="environment"):
        check(made, "sglang", {FILE: changed}, "kubernetes")


STAND_IN = """\
#!/bin/sh
printf '%s\\n' "$(basename "$0")" "$@"
"""


def words_of(pod: dict[str, Any], part: int, tmp_path: Path) -> list[str]:
    """What the pod's command starts, run by `sh` with stand-ins."""
    for name in ("vllm", "python3", "trtllm-serve"):
        (tmp_path / name).write_text(STAND_IN)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "getent").write_text("#!/bin/sh\n")
    (tmp_path / "getent").chmod(0o755)
    own = container(pod)
    environment = container_environment(own)
    words = [expanded(word, environment) for word in [*own["command"], *own["args"]]]
    done = subprocess.run(
        words,
        env={**environment, "NODE_RANK": str(part), "PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_a_worker_joins_the_head_of_its_replica(tmp_path: Path) -> None:
    found = list(engine_parts(objects(two_groups(), name="x")))
    head, worker = (words_of(part.pod, part.start, tmp_path) for part in found[2:])
    assert head[:3] == ["vllm", "serve", "meta-llama/Llama-3.1-405B"]
    assert " ".join(head).endswith(
        "--nnodes 2 --node-rank 0 --master-addr x-1-head-0.x-nodes --master-port 29500"
    )
    assert " ".join(worker).endswith("--node-rank 1 --master-addr x-1-head-0.x-nodes "
                                     "--master-port 29500 --headless")  # fmt: skip


def test_data_parallel_ranks_of_the_second_machine_start_where_the_first_ends(
    tmp_path: Path,
) -> None:
    made = plan((8, 8), tp=16, pp=1, model=moe_spec())
    made = with_split(made, ep=16, attention="dp")
    _, worker = (words_of(part.pod, part.start, tmp_path) for part in engine_parts(objects(made)))
    text = " ".join(worker)
    assert "--data-parallel-size-local 8" in text
    assert text.endswith("--headless --data-parallel-start-rank 8")
    assert word_flags(worker)["--data-parallel-size"] == "16"


def test_a_dollar_stays_one_in_arguments_and_variables(tmp_path: Path) -> None:
    odd = "a $(HOME) $$(HOME) $HOME `x` $((1 + 1)"
    variable = EnvironmentVariable(name="NCCL_X", value=odd, reason="odd")
    made = plan((8,), tp=8, pp=1, model=spec(odd), environment=(variable,))
    for make in (made, plan(model=spec(odd), environment=(variable,))):
        (part, *_) = engine_parts(objects(make, name="x"))
        assert container_environment(container(part.pod))["NCCL_X"] == odd
        assert odd in words_of(part.pod, 0, tmp_path)


@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("make", [four, two_groups])
@pytest.mark.parametrize("target", ["sglang", "trtllm"])
def test_yamllint_finds_nothing(target: str, make: Callable[[], Plan], extras: str) -> None:
    pytest.importorskip("yamllint", reason="pip install yamllint")
    if target == "trtllm" and make is two_groups:
        make = one
    config = importlib.import_module("yamllint.config").YamlLintConfig(
        "extends: default\n"
        "rules: {line-length: {max: 100, allow-non-breakable-inline-mappings: true}}"
    )
    text = render(make(), target, None, on="kubernetes", **EXTRAS[extras])[FILE]
    found = importlib.import_module("yamllint.linter").run(text, config)
    assert [str(problem) for problem in found] == []
