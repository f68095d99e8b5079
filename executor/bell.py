"""`Bell`: lets a process sleep until another one writes, on a word of memory that they share.

Linux's futex: a writer that nobody waits for pays one call of a microsecond, and who sleeps takes
no core from those that compute, as a look every half millisecond does where ranks outnumber cores.
"""

import ctypes
import errno
import time

import numpy as np
import numpy.typing as npt

_FUTEX = 202  # the call's number on x86-64, which is all that `shared_channel` runs on
_WAIT, _WAKE = 0, 1
_ALL = 2**31 - 1
# What `wait` ends by: another count, a signal, the time.
_EXPECTED = (errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT)
# Where a sandbox has no futex.
_NAP_S = 0.0005


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class Bell:
    """One end of it.

    Args:
        word: int32 of one number, in memory that all ends share.
    """

    def __init__(self, word: npt.NDArray[np.int32]) -> None:
        self._word = word
        self._address = ctypes.c_void_p(word.ctypes.data)
        self._call = ctypes.CDLL(None, use_errno=True).syscall

    @property
    def count(self) -> int:
        """What it was last rung with."""
        return int(self._word[0])

    def ring(self, count: int) -> None:
        """Wake all who wait; `count` must differ from the last one."""
        self._word[0] = count & _ALL
        self._call(_FUTEX, self._address, _WAKE, _ALL, None, None, 0)

    def wait(self, count: int, timeout_s: float) -> None:
        """Sleep until it is rung, if its count still is `count`; it may end early."""
        whole = int(timeout_s)
        limit = _Timespec(whole, int((timeout_s - whole) * 1e9))
        failed = self._call(_FUTEX, self._address, _WAIT, count, ctypes.byref(limit), None, 0)
        if failed and ctypes.get_errno() not in _EXPECTED:
            time.sleep(_NAP_S)
