"""What `bench --trace` puts into the prompts."""

import random

from rankwright.cli.load import trace_prompts
from rankwright.cli.load_values import Load
from rankwright.cost_model.trace import TraceRow


def test_prompts_have_their_lengths_and_share_what_was_cached() -> None:
    rows = tuple(
        TraceRow(arrival_s=0, input_tokens=tokens, output_tokens=1, cached_tokens=cached)
        for tokens, cached in ((40, 0), (50, 20), (30, 30), (60, 25))
    )
    load = Load(
        input_tokens=45,
        output_tokens=1,
        num_requests=4,
        concurrency=None,
        request_rate=1.0,
        vocab_size=1_000_000,
        trace=rows,
    )
    prompts = list(trace_prompts(load, random.Random(0)))
    assert [len(prompt) for prompt in prompts] == [40, 50, 30, 60]
    first, second, third, fourth = prompts
    assert second[:20] == third[:20] == fourth[:20]
    assert third[:25] == fourth[:25]
    assert second[20:25] != fourth[20:25]
    assert first[:20] != second[:20]
    assert all(100 <= token < 1_000_000 for prompt in prompts for token in prompt)
