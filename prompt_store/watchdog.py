"""Ends waits for a database that hangs: it keeps its connections open, and answers nothing on them.

A cut cable ends a connection within seconds (`tcp_user_timeout`), a server that was stopped at once. One whose machine
stands still does neither, and no time limit of its own can fire: whoever asked it would wait for as long as it hangs.
When the follower, which looks twice a second, has heard nothing for longer than `Availability` allows, all connections
are shut down from this side; the calls on them fail as if the server had gone.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterable

from prompt_store.availability import Availability

INTERVAL_S = 1.0


class OpenSockets:
    """The sockets of a database's connections, to be shut down from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # The inode tells whether a number still stands for the same socket: numbers are used again.
        self._inode_of: dict[int, int] = {}

    def add(self, descriptor: int) -> None:
        with self._lock:
            self._inode_of[descriptor] = os.fstat(descriptor).st_ino

    def shut_down(self) -> int:
        """Every one that is still open; returns how many."""
        with self._lock:
            known, self._inode_of = self._inode_of, {}
        return sum(_shut_down(known.items()))


class Watchdog:
    """One thread, from `start` to `stop`."""

    def __init__(
        self,
        availability: Availability,
        sockets: OpenSockets,
        *,
        interval_s: float = INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._availability = availability
        self._sockets = sockets
        self._interval_s = interval_s
        self._clock = clock
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="promptmux-store-watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """May be called twice, and without a start."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        looked_at_s, was_late = self._clock(), False
        while not self._stopping.wait(self._interval_s):
            last_at_s, looked_at_s = looked_at_s, self._clock()
            # When this process stood still itself, the follower may have an answer that it had no turn to hear.
            was_late = looked_at_s - last_at_s > 2 * self._interval_s and not was_late
            if self._availability.is_silent and not was_late:
                self._availability.lose()
                self._sockets.shut_down()


def _shut_down(known: Iterable[tuple[int, int]]) -> Iterable[bool]:
    for descriptor, inode in known:
        try:
            copy = os.dup(descriptor)
        except OSError:
            yield False
            continue
        if os.fstat(copy).st_ino != inode:
            os.close(copy)
            yield False
            continue
        with socket.socket(fileno=copy) as same:
            try:
                same.shutdown(socket.SHUT_RDWR)
            except OSError:
                yield False
                continue
        yield True
