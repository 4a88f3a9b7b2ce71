"""What other threads want done on the engine's: a queue of calls, and the bell that ends the engine's wait.

Knows nothing of what the calls do.
"""

import queue
import threading
from collections.abc import Callable


class Commands:
    """`post` and `wake` are for any thread, the rest for the engine's alone."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._bell = threading.Event()

    def post(self, command: Callable[[], None]) -> None:
        self._queue.put(command)
        self._bell.set()

    def wake(self) -> None:
        self._bell.set()

    @property
    def is_empty(self) -> bool:
        return self._queue.empty()

    def do_all(self) -> None:
        while not self._queue.empty():
            self._queue.get()()

    def wait(self, timeout_s: float) -> None:
        """Until something is posted, or somebody wakes the thread; not at all if that has happened since."""
        self._bell.wait(timeout_s)
        self._bell.clear()
