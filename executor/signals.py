"""Signals that end a run, as events of the loop instead of exceptions anywhere."""

import asyncio
import signal
import threading
from collections.abc import Awaitable


class Signals:
    """SIGINT and SIGTERM as something to wait for, on the running loop."""

    def __init__(self) -> None:
        """Take the signals over; in a thread there are none to take."""
        self._arrived: asyncio.Queue[int] = asyncio.Queue()
        if threading.current_thread() is not threading.main_thread():
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._arrived.put_nowait, number)

    async def before(self, work: Awaitable[object]) -> bool:
        """Return whether a signal came before `work` was done, which is then cancelled."""
        job = asyncio.ensure_future(work)
        arrived = asyncio.create_task(self._arrived.get())
        try:
            await asyncio.wait({job, arrived}, return_when=asyncio.FIRST_COMPLETED)
            if job.done():
                job.result()  # raises what it raised
            return not job.done()
        finally:
            arrived.cancel()
            job.cancel()
