"""A draw among the tokens that top-k and top-p leave, without sorting the vocabulary.

Shapes: B rows (one a sequence), V vocabulary, G groups of it, C candidates.

What is kept is all above a threshold, and of those equal to it the first by token id. A threshold
is found bit by bit, from the count (top-k) or the probability (top-p) of what is at least as large.
Over a hundred thousand values that would take long, so a first pass notes the best of every group
of 32 tokens: the k-th best of those is no more than the k-th best token. What is at least as large,
a few more than k, is copied out, and the search goes over these candidates in registers. For top-p
alone k is 1024, enough if the candidates hold that much probability. Where candidates do not
suffice (a flat distribution, thousands of equal logits) the search goes over the whole row, slower,
with the same result.

Probabilities are summed as integers, so that no order of adding changes what is kept: on all ranks
of a group the same.
"""

from __future__ import annotations

import torch

from rankwright.kernels.backend import ceil_div, jit, next_power_of_two, tl
from rankwright.kernels.noise import CONSTANTS, log_noise_kernel, row_keys_kernel

GROUP = 32
_BLOCK = 4096  # tokens that a program of the first pass looks at, and of the second at a time
_MAX_CANDIDATES = 4096  # 4 registers a thread and value, at 32 warps
_FIRST_CANDIDATES = 1024
# 1.0 in probability before it is normalised: 2**18 of them, one a token, stay below 2**63.
_ONE = 2.0**44


@jit()
def _group_maxima_kernel(
    logits_ptr,
    maxima_ptr,
    logits_stride,
    num_tokens,
    num_groups,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Write the best logit of each group of one part of a row."""
    row = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = logits_ptr + row * logits_stride + token
    logit = tl.load(at, mask=token < num_tokens, other=-float("inf")).to(tl.float32)
    best = tl.max(tl.reshape(logit, [BLOCK // GROUP, GROUP]), axis=1)
    group = tl.program_id(0) * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
    tl.store(maxima_ptr + row * num_groups + group, best, mask=group < num_groups)


@jit()
def _ordered(x):
    """Return int64 keys from 0 to 2**32 - 1, in the order of float32 values."""
    x = tl.where(x == 0.0, 0.0, x)  # -0 equals 0
    bits = x.to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(bits < 0, -bits - 1, bits + 2147483648)


@jit()
def _mass(value, highest, mask, ONE: tl.constexpr):
    """Return probabilities as integers, not normalised: `ONE` is that of the best token."""
    return tl.where(mask, (tl.exp(value - highest) * ONE).to(tl.int64), 0)


@jit()
def _threshold(keys, weights, target):
    """Return the largest key such that all that reach it weigh `target` together."""
    found = tl.full([], 0, tl.int64)
    for step in range(32):
        trial = found + (tl.full([], 2147483648, tl.int64) >> step)
        enough = tl.sum(tl.where(keys >= trial, weights, 0), axis=0) >= target
        found = tl.where(enough, trial, found)
    return found


@jit()
def _row_weight(
    logits_ptr, num_tokens, scale, highest, key, BY_MASS: tl.constexpr, BLOCK: tl.constexpr,
    ONE: tl.constexpr,
):  # fmt: skip
    """Return what all tokens of a row that reach `key` weigh together: their mass, or one each."""
    weight = tl.full([], 0, tl.int64)
    for start in range(0, num_tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        mask = token < num_tokens
        value = tl.load(logits_ptr + token, mask=mask, other=-float("inf")).to(tl.float32)
        value = tl.div_rn(value, scale)
        mask = mask & (_ordered(value) >= key)
        weight += tl.sum(_mass(value, highest, mask, ONE) if BY_MASS else mask.to(tl.int64), axis=0)
    return weight


@jit()
def _row_threshold(
    logits_ptr, num_tokens, scale, highest, target, BY_MASS: tl.constexpr, BLOCK: tl.constexpr,
    ONE: tl.constexpr,
):  # fmt: skip
    """Return `_threshold` of a whole row."""
    found = tl.full([], 0, tl.int64)
    for step in range(32):
        trial = found + (tl.full([], 2147483648, tl.int64) >> step)
        weight = _row_weight(logits_ptr, num_tokens, scale, highest, trial, BY_MASS, BLOCK, ONE)
        found = tl.where(weight >= target, trial, found)
    return found


@jit()
def _sample_filtered_kernel(
    logits_ptr,
    maxima_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    seeds_ptr,
    positions_ptr,
    values_ptr,
    tokens_ptr,
    out_ptr,
    logits_stride,
    num_tokens,
    num_groups,
    BLOCK: tl.constexpr,
    BLOCK_G: tl.constexpr,
    CANDIDATES: tl.constexpr,
    FIRST: tl.constexpr,
    ONE: tl.constexpr,
    MULTIPLY_1: tl.constexpr,
    MULTIPLY_2: tl.constexpr,
    WEYL: tl.constexpr,
    BELOW_ONE: tl.constexpr,
):
    """Write the token that one row draws."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    values_ptr += row * CANDIDATES
    tokens_ptr += row * CANDIDATES
    temperature = tl.load(temperature_ptr + row).to(tl.float32)
    draws = temperature > 0
    scale = tl.where(draws, temperature, 1.0)
    k = tl.load(top_k_ptr + row).to(tl.int32)
    k = tl.where((k <= 0) | (k > num_tokens), num_tokens, k)
    p = tl.load(top_p_ptr + row).to(tl.float64)
    # A row of temperature 0 keeps the best only, and takes the first of them by id.
    k = tl.where(draws, k, 1)
    by_k, by_p = k < num_tokens, draws & (p < 1.0)
    seed, position = tl.load(seeds_ptr + row), tl.load(positions_ptr + row)
    first, second = row_keys_kernel(seed, position, MULTIPLY_1, MULTIPLY_2, WEYL)

    g = tl.arange(0, BLOCK_G)
    is_group = g < num_groups
    maxima = tl.load(maxima_ptr + row * num_groups + g, mask=is_group, other=-float("inf"))
    maxima = tl.div_rn(maxima, scale)
    highest = tl.max(maxima, axis=0)
    wanted = tl.minimum(tl.where(by_k, k, FIRST), num_groups).to(tl.int64)
    # A padding group weighs nothing.
    floor = _threshold(_ordered(maxima), is_group.to(tl.int64), wanted)

    count = tl.full([], 0, tl.int32)
    inside = tl.full([], 0, tl.int64)
    total = tl.full([], 0, tl.int64)
    for start in range(0, num_tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        mask = token < num_tokens
        value = tl.load(logits_ptr + token, mask=mask, other=-float("inf")).to(tl.float32)
        value = tl.div_rn(value, scale)
        mass = _mass(value, highest, mask, ONE)
        chosen = mask & (_ordered(value) >= floor)
        place = count + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
        fits = chosen & (place < CANDIDATES)
        tl.store(values_ptr + place, value, mask=fits)
        tl.store(tokens_ptr + place, token, mask=fits)
        count += tl.sum(chosen.to(tl.int32), axis=0)
        inside += tl.sum(tl.where(chosen, mass, 0), axis=0)
        total += tl.sum(mass, axis=0)
    tl.debug_barrier()  # what was stored is read by other threads

    # In float64: a probability times a sum of up to 62 bits.
    reached = inside.to(tl.float64) >= p * total.to(tl.float64)
    enough = (count == num_tokens) | (by_k & (count >= k)) | ((not by_k) & by_p & reached)
    threshold = tl.full([], 0, tl.int64)
    above = tl.full([], 0, tl.int64)
    target = tl.full([], 1, tl.int64) << 62  # no limit
    best = tl.full([], -float("inf"), tl.float32)
    drawn = tl.full([], 0, tl.int32)
    if enough & (count <= CANDIDATES):
        c = tl.arange(0, CANDIDATES)
        here = c < count
        candidate = tl.load(values_ptr + c, mask=here, other=-float("inf"))
        token_id = tl.load(tokens_ptr + c, mask=here, other=0)
        keys = _ordered(candidate)
        masses = _mass(candidate, highest, here, ONE)
        if by_k:
            threshold = _threshold(keys, here.to(tl.int64), k.to(tl.int64))
            total = tl.sum(tl.where(keys >= threshold, masses, 0), axis=0)
        if by_p:
            target = tl.maximum(tl.ceil(p * total.to(tl.float64)).to(tl.int64), 1)
            threshold = _threshold(keys, masses, target)
            above = tl.sum(tl.where(keys > threshold, masses, 0), axis=0)
        # Of those equal to the threshold, by their ids, as many as it takes to reach the target.
        equal = here & (keys == threshold)
        before = tl.cumsum(equal.to(tl.int64), axis=0) - 1
        kept = here & ((keys > threshold) | (equal & (above + before * masses < target)))
        noise = log_noise_kernel(token_id, first, second, MULTIPLY_1, MULTIPLY_2, BELOW_ONE)
        score = tl.where(kept, tl.where(draws, candidate - noise, candidate), -float("inf"))
        winner = tl.argmax(score, axis=0, tie_break_left=True)
        drawn = tl.sum(tl.where(c == winner, token_id, 0), axis=0)
    else:
        if by_k:
            threshold = _row_threshold(
                logits_ptr, num_tokens, scale, highest, k.to(tl.int64), False, BLOCK, ONE
            )
            total = _row_weight(logits_ptr, num_tokens, scale, highest, threshold, True, BLOCK, ONE)
        if by_p:
            target = tl.maximum(tl.ceil(p * total.to(tl.float64)).to(tl.int64), 1)
            threshold = _row_threshold(
                logits_ptr, num_tokens, scale, highest, target, True, BLOCK, ONE
            )
            above = _row_weight(
                logits_ptr, num_tokens, scale, highest, threshold + 1, True, BLOCK, ONE
            )
        num_equal = tl.full([], 0, tl.int64)
        for start in range(0, num_tokens, BLOCK):
            token = start + tl.arange(0, BLOCK)
            mask = token < num_tokens
            value = tl.load(logits_ptr + token, mask=mask, other=-float("inf")).to(tl.float32)
            value = tl.div_rn(value, scale)
            mass = _mass(value, highest, mask, ONE)
            row_keys = _ordered(value)
            equals = mask & (row_keys == threshold)
            earlier = num_equal + tl.cumsum(equals.to(tl.int64), axis=0) - 1
            num_equal += tl.sum(equals.to(tl.int64), axis=0)
            keeps = mask & ((row_keys > threshold) | (equals & (above + earlier * mass < target)))
            noises = log_noise_kernel(token, first, second, MULTIPLY_1, MULTIPLY_2, BELOW_ONE)
            scores = tl.where(keeps, tl.where(draws, value - noises, value), -float("inf"))
            index = tl.argmax(scores, axis=0, tie_break_left=True)
            top = tl.max(scores, axis=0)
            drawn = tl.where(top > best, start + index, drawn)
            best = tl.maximum(best, top)
    tl.store(out_ptr + row, drawn.to(tl.int64))


def sample_filtered(
    logits_BV: torch.Tensor,
    temperature_B: torch.Tensor,
    top_k_B: torch.Tensor,
    top_p_B: torch.Tensor,
    seeds_B: torch.Tensor,
    positions_B: torch.Tensor,
) -> torch.Tensor:
    """Return one token id a row, int64 [B]; see `sampling.sample`."""
    if logits_BV.stride(1) != 1:
        logits_BV = logits_BV.contiguous()
    batch, vocab = logits_BV.shape
    device = logits_BV.device
    num_groups = ceil_div(vocab, GROUP)
    maxima_BG = torch.empty((batch, num_groups), dtype=torch.float32, device=device)
    values_BC = torch.empty((batch, _MAX_CANDIDATES), dtype=torch.float32, device=device)
    tokens_BC = torch.empty((batch, _MAX_CANDIDATES), dtype=torch.int32, device=device)
    out_B = torch.empty((batch,), dtype=torch.int64, device=device)
    if batch == 0:
        return out_B
    stride = logits_BV.stride(0)
    _group_maxima_kernel[(ceil_div(vocab, _BLOCK), batch)](
        logits_BV, maxima_BG, stride, vocab, num_groups, BLOCK=_BLOCK, GROUP=GROUP, num_warps=8
    )
    _sample_filtered_kernel[(batch,)](
        logits_BV,
        maxima_BG,
        temperature_B,
        top_k_B,
        top_p_B,
        seeds_B,
        positions_B,
        values_BC,
        tokens_BC,
        out_B,
        stride,
        vocab,
        num_groups,
        BLOCK=_BLOCK,
        BLOCK_G=next_power_of_two(num_groups),
        CANDIDATES=_MAX_CANDIDATES,
        FIRST=_FIRST_CANDIDATES,
        ONE=_ONE,
        **CONSTANTS,
        num_warps=16,
    )
    return out_B
