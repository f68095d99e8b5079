"""Shares come out of a calibration as they went in, and predictions use them."""

from pathlib import Path

import pytest

from rankwright.cli import main
from rankwright.cost_model.apply_calibration import apply_calibration
from rankwright.cost_model.calibration import (
    Calibration,
    OpTime,
    RunTime,
    TimedKind,
    add_run,
    write_calibration,
)
from rankwright.cost_model.efficiency import find_efficiency
from rankwright.cost_model.fit import fit_shares
from rankwright.cost_model.predict import predict
from rankwright.cost_model.read_model import read_model
from rankwright.cost_model.split import Split
from rankwright.cost_model.tiles import TILE_KEYS, prefill_flops
from rankwright.cost_model.workload import Workload
from rankwright.topology.shorthand import parse_cluster

PEAK_BYTES_PER_S, PEAK_FLOPS_PER_S = 4.8e12, {"bfloat16": 989e12, "float8": 1979e12}
LAUNCH_S = 2e-6


def op(
    kind: TimedKind, shape: tuple[int, ...], flops: float, moved: float, seconds: float
) -> OpTime:
    return OpTime(
        kind=kind,
        name="it",
        dtype="bfloat16",
        shape=shape,
        flops=flops,
        bytes=moved,
        seconds=seconds,
    )


def machine(product_share: float, memory_share: float) -> Calibration:
    """A calibration of a GPU that behaves as the roofline says, with these shares."""
    ops = [op("launch", (), 0, 0, LAUNCH_S)]
    for rows in (1, 64, 1024, 8192):
        moved = 8.0 * rows * 4096
        seconds = LAUNCH_S + moved / (0.5 * PEAK_BYTES_PER_S)
        ops.append(op("elementwise", (rows, 4096), 0, moved, seconds))
    for m in (1, 16, 1024, 4096):
        for n in (4096, 28672):
            flops, moved = 2.0 * m * n * 4096, 2.0 * n * 4096
            arithmetic_s = flops * (1 + 64 / m) / (product_share * PEAK_FLOPS_PER_S["bfloat16"])
            memory_s = moved / (memory_share * PEAK_BYTES_PER_S)
            seconds = max(arithmetic_s, memory_s) + LAUNCH_S + 3e-6
            ops.append(op("gemm", (m, n, 4096), flops, moved, seconds))
    for batch in (1, 32, 256):
        moved = 4.0 * batch * 2048 * 8 * 128
        seconds = 2 * LAUNCH_S + 1e-6 + moved / (0.7 * PEAK_BYTES_PER_S)
        ops.append(op("attention decode", (batch, 1, 2048, 32, 8, 128), 1.0, moved, seconds))
    for new in (1024, 4096, 8192):
        flops = 4.0 * 32 * 128 * new * (new + 1) / 2
        taken = prefill_flops(new, (new + 1) / 2, new, 32, 4 * 128, TILE_KEYS)
        seconds = LAUNCH_S + taken / (0.4 * PEAK_FLOPS_PER_S["bfloat16"])
        ops.append(op("attention prefill", (1, new, new, 32, 8, 128), flops, 1.0, seconds))
    return Calibration(device="h200-sxm", name="NVIDIA H200", ops=tuple(ops))


def test_shares_are_found_again() -> None:
    shares = fit_shares(machine(0.6, 0.8), PEAK_BYTES_PER_S, PEAK_FLOPS_PER_S)
    assert shares["gemm_memory"] == pytest.approx(0.8, rel=0.01)
    assert shares["gemm_compute"] == pytest.approx(0.6, rel=0.05)
    assert shares["product_s"] == pytest.approx(3e-6, rel=0.05)
    assert shares["launch_s"] == pytest.approx(LAUNCH_S, rel=0.01)
    assert shares["elementwise_memory"] == pytest.approx(0.5, rel=0.01)
    assert shares["attention_memory"] == pytest.approx(0.7, rel=0.01)
    assert shares["attention_s"] == pytest.approx(1e-6, rel=0.05)
    assert shares["attention_compute"] == pytest.approx(0.4, rel=0.01)
    assert "gemm_compute_float8" not in shares  # nothing was timed in FP8


def test_predictions_follow_the_calibration_of_this_machine() -> None:
    model = read_model("meta-llama/Llama-3.1-8B")
    load = Workload(input_tokens=512, output_tokens=64)
    split = Split(stage_layers=(32,))
    plain = parse_cluster("1xh200-sxm")
    slow = apply_calibration(plain, machine(0.6, 0.4))
    fast = apply_calibration(plain, machine(0.6, 0.8))
    times = [predict(model, cluster, load, split).tpot_s.value for cluster in (slow, fast)]
    assert times[0] > 1.6 * times[1]  # weights are nearly all of a step at batch 1
    gpu = slow.nodes[0].gpus[0]
    assert find_efficiency("rankwright", gpu).provenance == "measured here"
    assert find_efficiency("vllm", gpu).provenance == "analytic"
    assert slow.fingerprint == plain.fingerprint
    assert predict(model, slow, load, split).decode_parts[0].source == "measured here"


def test_runs_of_the_engine_say_what_a_step_takes_besides() -> None:
    model = read_model("meta-llama/Llama-3.1-8B")
    split = Split(stage_layers=(32,), max_batch_size=4)
    load = Workload(input_tokens=512, output_tokens=64, concurrency=4)
    plain = parse_cluster("1xh200-sxm")
    measured = machine(0.6, 0.8)
    ours = apply_calibration(plain, measured)
    expected_s = predict(model, ours, load, split).tpot_s.value + 2e-3
    run = RunTime(
        model=model,
        split=split,
        input_tokens=512,
        output_tokens=64,
        concurrency=4,
        tpot_s=expected_s,
    )
    too_large = run.model_copy(update={"split": split.model_copy(update={"tp": 4})})
    folded = apply_calibration(plain, add_run(add_run(measured, run), too_large))
    assert predict(model, folded, load, split).tpot_s.value == pytest.approx(expected_s, rel=1e-3)
    many = measured
    for _ in range(40):
        many = add_run(many, run)
    assert len(many.runs) == 32


def test_a_calibration_that_ships_is_used_and_named() -> None:
    shipped = find_efficiency("rankwright", parse_cluster("1xh200-sxm").nodes[0].gpus[0])
    assert shipped.provenance == "measured table"
    assert "NVIDIA H200" in shipped.source
    other = find_efficiency("rankwright", parse_cluster("1xa100-sxm").nodes[0].gpus[0])
    assert other.provenance == "analytic"


def test_a_calibration_of_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match="is of h200-sxm"):
        apply_calibration(parse_cluster("1xh100-sxm"), machine(0.6, 0.8))


def test_the_commands_take_a_calibration_and_find_the_users_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    command = ["predict", "meta-llama/Llama-3.1-8B", "--cluster", "1xh200-sxm", "--json"]

    def tpot_s(*more: str) -> str:
        assert main([*command, *more]) == 0
        return capsys.readouterr().out

    shipped = tpot_s()
    write_calibration(machine(0.6, 0.4), tmp_path / "slow.json")
    given = tpot_s("--calibration", str(tmp_path / "slow.json"))
    assert given != shipped
    write_calibration(machine(0.6, 0.4), tmp_path / "rankwright" / "calibration" / "h200-sxm.json")
    assert tpot_s() == given
    assert main([*command, "--calibration", str(tmp_path / "none.json")]) == 2
    assert "No such file" in capsys.readouterr().err
