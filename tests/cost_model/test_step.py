import pytest

from rankwright.cost_model.ops import StepTokens
from rankwright.cost_model.predict import StageModels, choose_replicas
from rankwright.cost_model.read_model import read_model
from rankwright.cost_model.split import Split
from rankwright.cost_model.step import Pipeline
from rankwright.topology.shorthand import parse_cluster


def pipeline_of(
    name: str, cluster: str, tp: int, layers: tuple[int, ...], engine: str = "vllm"
) -> Pipeline:
    machines = parse_cluster(cluster)
    split = Split(tp=tp, pp=len(layers), stage_layers=layers)
    models = StageModels(read_model(name), machines, engine)
    return models.pipeline(choose_replicas(machines, split)[0], layers, 1)


def decode(batch: int, context: int) -> StepTokens:
    return StepTokens(decode=batch, decode_context=context)


# Our own runs of vLLM 0.26.0 on H200 (NV18), torch 2.11, random weights, bf16, FlashAttention 3,
# CUDA graphs: model, TP, batch, context, milliseconds of a decode step.
@pytest.mark.parametrize(
    ("name", "tp", "batch", "context", "measured_ms"),
    [
        ("Qwen/Qwen3-8B", 1, 1, 512, 5.24),
        ("Qwen/Qwen3-8B", 1, 8, 512, 5.70),
        ("Qwen/Qwen3-8B", 1, 32, 512, 6.26),
        ("Qwen/Qwen3-8B", 1, 128, 512, 9.46),
        ("Qwen/Qwen3-8B", 1, 256, 512, 15.07),
        ("Qwen/Qwen3-8B", 2, 1, 512, 3.75),
        ("Qwen/Qwen3-8B", 2, 32, 512, 4.55),
        ("Qwen/Qwen3-8B", 2, 256, 512, 9.63),
        ("Qwen/Qwen3-14B", 1, 1, 512, 8.63),
        ("Qwen/Qwen3-14B", 1, 16, 4096, 11.5),
        ("Qwen/Qwen3-14B", 1, 128, 512, 13.4),
        ("Qwen/Qwen3-14B", 2, 1, 512, 5.62),
        ("Qwen/Qwen3-14B", 2, 128, 512, 8.39),
        ("Qwen/Qwen3-30B-A3B", 1, 1, 512, 4.16),
        ("Qwen/Qwen3-30B-A3B", 1, 256, 512, 24.5),
    ],
)
def test_a_decode_step_is_within_15_percent_of_what_was_measured(
    name: str, tp: int, batch: int, context: int, measured_ms: float
) -> None:
    layers = (read_model(name).num_layers,)
    pipeline = pipeline_of(name, f"{tp}xh200-sxm", tp, layers)
    assert pipeline.round_s(decode(batch, context)) * 1e3 == pytest.approx(measured_ms, rel=0.15)


@pytest.mark.parametrize(("tokens", "measured_ms"), [(4096, 94), (8000, 214)])
def test_a_prefill_is_within_10_percent_of_what_was_measured(
    tokens: int, measured_ms: float
) -> None:
    pipeline = pipeline_of("Qwen/Qwen3-8B", "1xh200-sxm", 1, (36,))
    step = StepTokens(prefill=tokens, prefill_context=tokens / 2, prompts=1)
    assert pipeline.round_s(step) * 1e3 == pytest.approx(measured_ms, rel=0.10)


def test_a_round_is_the_sum_of_the_stages_or_the_slowest_for_all_micro_batches() -> None:
    pipeline = pipeline_of("meta-llama/Llama-3.1-8B", "2xh100-sxm", 1, (10, 22))
    tokens = decode(8, 100)
    short, long = (pipeline.stage_s(stage, tokens) for stage in (0, 1))
    send = pipeline.send_s(0, tokens)
    assert long > short
    assert pipeline.round_s(tokens, 1) == pytest.approx(short + long + send)
    assert pipeline.round_s(tokens, 2) == pytest.approx(max(short + long + send, 2 * long))
    assert pipeline.round_s(tokens, 4) == pytest.approx(4 * long)
    assert pipeline.slowest_stage(tokens) == 1


def test_chunks_of_a_prompt_follow_each_other_through_the_stages() -> None:
    pipeline = pipeline_of("meta-llama/Llama-3.1-8B", "2xh100-sxm", 1, (16, 16))
    step = StepTokens(prefill=1024, prefill_context=2048)
    once = pipeline.prompt_s(step, 1)
    slowest = pipeline.stage_s(pipeline.slowest_stage(step), step)
    assert once == pytest.approx(pipeline.round_s(step, 1))
    assert pipeline.prompt_s(step, 5) == pytest.approx(once + 4 * slowest)


def test_parts_add_up_to_the_stage() -> None:
    for layers in ((32,), (16, 16)):
        pipeline = pipeline_of("meta-llama/Llama-3.1-8B", "4xh100-sxm", 2, layers)
        tokens = StepTokens(8, 500, 256, 300, 0.5)
        for stage in range(len(layers)):
            seconds = sum(part.seconds for part in pipeline.parts(stage, tokens))
            expected = pipeline.stage_s(stage, tokens)
            if stage < len(layers) - 1:
                expected += pipeline.send_s(stage, tokens)
            assert seconds == pytest.approx(expected)


def test_parts_can_be_repeated() -> None:
    pipeline = pipeline_of("meta-llama/Llama-3.1-8B", "1xh100-sxm", 1, (32,))
    tokens = decode(1, 10)
    once, thrice = pipeline.parts(0, tokens), pipeline.parts(0, tokens, repeat=3)
    assert [part.seconds * 3 for part in once] == pytest.approx([part.seconds for part in thrice])


def test_layers_that_differ_are_timed_apart() -> None:
    # The first three layers of DeepSeek-V3 are dense and take longer for many tokens than for few.
    name = "deepseek-ai/DeepSeek-V3"
    pipeline = pipeline_of(name, "8xh200-sxm", 8, (61,))
    assert pipeline.kinds == (((0, 3), (1, 58)),)
    names = {part.name for part in pipeline.parts(0, decode(8, 100))}
    assert {"mlp", "experts", "shared experts", "router"} <= names
