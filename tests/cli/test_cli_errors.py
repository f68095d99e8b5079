"""A user's mistake ends in one line that helps, and the right exit code."""

import json
from pathlib import Path
from typing import Any

import pytest

from rankwright.cli import main
from rankwright.cli.errors import describe_error, exit_code, nearest

SMALL = ["--cluster", "4xl4", "--isl", "64", "--osl", "8"]


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = main(args)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["plam"], ["'plam'", "'plan'"]),
        (["xyzzy"], ["'xyzzy'", "known are", "'probe'"]),
        (["plan"], ["MODEL", "missing"]),
        (["plan", "Qwen/Qwen3-8B", "--ils", "5"], ["--ils", "--isl", "plan --help"]),
        (["plan", "Qwen/Qwen3-8B", "--isl", "-3"], ["--isl", "1"]),
        (["plan", "Qwen/Qwen3-8B", "--isl", "many"], ["--isl", "many"]),
        (["plan", "Qwen/Qwen3-8B", "--objective", "speed"], ["speed", "throughput"]),
        (["plan", "Qwen/Qwen3-8B", "--rate", "1", "--concurrency", "2", *SMALL], ["--rate", "one"]),
        (["plan", "Qwen/Qwen3-8B", "--ttft", "0", *SMALL], ["--ttft", "above 0"]),
        (["plan", "Qwen/Qwen3-8B", "--percentile", "100", *SMALL], ["--percentile", "100"]),
        (["plan", "Qwen/Qwen3-8B", "--memory-budget", "-1", *SMALL], ["--memory-budget", "-1"]),
        (["plan", "Qwen/Qwen3-8B", "--ttft", "nan", *SMALL], ["--ttft", "finite, got nan"]),
        (["plan", "Qwen/Qwen3-8B", "--tpot", "inf", *SMALL], ["--tpot", "finite, got inf"]),
        (["plan", "Qwen/Qwen3-8B", "--tpot", "-5", *SMALL], ["--tpot", "above 0", "-5"]),
        (["plan", "Qwen/Qwen3-8B", "--rate", "inf", *SMALL], ["--rate", "got inf"]),
        (["plan", "Qwen/Qwen3-8B", "--percentile", "nan", *SMALL], ["--percentile", "nan"]),
        (["plan", "Qwen/Qwen3-8B", "--time-limit", "nan", *SMALL], ["--time-limit", "got nan"]),
        (["plan", "Qwen/Qwen3-8B", "--expert-load", "x"], ["--expert-load", "--expert-slots"]),
        (["plan", "Qwen/Qwen3-8B", "--expert-slots", "4", *SMALL], ["a model with experts and ep"]),
        (["plan", "Qwen/Qwen3-8B", "--isl", "9" * 12], ["--isl", "at most 100,000,000"]),
        (["plan", "Qwen/Qwen3-8B", "--isl", "90000"], ["context of Qwen/Qwen3-8B", "90000"]),
        (["plan", "Qwen/Qwen3-8B", "--memory-budget", "nan", *SMALL], ["--memory-budget", "nan"]),
        (["plan", "Qwen/Qwen3-8B", "--memory-budget", "inf", *SMALL], ["--memory-budget", "inf"]),
        (["plan", "Qwen/Qwen3-8B", "--memory-budget", "80", *SMALL], ["memory budget", "24", "l4"]),
        (["plan", "Qwen/Qwen3-8B", "--dtype", "fp8", *SMALL], ["--dtype': 'fp8' is not", "float8"]),
        (["plan", "Qwen/Qwen3-8B", "--concurrency", "9" * 20, *SMALL], ["--concurrency must be"]),
        (["plan", "Qwen/Qwen3-8C", *SMALL], ["Qwen/Qwen3-8C", "Qwen/Qwen3-8B"]),
        (["plan", "Qwen/Qwen3-8B", "--cluster", "8xh100-smx"], ["h100-smx", "h100-sxm"]),
        (["plan", "Qwen/Qwen3-8B", "--cluster", "2x8xh100-sxm"], ["fabric", "+ib400"]),
        (["predict", "Qwen/Qwen3-8B", "--tp", "8", *SMALL], ["TP8", "8 GPUs", "4"]),
        (["predict", "Qwen/Qwen3-8B", "--tp", "2", "--ep", "2", *SMALL], ["ep=2", "no experts"]),
        (["predict", "Qwen/Qwen3-8B", "--pp", "99", *SMALL], ["--pp", "99", "36 layers"]),
        (["render", "none.json", "--target", "slurm"], ["none.json"]),
        (["launch", "none.json"], ["none.json", "rankwright plan"]),
        (["launch", "x", "--node-rank", "2", "--nnodes", "2"], ["--node-rank", "2 nodes"]),
        (["launch", "x", "--start-timeout", "nan"], ["--start-timeout", "finite, got nan"]),
        (["generate", "x", "--prompt", "a", "--start-timeout", "0"], ["--start-timeout", "got 0"]),
        (["probe", "--from-file", "none.txt"], ["none.txt", "no such file"]),
        (["bench", "none.json"], ["none.json"]),
        (["bench", "x.json", "--plan", "y.json"], ["--plan", "URL"]),
        (["doctor", "--url", "localhost:8000"], ["--url", "http://"]),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], args: list[str], parts: list[str]
) -> None:
    code, out, err = run(capsys, *args)
    assert code == 2, err
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("rankwright: ")
    for part in parts:
        assert part.lower() in err.lower()


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("config.json", "{", ["config.json", "JSON"]),
        ("config.json", "{}", ["architectures"]),
        ("config.json", '{"architectures": ["GPT2LMHeadModel"]}', ["GPT2LMHeadModel"]),
        ("plan.json", "{}", ["plan.json", "num_gpus"]),
        ("plan.json", "[", ["plan.json", "JSON"]),
    ],
)
def test_a_malformed_file_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, text: str, parts: list[str]
) -> None:
    path = tmp_path / name
    path.write_text(text)
    command = ["plan", str(path), *SMALL] if name == "config.json" else ["launch", str(path)]
    code, _, err = run(capsys, *command)
    assert code == 2
    assert err.count("\n") == 1
    for part in parts:
        assert part in err


@pytest.mark.parametrize("text", ["cluster: [", "nodes: []", "nodes:\n- nmae: a", "3"])
def test_a_malformed_cluster_file_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str
) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    code, _, err = run(capsys, "plan", "Qwen/Qwen3-8B", "--cluster", str(path))
    assert code == 2
    assert err.count("\n") == 1
    assert "cluster.yaml" in err


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"nodes": [{"name": "a", "gpus": []}]}, ["no GPU and no CPU rank"]),
        ({"nodes": [{"name": "a", "gpus": [{"memory_bytes": 0}]}]}, ["gpus.0.memory_bytes"]),
        ({"nodes": [{"name": "a", "gpus": [{"device": "abacus"}]}]}, ["abacus", "GPU 0"]),
        ({"nodes": [{"name": "a", "count": 10**9, "gpus": [{}]}]}, ["nodes.0.count"]),
        ({"links": [{"bytes_per_s": float("nan")}]}, ["links.0.bytes_per_s"]),
        ({"links": [{"bytes_per_s": float("inf")}]}, ["links.0.bytes_per_s"]),
        ({"links": [{"latency_s": -1}]}, ["links.0.latency_s"]),
        ({"nodes": [{"name": "a", "count": 2, "gpus": [{}]}]}, ["need a fabric"]),
    ],
)
def test_a_cluster_that_cannot_be_is_named_by_field(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    change: dict[str, list[dict[str, Any]]],
    parts: list[str],
) -> None:
    gpu = {
        "index": 0,
        "device": "l4",
        "name": "NVIDIA L4",
        "memory_bytes": 24 * 10**9,
        "total_memory_bytes": 24 * 10**9,
    }
    link = {"a": 0, "b": 1, "kind": "PHB", "bytes_per_s": 1e10, "latency_s": 1e-5}
    nodes = change.get("nodes") or [{"name": "a", "gpus": [{}, {"index": 1}]}]
    for node in nodes:
        node["gpus"] = [gpu | one for one in node["gpus"]]
        node["links"] = [link | one for one in change.get("links", [])]
    path = tmp_path / "cluster.json"
    path.write_text(json.dumps({"nodes": nodes}))
    code, _, err = run(capsys, "plan", "Qwen/Qwen3-8B", "--cluster", str(path))
    assert code == 2, err
    assert err.count("\n") == 1
    assert "cluster.json" in err or "GPU 0" in parts
    for part in parts:
        assert part in err


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--ttft", "0.001"], ["TTFT limit of 0.001 ms", "a TTFT limit of"]),
        (["--tpot", "0.001"], ["TPOT limit of 0.001 ms", "a TPOT limit of"]),
        (["--rate", "1e9"], ["request rate", "requests/s"]),
        (["--memory-budget", "1e-9"], ["memory", "0.0 GB may be used"]),
        (["--memory-budget", "0.001"], ["memory", "a memory budget of"]),
        (["--tp", "999999999999"], ["tp=999999999999", "unpin"]),
        (["--dp", "9" * 20], ["pinned dp=99", "unpin"]),
    ],
)
def test_limits_that_no_split_keeps_name_the_change(
    capsys: pytest.CaptureFixture[str], args: list[str], parts: list[str]
) -> None:
    code, out, err = run(capsys, "plan", "Qwen/Qwen3-8B", *SMALL, *args)
    assert code == 3
    assert out == ""
    assert err.count("\n") == 1
    for part in (*parts, "nearest change that fits"):
        assert part in err


def test_a_trace_beside_lengths_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("arrival_s,input_tokens,output_tokens\n0,9,4\n")
    for option in ("--isl", "--osl", "--concurrency", "--rate"):
        for command in (["plan", "Qwen/Qwen3-8B"], ["bench", "http://127.0.0.1:9"]):
            code, _, err = run(capsys, *command, "--trace", str(path), option, "5")
            assert code == 2
            assert option in err
            assert "--trace" in err
    path.write_text("arrival_s,input_tokens,output_tokens\n0,9,4\n1,-9,4\n")
    code, _, err = run(capsys, "bench", "http://127.0.0.1:9", "--trace", str(path))
    assert code == 2
    assert "line 3, field input_tokens" in err


def test_what_does_not_fit_is_exit_code_3_with_a_change_that_would(
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = ["plan", "meta-llama/Llama-3.1-405B", "--cluster", "8xh100-sxm", "--json"]
    code, out, err = run(capsys, *args)
    assert code == 3
    assert err.count("\n") == 1
    error = json.loads(out)["error"]
    assert error["class"] == "NoFeasiblePlanError"
    assert error["message"] in err
    assert "GPU" in error["message"]


def test_a_broken_driver_is_exit_code_4_with_its_class(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = "Failed to initialize NVML: Driver/library version mismatch\n"
    (tmp_path / "smi.txt").write_text(text)
    code, out, err = run(capsys, "probe", "--from-file", str(tmp_path / "smi.txt"), "--json")
    assert code == 4
    assert json.loads(out)["error"]["class"] == "driver_library_mismatch"
    assert "reboot" in err


def test_a_server_that_is_not_there_is_exit_code_5(capsys: pytest.CaptureFixture[str]) -> None:
    # Port 9 (discard) is not served on any machine that runs tests.
    code, _, err = run(capsys, "bench", "http://127.0.0.1:9", "--num-requests", "1")
    assert code == 5
    assert err.count("\n") == 1
    assert "127.0.0.1:9" in err


def test_an_interrupt_is_exit_code_130_as_a_shell_says_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rankwright.cli.build_app", interrupted)
    assert run(capsys, "plan") == (130, "", "rankwright: stopped\n")


def test_debug_shows_the_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANKWRIGHT_DEBUG", "1")
    code, _, err = run(capsys, "predict", "no/such-model", *SMALL)
    assert code == 2
    assert "Traceback" in err


def test_our_own_mistake_is_not_passed_off_as_the_users() -> None:
    assert exit_code(AssertionError("x")) == 1
    assert exit_code(ModuleNotFoundError(name="rankwright.nothing")) == 1
    assert exit_code(KeyError("x")) == 1


def test_a_missing_extra_says_what_to_install() -> None:
    error = ModuleNotFoundError(name="torch")
    assert exit_code(error) == 5
    assert "rankwright[executor]" in describe_error(error)[1]


def test_nearest_lists_what_is_known_when_nothing_is_near() -> None:
    assert nearest("qqq", ["slurm", "kubernetes"]) == "known are 'slurm', 'kubernetes'"


def test_what_is_stored_small_is_kept_so_by_another_engine(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, _, err = run(capsys, "plan", "openai/gpt-oss-120b", "--cluster", "1xh100-sxm")
    assert code == 3
    assert "--engine vllm, which keeps the weights as stored (mxfp4)" in err


def test_more_gpus_are_suggested_once(capsys: pytest.CaptureFixture[str]) -> None:
    args = ("--cluster", "1xrtx4090", "--dtype", "int4")
    code, _, err = run(capsys, "plan", "meta-llama/Llama-3.1-70B", *args)
    assert code == 3
    assert err.endswith("nearest change that fits: 2 x rtx4090\n")


@pytest.mark.parametrize("dtype", ["float8", "int4"])
def test_numbers_that_our_executor_does_not_compute_in_are_said(
    capsys: pytest.CaptureFixture[str], dtype: str
) -> None:
    code, out, _ = run(capsys, "plan", "Qwen/Qwen3-8B", "--dtype", dtype, *SMALL, "--json")
    assert code == 0
    plan = json.loads(out)
    assert f"weights: {dtype}, which rankwright's executor does not" in plan["assumptions"][0]


def test_a_gpu_without_bfloat16_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    args = ("plan", "Qwen/Qwen3-8B", "--cluster", "4xv100-sxm2", "--json")
    _, out, _ = run(capsys, *args)
    assert "v100-sxm2-32gb does not compute in bfloat16" in json.loads(out)["assumptions"][0]
    _, out, _ = run(capsys, *args, "--dtype", "float16")
    assert json.loads(out)["assumptions"] == []


@pytest.mark.parametrize(
    ("option", "text", "says"),
    [
        ("--cluster", "null", "holds nothing"),
        ("--calibration", b"\xff", "is not a text file"),
        ("--expert-load", "[]", "Input should be"),
    ],
)
def test_a_file_of_another_kind_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, option: str, text: str | bytes, says: str
) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    more = ["--expert-slots", "40"] if option == "--expert-load" else []
    args = ["plan", "Qwen/Qwen3-30B-A3B", "--ep", "4", "--cluster", "4xh100-sxm", *more]
    code, _, err = run(capsys, *args, option, str(path))
    assert code == 2
    assert "file.json" in err
    assert says in err
    assert "http" not in err


def test_a_request_of_a_trace_that_is_longer_than_the_context_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,input_tokens,output_tokens\n0,1000,100\n1,200000,100\n")
    options = ["--cluster", "8xh100-sxm", "--trace", str(trace)]
    assert main(["plan", "meta-llama/Llama-3.1-8B", *options]) == 2
    assert "a request of 200000 + 100 tokens exceeds the context" in capsys.readouterr().err


def test_a_cache_that_our_executor_does_not_keep_is_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--cluster", "2xh100-sxm", "--kv-dtype", "float8"]
    assert main(["plan", "meta-llama/Llama-3.1-8B", *options]) == 0
    assert "KV cache: float8, which rankwright's executor does not" in capsys.readouterr().out
    assert main(["plan", "meta-llama/Llama-3.1-8B", *options, "--engine", "vllm"]) == 0
    assert "KV cache: float8" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-o", "cluster.txt"], "cannot write a cluster to 'cluster.txt'"),
        (["--from-file", __file__, "--gather", "ray"], "--from-file reads a text"),
        (["--from-file", __file__, "--fabric", "ib400"], "--fabric is between machines"),
    ],
)
def test_options_of_probe_that_do_not_apply_are_refused(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["probe", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_no_arguments_print_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out.startswith("Usage: rankwright")


def test_a_label_is_selected_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tmp_path / "plan.json"
    options = ["--cluster", "2xh100-sxm", "-o", str(plan)]
    assert main(["plan", "meta-llama/Llama-3.1-8B", *options]) == 0
    selector = ["--set", "node_selector=zone=a,zone=b", "-o", str(tmp_path / "out")]
    assert main(["render", str(plan), "--target", "kubernetes", *selector]) == 2
    assert "names a label twice" in capsys.readouterr().err


def test_a_plan_with_a_replica_over_two_machines_is_a_job(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    options = ["--cluster", "2x8xh200-sxm+ib400", "--tp", "1", "--pp", "5", "--dp", "3"]
    assert main(["plan", "Qwen/Qwen3-235B-A22B", *options, "-o", str(plan)]) == 0
    assert main(["render", str(plan), "--target", "slurm", "-o", str(tmp_path / "out")]) == 0
