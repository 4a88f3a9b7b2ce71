"""The pages of one row, and what the row says of each of them. Numpy bookkeeping, no tensors of the model."""

import numpy as np
import numpy.typing as npt

from server.engine.pages import NO_CONTENT, PAGE_SIZE, PageLedger, PageNumbers


class RowPages:
    """In the order of the row's columns: first the prefix's full pages, then shared pages of text, then its own.

    `generations` are those of the moment in which the row got the page. `contents` is what the row expects a shared
    page to hold, worked out from its own request and never read from the ledger; NO_CONTENT for a page of its own.
    """

    def __init__(self, max_columns: int) -> None:
        capacity = -(-max_columns // PAGE_SIZE)
        self._numbers = np.empty(capacity, dtype=np.int32)
        self._generations = np.empty(capacity, dtype=np.int64)
        self._contents = np.empty(capacity, dtype=np.int64)
        self.num_pages = 0
        self.num_prefix_pages = 0
        """The first so many belong to the prefix, whose holder gives them back; the row does not."""

    @property
    def numbers(self) -> PageNumbers:
        return self._numbers[: self.num_pages]

    @property
    def generations(self) -> npt.NDArray[np.int64]:
        return self._generations[: self.num_pages]

    @property
    def contents(self) -> npt.NDArray[np.int64]:
        return self._contents[: self.num_pages]

    @property
    def num_columns(self) -> int:
        """How many columns the pages have room for."""
        return self.num_pages * PAGE_SIZE

    @property
    def held(self) -> PageNumbers:
        """The pages that the row itself holds: all but the prefix's."""
        return self.numbers[self.num_prefix_pages :]

    def append(self, pages: PageNumbers, ledger: PageLedger, contents: npt.NDArray[np.int64] | None = None) -> None:
        """Add pages behind the last. `contents` None: they are the row's own."""
        end = self.num_pages + len(pages)
        if end > len(self._numbers):
            raise RuntimeError(f"{end} pages are more than the row can ever need ({len(self._numbers)})")
        new = slice(self.num_pages, end)
        self._numbers[new] = pages
        self._generations[new] = ledger.generation[pages]
        self._contents[new] = NO_CONTENT if contents is None else contents
        self.num_pages = end

    def append_prefix(self, pages: PageNumbers, ledger: PageLedger, contents: npt.NDArray[np.int64]) -> None:
        """Add the prefix's full pages; they come before all others."""
        self.append(pages, ledger, contents)
        self.num_prefix_pages = self.num_pages

    def mark_shared(self, first: int, contents: npt.NDArray[np.int64]) -> None:
        """From page `first` on, own pages have become shared: take the contents that are not NO_CONTENT."""
        part = self._contents[first : first + len(contents)]
        part[:] = np.where(contents != NO_CONTENT, contents, part)
