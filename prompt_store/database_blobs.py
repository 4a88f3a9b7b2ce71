"""Blobs in the shared database, beside the rows that refer to them: written, and removed, in the same transaction.

The same promises as of files (`blobs`): a name is a digest, what does not match it is never given out, and a damaged
blob is replaced by the next `put` of its bytes.
"""

import hashlib
from collections.abc import Iterator

from sqlalchemy import delete, select
from sqlalchemy.dialects.postgresql import insert

from prompt_store import failpoints
from prompt_store.blobs import check_content, missing
from prompt_store.database import Database
from prompt_store.errors import PromptCorrupt
from prompt_store.names import is_digest
from prompt_store.shared_models import BlobRow


class DatabaseBlobs:
    def __init__(self, database: Database) -> None:
        self._database = database

    def put(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        if self._is_sound(digest):
            return digest
        row = insert(BlobRow).values(digest=digest, data=data)
        with self._database.writing() as session:
            session.execute(row.on_conflict_do_update(index_elements=[BlobRow.digest], set_={"data": data}))
        failpoints.hit(failpoints.BLOB_TEMP_WRITTEN)
        failpoints.hit(failpoints.BLOB_RENAMED)
        return digest

    def get(self, digest: str) -> bytes:
        assert is_digest(digest), "a blob is only ever named by its digest"
        with self._database.reading() as session:
            data = session.scalar(select(BlobRow.data).where(BlobRow.digest == digest))
        if data is None:
            raise missing(digest)
        return check_content(digest, data)

    def exists(self, digest: str) -> bool:
        with self._database.reading() as session:
            return session.scalar(select(BlobRow.digest).where(BlobRow.digest == digest)) is not None

    def delete(self, digest: str) -> None:
        with self._database.writing() as session:
            session.execute(delete(BlobRow).where(BlobRow.digest == digest))

    def digests(self) -> Iterator[str]:
        with self._database.reading() as session:
            yield from list(session.scalars(select(BlobRow.digest)))

    def _is_sound(self, digest: str) -> bool:
        try:
            self.get(digest)
        except PromptCorrupt:
            return False
        return True
