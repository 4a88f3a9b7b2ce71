"""Receipts: which digest answered which request. Append-only; the oldest give way when there are too many.

Knows how they are kept and found, not when they are written: a request never waits for its receipt.
"""

import dataclasses
from collections.abc import Iterator, Sequence

from sqlalchemy import delete, func, insert, select

from prompt_store.database import Database
from prompt_store.manifest import Receipt
from prompt_store.models import ReceiptRow

_PAGE = 500
_FIELDS = tuple(field.name for field in dataclasses.fields(Receipt))
_NEW_FIELDS = tuple(name for name in _FIELDS if name != "id")


class Receipts:
    def __init__(self, database: Database) -> None:
        self._database = database

    def append(self, receipts: Sequence[Receipt], max_rows: int) -> None:
        """All of them in one transaction; of what is then kept, no more than the newest `max_rows`."""
        if not receipts:
            return
        rows = [{name: getattr(receipt, name) for name in _NEW_FIELDS} for receipt in receipts]
        with self._database.writing() as session:
            session.execute(insert(ReceiptRow), rows)
            newest = session.scalar(select(func.max(ReceiptRow.id)))
            # Ids have no gaps worth counting: the difference is the number of rows.
            if newest is not None and newest > max_rows:
                session.execute(delete(ReceiptRow).where(ReceiptRow.id <= newest - max_rows))

    def iterate(self, tenant: str | None, *, after: int, request_id: str | None, task: str | None) -> Iterator[Receipt]:
        """Those with an id above `after`, oldest first, that match all that is given. Holds no transaction."""
        while True:
            query = select(ReceiptRow).where(ReceiptRow.id > after).order_by(ReceiptRow.id).limit(_PAGE)
            if tenant is not None:
                query = query.where(ReceiptRow.tenant == tenant)
            if request_id is not None:
                query = query.where(ReceiptRow.request_id == request_id)
            if task is not None:
                query = query.where(ReceiptRow.task == task)
            with self._database.reading() as session:
                rows = list(session.scalars(query))
            yield from (Receipt(**{name: getattr(row, name) for name in _FIELDS}) for row in rows)
            if len(rows) < _PAGE:
                return
            after = rows[-1].id
