"""Up to which size the executor sums over GPUs by reading peers' memory, and from where by NCCL.

One table for both: the executor chooses by it, and the cost model may price by it.
"""

# Bytes of a rank's part. One-shot moves (n - 1) times the part to each of n ranks; a ring moves
# 2 (n - 1) / n times it, but starts later. On two ranks both move the same, so one-shot ends where
# its memory does. The others: where vLLM 0.26 leaves its own kernels on sm_90 for NCCL (4 ranks: of
# its one-shot, vllm-project/vllm pull request 24532, 10 us against 21 us at 0.5 MB).
_MAX_BYTES = {2: 32 << 20, 3: 1 << 20, 4: 512 << 10, 5: 256 << 10, 6: 256 << 10, 8: 256 << 10}


def one_shot_max_bytes(num_ranks: int) -> int:
    """Return the largest part that `num_ranks` ranks of one machine sum in one shot; 0: none.

    >>> one_shot_max_bytes(2), one_shot_max_bytes(16)
    (33554432, 0)
    """
    return _MAX_BYTES.get(num_ranks, 0)
