"""Mistral: Llama's layers, with a sliding window in some checkpoints."""

from rankwright.executor.models.llama import NAMES

__all__ = ["NAMES"]
