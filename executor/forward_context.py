"""`ForwardContext`: what the layers need to know of a batch, as tensors on the device.

Shape letters: S sequences, T tokens, N blocks of a table row, P positions or pieces of prompts, M
blocks to gather, D head dimension, B sequences that decode.
"""

from dataclasses import dataclass, field

import torch

from rankwright.executor.mesh import Mesh
from rankwright.executor.rank_batch import Parts


@dataclass(frozen=True, slots=True, kw_only=True)
class GatheredPrompts:
    """Prompts whose keys and values are gathered at once; see `rank_batch.GatherGroup`."""

    blocks_M: torch.Tensor  # int64
    rows: slice
    query_starts: list[int]
    context_lens: list[int]
    block_tables_PN: torch.Tensor  # int32, blocks of the gathered pool
    part_tables_PN: torch.Tensor  # int32, blocks of one rank's part of it


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardContext:
    """Positions, cache slots and lengths of one forward pass; decodes stand first."""

    num_decodes: int
    positions_T: torch.Tensor  # int64
    slots_T: torch.Tensor  # int64, negative: written by another rank, or padding
    context_lens_S: torch.Tensor  # int32, 0: padding
    block_tables_SN: torch.Tensor  # int32
    cos_sin_PD: torch.Tensor  # float32
    parts: Parts
    num_padding: int = 0  # rows after the decodes that attend to nothing
    prefill_query_starts: list[int] = field(default_factory=list)  # one more than sequences
    prefill_context_lens: list[int] = field(default_factory=list)
    gathers: list[GatheredPrompts] = field(default_factory=list)
    _seen: dict[int | None, tuple[torch.Tensor, torch.Tensor | None]] = field(default_factory=dict)
    _counted: list[torch.Tensor] = field(default_factory=list)

    def counted(self) -> torch.Tensor:
        """Return int32 [T]: 0 for tokens of padding, which have no context."""
        lens_B = self.context_lens_S[: self.num_decodes]
        if not self.prefill_query_starts:
            return lens_B
        prompts = len(self.positions_T) - self.num_decodes - self.num_padding
        padding = lens_B.new_zeros(self.num_padding)
        return torch.cat([lens_B, padding, lens_B.new_ones(prompts)])

    def counted_of_group(self, mesh: Mesh) -> torch.Tensor:
        """Return `counted` of all ranks whose tokens `Mesh.gather_tokens` gathers, once a pass."""
        if not self._counted:
            self._counted.append(mesh.gather_tokens(self.counted()))
        return self._counted[0]

    def seen_here(self, window: int | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return what sequences that decode see of this rank's cache, as int32 [B] each.

        Their tokens there, and how many of those, the last, are inside the window (None: all, or
        the window itself). Worked out once a pass, on the device, as a CUDA graph needs.
        """
        lens_B = self.context_lens_S[: self.num_decodes]
        if self.parts.cp == 1:
            return lens_B, None
        if window not in self._seen:
            here_B = self._tokens_here(lens_B)
            if window is None:
                self._seen[window] = here_B, None
            else:
                windows_B = here_B - self._tokens_here((lens_B - window).clamp(min=0))
                # Where nothing here is inside it, there is nothing to see.
                self._seen[window] = here_B.where(windows_B > 0, 0), windows_B
        return self._seen[window]

    def _tokens_here(self, count_B: torch.Tensor) -> torch.Tensor:
        """`rank_batch.tokens_before` on the device."""
        size, cp = self.parts.block_tokens, self.parts.cp
        full_B = count_B // (size * cp)
        rest_B = count_B - full_B * (size * cp) - self.parts.cp_rank * size
        return full_B * size + rest_B.clamp(0, size)
