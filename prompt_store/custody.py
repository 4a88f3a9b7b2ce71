"""Keeps blobs and catalog in step: damaged blobs are quarantined, and blobs that nothing refers to are removed.

Knows who refers to a blob, which `blobs` does not, and touches files, which `catalog` does not.
"""

import contextlib
import logging
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager

from prompt_store import failpoints
from prompt_store.blobs import BlobStore
from prompt_store.catalog import Catalog
from prompt_store.errors import PromptCorrupt, PromptStoreError, StorageFailed, StorageFull
from prompt_store.faults import storage_errors
from prompt_store.manifest import PromptVersion

_log = logging.getLogger(__name__)


class Custody:
    """`changing` is the context in which this store's writers exclude each other (of the change of a tenant's task, if
    they are named); it is not reentrant.
    """

    def __init__(
        self, catalog: Catalog, blobs: BlobStore, changing: Callable[..., AbstractContextManager[None]]
    ) -> None:
        self._catalog = catalog
        self._blobs = blobs
        self._changing = changing

    def read(self, version: PromptVersion, digest: str) -> bytes:
        """A blob of `version`, verified. Not to be called while changing.

        Raises PromptCorrupt after quarantining the version, or TaskNotFound when it was deleted meanwhile.
        """
        with storage_errors():
            with contextlib.suppress(PromptCorrupt):
                return self._blobs.get(digest)
            # Once more where no writer can be repairing or deleting it at this moment.
            with self._changing(version.tenant, version.task):
                try:
                    return self._blobs.get(digest)
                except PromptCorrupt as error:
                    damage = error
                    self._quarantine(version, error.message)
            # Not before: an error inside would undo the change.
            raise damage

    def collect(self, digests: Collection[str]) -> None:
        """Remove those that nothing refers to. Only while changing.

        What fails is left to the sweep of the next start: an unreferenced blob is never served.
        """
        try:
            for digest in self._catalog.find_unreferenced(digests):
                self._blobs.delete(digest)
                failpoints.hit(failpoints.DELETE_BLOB_REMOVED)
        except (PromptStoreError, OSError):
            _log.warning("could not remove unreferenced files; the next start will", exc_info=True)

    def sweep(self) -> None:
        """Remove every blob that nothing refers to. Raises StorageFailed."""
        with storage_errors(), self._changing():
            referenced = self._catalog.all_digests()
            for digest in [digest for digest in self._blobs.digests() if digest not in referenced]:
                self._blobs.delete(digest)

    def check_invariants(self) -> None:
        """Every blob is referred to, and every reference has its sound blob. Reads everything: for tests."""
        with self._changing():
            referenced, stored = self._catalog.all_digests(), set(self._blobs.digests())
            assert referenced == stored, f"missing {referenced - stored}, left over {stored - referenced}"
            for digest in stored:
                self._blobs.get(digest)

    def _quarantine(self, version: PromptVersion, reason: str) -> None:
        try:
            self._catalog.quarantine(version, reason)
        except (StorageFailed, StorageFull):
            # A folder that cannot be written must not turn a refusal into something else.
            _log.exception("could not quarantine a damaged prompt")
