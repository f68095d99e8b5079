"""Made-up batches that a runner computes before it takes requests."""

from collections.abc import Iterator

from rankwright.executor.cuda_graphs import LARGEST
from rankwright.executor.rank_batch import Parts
from rankwright.executor.step_batch import StepBatch, made_up_batch
from rankwright.planner.plan import Limits

# Chunk lengths that differ in how a prefill kernel is cut (16, 32, 64 and 128 rows a program).
_CHUNKS = (512, 65, 33, 17, 2)


def warm_up_batches(limits: Limits, parts: Parts) -> Iterator[StepBatch]:
    """Return batches that launch every kernel that requests will, the largest step first.

    What that one takes shows now, and not under load, whether the memory suffices. And PyTorch's
    allocator cuts smaller tensors out of what it got for larger ones, but never joins what it got
    for small ones: on an H200, prompts of a 32B model that grew step by step left 6 GB unused.

    Mixed batches of several chunk lengths, drawn with and without a top-k.
    """
    ranks = parts.attention_ranks
    tokens = limits.max_batched_tokens // ranks
    decodes = min(LARGEST, limits.max_num_seqs - 1) // ranks
    longest = min(tokens, limits.max_model_len - 1)
    largest = min(tokens - decodes, longest)
    if largest > 0:
        yield made_up_batch(largest, decodes=decodes, sampled=True, top_k=5, num_parts=ranks)
    # With context parallelism, a chunk of each length on each rank in turn.
    before = [rank * parts.block_tokens for rank in range(parts.cp)]
    chunks = {min(length + blocks, longest) for length in _CHUNKS for blocks in before}
    kinds = ((decodes, True, 5), (1, True, 0), (0, False, 0))
    for chunk in sorted(chunks - {0}, reverse=True):
        for num_decodes, sampled, top_k in kinds:
            if num_decodes + chunk <= tokens and num_decodes * ranks < limits.max_num_seqs:
                yield made_up_batch(
                    chunk, decodes=num_decodes, sampled=sampled, top_k=top_k, num_parts=ranks
                )
