"""The run-time isolation check: every index of every plan against the ledger of owners, on every step.

The plan says which memory each token reads and writes. The ledger says who owns that memory. The rows say who they
are and which prompt they hold. Nothing here trusts how the plan was built: the indices are read back from the plan's
own arrays, the ones that the forward pass will use, and compared with what rows and ledger say. A row that fails is
ended with an error before the pass; no token is ever sampled from such a step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from server.engine.plan import IntArray, StepPlan
from server.engine.slots import NO_PREFIX, Slab, Slot


@dataclass(frozen=True, slots=True)
class Claim:
    """What the holder of an entry says about itself, taken from the row and not from the plan.

    It means to compute `token_ids` from `start_column` on, and awaits the logits of the last `num_logits` of them.
    `serial` is the row's (or the compile job's) name in the ledger; `prefix_uid` the uid of the prefix it holds;
    `prefix_matches` whether that prefix is the one that its request resolved to, and still alive. `vectors` is what it
    wants in place of its tokens' embeddings: only a prompt being compiled has any.
    """

    serial: int
    slot: Slot
    start_column: int
    token_ids: Sequence[int]
    num_logits: int
    prefix_uid: int = NO_PREFIX
    prefix_matches: bool = True
    vectors: object | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Violation:
    """Entry `entry` of the plan (packed order) touches what its row does not own."""

    entry: int
    reason: str


def check_plan(plan: StepPlan, claims: Sequence[Claim], slabs: Mapping[int, Slab]) -> list[Violation]:
    """Compare the plan with the claims (one an entry, in the plan's order) and the ledger's slabs.

    Returns one violation an offending entry, empty when all is well. Vectorised over tokens; takes well under a
    millisecond for a full step.
    """
    if len(claims) != len(plan.entries):
        return [Violation(entry, "plan and rows differ in number") for entry in range(len(claims))]
    checker = _Checker(plan, claims, slabs)
    checker.check_claims()
    checker.check_packing()
    checker.check_writes()
    checker.check_decode_reads()
    checker.check_prefill_reads()
    checker.check_logits()
    return checker.violations()


class _Checker:
    """Collects, an entry, the first thing found wrong."""

    def __init__(self, plan: StepPlan, claims: Sequence[Claim], slabs: Mapping[int, Slab]) -> None:
        self._plan = plan
        self._claims = claims
        self._slabs = slabs
        self._reasons: dict[int, str] = {}
        counts = np.array([claim.num_tokens for claim in claims], dtype=np.int64)
        self._counts = counts
        self._num_tokens = int(counts.sum())
        self._entry_of = np.repeat(np.arange(len(claims), dtype=np.int64), counts)
        self._firsts = np.cumsum(counts) - counts
        serials = np.array([claim.serial for claim in claims], dtype=np.int64)
        generations = np.array([claim.slot.generation for claim in claims], dtype=np.int64)
        starts = np.array([claim.start_column for claim in claims], dtype=np.int64)
        self._serials = serials[self._entry_of]  # [T]
        self._generations = generations[self._entry_of]  # [T]
        self._columns = np.arange(self._num_tokens) - self._firsts[self._entry_of] + starts[self._entry_of]  # [T]

    def violations(self) -> list[Violation]:
        return [Violation(entry, reason) for entry, reason in sorted(self._reasons.items())]

    def check_claims(self) -> None:
        """Each row's slot is its own in the ledger, in this generation, and holds the prefix that the row holds."""
        for entry, claim in enumerate(self._claims):
            slab = self._slabs.get(claim.slot.slab)
            if slab is None:
                self._blame_entry(entry, "its slab is gone")
            elif int(slab.owner[claim.slot.index]) != claim.serial:
                self._blame_entry(entry, "its slot belongs to another row")
            elif int(slab.generation[claim.slot.index]) != claim.slot.generation:
                self._blame_entry(entry, "its slot was given away and taken back")
            elif int(slab.prefix_uid[claim.slot.index]) != claim.prefix_uid:
                self._blame_entry(entry, "its slot holds another prefix")
            elif not claim.prefix_matches:
                self._blame_entry(entry, "its prefix is not the one that its request named")

    def check_packing(self) -> None:
        """Entries, tokens, positions and segment bounds are those of the rows.

        The dense path reads the entries themselves, and both take vectors from them, so they are held to the same
        account as the arrays.
        """
        plan = self._plan
        for index, (entry, claim) in enumerate(zip(plan.entries, self._claims, strict=True)):
            if (
                entry.slot != claim.slot
                or entry.start_column != claim.start_column
                or list(entry.token_ids) != list(claim.token_ids)
                or entry.vectors is not claim.vectors
            ):
                self._blame_entry(index, "its entry is another's")
        if len(plan.token_ids) != self._num_tokens or len(plan.positions) != self._num_tokens:
            self._blame_all("the packed batch has another length")
            return
        self._blame(self._entry_of[plan.positions != self._columns], "its tokens are at wrong positions")
        token_ids = np.concatenate([np.asarray(claim.token_ids, dtype=np.int64) for claim in self._claims])
        self._blame(self._entry_of[plan.token_ids != token_ids], "its tokens are another's")
        wrong = np.flatnonzero((plan.first_tokens != self._firsts) | (plan.counts != self._counts))
        self._blame(wrong, "its segment begins elsewhere")

    def check_writes(self) -> None:
        """Each token's keys and values go to its own row's slot and column, each token exactly once."""
        written = np.zeros(self._num_tokens, dtype=np.int64)
        for write in self._plan.writes:
            slab = self._slabs.get(write.slab)
            if slab is None or not self._in_range(write.tokens, self._num_tokens):
                self._blame_all("a write leaves the batch or its slab is gone")
                return
            if not (self._in_range(write.slots, slab.num_slots) and self._in_range(write.columns, slab.capacity)):
                self._blame(self._entry_of[write.tokens], "a write leaves the slab")
                continue
            np.add.at(written, write.tokens, 1)
            wrong = (
                (slab.owner[write.slots] != self._serials[write.tokens])
                | (slab.generation[write.slots] != self._generations[write.tokens])
                | (write.columns != self._columns[write.tokens])
            )
            if len(write.tokens) == self._num_tokens:
                # A write of the whole batch takes the tokens as they lie, without a gather.
                wrong |= write.tokens != np.arange(self._num_tokens)
            self._blame(self._entry_of[write.tokens[wrong]], "it would write into another row's slot")
        self._blame(self._entry_of[written != 1], "its tokens are not written exactly once")

    def check_decode_reads(self) -> None:
        """Each single token asks its own row's slot, sees exactly the columns up to its own, and gets that answer."""
        for read in self._plan.decode_reads:
            slab = self._slabs.get(read.slab)
            if (
                slab is None
                or read.first_slot < 0
                or read.first_slot + read.num_slots > slab.num_slots
                or not self._in_range(read.result_slots, read.num_slots)
                or not self._in_range(read.result_tokens, self._num_tokens)
                or not self._in_range(read.query_tokens, self._num_tokens)
                or not self._in_range(read.lengths - 1, slab.capacity)
            ):
                self._blame_all("a read leaves the batch or its slab")
                return
            tokens = read.result_tokens
            slots = read.first_slot + read.result_slots
            wrong = (
                (slab.owner[slots] != self._serials[tokens])
                | (slab.generation[slots] != self._generations[tokens])
                | (read.query_tokens[read.result_slots] != tokens)
                | (read.lengths[read.result_slots] != self._columns[tokens] + 1)
            )
            if read.is_dense and not np.array_equal(read.result_slots, np.arange(read.num_slots)):
                wrong = np.ones(len(tokens), dtype=bool)
            if read.is_dense and not np.array_equal(tokens, int(tokens[0]) + np.arange(len(tokens))):
                wrong = np.ones(len(tokens), dtype=bool)
            self._blame(self._entry_of[tokens[wrong]], "it would read another row's slot")

    def check_prefill_reads(self) -> None:
        """Each chunk asks its own row's slot from its own column on; together the reads cover every token once."""
        read_times = np.zeros(self._num_tokens, dtype=np.int64)
        for decode in self._plan.decode_reads:
            if self._in_range(decode.result_tokens, self._num_tokens):  # else all are blamed already
                np.add.at(read_times, decode.result_tokens, 1)
        for read in self._plan.prefill_reads:
            slab = self._slabs.get(read.slab)
            last = read.first_token + read.num_tokens
            if (
                slab is None
                or not 0 <= read.slot < slab.num_slots
                or not 0 <= read.first_token < last <= self._num_tokens
            ):
                self._blame_all("a read leaves the batch or its slab")
                return
            read_times[read.first_token : last] += 1
            tokens = slice(read.first_token, last)
            wrong = (
                (self._serials[tokens] != slab.owner[read.slot])
                | (self._generations[tokens] != slab.generation[read.slot])
                | (self._columns[tokens] != read.start_column + np.arange(read.num_tokens))
            )
            self._blame(self._entry_of[tokens][wrong], "it would read another row's slot")
        self._blame(self._entry_of[read_times != 1], "its tokens are not read exactly once")

    def check_logits(self) -> None:
        """The logits asked for are of each entry's own last tokens, in packed order."""
        plan = self._plan
        if len(plan.logits_tokens) != len(plan.logits_entries) or not self._in_range(
            plan.logits_tokens, self._num_tokens
        ):
            self._blame_all("the logits are of tokens outside the batch")
            return
        owners = self._entry_of[plan.logits_tokens]
        self._blame(owners[owners != plan.logits_entries], "its logits would go to another row")
        expected = []
        for first, claim in zip(self._firsts.tolist(), self._claims, strict=True):
            last = first + claim.num_tokens
            expected.append(np.arange(last - claim.num_logits, last))
        wanted = np.concatenate(expected)
        if len(wanted) != len(plan.logits_tokens):
            missing = np.setxor1d(wanted, plan.logits_tokens)
            self._blame(self._entry_of[missing], "its logits are not of its last tokens")
            if not len(missing):
                self._blame_all("a token's logits are asked for twice")
        else:
            wrong = np.flatnonzero(wanted != plan.logits_tokens)
            self._blame(self._entry_of[wanted[wrong]], "its logits are not of its last tokens")

    @staticmethod
    def _in_range(index: IntArray, limit: int) -> bool:
        return index.size == 0 or bool(index.min() >= 0 and index.max() < limit)

    def _blame_entry(self, entry: int, reason: str) -> None:
        self._reasons.setdefault(entry, reason)

    def _blame(self, entries: npt.NDArray[np.int64], reason: str) -> None:
        for entry in np.unique(entries).tolist():
            self._reasons.setdefault(entry, reason)

    def _blame_all(self, reason: str) -> None:
        for entry in range(len(self._claims)):
            self._reasons.setdefault(entry, reason)
