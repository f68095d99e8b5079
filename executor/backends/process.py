"""A launch whose parent is a process of this machine (local, Ray), seen from another process."""

import os
import signal
import socket
import time
from dataclasses import dataclass

from rankwright.executor.launch_record import LaunchRecord, ProcessPlace, started_ticks
from rankwright.executor.launch_state import LaunchState, ask_server, phase_of

# A signal that comes while the first is still pending is lost.
_BETWEEN_SIGNALS_S = 0.3
# The server is up before any rank is, so that one that does not answer has just begun or is ending.
_ANSWERS_WITHIN_S = 10.0


@dataclass
class ProcessLaunch:
    """A launch that `rankwright launch` runs in the foreground somewhere."""

    record: LaunchRecord

    @property
    def _place(self) -> ProcessPlace:
        assert isinstance(self.record.place, ProcessPlace)
        return self.record.place

    def look(self) -> LaunchState:
        """Return how the process and its server do."""
        url = self.record.url
        if self._place.host != socket.gethostname():
            server = None if url is None else ask_server(url)
            where = f"on {self._place.host}"
            return LaunchState(
                "unknown" if server is None else phase_of(server), where, url, server
            )
        if not self._runs():
            return LaunchState("ended", "its process is gone")
        server = None if url is None else ask_server(url)
        if server is None:
            young = time.time() - self.record.created_s < _ANSWERS_WITHIN_S
            return LaunchState("starting" if young else "stopping", "no answer", url)
        detail = "" if server.status in ("ok", "starting") else server.status
        return LaunchState(phase_of(server), detail, url, server)

    def log_lines(self) -> list[str]:
        """Return nothing: its output is where it was started."""
        return []

    def stop(self, *, drain: bool) -> None:
        """Signal the process, which drains at the first signal and stops at the second.

        Raises:
            ValueError: It is on another machine.
        """
        if self._place.host != socket.gethostname():
            raise ValueError(
                f"{self.record.id} runs on {self._place.host}, and a signal reaches only this "
                "machine; run `rankwright stop` there"
            )
        for number in range(1 if drain else 2):
            if number:
                time.sleep(_BETWEEN_SIGNALS_S)
            if self._runs():
                os.kill(self._place.pid, signal.SIGTERM)

    def close(self) -> None:
        """Nothing is held open."""

    def _runs(self) -> bool:
        try:
            os.kill(self._place.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # another user's
        # A process id is used again; the two together are not.
        return started_ticks(self._place.pid) == self._place.started_ticks
