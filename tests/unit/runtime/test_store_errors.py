"""Every error that the store can raise has its place in the table."""

import inspect

import pytest

from prompt_store import errors as store
from server.runtime.store_errors import client_errors, to_client_error

EXPECTED = {
    store.PromptStoreError: (500, "internal_error"),
    store.InvalidValue: (400, "invalid_value"),
    store.InvalidName: (400, "invalid_name"),
    store.InvalidConfig: (400, "invalid_config"),
    store.UnsupportedFile: (415, "unsupported_file"),
    store.FileTooLarge: (413, "payload_too_large"),
    store.PromptMismatch: (422, "prompt_mismatch"),
    store.TaskNotFound: (404, "model_not_found"),
    store.KeyNotFound: (404, "not_found"),
    store.TrainingNotFound: (404, "not_found"),
    store.VersionConflict: (409, "version_conflict"),
    store.VersionActive: (409, "version_active"),
    store.GateNotPassed: (409, "gate_not_passed"),
    store.QuotaExceeded: (429, "storage_quota_exceeded"),
    store.TooManyJobs: (429, "too_many_jobs"),
    store.PromptCorrupt: (503, "prompt_corrupt"),
    store.StoreInUse: (503, "storage_failed"),
    store.StorageFull: (507, "storage_full"),
    store.StorageFailed: (503, "storage_failed"),
    store.StorageUnavailable: (503, "store_unavailable"),
}
ALL = [kind for kind in vars(store).values() if inspect.isclass(kind) and issubclass(kind, store.PromptStoreError)]


@pytest.mark.parametrize("kind", ALL)
def test_error_has_its_status_and_code(kind: type[store.PromptStoreError]) -> None:
    error = to_client_error(kind("what happened", param="file"))

    assert (error.status, error.code) == EXPECTED[kind]
    if kind is not store.PromptStoreError:
        assert (error.message, error.param) == ("what happened", "file")


def test_unknown_error_tells_nothing() -> None:
    assert "secret" not in to_client_error(store.PromptStoreError("secret path")).message


def test_errors_are_translated_on_the_way_out() -> None:
    with pytest.raises(Exception, match="gone") as raised, client_errors():
        raise store.TaskNotFound("gone")
    assert getattr(raised.value, "status", None) == 404
    assert isinstance(raised.value.__cause__, store.TaskNotFound)
