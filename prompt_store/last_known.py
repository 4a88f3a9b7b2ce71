"""Answers of a database kept for the time when it is away: a key that was good a minute ago still opens the server.

Asked first is always the database; what it said last counts only when it cannot be reached, only as long as it may be
believed, and not once it was told that something has changed (`forget`): a key that was revoked stays so.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from prompt_store.errors import StorageUnavailable

R = TypeVar("R")

MAX_ANSWERS = 20_000


class LastKnown:
    """`is_believable` says whether what was known last may be told. All methods may be called from any thread."""

    def __init__(self, is_believable: Callable[[], bool], *, max_answers: int = MAX_ANSWERS) -> None:
        self._is_believable = is_believable
        self._max_answers = max_answers
        self._lock = threading.Lock()
        self._answers: OrderedDict[Hashable, Any] = OrderedDict()
        self._generation = 0

    def ask(self, name: Hashable, question: Callable[[], R], *, keeps: Callable[[R], bool] = lambda answer: True) -> R:
        """The answer to `question`, or what it was last. Raises what the question raises.

        An answer that `keeps` refuses is not remembered, and what was remembered under the name is forgotten.
        """
        generation = self._generation
        try:
            answer = question()
        except StorageUnavailable:
            with self._lock:
                if name in self._answers and self._is_believable():
                    return self._answers[name]  # type: ignore[no-any-return]
            raise
        with self._lock:
            self._answers.pop(name, None)
            # What was asked before a change and answered after it may be of before.
            if generation == self._generation and keeps(answer):
                self._answers[name] = answer
                while len(self._answers) > self._max_answers:
                    self._answers.popitem(last=False)
        return answer

    def forget(self) -> None:
        """Anything may have changed. What is being asked meanwhile is not remembered either."""
        with self._lock:
            self._generation += 1
            self._answers.clear()
