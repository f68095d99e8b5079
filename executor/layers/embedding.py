"""Vocabulary-parallel embedding and head.

Shape letters: T tokens, R rows to sample, D hidden, V vocabulary rows of a shard.
"""

import torch
from torch.nn.functional import embedding, linear

from rankwright.executor.mesh import Mesh


class VocabularyEmbedding:
    """`x_TD = W[ids_T]`, with the rows of W cut over the TP group."""

    def __init__(self, mesh: Mesh, weight_VD: torch.Tensor) -> None:
        self._mesh = mesh
        self.weight_VD = weight_VD

    def __call__(self, ids_T: torch.Tensor) -> torch.Tensor:
        """Return [T, D] of this rank's tokens."""
        if self._mesh.tp.size == 1:
            return embedding(ids_T, self.weight_VD)
        ids_T = self._mesh.gather_tokens(ids_T)
        start, stop = self._mesh.place.vocab
        here_T = (ids_T >= start) & (ids_T < stop)
        x_TD = embedding((ids_T - start).where(here_T, 0), self.weight_VD)
        return self._mesh.sum_tokens(x_TD * here_T.unsqueeze(1).to(x_TD.dtype))


class VocabularyHead:
    """`logits = x_RD W^T`, gathered over the TP group."""

    def __init__(self, mesh: Mesh, weight_VD: torch.Tensor) -> None:
        self._mesh = mesh
        self.weight_VD = weight_VD

    def __call__(self, x_RD: torch.Tensor) -> torch.Tensor:
        """Return [R, whole vocabulary] of all ranks' rows, equal on every rank of the group."""
        x_RD = self._mesh.gather_tokens(x_RD)
        return self._mesh.all_gather_columns(linear(x_RD, self.weight_VD))
