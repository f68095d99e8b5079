import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from rankwright.kernels.noise import exponential_noise
from rankwright.kernels.sampling import sample


def rows(
    batch: int, device: str = "cpu", *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> dict[str, Any]:
    """Return the settings of `batch` rows: equal but for their positions."""
    return {
        "temperature_B": torch.full((batch,), temperature, device=device),
        "top_k_B": torch.full((batch,), top_k, device=device),
        "top_p_B": torch.full((batch,), top_p, device=device),
        "seeds_B": torch.full((batch,), int(torch.randint(2**62, ())), device=device),
        "positions_B": torch.arange(batch, device=device),
    }


def chi_square_over_limit(counts: torch.Tensor, probability: torch.Tensor) -> float:
    """Return chi-square over what a right sampler stays below.

    Categories that are expected less than 5 times count as one: the statistic of a rare one has a
    tail far longer than chi-square's.
    """
    expected = probability * counts.sum()
    assert not counts[expected == 0].any()
    order = expected.argsort()
    num_rare = int((expected < 5).sum())
    if num_rare and expected[order[:num_rare]].sum() < 5:
        num_rare += 1
    rare, common = order[:num_rare], order[num_rare:]
    counted, expected = (
        torch.cat([values[common], values[rare].sum().view(1)]) for values in (counts, expected)
    )
    counted, expected = counted[expected > 0], expected[expected > 0]
    return float(((counted - expected) ** 2 / expected).sum()) / limit(max(len(expected) - 1, 1))


def limit(degrees_of_freedom: int) -> float:
    """Return a bound of chi-square that a right sampler passes once in a billion runs.

    Wilson and Hilferty's approximation, at 6 standard deviations.
    """
    spread = 2 / (9 * degrees_of_freedom)
    return degrees_of_freedom * float((1 - spread + 6 * math.sqrt(spread)) ** 3)


BACKENDS = ["triton", "reference"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_temperature_zero_takes_the_first_of_the_best(
    backend: Any, dtype: torch.dtype, device: str
) -> None:
    logits = torch.randn(4, 5000, device=device).to(dtype)
    logits[1, [4999, 17, 4097]] = 50.0
    logits[2, 4096:] = 60.0
    logits[3] = 0.0
    options = rows(4, device, temperature=0.0)
    options["temperature_B"][0] = 1.0  # else the CPU takes a short cut
    out = sample(logits, **options, filtered=False, backend=backend)
    assert out.dtype == torch.int64
    assert out[1:].tolist() == [17, 4096, 0]
    assert sample(logits, **rows(4, device, temperature=0.0))[1:].tolist() == [17, 4096, 0]


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_draws_follow_the_softmax(temperature: float, filtered: bool, device: str) -> None:
    draws, vocab = 20_000, 30
    logits = 2 * torch.randn(vocab, device=device)
    options = rows(draws, device, temperature=temperature)
    out = sample(logits.expand(draws, -1), **options, filtered=filtered)
    counts = torch.bincount(out, minlength=vocab).double()
    assert chi_square_over_limit(counts, (logits / temperature).double().softmax(-1)) < 1


@pytest.mark.parametrize("vary", ["seeds_B", "positions_B"])
def test_noise_is_uniform_over_tokens_seeds_and_positions(vary: str) -> None:
    batch, vocab, bins = 400, 500, 64
    options = rows(batch)
    options["seeds_B"][:], options["positions_B"][:] = 5, 7
    # Seeds that differ in their high or low half only, and neighbouring positions.
    step = {"seeds_B": 2**33 + 1, "positions_B": 1}[vary]
    options[vary] = torch.arange(batch) * step
    noise = exponential_noise(options["seeds_B"], options["positions_B"], torch.arange(vocab)[None])
    uniform = torch.exp(-noise.double())
    even = torch.full((bins,), 1 / bins, dtype=torch.float64)
    counts = torch.histc(uniform, bins, 0, 1)
    assert chi_square_over_limit(counts, even) < 1
    # Rows, and neighbouring tokens, are unrelated: correlations of n pairs spread as 1 / sqrt(n).
    for x in (uniform, uniform.t()):
        pairs = torch.corrcoef(torch.stack([x[1:].flatten(), x[:-1].flatten()]))[0, 1]
        assert abs(float(pairs)) < 6 / math.sqrt(uniform.numel())


def test_noise_reaches_far_into_its_tail() -> None:
    noise = exponential_noise(torch.arange(64), torch.arange(64), torch.arange(30_000)[None])
    assert noise.isfinite().all()
    assert bool((noise > 0).all())
    # The smallest of n variates is about 1 / n: their logarithm decides a draw.
    assert 1e-8 < float(noise.min()) < 1e-5
    assert float(noise.max()) > 11


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_draws_the_tokens_of_the_reference(dtype: torch.dtype, device: str) -> None:
    batch = 12
    logits = torch.randn(batch, 4999, device=device).to(dtype)
    options = rows(batch, device)
    options["temperature_B"] = torch.rand(batch, device=device) * 2
    options["temperature_B"][::7] = 0.0
    options["seeds_B"] = torch.randint(-(2**63), 2**63 - 1, (batch,), device=device)
    out = sample(logits, **options, filtered=False, backend="triton")
    reference = sample(logits, **options, filtered=False, backend="reference")
    # A logarithm off in its last bit decides between two scores once in some ten thousand rows.
    assert int((out != reference).sum()) <= 1
    filtered = sample(logits, **options, filtered=True)
    assert int((out != filtered).sum()) <= 1


def test_a_draw_depends_on_its_row_alone(device: str) -> None:
    logits = torch.randn(16, 1000, device=device)
    options = rows(16, device)
    options["temperature_B"][3] = 0.0
    options["top_k_B"][::2] = 20
    options["top_p_B"][::3] = 0.8
    out = sample(logits, **options)
    assert torch.equal(out, sample(logits, **options))
    order = torch.randperm(16, device=device)
    shuffled = {key: value[order] for key, value in options.items()}
    assert torch.equal(sample(logits[order], **shuffled), out[order])
    for b in range(16):
        alone = {key: value[b : b + 1] for key, value in options.items()}
        assert torch.equal(sample(logits[b : b + 1], **alone), out[b : b + 1])


def test_other_seeds_and_positions_draw_other_tokens(device: str) -> None:
    logits = torch.zeros(100, 1000, device=device)
    options = rows(100, device)
    assert len(sample(logits, **options).unique()) > 80  # 1000 (1 - 0.999 ** 100) = 95 expected
    options["seeds_B"], options["positions_B"] = options["positions_B"], options["seeds_B"]
    assert len(sample(logits, **options).unique()) > 80


def kept_by_transformers(logits: torch.Tensor, top_k: int, top_p: float) -> set[int]:
    warpers: list[Any] = [TemperatureLogitsWarper(0.8)]
    if top_k > 0:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    scores = logits[None]
    for warper in warpers:
        scores = warper(None, scores)
    return set(torch.nonzero(scores[0] > -math.inf)[:, 0].tolist())


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 60), st.floats(0.0, 1.0), st.integers(0, 2**31 - 1))
def test_filters_keep_what_transformers_keeps(top_k: int, top_p: float, seed: int) -> None:
    vocab, draws = 50, 2000
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(seed))
    kept = kept_by_transformers(logits, top_k, top_p)
    options = rows(draws, temperature=0.8, top_k=top_k, top_p=top_p)
    drawn = set(sample(logits.expand(draws, -1), **options).tolist())
    # A sum of probabilities that hits top_p within rounding may fall on either side.
    scaled = logits / 0.8
    if top_k:
        scaled = scaled.masked_fill(scaled < scaled.topk(min(top_k, vocab)).values[-1], -math.inf)
    before = scaled.softmax(-1).sort(descending=True).values.cumsum(-1)
    on_the_edge = bool(((before - top_p).abs() < 1e-5).any())
    assert drawn <= kept or on_the_edge
    likely = (logits / 0.8).softmax(-1) > 0.01  # missed 2000 times once in 10 ** 8
    assert {token for token in kept if likely[token]} <= drawn or on_the_edge


@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (0, 0.6), (8, 0.7)])
def test_filtered_draws_follow_the_renormalised_softmax(
    top_k: int, top_p: float, device: str
) -> None:
    vocab, draws = 40, 20_000
    logits = 1.5 * torch.randn(vocab)
    kept = list(kept_by_transformers(logits, top_k, top_p))
    probability = torch.zeros(vocab, dtype=torch.float64)
    probability[kept] = (logits[kept].double() / 0.8).softmax(-1)
    options = rows(draws, device, temperature=0.8, top_k=top_k, top_p=top_p)
    out = sample(logits.to(device).expand(draws, -1), **options).cpu()
    counts = torch.bincount(out, minlength=vocab).double()
    assert chi_square_over_limit(counts, probability) < 1


@pytest.mark.parametrize(("backend", "draws"), [("triton", 12), ("reference", 2000)])
def test_ties_with_the_kth_are_kept_and_top_p_zero_is_greedy(
    backend: Any, draws: int, device: str
) -> None:
    logits = torch.tensor([1.0, 3.0, 3.0, 3.0, 0.0], device=device).expand(draws, -1)
    tied = sample(logits, **rows(draws, device, top_k=2), backend=backend)
    assert set(tied.tolist()) <= {1, 2, 3}
    assert len(set(tied.tolist())) > 1
    few = draws // 4
    best = sample(logits[:few], **rows(few, device, top_p=0.0), backend=backend)
    assert set(best.tolist()) == {1}
    # Of equal tokens top-p keeps the first by id: two of them reach 0.6 of three.
    some = sample(logits[:few], **rows(few, device, top_k=2, top_p=0.6), backend=backend)
    assert set(some.tolist()) <= {1, 2}


def filters(batch: int, device: str) -> dict[str, Any]:
    """Return rows that differ in everything: no, one and both filters, narrow and wide."""
    options = rows(batch, device)
    options["temperature_B"] = torch.rand(batch, device=device) * 1.5 + 0.1
    options["temperature_B"][::11] = 0.0
    ks = torch.tensor([0, 1, 5, 50, 1500, 10**6], device=device)
    options["top_k_B"] = ks[torch.randint(0, len(ks), (batch,), device=device)]
    ps = torch.tensor([1.0, 0.0, 0.2, 0.9, 0.999], device=device)
    options["top_p_B"] = ps[torch.randint(0, len(ps), (batch,), device=device)]
    return options


@pytest.mark.parametrize(
    ("dtype", "vocab", "spread"),
    [
        (torch.float32, 1, 1.0),
        (torch.bfloat16, 33, 1e30),
        (torch.float32, 4096, 3.0),
        (torch.bfloat16, 4999, 3.0),
        (torch.bfloat16, 4999, 0.0),  # more candidates than fit: over the whole row
        (torch.float32, 9001, 0.01),
    ],
)
def test_filtered_kernel_draws_the_tokens_of_the_reference(
    dtype: torch.dtype, vocab: int, spread: float, device: str
) -> None:
    batch = 4
    logits = (torch.randn(batch, vocab, device=device) * spread).to(dtype)
    logits[0, vocab // 2 + 1 :] = -math.inf
    logits[1] = logits[1].round()
    options = filters(batch, device)
    options["top_k_B"][:2], options["top_p_B"][1:3] = 3, 0.7
    out = sample(logits, **options, filtered=True, backend="triton")
    reference = sample(logits, **options, filtered=True, backend="reference")
    # A logarithm off in its last bit, or a probability that hits p within rounding, decides between
    # two tokens once in some thousand rows. Where all logits are equal, p is hit within rounding.
    for row in torch.nonzero(out != reference)[:, 0].tolist() if spread else ():
        assert is_on_the_edge(logits[row].float(), options, row, int(out[row]))
    if not spread:
        assert bool(((out >= 0) & (out < vocab)).all())


def is_on_the_edge(logits: torch.Tensor, options: dict[str, Any], row: int, token: int) -> bool:
    """Whether `token` is kept but for a rounding of what stands before it."""
    temperature = float(options["temperature_B"][row])
    order = (logits / temperature).sort(descending=True, stable=True)
    k = int(options["top_k_B"][row])
    scaled = order.values.double()
    if 0 < k < len(scaled):
        scaled = scaled.masked_fill(scaled < scaled[k - 1], -math.inf)
    before = scaled.softmax(-1).cumsum(-1) - scaled.softmax(-1)
    place = int((order.indices == token).nonzero())
    p = float(options["top_p_B"][row])
    return float((before - p).abs().min()) < 1e-4 and bool(before[place] < p + 1e-4)


def test_kept_tokens_are_those_of_transformers_also_by_the_kernel(device: str) -> None:
    draws = 2
    for top_k, top_p in ((7, 1.0), (0, 0.55), (3000, 0.3)):
        logits = 4 * torch.randn(5000)
        kept = kept_by_transformers(logits, top_k, top_p)
        options = rows(draws, device, temperature=0.8, top_k=top_k, top_p=top_p)
        drawn = sample(logits.to(device).expand(draws, -1), **options, backend="triton")
        assert set(drawn.tolist()) <= kept


def test_filtered_draws_do_not_depend_on_the_batch(device: str) -> None:
    logits = (2 * torch.randn(2, 5000, device=device)).bfloat16()
    options = filters(2, device)
    out = sample(logits, **options, filtered=True, backend="triton")
    for b in range(2):
        alone = {key: value[b : b + 1] for key, value in options.items()}
        one = sample(logits[b : b + 1], **alone, filtered=True, backend="triton")
        assert torch.equal(one, out[b : b + 1])


def test_an_empty_batch_and_a_vocabulary_of_one_are_fine(device: str) -> None:
    for filtered in (False, True):
        for backend in BACKENDS:
            options: dict[str, Any] = {"filtered": filtered, "backend": backend}
            empty = sample(torch.zeros(0, 10, device=device), **rows(0, device), **options)
            assert empty.shape == (0,)
            one = sample(torch.zeros(3, 1, device=device), **rows(3, device), **options)
            assert one.tolist() == [0, 0, 0]


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"logits \(3, 10\) with rows of \[\(2,\), "):
        sample(torch.zeros(3, 10), **rows(2))


@pytest.mark.gpu
def test_gpu_and_cpu_draw_the_same_tokens_also_in_a_graph() -> None:
    logits = torch.randn(64, 128256, device="cuda").bfloat16()
    options = rows(64, "cuda")
    sample(logits, **options, filtered=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sample(logits, **options, filtered=False)
    for _ in range(2):
        options["positions_B"] += 1
        logits.copy_(torch.randn_like(logits))
        graph.replay()
        on_cpu = sample(logits.cpu(), **{key: value.cpu() for key, value in options.items()})
        assert int((out.cpu() != on_cpu).sum()) <= 1
        assert int((sample(logits, **options, filtered=True) != out).sum()) <= 1


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [128256, 151936, 262144])
def test_filtered_draws_of_a_whole_vocabulary_equal_the_cpus(vocab: int) -> None:
    logits = (3 * torch.randn(64, vocab, device="cuda")).bfloat16()
    options = filters(64, "cuda")
    out = sample(logits, **options, filtered=True, backend="triton")
    on_cpu = {key: value.cpu() for key, value in options.items()}
    reference = sample(logits.cpu(), **on_cpu, filtered=True)
    for row in torch.nonzero(out.cpu() != reference)[:, 0].tolist():
        assert is_on_the_edge(logits[row].float().cpu(), on_cpu, row, int(out[row]))
