"""Vocabulary-parallel embedding and head.

Shape letters: T tokens, R rows to sample, D hidden, V vocabulary rows of a shard.
"""

import torch
from torch.nn.functional import embedding, linear

from rankwright.executor.mesh import Mesh
from rankwright.kernels.shard_embedding import shard_embedding


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
        out_TD = self._mesh.part(len(ids_T), self.weight_VD.shape[1], self.weight_VD.dtype)
        first, _ = self._mesh.place.vocab
        return self._mesh.sum_tokens(shard_embedding(ids_T, self.weight_VD, first, out_TD))


class VocabularyHead:
    """`logits = x_RD W^T`, gathered over the TP group."""

    def __init__(self, mesh: Mesh, weight_VD: torch.Tensor) -> None:
        self._mesh = mesh
        self.weight_VD = weight_VD

    def __call__(self, x_RD: torch.Tensor) -> torch.Tensor:
        """Return [R, whole vocabulary] of all ranks' rows, equal on every rank of the group."""
        x_RD = self._mesh.gather_tokens(x_RD)
        return self._mesh.all_gather_columns(linear(x_RD, self.weight_VD))
