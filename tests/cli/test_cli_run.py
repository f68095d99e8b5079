"""Commands that start ranks: a tiny random model over two CPU processes."""

import json
from pathlib import Path

import pytest

from rankwright.cli import main

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
