"""Between the rows that wait for prompts and the tiers that bring them: what arrives, what fails, what is deleted."""

import logging
from collections.abc import Sequence
from typing import Protocol

from server.engine.audit import Auditor
from server.engine.request import PromptRef
from server.engine.residency import PrefixResidency
from server.engine.row import Row
from server.engine.row_memory import RowMemory
from server.engine.scheduler import Scheduler
from server.errors import PromptmuxError

logger = logging.getLogger(__name__)

COMPILE_RUNNING_S = 0.1
COMPILE_IDLE_S = 0.25


class EndRow(Protocol):
    def __call__(self, row: Row, *, error: PromptmuxError) -> None: ...


class PromptIntake:
    """Called once a turn of the step loop, on its thread. `end_row` ends a row with an error."""

    def __init__(
        self,
        prefixes: PrefixResidency,
        memory: RowMemory,
        scheduler: Scheduler,
        auditor: Auditor,
        end_row: EndRow,
    ) -> None:
        self._prefixes = prefixes
        self._memory = memory
        self._scheduler = scheduler
        self._auditor = auditor
        self._end_row = end_row
        self._doomed: set[str] = set()

    def evict_when_unwanted(self, prefix_key: str) -> None:
        """Forget a deleted prompt as soon as no row waits for it, unless it is asked for or pinned before that."""
        self._doomed.add(prefix_key)

    def prefetch(self, ref: PromptRef) -> None:
        """A row has come that will need this prompt."""
        self._doomed.discard(ref.prefix_key)
        self._prefixes.prefetch(ref)

    def pin(self, refs: Sequence[PromptRef]) -> None:
        """Keep exactly these prompts on the device (`PrefixResidency.pin`)."""
        self._doomed.difference_update(ref.prefix_key for ref in refs)
        self._prefixes.pin(refs)

    def turn(self) -> None:
        """Forget deleted prompts, take in loaded ones, and compile those that rows wait for.

        At least one is compiled, and more for a while that is longer when no row runs.
        """
        self._evict_doomed()
        failed, for_audit = self._prefixes.poll()
        for loaded in for_audit:
            self._auditor.supply(loaded.ref, loaded.prompt)
        for loaded in failed:
            if loaded.error is not None:
                logger.warning("%s@%s could not be loaded: %s", loaded.ref.task, loaded.ref.version, loaded.error)
                self._fail_waiting(loaded.ref, loaded.error, same_version_only=True)
        if self._prefixes.num_wanted:
            self._prefixes.keep_wanted(self._waited_for())
            limit_s = COMPILE_RUNNING_S if self._scheduler.running else COMPILE_IDLE_S
            for ref, error in self._prefixes.compile_wanted(limit_s):
                self._fail_waiting(ref, error)

    def _evict_doomed(self) -> None:
        if self._doomed:
            waiting = self._waited_for()
            for key in self._doomed - waiting:
                self._prefixes.evict(key)
                self._memory.forget_prompt(key)
            self._doomed &= waiting

    def _waited_for(self) -> set[str]:
        """The prompts that rows wait for: those of waiting rows that hold no prefix yet."""
        return {
            row.request.prompt.prefix_key
            for row in self._scheduler.waiting
            if row.request.prompt is not None and row.prefix is None
        }

    def _fail_waiting(self, ref: PromptRef, error: PromptmuxError, *, same_version_only: bool = False) -> None:
        """End the rows that wait for a prompt that will not come.

        What cannot be compiled cannot be for anyone; but a load may have failed because one of two versions that share
        a file was deleted, and rows of the other ask again by themselves. Some waiting rows hold their prefix already.
        """
        for row in list(self._scheduler.waiting):
            prompt = row.request.prompt
            if row.prefix is not None or prompt is None or prompt.prefix_key != ref.prefix_key:
                continue
            if prompt == ref or not same_version_only:
                self._end_row(row, error=error)
