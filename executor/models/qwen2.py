"""Qwen2 and Qwen2.5: Llama's layers, with a bias on query, key and value."""

from rankwright.executor.models.llama import NAMES

__all__ = ["NAMES"]
