"""`ForwardContext`: what the layers need to know of a batch, as tensors on the device.

Shape letters: S sequences, T tokens, N blocks of a table row, P positions, D head dimension.
"""

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardContext:
    """Positions, cache slots and lengths of one forward pass; decodes stand first."""

    num_decodes: int
    positions_T: torch.Tensor  # int64
    slots_T: torch.Tensor  # int64, negative: padding
    context_lens_S: torch.Tensor  # int32, 0: padding
    block_tables_SN: torch.Tensor  # int32
    cos_sin_PD: torch.Tensor  # float32
    prefill_query_starts: list[int] = field(default_factory=list)  # one more than sequences
    prefill_context_lens: list[int] = field(default_factory=list)

    def counted(self) -> torch.Tensor:
        """Return int32 [T]: 0 for tokens of padding, which have no context."""
        lens_B = self.context_lens_S[: self.num_decodes]
        if not self.prefill_query_starts:
            return lens_B
        prompts = len(self.positions_T) - self.num_decodes
        return torch.cat([lens_B, lens_B.new_ones(prompts)])
