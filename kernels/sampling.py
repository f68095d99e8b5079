"""Choice of the next token: greedy, or at random by temperature, top-k and top-p.

Shapes: B rows (one a sequence), V vocabulary, W chunks of the vocabulary.

A token is drawn as the argmax of `logit / temperature + Gumbel noise` (`noise.py`), which needs no
normalised probabilities. Top-k and top-p are in `filtered_sampling.py`.
"""

from __future__ import annotations

import math

import torch

from rankwright.kernels.backend import Backend, ceil_div, jit, next_power_of_two, runs_triton, tl
from rankwright.kernels.filtered_sampling import sample_filtered
from rankwright.kernels.noise import (
    CONSTANTS,
    exponential_noise,
    log_noise_kernel,
    row_keys_kernel,
)


def _hide_filtered(
    sorted_BV: torch.Tensor, top_k_B: torch.Tensor, top_p_B: torch.Tensor
) -> torch.Tensor:
    """Return descending logits with those set to -inf that Hugging Face's warpers remove.

    Top-k keeps ties with the k-th value. Top-p keeps a token when what stands before it, out of
    what top-k left, has a probability below p.
    """
    vocab = sorted_BV.shape[1]
    k_B = torch.where(top_k_B <= 0, vocab, top_k_B.clamp(max=vocab)).long()
    kth_B1 = sorted_BV.gather(1, k_B[:, None] - 1)
    sorted_BV = sorted_BV.masked_fill(sorted_BV < kth_B1, -math.inf)
    probability_BV = sorted_BV.softmax(-1)
    before_BV = probability_BV.cumsum(-1) - probability_BV
    p_B1 = top_p_B.float()[:, None]
    removed_BV = (before_BV >= p_B1) & (p_B1 < 1)
    removed_BV[:, 0] = False
    return sorted_BV.masked_fill(removed_BV, -math.inf)


def sample_reference(
    logits_BV: torch.Tensor,
    temperature_B: torch.Tensor,
    top_k_B: torch.Tensor,
    top_p_B: torch.Tensor,
    seeds_B: torch.Tensor,
    positions_B: torch.Tensor,
    filtered: bool = True,
) -> torch.Tensor:
    """Return one token id a row; without `filtered`, top-k and top-p are not looked at."""
    logits_BV = logits_BV.float()
    greedy_B = logits_BV.argmax(-1)  # the first of several maxima, as PyTorch documents
    scaled_BV = logits_BV / torch.where(temperature_B > 0, temperature_B, 1.0).float()[:, None]
    if filtered:
        # Stable, so that of equal logits the lower token id is kept, on every device.
        scaled_BV, tokens_BV = scaled_BV.sort(dim=-1, descending=True, stable=True)
        scaled_BV = _hide_filtered(scaled_BV, top_k_B, top_p_B)
    else:
        tokens_BV = torch.arange(logits_BV.shape[1], device=logits_BV.device)[None]
    noise_BV = exponential_noise(seeds_B, positions_B, tokens_BV)
    drawn_B1 = (scaled_BV - noise_BV.log()).argmax(-1, keepdim=True)
    drawn_B = tokens_BV.expand_as(scaled_BV).gather(1, drawn_B1)[:, 0]
    return torch.where(temperature_B > 0, drawn_B, greedy_B)


@jit()
def _sample_kernel(
    logits_ptr,
    temperature_ptr,
    seeds_ptr,
    positions_ptr,
    best_ptr,
    token_ptr,
    logits_stride,
    num_tokens,
    num_chunks,
    BLOCK: tl.constexpr,
    MULTIPLY_1: tl.constexpr,
    MULTIPLY_2: tl.constexpr,
    WEYL: tl.constexpr,
    BELOW_ONE: tl.constexpr,
):
    """Write the best score and its token id of one chunk of the vocabulary."""
    row = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < num_tokens
    at = logits_ptr + row * logits_stride + token
    score = tl.load(at, mask=inside, other=-float("inf")).to(tl.float32)
    temperature = tl.load(temperature_ptr + row).to(tl.float32)
    if temperature > 0:
        seed, position = tl.load(seeds_ptr + row), tl.load(positions_ptr + row)
        first, second = row_keys_kernel(seed, position, MULTIPLY_1, MULTIPLY_2, WEYL)
        noise = log_noise_kernel(token, first, second, MULTIPLY_1, MULTIPLY_2, BELOW_ONE)
        score = score / temperature - noise
    chunk = row * num_chunks + tl.program_id(0)
    index = tl.argmax(score, axis=0, tie_break_left=True)
    tl.store(best_ptr + chunk, tl.max(score, axis=0))
    tl.store(token_ptr + chunk, tl.program_id(0) * BLOCK + index)


@jit()
def _pick_kernel(best_ptr, token_ptr, out_ptr, num_chunks, BLOCK_W: tl.constexpr):
    """Write the token id of the best chunk; of equal ones the first, which has the lowest ids."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, BLOCK_W)
    at = best_ptr + row * num_chunks + chunk
    best = tl.load(at, mask=chunk < num_chunks, other=-float("inf"))
    winner = tl.argmax(best, axis=0, tie_break_left=True)
    tl.store(out_ptr + row, tl.load(token_ptr + row * num_chunks + winner))


# 16 values a thread: the hash costs some 20 instructions a value, so several loads overlap it.
_BLOCK = 4096


def _sample_unfiltered(
    logits_BV: torch.Tensor,
    temperature_B: torch.Tensor,
    seeds_B: torch.Tensor,
    positions_B: torch.Tensor,
) -> torch.Tensor:
    """Return one token id a row in a single pass over the logits."""
    if logits_BV.stride(1) != 1:
        logits_BV = logits_BV.contiguous()
    batch, vocab = logits_BV.shape
    device = logits_BV.device
    num_chunks = ceil_div(vocab, _BLOCK)
    best_BW = torch.empty((batch, num_chunks), dtype=torch.float32, device=device)
    token_BW = torch.empty((batch, num_chunks), dtype=torch.int32, device=device)
    out_B = torch.empty((batch,), dtype=torch.int64, device=device)
    if batch == 0:
        return out_B
    _sample_kernel[(num_chunks, batch)](
        logits_BV,
        temperature_B,
        seeds_B,
        positions_B,
        best_BW,
        token_BW,
        logits_BV.stride(0),
        vocab,
        num_chunks,
        BLOCK=_BLOCK,
        **CONSTANTS,
        num_warps=8,
    )
    _pick_kernel[(batch,)](
        best_BW, token_BW, out_B, num_chunks, BLOCK_W=next_power_of_two(num_chunks), num_warps=1
    )
    return out_B


def sample(
    logits_BV: torch.Tensor,
    temperature_B: torch.Tensor,
    top_k_B: torch.Tensor,
    top_p_B: torch.Tensor,
    seeds_B: torch.Tensor,
    positions_B: torch.Tensor,
    *,
    filtered: bool | None = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Return one token id a row, int64 [B].

    Args:
        logits_BV: Scores of any float dtype.
        temperature_B: 0 takes the best token, the lowest id where several are equal.
        top_k_B: Keep this many best tokens; 0 or less: all.
        top_p_B: Keep the best tokens that together reach this probability; 1 or more: all.
        seeds_B: int64, one a request.
        positions_B: int64, position in its sequence of the token to draw.
        filtered: Whether any row has a top-k or top-p; None: looked up on the CPU, and taken as
            true on a GPU, where looking would wait for it.
        backend: What runs it, see `runs_triton`; a filtered draw only by "triton" without sorting.

    Raises:
        ValueError: When shapes disagree.
    """
    batch = len(logits_BV)
    rows = (temperature_B, top_k_B, top_p_B, seeds_B, positions_B)
    if logits_BV.dim() != 2 or any(row.shape != (batch,) for row in rows):
        raise ValueError(
            f"sample: logits {tuple(logits_BV.shape)} with rows of "
            f"{[tuple(row.shape) for row in rows]}; expected [batch, vocabulary] and [batch] each"
        )
    if logits_BV.device.type == "cpu":
        if not bool((temperature_B > 0).any()):
            return logits_BV.argmax(-1)
        if filtered is None:
            filtered = bool(((top_k_B > 0) | (top_p_B < 1)).any())
    # The kernel for filtered rows has not run on a GPU yet, so only who asks for it gets it.
    by_kernel = runs_triton(logits_BV, backend) and (filtered is False or backend == "triton")
    if not by_kernel and logits_BV.is_meta:
        return torch.empty(batch, dtype=torch.int64, device="meta")
    if not by_kernel:
        return sample_reference(
            logits_BV, temperature_B, top_k_B, top_p_B, seeds_B, positions_B, filtered is not False
        )
    if filtered is not False:
        return sample_filtered(logits_BV, temperature_B, top_k_B, top_p_B, seeds_B, positions_B)
    return _sample_unfiltered(logits_BV, temperature_B, seeds_B, positions_B)
