"""`Drawn`: tokens that a step draws, on their way to the host.

Waiting for them at once would leave the GPU idle until the host has decided the next step, so their
copy is started behind the step and looked at one step later.
"""

import torch


class Drawn:
    """The R tokens of one step.

    Args:
        tokens_R: int64, on the device that computes them.
        is_read: Whether this host is to have them; else only `tokens_R`.
    """

    def __init__(self, tokens_R: torch.Tensor, *, is_read: bool = True) -> None:
        self.tokens_R = self._tokens_R = tokens_R
        self._copied: torch.cuda.Event | None = None
        if tokens_R.is_cuda and is_read:
            self._tokens_R = torch.empty_like(tokens_R, device="cpu", pin_memory=True)
            self._tokens_R.copy_(tokens_R, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def is_ready(self) -> bool:
        """Whether `wait` would return at once."""
        return self._copied is None or self._copied.query()

    def wait(self) -> list[int]:
        """Return the tokens, once the step is done."""
        if self._copied is not None:
            self._copied.synchronize()
        tokens: list[int] = self._tokens_R.tolist()
        return tokens
