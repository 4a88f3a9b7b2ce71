"""What tenants teach their prompts is theirs alone, and what they may have is bounded."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.integration.training.conftest import EXAMPLES, TrainingServer, to_lines, training_server


@pytest.fixture(scope="module")
def tenants(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TrainingServer, dict[str, str]]]:
    """A server with keys: of two tenants that may write, and of one that may only call."""
    settings = {"max_tenant_training_jobs": 1, "max_training_file_bytes": 4096, "max_tenant_training_bytes": 6000}
    with training_server(model, tmp_path_factory.mktemp("tenants"), max_training_steps=30_000, **settings) as server:
        store = server.app_runtime.store
        keys = {tenant: store.create_key(tenant, ["infer", "write"])[1] for tenant in ("ours", "theirs")}
        keys["caller"] = store.create_key("ours", ["infer"])[1]
        server.app_runtime.keys.require_keys()
        yield server, keys


def test_files_and_jobs_of_another_tenant_are_not_there(tenants: tuple[TrainingServer, dict[str, str]]) -> None:
    server, keys = tenants
    job = server.create(keys["ours"], task="secret", num_steps=30_000)

    with server.client(keys["theirs"]) as theirs:
        for ask in (
            lambda: theirs.files.retrieve(job.training_file),
            lambda: theirs.files.content(job.training_file),
            lambda: theirs.files.delete(job.training_file),
            lambda: theirs.fine_tuning.jobs.retrieve(job.id),
            lambda: theirs.fine_tuning.jobs.list_events(job.id),
            lambda: theirs.fine_tuning.jobs.checkpoints.list(job.id),
            lambda: theirs.fine_tuning.jobs.cancel(job.id),
            lambda: theirs.fine_tuning.jobs.create(model=server.backbone, training_file=job.training_file),
        ):
            with pytest.raises(openai.NotFoundError) as foreign:
                ask()
            assert foreign.value.code == "not_found"
        assert theirs.files.list().data == []
        assert theirs.fine_tuning.jobs.list().data == []
        with pytest.raises(openai.NotFoundError) as unknown:
            theirs.files.retrieve("file-" + "0" * 24)
        with pytest.raises(openai.NotFoundError) as foreign:
            theirs.files.retrieve(job.training_file)
        assert unknown.value.message == foreign.value.message
    with server.client(keys["ours"]) as ours:
        assert ours.files.content(job.training_file).content == to_lines(EXAMPLES)
        with pytest.raises(openai.ConflictError):
            ours.files.delete(job.training_file)
        with pytest.raises(openai.RateLimitError, match="jobs queued or running"):
            server.create(keys["ours"])
        ours.fine_tuning.jobs.cancel(job.id)
        assert ours.files.delete(job.training_file).deleted


def test_a_prompt_is_made_in_the_tenant_that_asked(tenants: tuple[TrainingServer, dict[str, str]]) -> None:
    server, keys = tenants
    job = server.wait(server.create(keys["theirs"], task="same-name", num_steps=2).id, keys["theirs"])
    assert job.error is None

    with server.client(keys["ours"]) as ours, pytest.raises(openai.NotFoundError):
        ours.completions.create(model="same-name", prompt="x")
    with server.client(keys["theirs"]) as theirs:
        assert theirs.completions.create(model="same-name", prompt="x", max_tokens=1).choices
    assert job.organization_id == "theirs"


def test_a_key_that_may_only_call_makes_no_prompts(tenants: tuple[TrainingServer, dict[str, str]]) -> None:
    server, keys = tenants
    with server.client(keys["caller"]) as caller:
        for ask in (
            lambda: caller.files.list(),
            lambda: caller.files.create(file=b"x", purpose="fine-tune"),
            lambda: caller.fine_tuning.jobs.list(),
            lambda: caller.fine_tuning.jobs.create(model="m", training_file="f"),
        ):
            with pytest.raises(openai.PermissionDeniedError):
                ask()


def test_files_are_bounded_each_and_together(tenants: tuple[TrainingServer, dict[str, str]]) -> None:
    server, keys = tenants
    large = [{"prompt": "x" * 1700, "completion": "y"}]
    with pytest.raises(openai.APIStatusError) as one:
        server.upload(large * 3, keys["ours"])
    assert one.value.status_code == 413
    server.upload(large * 2, keys["ours"])
    with pytest.raises(openai.RateLimitError, match="bytes"):
        server.upload(large * 2, keys["ours"])
