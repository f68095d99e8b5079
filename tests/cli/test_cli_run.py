"""Commands that start ranks: a tiny random model over two CPU processes."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from rankwright.cli import main
from rankwright.cli.bench import served
from rankwright.cost_model.calibration import (
    Calibration,
    OpTime,
    read_calibration,
    write_calibration,
)
from rankwright.cost_model.calibration_file import default_path

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
    "eos_token_id": 2,
}


@pytest.fixture(scope="module")
def plan_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    path = folder / "plan.json"
    args = ["plan", str(folder), "--cluster", "2xcpu", "--tp", "1", "--pp", "2", "-o", str(path)]
    assert main([*args, "--isl", "32", "--osl", "8", "--concurrency", "2"]) == 0
    return path


def test_generate_answers_every_prompt(capsys: pytest.CaptureFixture[str], plan_path: Path) -> None:
    prompts = ("--prompt", "one", "--prompt", "three", "--max-tokens", "6")
    code = main(["generate", str(plan_path), *prompts, "--load-format", "dummy", "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    result = json.loads(out)
    assert result["split"]["pp"] == 2
    assert [answer["num_prompt_tokens"] for answer in result["answers"]] == [3, 5]
    assert all(1 <= len(answer["token_ids"]) <= 6 for answer in result["answers"])


def test_bench_puts_measured_beside_predicted(
    capsys: pytest.CaptureFixture[str], plan_path: Path
) -> None:
    args = ["--num-requests", "4", "--load-format", "dummy", "--json"]
    code = main(["bench", str(plan_path), *args])
    out, err = capsys.readouterr()
    assert code == 0, err
    result = json.loads(out)
    assert result["load"] == {
        "input_tokens": 32,
        "output_tokens": 8,
        "concurrency": 2,
        "request_rate": None,
        "num_requests": 4,
    }
    measured, predicted = result["measured"], result["predicted"]
    assert (measured["num_requests"], measured["num_failed"]) == (4, 0)
    assert 0 < measured["ttft_s"]["p50"] <= measured["ttft_s"]["p99"]
    assert measured["output_tokens_per_s"] * measured["duration_s"] == pytest.approx(4 * 8)
    assert predicted["output_tokens_per_s"]["value"] > 0


def test_bench_adds_to_a_calibration(
    capsys: pytest.CaptureFixture[str],
    url: str,
    plan_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    args = ["bench", url, "--plan", str(plan_path), "--num-requests", "2", "--calibrate"]
    assert main(args) == 2
    assert "there is no calibration" in capsys.readouterr().err
    shape = {"kind": "launch", "name": "it", "dtype": "bfloat16", "shape": ()}
    launch = OpTime.model_validate(shape | {"flops": 0, "bytes": 0, "seconds": 1e-5})
    path = default_path("cpu")
    write_calibration(Calibration(device="cpu", name="CPU", ops=(launch,)), path)
    assert main(args) == 0
    capsys.readouterr()
    (run,) = read_calibration(path).runs
    assert (run.concurrency, run.output_tokens) == (2, 8)
    assert run.tpot_s > 0
    assert main([*args, "--rate", "5"]) == 2
    assert "--concurrency instead of --rate" in capsys.readouterr().err


@pytest.fixture(scope="module")
def url(plan_path: Path) -> Iterator[str]:
    with served(plan_path, "dummy", None) as address:
        yield address


def test_bench_sends_at_a_rate(capsys: pytest.CaptureFixture[str], url: str) -> None:
    args = ["--rate", "50", "--isl", "16", "--osl", "4", "--num-requests", "5", "--json"]
    assert main(["bench", url, *args]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["load"]["request_rate"] == 50
    assert result["load"]["concurrency"] is None
    assert (result["measured"]["num_requests"], result["measured"]["num_failed"]) == (5, 0)
    assert result["predicted"] is None


def test_bench_sends_a_trace(
    capsys: pytest.CaptureFixture[str], url: str, plan_path: Path, tmp_path: Path
) -> None:
    rows = [(5.0, 16, 4, 0), (5.1, 24, 8, 12), (5.2, 8, 1, 0), (5.4, 30, 6, 12)]
    trace = tmp_path / "trace.csv"
    head = "arrival_s,input_tokens,output_tokens,cached_tokens"
    trace.write_text("\n".join([head, *(",".join(map(str, row)) for row in rows)]))
    args = ["bench", url, "--plan", str(plan_path), "--trace", str(trace)]
    assert main([*args, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    load, measured, predicted = result["load"], result["measured"], result["predicted"]
    assert (load["num_requests"], load["input_tokens"], load["concurrency"]) == (4, 20, None)
    assert load["request_rate"] == pytest.approx(3 / 0.4)
    assert (measured["num_requests"], measured["num_failed"]) == (4, 0)
    assert measured["duration_s"] > 0.4  # the last is sent then, not before
    assert measured["output_tokens_per_s"] * measured["duration_s"] == pytest.approx(19)
    assert predicted["ttft_s"]["low"] < predicted["ttft_s"]["value"] < predicted["ttft_s"]["high"]
    assert set(predicted["ttft_percentiles_s"]) == {"50", "90", "99"}
    assert main([*args, "--num-requests", "2"]) == 0
    page = capsys.readouterr().out
    assert "2 requests of 20 + 6 tokens on average, as the trace has them" in page
    assert "predicted: first token" in page
    trace.write_text(f"{head}\n0,500,100,0\n")
    assert main(args) == 2
    assert "--trace has a request of 500 + 100 tokens" in capsys.readouterr().err


def test_bench_shows_a_table(capsys: pytest.CaptureFixture[str], url: str, plan_path: Path) -> None:
    args = ["--plan", str(plan_path), "--osl", "4", "--num-requests", "2"]
    assert main(["bench", url, *args]) == 0
    page = capsys.readouterr().out
    assert "2 requests of 32 + 4 tokens, 2 in flight" in page
    assert "predicted" in page


def test_requests_that_fail_are_an_error_with_the_servers_words(
    capsys: pytest.CaptureFixture[str], url: str
) -> None:
    assert main(["bench", url, "--isl", "5000", "--num-requests", "2"]) == 5
    err = capsys.readouterr().err
    assert "HTTP 400" in err
    assert "5000" in err


def test_doctor_finds_a_healthy_server(
    capsys: pytest.CaptureFixture[str], url: str, plan_path: Path
) -> None:
    assert main(["doctor", "--url", url, "--json"]) == 0
    findings = {f["check"]: f for f in json.loads(capsys.readouterr().out)["findings"]}
    assert findings["server"]["state"] == "ok"
    assert findings["models"]["detail"] == str(plan_path.parent)


def test_a_prompt_that_does_not_fit_is_refused_before_anything_starts(
    capsys: pytest.CaptureFixture[str], plan_path: Path
) -> None:
    prompt = "x" * 600
    args = ["generate", str(plan_path), "--prompt", prompt, "--load-format", "dummy"]
    assert main(args) == 2
    err = capsys.readouterr().err
    assert "600 tokens" in err
    assert err.count("\n") == 1


def test_weights_that_are_not_there_are_refused_before_anything_starts(
    capsys: pytest.CaptureFixture[str], plan_path: Path
) -> None:
    assert main(["generate", str(plan_path), "--prompt", "x"]) == 2
    err = capsys.readouterr().err
    assert "safetensors" in err
    assert err.count("\n") == 1


MOE_CONFIG = CONFIG | {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_hidden_layers": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


def test_what_a_launch_counted_places_the_experts_of_a_plan(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MOE_CONFIG))
    load = {"model": str(tmp_path), "layers": [[90, 5, 3, 2], [2, 3, 5, 90]]}
    (tmp_path / "load.json").write_text(json.dumps(load))
    slots = ["--expert-slots", "3", "--expert-load", str(tmp_path / "load.json")]
    shape = ["--cluster", "2xh100-sxm", "--tp", "2", "--ep", "2", "--isl", "32", "--osl", "8"]
    args = ["plan", str(tmp_path), *shape, *slots, "--rebalance-steps", "50", "--json"]
    assert main(args) == 0
    placed = json.loads(capsys.readouterr().out)["expert_slots"]
    assert placed["rebalance_steps"] == 50
    # The hot expert of each layer is on both ranks.
    assert all(0 in rank for rank in placed["layers"][0])
    assert all(3 in rank for rank in placed["layers"][1])
