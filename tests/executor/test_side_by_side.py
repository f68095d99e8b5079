"""Two engines get one load: what is asked of each, and how they are compared.

Mock: a `vllm` that answers at once stands in for the real one, which needs a GPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench_side_by_side import finished
from side_load import LOADS, Load, chosen, compared, measure, mixed_lengths

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
STAND_IN = """
import time
__version__ = "0"
asked = []
class SamplingParams:
    def __init__(self, **options): self.max_tokens = options["max_tokens"]
class LLM:
    def __init__(self, folder, **options): assert options["max_num_seqs"] == 3
    def generate(self, prompts, sampling, use_tqdm):
        assert len(prompts) == len(sampling)
        time.sleep(0.001 * max(one.max_tokens for one in sampling))
        return [Answer(one.max_tokens) for one in sampling]
class Answer:
    def __init__(self, count): self.token_ids, self.outputs = [0] * count, [self]
"""


def test_a_step_is_what_more_tokens_take_and_a_rate_counts_all_of_them() -> None:
    load = Load(batches=(2,), prompt=8, decoded=4, many=2, long_prompts=(16,), mixed=(3, 5, 5))

    def run(lengths: object) -> float:
        # A second a step, and a tenth of one for each prompt token.
        assert isinstance(lengths, list)
        return max(out for _, out in lengths) + 0.1 * sum(prompt for prompt, _ in lengths)

    reported: list[dict[str, object]] = []
    rows = measure(run, load, report=reported.append)
    assert rows == reported
    assert [{**row, "load_average": 0} for row in rows] == [
        {"what": "decode-2", "seconds": pytest.approx(1), "load_average": 0},
        {"what": "prefill-2x8", "tokens_per_s": pytest.approx(16 / 2.6), "load_average": 0},
        {"what": "prompt-16", "seconds": pytest.approx(2.6), "load_average": 0},
        {"what": "mixed-3", "tokens_per_s": pytest.approx(15 / 6.5), "load_average": 0},
    ]


def test_rows_can_be_chosen_and_one_that_fails_leaves_the_others() -> None:
    def run(lengths: object) -> float:
        assert isinstance(lengths, list)
        if len(lengths) == 2:
            raise RuntimeError("out of memory")
        return 1.0

    load = LOADS["small"]
    wanted = chosen(load, "prompt-*, decode-2,mixed-4")
    assert wanted == ["decode-2", "prompt-16", "mixed-4"]
    rows = measure(run, load, wanted)
    assert [row["what"] for row in rows] == wanted
    assert rows[0]["error"] == "RuntimeError('out of memory')"
    assert rows[1]["seconds"] == 1.0
    assert [row["what"] for row in compared(rows, rows)] == ["prompt-16", "mixed-4"]
    with pytest.raises(ValueError, match="no row is called 'decode-7'; there are decode-1, "):
        chosen(load, "decode-7")


def test_a_ratio_above_one_says_that_ours_is_faster() -> None:
    ours = [{"what": "a", "seconds": 2.0}, {"what": "b", "tokens_per_s": 30.0}]
    peer = [{"what": "b", "tokens_per_s": 20.0}, {"what": "a", "seconds": 1.0}]
    assert [row["speed_ratio"] for row in compared(ours, peer)] == [0.5, 1.5]


def test_every_engine_gets_the_same_mixed_requests() -> None:
    lengths = mixed_lengths(Load())
    assert len(lengths) == 256
    assert lengths == mixed_lengths(Load())
    assert min(map(min, lengths)) >= 100
    assert max(map(max, lengths)) <= 1024


def test_the_peer_runs_in_its_own_environment_and_writes_what_ours_does(tmp_path: Path) -> None:
    (tmp_path / "vllm.py").write_text(STAND_IN)
    target = tmp_path / "peer.json"
    options = ("--load", "small", "--max-batch", "3")
    places = os.pathsep.join((str(tmp_path), str(BENCHMARKS)))
    subprocess.run(
        [sys.executable, BENCHMARKS / "side_vllm.py", tmp_path, target, *options],
        env={**os.environ, "PYTHONPATH": places},
        check=True,
    )
    content = json.loads(target.read_text())
    ours = measure(lambda lengths: 1.0 + sum(out for _, out in lengths), LOADS["small"])
    assert content["version"] == "0"
    lines = target.with_suffix(".jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == content["rows"]
    assert [row["what"] for row in content["rows"]] == [row["what"] for row in ours]
    assert len(compared(ours, content["rows"])) == len(ours)


def test_an_engine_that_fails_leaves_its_words_and_the_rows_that_it_had(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write = f'open({str(tmp_path / "peer.jsonl")!r}, \'w\').write(\'{{"what": "a"}}\\n{{"wh\')'
    command = [sys.executable, "-c", f"{write}; raise SystemExit('no GPU here')"]
    found = finished(command, dict(os.environ), tmp_path / "peer.json", 60)
    assert found["rows"] == [{"what": "a"}]
    assert found["error"] == "peer failed with 1:\nno GPU here"
    assert "peer what=a" in capsys.readouterr().out


def test_an_engine_that_hangs_is_ended(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    found = finished(command, dict(os.environ), tmp_path / "peer.json", 0.1)
    assert found["error"].startswith("peer took longer than 0.1 s")
