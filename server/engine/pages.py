"""The ledger of pages: which row owns which page of the pool, which pages are shared, and what those hold.

Numpy bookkeeping; it knows neither tensors, nor rows, nor prompts. A page is 16 columns of keys and values in every
layer. It is free, or exclusive (one row, named by its serial, may write it), or shared (immutable: prefixes, and text
that several rows begin with). Shared pages are counted by holders, and say what they hold by a content id.

The ledger is one of the two sides of the isolation check (the other is the plan): each page carries its owner, a
generation that grows with every allocation, and its content. Content ids of text form a chain (as the block hashes of
vLLM's prefix cache do): a page's id is made of the id of the page before it and of its own tokens, from a root that
names the tenant and the prompt. Two pages of equal id therefore hold the same tenant's same prompt and same tokens.
"""

from array import array
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

PAGE_SIZE = 16
"""Columns (tokens) in a page."""

FREE = 0
"""Owner of a page that belongs to nobody. Serials of rows start at 1."""

SHARED = -1
"""Owner of an immutable page. As the owner given to `release`: a holder who claims no exclusive page."""

NO_CONTENT = 0
"""Content id of a page that is not shared."""

NO_PREFIX = 0
"""`tail_uid` of a page that begins with no prefix's columns. Uids of prefixes start at 1."""

PageNumbers = npt.NDArray[np.int32]
"""Numbers of pages, in the order of the columns they hold."""


def content_of_prefix(prefix_key: str, page_index: int) -> int:
    """The content id (63 bits, positive) of full page `page_index` of a prefix."""
    return _content_id(b"prefix", prefix_key.encode() + page_index.to_bytes(8, "little"))


def text_root(tenant: str, prefix_key: str | None) -> int:
    """The content id that chains of text begin with. `prefix_key` is None for the bare backbone."""
    name = tenant.encode()
    prompt = b"" if prefix_key is None else b"\x01" + prefix_key.encode()
    return _content_id(b"root", len(name).to_bytes(8, "little") + name + prompt)


def content_of_text(parent: int, token_ids: Sequence[int]) -> int:
    """The content id of a page of text: `parent` is the id of the page before it, or the root."""
    return _content_id(b"text", array("q", (parent, *token_ids)).tobytes())


class PageLedger:
    """Which row owns which page, in which generation; which pages are shared and what they hold.

    `tail_uid` names the prefix whose last columns, too few for a page, were copied to the beginning of a row's own
    page; a shared page answers for its prefix by its content. Arrays are `[num_pages]`; only this class writes them.
    Not thread-safe: the engine thread owns it. Other threads may read `num_free` and `num_used`.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages must be at least 1, not {num_pages}")
        self.num_pages = num_pages
        self.num_free = num_pages
        self.owner: npt.NDArray[np.int64] = np.full(num_pages, FREE, dtype=np.int64)
        self.generation: npt.NDArray[np.int64] = np.zeros(num_pages, dtype=np.int64)
        self.content: npt.NDArray[np.int64] = np.full(num_pages, NO_CONTENT, dtype=np.int64)
        self.tail_uid: npt.NDArray[np.int64] = np.full(num_pages, NO_PREFIX, dtype=np.int64)
        self.num_holders: npt.NDArray[np.int32] = np.zeros(num_pages, dtype=np.int32)
        # A stack, so that pages used before are used again and memory never touched stays untouched.
        self._free_stack: PageNumbers = np.arange(num_pages - 1, -1, -1, dtype=np.int32)
        self._next_generation = 1

    @property
    def num_used(self) -> int:
        return self.num_pages - self.num_free

    def allocate(self, owner: int, count: int) -> PageNumbers | None:
        """`count` exclusive pages of one holder each, or None when fewer are free. `owner` is a row's serial.

        Raises ValueError for a serial or a count that cannot be.
        """
        if owner <= FREE:
            raise ValueError(f"owner must be a positive serial, not {owner}")
        if count < 0:
            raise ValueError(f"count must not be negative: {count}")
        if count > self.num_free:
            return None
        num_left = self.num_free - count
        pages = self._free_stack[num_left : self.num_free][::-1].copy()
        self.num_free = num_left
        self.owner[pages] = owner
        self.generation[pages] = np.arange(self._next_generation, self._next_generation + count)
        self.num_holders[pages] = 1
        self._next_generation += count
        return pages

    def share(self, page: int, owner: int, content: int) -> None:
        """Make the owner's full page immutable; its holder stays.

        Raises RuntimeError when `owner` does not own the page, ValueError for a content id that is not positive.
        """
        if content <= NO_CONTENT:
            raise ValueError(f"content must be a positive id, not {content}")
        self._require_owned(page, owner)
        self.owner[page] = SHARED
        self.content[page] = content
        self.tail_uid[page] = NO_PREFIX

    def stamp_tail(self, page: int, owner: int, prefix_uid: int) -> None:
        """Record that the owner's page begins with the last columns of the prefix with this uid.

        Raises RuntimeError when `owner` does not own the page.
        """
        self._require_owned(page, owner)
        self.tail_uid[page] = prefix_uid

    def hold(self, pages: PageNumbers | Sequence[int]) -> None:
        """One more holder for each of these shared pages (for each time it is named).

        Raises RuntimeError, and changes nothing, when one of them is not shared.
        """
        named, times = self._count(pages)
        not_shared = self.owner[named] != SHARED
        if not_shared.any():
            raise RuntimeError(f"pages {named[not_shared].tolist()} are not shared and cannot be held")
        self.num_holders[named] += times

    def release(self, pages: PageNumbers | Sequence[int], owner: int) -> PageNumbers:
        """One holder less for each of these pages; those without a holder become free and are returned, ascending.

        An exclusive page must be owned by `owner`. Raises RuntimeError, and changes nothing, on a stale claim.
        """
        named, times = self._count(pages)
        owners = self.owner[named]
        is_held = (owners == SHARED) | (owners == owner)
        is_stale = ~is_held | (times > self.num_holders[named])
        if is_stale.any():
            raise RuntimeError(f"stale claim of row {owner} on pages {named[is_stale].tolist()}")
        self.num_holders[named] -= times
        freed: PageNumbers = named[self.num_holders[named] == 0]
        self.owner[freed] = FREE
        self.content[freed] = NO_CONTENT
        self.tail_uid[freed] = NO_PREFIX
        # The lowest page on top: it is the next to be used.
        self._free_stack[self.num_free : self.num_free + len(freed)] = freed[::-1]
        self.num_free += len(freed)
        return freed

    def check_invariants(self) -> None:
        """Raises RuntimeError when the ledger contradicts itself."""
        is_free, is_shared = self.owner == FREE, self.owner == SHARED
        stack = self._free_stack[: self.num_free]
        if not np.array_equal(np.sort(stack), np.flatnonzero(is_free)):
            raise RuntimeError("the stack of free pages is not the pages that are free")
        if np.any(self.owner < SHARED):
            raise RuntimeError("a page has an owner that cannot be")
        if np.any(self.num_holders[is_free] != 0):
            raise RuntimeError("a free page has a holder")
        if np.any(self.num_holders[~is_free & ~is_shared] != 1):
            raise RuntimeError("an exclusive page has not exactly one holder")
        if np.any(self.num_holders[is_shared] < 1):
            raise RuntimeError("a shared page has no holder")
        if np.any((self.content != NO_CONTENT) != is_shared):
            raise RuntimeError("a page that is not shared has a content, or a shared one has none")
        if np.any(self.tail_uid[is_free | is_shared] != NO_PREFIX):
            raise RuntimeError("a page that no row owns still names a prefix")
        live = self.generation[~is_free]
        if live.size and (int(live.min()) < 1 or int(live.max()) >= self._next_generation):
            raise RuntimeError("a generation from the future, or none")
        if len(np.unique(live)) != len(live):
            raise RuntimeError("two pages have one generation")

    def _require_owned(self, page: int, owner: int) -> None:
        if owner <= FREE or not 0 <= page < self.num_pages or int(self.owner[page]) != owner:
            raise RuntimeError(f"page {page} is not owned by row {owner}")

    def _count(self, pages: PageNumbers | Sequence[int]) -> tuple[PageNumbers, PageNumbers]:
        """The distinct pages, ascending, and how often each is named. Raises RuntimeError for one that is not there."""
        named, times = np.unique(np.asarray(pages, dtype=np.int32), return_counts=True)
        if named.size and (int(named[0]) < 0 or int(named[-1]) >= self.num_pages):
            raise RuntimeError(
                f"pages {int(named[0])} to {int(named[-1])} do not all lie in a pool of {self.num_pages}"
            )
        return named, times.astype(np.int32)


def _content_id(kind: bytes, data: bytes) -> int:
    digest = blake2b(data, digest_size=8, person=kind).digest()
    return (int.from_bytes(digest, "little") >> 1) or 1
