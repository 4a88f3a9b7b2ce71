"""The audit of finished rows. The oracle is a plain transformers model that is given real tokens as its prompt.

A prompt whose vectors are the embeddings of real tokens, or whose keys and values are those that the model computed for
real tokens, must answer as the model does with these tokens in front.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from prompt_store.manifest import SoftPrompt
from server.engine.audit import MAX_PENDING, TOLERANCE_NATS, Auditor, AuditResult
from server.engine.backbone import Backbone
from server.engine.request import PromptRef, RowRequest, SamplingParams
from server.engine.row import Row
from server.engine.text import TextStream
from server.metrics import Metrics
from tests.factories import load_model

PROMPT_TOKENS = (11, 70, 23, 5, 99)
OTHER_TOKENS = (64, 3, 3, 120, 8)
CLIENT_TOKENS = (40, 41, 60)
TOLERANCE = TOLERANCE_NATS[torch.float32]


@pytest.fixture(scope="module")
def model(tiny_backbone_folder: Callable[[str], Path]) -> PreTrainedModel:
    return load_model(tiny_backbone_folder("llama"))


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def auditor(llama: Backbone, metrics: Metrics) -> Auditor:
    return Auditor(llama, 1.0, metrics)


def num_audits(metrics: Metrics, result: str) -> float | None:
    return metrics.registry.get_sample_value("promptmux_isolation_audits_total", {"result": result})


def make_ref(kind: str = "embeddings", key: str = "d1") -> PromptRef:
    return PromptRef(
        tenant="default",
        task="task",
        version=1,
        digest=key,
        prefix_key=key,
        kind=kind,
        num_virtual_tokens=len(PROMPT_TOKENS),
    )


@torch.inference_mode()
def make_prompt(model: PreTrainedModel, token_ids: Sequence[int], kind: str) -> SoftPrompt:
    ids = torch.tensor([token_ids])
    if kind == "embeddings":
        return SoftPrompt(kind="embeddings", values=model.get_input_embeddings()(ids)[0].numpy())
    cache: Any = DynamicCache()
    model(ids, past_key_values=cache, use_cache=True)
    layers = [np.stack([layer.keys[0].numpy(), layer.values[0].numpy()]) for layer in cache.layers]
    return SoftPrompt(kind="prefix", values=np.stack(layers))


@torch.inference_mode()
def finished_row(
    model: PreTrainedModel,
    ref: PromptRef | None,
    prompt_tokens: Sequence[int],
    *,
    row_id: str = "row",
    num_new: int = 6,
) -> Row:
    """A row as the engine leaves it when it was answered by the model with `prompt_tokens` in front."""
    request = RowRequest(
        row_id=row_id,
        tenant="default",
        token_ids=CLIENT_TOKENS,
        prompt=ref,
        sampling=SamplingParams(max_tokens=num_new),
    )
    stream = TextStream(None, context=(), stop=(), skip_special_tokens=True)  # type: ignore[arg-type]
    row = Row(request=request, serial=1, arrived_at_s=0.0, text=stream, is_audited=True)
    for _ in range(num_new):
        logprobs = model(torch.tensor([[*prompt_tokens, *row.token_ids]])).logits[0, -1].log_softmax(-1)
        # The third best, so that the replay is not only right about the obvious.
        token_id = int(logprobs.argsort(descending=True)[2])
        row.token_ids.append(token_id)
        row.audit_logprobs.append(float(logprobs[token_id]))
    return row


def audit(auditor: Auditor, row: Row, prompt: SoftPrompt | None) -> AuditResult:
    ref = auditor.add(row)
    assert ref == row.request.prompt
    if ref is not None:
        assert auditor.num_ready == 0
        auditor.supply(ref, prompt)
    assert auditor.num_ready == 1
    result = auditor.run_one()
    assert result is not None
    assert result is auditor.last_result
    assert auditor.num_pending == 0
    return result


@pytest.mark.parametrize("kind", ["embeddings", "prefix", None])
def test_row_that_was_answered_by_its_own_prompt_passes(
    model: PreTrainedModel, auditor: Auditor, metrics: Metrics, kind: str | None
) -> None:
    prompt = make_prompt(model, PROMPT_TOKENS, kind) if kind is not None else None
    row = finished_row(model, make_ref(kind) if kind is not None else None, PROMPT_TOKENS if kind is not None else ())
    result = audit(auditor, row, prompt)

    assert result.passed
    assert result.difference_nats < 1e-4
    assert (num_audits(metrics, "match"), num_audits(metrics, "mismatch")) == (1.0, 0.0)


@pytest.mark.parametrize("kind", ["embeddings", "prefix"])
@pytest.mark.parametrize("answered_by", [OTHER_TOKENS, (), (*PROMPT_TOKENS[:-1], 98), PROMPT_TOKENS[:-1]])
def test_row_that_was_answered_by_another_prompt_fails_and_is_reported(
    model: PreTrainedModel,
    auditor: Auditor,
    metrics: Metrics,
    kind: str,
    answered_by: tuple[int, ...],
    caplog: pytest.LogCaptureFixture,
) -> None:
    row = finished_row(model, make_ref(kind), answered_by, row_id="row-17")
    result = audit(auditor, row, make_prompt(model, PROMPT_TOKENS, kind))

    assert not result.passed
    assert result.difference_nats > 10 * TOLERANCE
    assert (num_audits(metrics, "match"), num_audits(metrics, "mismatch")) == (0.0, 1.0)
    (record,) = caplog.records
    assert record.levelname == "CRITICAL"
    assert "row-17" in record.getMessage()
    assert "d1" in record.getMessage()


def test_bare_row_that_was_given_a_prompt_fails(model: PreTrainedModel, auditor: Auditor) -> None:
    assert not audit(auditor, finished_row(model, None, PROMPT_TOKENS), None).passed


def test_one_wrong_token_among_many_fails(model: PreTrainedModel, auditor: Auditor) -> None:
    row = finished_row(model, None, (), num_new=12)
    row.audit_logprobs[7] += 13 * TOLERANCE

    assert not audit(auditor, row, None).passed


def test_rounding_passes(model: PreTrainedModel, auditor: Auditor) -> None:
    row = finished_row(model, None, ())
    row.audit_logprobs = [value + TOLERANCE / 2 * (-1) ** i for i, value in enumerate(row.audit_logprobs)]

    assert audit(auditor, row, None).passed


def test_differences_do_not_cancel_out(model: PreTrainedModel, auditor: Auditor) -> None:
    row = finished_row(model, None, ())
    row.audit_logprobs = [value + 2 * TOLERANCE * (-1) ** i for i, value in enumerate(row.audit_logprobs)]

    assert not audit(auditor, row, None).passed


def test_recorded_value_that_is_not_a_number_fails(model: PreTrainedModel, auditor: Auditor) -> None:
    row = finished_row(model, None, ())
    row.audit_logprobs[-1] = math.nan

    assert not audit(auditor, row, None).passed


def test_rows_wait_for_their_own_prompt(model: PreTrainedModel, auditor: Auditor, metrics: Metrics) -> None:
    prompts = {"d1": PROMPT_TOKENS, "d2": OTHER_TOKENS}
    refs = {key: make_ref(key=key) for key in prompts}
    for row_id, key in [("a", "d1"), ("b", "d2"), ("c", "d1")]:
        auditor.add(finished_row(model, refs[key], prompts[key], row_id=row_id))
    assert auditor.run_one() is None

    auditor.supply(refs["d2"], make_prompt(model, prompts["d2"], "embeddings"))
    assert (auditor.num_ready, auditor.num_pending) == (1, 3)
    auditor.supply(refs["d1"], make_prompt(model, prompts["d1"], "embeddings"))
    results = [auditor.run_one() for _ in range(3)]

    assert [r.job.row_id for r in results if r is not None] == ["b", "a", "c"]
    assert all(r is not None and r.passed for r in results)
    assert auditor.run_one() is None
    assert num_audits(metrics, "match") == 3.0


def test_row_whose_prompt_was_deleted_is_counted_as_skipped(
    model: PreTrainedModel, auditor: Auditor, metrics: Metrics
) -> None:
    ref = auditor.add(finished_row(model, make_ref(), PROMPT_TOKENS))
    assert ref is not None
    auditor.supply(ref, None)

    assert auditor.num_pending == 0
    assert auditor.run_one() is None
    assert num_audits(metrics, "skipped") == 1.0


def test_replay_that_cannot_be_run_is_counted_and_ends_nothing_else(
    model: PreTrainedModel, auditor: Auditor, metrics: Metrics
) -> None:
    row = finished_row(model, make_ref(), PROMPT_TOKENS)
    ref = auditor.add(row)
    assert ref is not None
    auditor.supply(ref, SoftPrompt(kind="embeddings", values=np.zeros((5, 3), dtype=np.float32)))

    assert auditor.run_one() is None
    assert num_audits(metrics, "error") == 1
    assert num_audits(metrics, "mismatch") == 0


def test_rows_beyond_the_limit_are_counted_as_skipped(
    model: PreTrainedModel, auditor: Auditor, metrics: Metrics
) -> None:
    row = finished_row(model, make_ref(), PROMPT_TOKENS, num_new=1)
    asked = [auditor.add(row) for _ in range(MAX_PENDING + 3)]

    assert asked.count(None) == 3
    assert auditor.num_pending == MAX_PENDING
    assert num_audits(metrics, "skipped") == 3.0


def test_row_without_recorded_values_is_not_audited(model: PreTrainedModel, auditor: Auditor) -> None:
    row = finished_row(model, None, (), num_new=0)

    assert auditor.add(row) is None
    assert auditor.num_pending == 0


def test_job_keeps_its_numbers_when_the_row_goes_on(model: PreTrainedModel, auditor: Auditor) -> None:
    row = finished_row(model, None, ())
    auditor.add(row)
    row.token_ids.append(1)
    row.audit_logprobs.append(0.0)
    result = auditor.run_one()

    assert result is not None
    assert result.passed


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_share_of_rows_is_selected_by_their_ids(llama: Backbone, share: float) -> None:
    auditor = Auditor(llama, share, Metrics())
    selected = [auditor.selects(f"cmpl-{i:x}-0") for i in range(4000)]

    assert sum(selected) / len(selected) == pytest.approx(share, abs=0.025)
    assert selected == [auditor.selects(f"cmpl-{i:x}-0") for i in range(4000)]


def test_replay_leaves_the_backbone_as_it_was(model: PreTrainedModel, llama: Backbone, auditor: Auditor) -> None:
    before = llama.model.config._attn_implementation
    audit(auditor, finished_row(model, None, ()), None)

    assert llama.model.config._attn_implementation == before


def test_replay_does_not_trust_the_rows_reference_to_the_prompt(model: PreTrainedModel, auditor: Auditor) -> None:
    """The file that the store gives decides, not what the row says of its prompt's kind."""
    row = finished_row(model, replace(make_ref(), kind="prefix"), PROMPT_TOKENS)

    assert audit(auditor, row, make_prompt(model, PROMPT_TOKENS, "embeddings")).passed
