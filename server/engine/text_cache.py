"""Texts that rows have computed, kept for later rows of the same tenant and prompt that begin alike.

It owns a tree whose nodes are full pages of tokens, one tree a tenant and prompt, and one holder's claim on each of
those pages in the ledger. It knows neither tensors nor rows. The structure is the radix tree of SGLang (Zheng et al.
2024) cut at page boundaries; least recently used leaves go first.

A child is found by its tokens, compared one by one. The content ids of pages, which are hashes, are for the isolation
check: that a hash collides can hide a fault from the check, but never makes two texts one.

Column c of a row holds virtual token c for c < k and client token c - k after that. The first page of text begins at
column `k // 16 * 16`: it holds k % 16 columns of the prefix and 16 - k % 16 tokens; every later page holds 16 tokens.
"""

import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from server.engine.pages import (
    NO_CONTENT,
    PAGE_SIZE,
    SHARED,
    PageLedger,
    PageNumbers,
    content_of_text,
    text_root,
)

RootName = tuple[str, str | None]
"""Tenant and prefix key; the key of the bare backbone is None."""


@dataclass(frozen=True, slots=True, eq=False)
class TextMatch:
    """Pages that continue a row's prefix, held once more for the caller.

    `contents` is worked out from the caller's own tokens, not read from the tree or the ledger. `num_tokens` is how
    many of the caller's tokens the pages hold.
    """

    pages: PageNumbers
    contents: npt.NDArray[np.int64]
    num_tokens: int


@dataclass(slots=True, eq=False)
class _Node:
    """One page of text below the pages before it. A root has no parent, no page, and the name of its tree."""

    parent: "_Node | None"
    tokens: tuple[int, ...]
    page: int
    content: int
    name: RootName | None = None
    children: dict[tuple[int, ...], "_Node"] = field(default_factory=dict)
    last_used: int = 0
    is_queued: bool = False


class TextCache:
    """Full pages of client and generated tokens that later rows of the same tenant and prompt may share.

    Holds one holder's claim on each of its pages, in `ledger`. `release` takes claims back when pages are dropped; the
    default is the ledger's own. Not thread-safe: the engine thread owns it. Other threads may read `num_pages` and
    `num_evictable`.
    """

    def __init__(
        self,
        ledger: PageLedger,
        *,
        release: Callable[[PageNumbers, int], object] | None = None,
    ) -> None:
        self.num_pages = 0
        self.num_entered = 0
        """Pages that have come in since the beginning: while it stays, no match becomes longer."""
        self._ledger = ledger
        self._release = release if release is not None else ledger.release
        self._roots: dict[RootName, _Node] = {}
        self._is_kept: npt.NDArray[np.bool_] = np.zeros(ledger.num_pages, dtype=np.bool_)
        # Leaves by last use. An entry may be older than its node: it is put right when it comes to the top, so that
        # using a page costs nothing here. A node has one entry at most.
        self._queue: list[tuple[int, int, _Node]] = []
        self._entry_numbers = itertools.count()
        self._clock = 0

    @property
    def num_evictable(self) -> int:
        """How many pages `evict` could make free: those that nobody else holds. One vectorised pass."""
        return int(np.count_nonzero(self._is_kept & (self._ledger.num_holders == 1)))

    def match(self, tenant: str, prefix_key: str | None, k: int, token_ids: Sequence[int], *, limit: int) -> TextMatch:
        """The longest run of kept pages that holds the beginning of `token_ids`, at most `limit` of them.

        The caller becomes a holder of each page, and releases them like its own. `k` is the number of the prefix's
        virtual tokens.
        """
        self._clock += 1
        pages: list[int] = []
        contents: list[int] = []
        num_tokens = 0
        node = self._roots.get((tenant, prefix_key))
        content = text_root(tenant, prefix_key)
        for first, end in _page_bounds(k):
            if node is None or end > min(limit, len(token_ids)):
                break
            tokens = tuple(token_ids[first:end])
            node = node.children.get(tokens)
            if node is None:
                break
            content = content_of_text(content, tokens)
            node.last_used = self._clock
            pages.append(node.page)
            contents.append(content)
            num_tokens = end
        self._ledger.hold(pages)
        return TextMatch(np.array(pages, dtype=np.int32), np.array(contents, dtype=np.int64), num_tokens)

    def insert(
        self,
        tenant: str,
        prefix_key: str | None,
        k: int,
        token_ids: Sequence[int],
        pages: Sequence[int] | PageNumbers,
        owner: int,
    ) -> npt.NDArray[np.int64]:
        """Keep a row's full pages of text, in order from its first; `owner` is the row's serial.

        Pages that are still the row's own become shared and enter the tree. Where the tree has the same text in
        another page already, the row keeps its own. Returns `[num_pages]`, the content id of each page that is shared
        now and NO_CONTENT for the others, worked out from `token_ids`.

        Before anything is changed, raises ValueError when there are fewer tokens than the pages hold, RuntimeError
        when a page is neither the row's nor shared, or when a shared page holds something else.
        """
        numbers = [int(page) for page in pages]
        bounds = list(itertools.islice(_page_bounds(k), len(numbers)))
        if bounds and bounds[-1][1] > len(token_ids):
            raise ValueError(
                f"{len(numbers)} full pages after {k} virtual tokens hold more than {len(token_ids)} tokens"
            )
        owners = self._ledger.owner[numbers].tolist()
        held_contents = self._ledger.content[numbers].tolist()
        for page, page_owner in zip(numbers, owners, strict=True):
            if page_owner not in (owner, SHARED):
                raise RuntimeError(f"page {page} is not owned by row {owner}, which would keep it")
        name = (tenant, prefix_key)
        root = self._roots.get(name) or _Node(None, (), -1, text_root(tenant, prefix_key), name)
        chain = self._chain(root, token_ids, bounds)
        for page, page_owner, held, content in zip(numbers, owners, held_contents, chain, strict=True):
            if page_owner == SHARED and held != content:
                raise RuntimeError(f"page {page} of row {owner} holds another text than the row's")
        self._clock += 1
        contents = np.full(len(numbers), NO_CONTENT, dtype=np.int64)
        entered: list[int] = []
        last = root
        for index, (first, end) in enumerate(bounds):
            page, content, tokens = numbers[index], chain[index], tuple(token_ids[first:end])
            node = last.children.get(tokens)
            is_shared = owners[index] == SHARED
            if node is None:
                if not is_shared:
                    self._ledger.share(page, owner, content)
                    is_shared = True
                node = self._enter(last, tokens, page, content)
                entered.append(page)
            if is_shared:
                contents[index] = content
            node.last_used = self._clock
            last = node
        self._ledger.hold(entered)
        if root.children:
            self._roots[name] = root
            self._queue_leaf(last)
        return contents

    def evict(self, num_pages: int) -> int:
        """Drop least recently used leaves that nobody else holds until `num_pages` are free by it.

        Returns how many became free: fewer only when all pages that are left have another holder. O(log n) a page.
        """
        freed: list[int] = []
        given_up: list[int] = []
        in_use: list[_Node] = []
        holders = self._ledger.num_holders
        while len(freed) < num_pages:
            leaf = self._pop_oldest_leaf()
            if leaf is None:
                # A row that had computed a text of its own may hold a leaf, and not the equal pages kept before it.
                leaf = self._first_in_the_way(in_use)
                if leaf is None:
                    break
                in_use.remove(leaf)
                given_up.append(leaf.page)
            elif holders[leaf.page] > 1:
                in_use.append(leaf)
                continue
            else:
                freed.append(leaf.page)
            self._drop(leaf)
        for leaf in in_use:
            self._queue_leaf(leaf)
        if freed or given_up:
            self._release(np.array(freed + given_up, dtype=np.int32), SHARED)
        return len(freed)

    def evict_prefix(self, prefix_key: str) -> None:
        """Forget all text behind a deleted prompt. Pages that rows hold stay theirs, and are free when they end."""
        pages: list[int] = []
        for name in [name for name in self._roots if name[1] == prefix_key]:
            pages.extend(node.page for node in _below(self._roots.pop(name)))
        if not pages:
            return
        self._is_kept[pages] = False
        self.num_pages -= len(pages)
        # Entries of forgotten pages would otherwise stay for as long as nothing is evicted.
        self._queue = [entry for entry in self._queue if self._is_kept[entry[2].page]]
        heapq.heapify(self._queue)
        self._release(np.array(pages, dtype=np.int32), SHARED)

    def check_invariants(self) -> None:
        """Raises RuntimeError when tree, queue and ledger contradict each other."""
        queued = [node for _, _, node in self._queue]
        if len({id(node) for node in queued}) != len(queued):
            raise RuntimeError("a page of text is queued twice")
        seen: list[_Node] = []
        for name, root in self._roots.items():
            if root.name != name or root.content != text_root(*name) or not root.children:
                raise RuntimeError("a tree of texts is empty or under another's name")
            for node in _below(root):
                seen.append(node)
                self._check_node(node)
        if len(seen) != self.num_pages or sorted(n.page for n in seen) != np.flatnonzero(self._is_kept).tolist():
            raise RuntimeError("the pages counted and marked as kept are not those of the trees")
        if {id(node) for node in seen if node.is_queued} != {id(node) for node in queued}:
            raise RuntimeError("the queue is not of the pages that say so")

    def _check_node(self, node: _Node) -> None:
        parent, ledger = node.parent, self._ledger
        if parent is None or parent.children.get(node.tokens) is not node:
            raise RuntimeError(f"page {node.page} is not where its tokens lead")
        if node.content != content_of_text(parent.content, node.tokens):
            raise RuntimeError(f"page {node.page} is known by another text's content")
        if int(ledger.owner[node.page]) != SHARED or int(ledger.content[node.page]) != node.content:
            raise RuntimeError(f"page {node.page} is kept, but the ledger does not show its text")
        if parent.parent is not None and (parent.last_used < node.last_used or len(node.tokens) != PAGE_SIZE):
            raise RuntimeError(f"page {node.page} was used later than the one before it, or is not full")
        if not node.children and not node.is_queued:
            raise RuntimeError(f"page {node.page} is a leaf that can never be evicted")

    def _chain(self, root: _Node, token_ids: Sequence[int], bounds: Sequence[tuple[int, int]]) -> list[int]:
        """The content ids of pages with these tokens. Hashed only where the tree does not know the text."""
        node: _Node | None = root
        content = root.content
        chain: list[int] = []
        for first, end in bounds:
            tokens = tuple(token_ids[first:end])
            node = node.children.get(tokens) if node is not None else None
            content = node.content if node is not None else content_of_text(content, tokens)
            chain.append(content)
        return chain

    def _enter(self, parent: _Node, tokens: tuple[int, ...], page: int, content: int) -> _Node:
        node = _Node(parent, tokens, page, content)
        parent.children[tokens] = node
        self._is_kept[page] = True
        self.num_pages += 1
        self.num_entered += 1
        return node

    def _first_in_the_way(self, in_use: list[_Node]) -> _Node | None:
        """The oldest of these leaves above which there is a page that nobody else holds."""
        if not in_use or not self.num_evictable:
            return None
        holders = self._ledger.num_holders
        in_the_way: list[_Node] = []
        for leaf in in_use:
            node = leaf.parent
            while node is not None and node.parent is not None:
                if holders[node.page] == 1:
                    in_the_way.append(leaf)
                    break
                node = node.parent
        return min(in_the_way, key=lambda leaf: leaf.last_used, default=None)

    def _pop_oldest_leaf(self) -> _Node | None:
        while self._queue:
            used, number, node = self._queue[0]
            if node.children:
                heapq.heappop(self._queue)
                node.is_queued = False
            elif used != node.last_used:
                heapq.heapreplace(self._queue, (node.last_used, number, node))
            else:
                heapq.heappop(self._queue)
                node.is_queued = False
                return node
        return None

    def _queue_leaf(self, node: _Node | None) -> None:
        if node is not None and node.parent is not None and not node.children and not node.is_queued:
            node.is_queued = True
            heapq.heappush(self._queue, (node.last_used, next(self._entry_numbers), node))

    def _drop(self, leaf: _Node) -> None:
        """Take a leaf out of the tree. The caller releases its page."""
        parent = leaf.parent
        if parent is None:
            raise RuntimeError("the root of a tree of texts is no page")
        del parent.children[leaf.tokens]
        self._is_kept[leaf.page] = False
        self.num_pages -= 1
        if parent.name is not None and not parent.children:
            self._roots.pop(parent.name, None)
        self._queue_leaf(parent)


def _page_bounds(k: int) -> Iterator[tuple[int, int]]:
    """Which tokens the full pages of a row with k virtual tokens hold: from the first, to the second exclusive."""
    first, end = 0, PAGE_SIZE - k % PAGE_SIZE
    while True:
        yield first, end
        first, end = end, end + PAGE_SIZE


def _below(root: _Node) -> Iterator[_Node]:
    """All nodes under a root, parents before children."""
    nodes = list(root.children.values())
    while nodes:
        node = nodes.pop()
        nodes.extend(node.children.values())
        yield node
