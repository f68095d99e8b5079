"""Qwen3: Llama's layers, with an RMSNorm over each query and key head."""

from rankwright.executor.models.llama import NAMES

__all__ = ["NAMES"]
