"""An engine without a model: a thread that says back, byte by byte, what it was asked.

`EchoEngine` keeps the engine's contract (a real thread, one delivery a step, bounded queue, cancel, drain, failure) so
that HTTP and the runtime are tested on real concurrency in milliseconds. What a row says is a pure function of its
request: see `expected_text`. Prompts are read through the real store, so a corrupt file fails as it would for real.
"""

import json
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from prompt_store.manifest import BackboneShape
from server.engine.norms import describe_norms, norms_of, unit_vectors
from server.engine.request import (
    FINISH_CANCELLED,
    FINISH_LENGTH,
    FINISH_STOP,
    PromptRef,
    RowOutput,
    RowRequest,
    TokenLogprob,
)
from server.engine.text import TextStream
from server.errors import DrainingError, EngineFailedError, PromptmuxError, QueueFullError
from server.metrics import Metrics
from server.runtime.protocols import Deliver, LoadPrompt, Residency
from server.settings import Settings
from tests.byte_tokenizer import BOS_ID, EOS_ID, VOCAB_SIZE, ByteTokenizer

HIDDEN_SIZE = 8


@dataclass(frozen=True)
class EchoNearest:
    token_ids: npt.NDArray[np.int64]
    cosines: npt.NDArray[np.float32]


class EchoVocabulary:
    """Random embeddings, `[VOCAB_SIZE, HIDDEN_SIZE]`, always the same; the nearest are found the plain way."""

    size = VOCAB_SIZE

    def __init__(self) -> None:
        self.embeddings = np.random.default_rng(0).standard_normal((VOCAB_SIZE, HIDDEN_SIZE)).astype(np.float32)
        self.norms = describe_norms(norms_of(self.embeddings))

    def nearest(self, vectors: npt.NDArray[np.float32], top: int) -> EchoNearest:
        cosines = np.einsum("kd,vd->kv", unit_vectors(vectors), unit_vectors(self.embeddings)).astype(np.float32)
        token_ids = np.argsort(-cosines, axis=1)[:, :top]
        return EchoNearest(token_ids, np.take_along_axis(cosines, token_ids, axis=1))


class EchoBackbone:
    name = "tiny/echo"
    fingerprint = "f" * 64
    kernel: Literal["gather"] = "gather"
    quantization: Literal["none"] = "none"
    compiled_state: Literal["off"] = "off"
    compiled_sizes: list[int] = [4, 64]  # noqa: RUF012
    path: Literal["packed", "dense"] = "packed"
    dtype_name = "float32"
    device_name = "cpu"
    vocab_size = VOCAB_SIZE

    def __init__(self, max_model_len: int = 4096) -> None:
        self.max_model_len = max_model_len
        self.tokenizer = ByteTokenizer()
        self.vocabulary = EchoVocabulary()

    def shape(self, max_virtual_tokens: int) -> BackboneShape:
        return BackboneShape(
            name=self.name,
            fingerprint=self.fingerprint,
            hidden_size=HIDDEN_SIZE,
            num_layers=2,
            kv_heads=1,
            head_dim=4,
            dtype="float32",
            max_virtual_tokens=max_virtual_tokens,
            model_type="echo",
        )


def expected_text(row: RowRequest) -> str:
    """All that a row says before it ends by itself: its prompt, its seed if it is not greedy, and the client's text."""
    prompt = row.prompt
    who = f"{prompt.task}@{prompt.version}" if prompt is not None else "bare"
    seed = f"#{row.sampling.seed}" if row.sampling.temperature > 0 else ""
    said = ByteTokenizer().decode(row.token_ids, skip_special_tokens=True)
    return f"[{who}{seed}]{said}"


def expected_logprob(token_id: int) -> float:
    return -(token_id % 7 + 1) / 4


@dataclass
class EchoRow:
    request: RowRequest
    text: TextStream
    ids: tuple[int, ...]
    num_generated: int = 0


@dataclass(frozen=True)
class EchoStatus:
    num_running: int
    num_waiting: int
    kv_usage_ratio: float
    prompts_resident: int
    heartbeat_age_s: float
    usual_step_s: float | None
    failure: str | None


@dataclass
class EchoEngine:
    """`gate` closed holds all rows; `step_s` slows steps down; `hang()` and `crash()` end the loop.

    `errors[text]` ends rows whose client text contains `text` after `error_after` tokens.
    """

    max_waiting_rows: int
    load_prompt: LoadPrompt
    step_s: float = 0.0
    errors: dict[str, PromptmuxError] = field(default_factory=dict)
    error_after: int = 0
    submitted: list[RowRequest] = field(default_factory=list)
    cancelled: set[str] = field(default_factory=set)
    evicted: list[str] = field(default_factory=list)
    pinned: tuple[PromptRef, ...] = ()
    heartbeat_age_s: float = 0.0
    usual_step_s: float | None = None
    stopped: bool = False

    def __post_init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self._changed = threading.Condition()
        self._rows: dict[str, EchoRow] = {}
        self._resident: set[str] = set()
        self._failure: str | None = None
        self._is_draining = False
        self._deliver: Deliver = lambda outputs: None
        self._thread = threading.Thread(target=self._run, name="echo-engine", daemon=True)

    def start(self, deliver: Deliver) -> None:
        self._deliver = deliver
        self._thread.start()

    def submit(self, rows: Sequence[RowRequest]) -> None:
        with self._changed:
            if self._failure is not None:
                raise EngineFailedError(f"the engine has failed: {self._failure}")
            if self._is_draining:
                raise DrainingError("the server is shutting down")
            if len(self._rows) + len(rows) > self.max_waiting_rows:
                raise QueueFullError(f"{len(self._rows)} rows wait already")
            for row in rows:
                self.submitted.append(row)
                self._rows[row.row_id] = self._make_row(row)
            self._changed.notify_all()

    def cancel(self, row_ids: Iterable[str]) -> None:
        with self._changed:
            for row_id in row_ids:
                if row_id in self._rows:
                    self.cancelled.add(row_id)
            self._changed.notify_all()

    def status(self) -> EchoStatus:
        with self._changed:
            return EchoStatus(
                num_running=len(self._rows),
                num_waiting=0,
                kv_usage_ratio=0.5,
                prompts_resident=len(self._resident),
                heartbeat_age_s=self.heartbeat_age_s,
                usual_step_s=self.usual_step_s,
                failure=self._failure,
            )

    def residency(self, prefix_key: str) -> Residency:
        return "device" if prefix_key in self._resident else "store"

    def evict(self, prefix_key: str) -> None:
        self.evicted.append(prefix_key)
        self._resident.discard(prefix_key)

    def pin(self, refs: Sequence[PromptRef]) -> None:
        self.pinned = tuple(refs)

    def set_background(self, work: object) -> None:
        raise AssertionError("an engine without a model trains nothing")

    def start_drain(self) -> None:
        with self._changed:
            self._is_draining = True

    def stop(self, timeout_s: float) -> None:
        with self._changed:
            self._is_draining = self.stopped = True
            self._changed.notify_all()
        self.gate.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
            assert not self._thread.is_alive()

    def crash(self, reason: str, *, silently: bool = False) -> None:
        """The loop ends with an exception; `silently` without telling its rows."""
        with self._changed:
            self._failure = reason
            if silently:
                self._rows.clear()
            self._changed.notify_all()
        self.gate.set()

    def wait_for(self, condition: Callable[["EchoEngine"], bool], timeout_s: float = 5.0) -> None:
        """Blocks the test until `condition` holds; fails it when it does not in time."""
        with self._changed:
            assert self._changed.wait_for(lambda: condition(self), timeout_s), "the engine never got there"

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    def _make_row(self, request: RowRequest) -> EchoRow:
        ids = tuple(expected_text(request).encode("utf-8"))
        sampling = request.sampling
        if not sampling.ignore_eos:
            ids = (*ids, EOS_ID)
        text = TextStream(
            ByteTokenizer(),
            context=request.token_ids,
            stop=sampling.stop,
            skip_special_tokens=sampling.skip_special_tokens,
        )
        return EchoRow(request, text, ids)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._rows) or self.stopped or self._failure is not None)
            if self.stopped or self._failure is not None:
                break
            while not self.gate.wait(0.01):
                self._take_cancelled()
            if self.step_s:
                time.sleep(self.step_s)
            self._step()
        error: PromptmuxError = DrainingError("the server shut down before this row was finished")
        if self._failure is not None:
            error = EngineFailedError(f"the engine has failed: {self._failure}")
        with self._changed:
            left, self._rows = list(self._rows), {}
        self._deliver([RowOutput(row_id=row_id, error=error) for row_id in left])

    def _take_cancelled(self) -> None:
        with self._changed:
            gone = [row_id for row_id in self._rows if row_id in self.cancelled]
            for row_id in gone:
                del self._rows[row_id]
            if gone:
                self._changed.notify_all()
        if gone:
            self._deliver([RowOutput(row_id=row_id, finish_reason=FINISH_CANCELLED) for row_id in gone])

    def _step(self) -> None:
        self._take_cancelled()
        with self._changed:
            rows = list(self._rows.values())
        outputs = [self._advance(row) for row in rows]
        with self._changed:
            for output in outputs:
                if output.is_last:
                    self._rows.pop(output.row_id, None)
            self._changed.notify_all()
        self._deliver(outputs)

    def _advance(self, row: EchoRow) -> RowOutput:
        request, sampling = row.request, row.request.sampling
        try:
            self._check(row)
        except PromptmuxError as error:
            return RowOutput(row_id=request.row_id, error=error)
        prompt_logprobs = None
        if row.num_generated == 0 and sampling.prompt_logprobs is not None:
            entries = (_logprob(i, sampling.prompt_logprobs) for i in request.token_ids[1:])
            prompt_logprobs = (None, *entries)
        if sampling.max_tokens == 0:
            return RowOutput(row_id=request.row_id, prompt_logprobs=prompt_logprobs, finish_reason=FINISH_LENGTH)
        token_id = row.ids[row.num_generated % len(row.ids)]
        row.num_generated += 1
        text, finish_reason, stop_reason = self._end(row, token_id)
        return RowOutput(
            row_id=request.row_id,
            text=text,
            token_ids=(token_id,),
            logprobs=(_logprob(token_id, sampling.logprobs),) if sampling.logprobs is not None else (),
            prompt_logprobs=prompt_logprobs,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
        )

    def _end(self, row: EchoRow, token_id: int) -> tuple[str, str | None, int | str | None]:
        sampling = row.request.sampling
        if token_id == EOS_ID:
            return row.text.finish(), FINISH_STOP, None
        if token_id in sampling.stop_token_ids:
            return row.text.finish(), FINISH_STOP, token_id
        text = row.text.add(token_id)
        if row.text.stopped_by is not None:
            return text, FINISH_STOP, row.text.stopped_by
        if row.num_generated >= sampling.max_tokens:
            return text + row.text.finish(), FINISH_LENGTH, None
        return text, None, None

    def _check(self, row: EchoRow) -> None:
        request = row.request
        if request.prompt is not None and request.prompt.prefix_key not in self._resident:
            self.load_prompt(request.prompt)
            self._resident.add(request.prompt.prefix_key)
        said = ByteTokenizer().decode(request.token_ids, skip_special_tokens=True)
        for text, error in self.errors.items():
            if text in said and row.num_generated >= self.error_after:
                raise error


def _logprob(token_id: int, num_top: int) -> TokenLogprob:
    own = expected_logprob(token_id)
    others = ((token_id + 1 + i) % BOS_ID for i in range(num_top))
    top = ((token_id, own), *((i, own - 1) for i in others)) if num_top else ()
    return TokenLogprob(token_id, own, top)


class EchoServerParts:
    """`load_backbone` and `make_engine` for `create_app`, and the engine that was made."""

    def __init__(self, *, max_model_len: int = 4096) -> None:
        self.backbone = EchoBackbone(max_model_len)
        self.engine: EchoEngine | None = None
        # Closed, it keeps the server in the state `loading`.
        self.load_gate = threading.Event()
        self.load_gate.set()
        self.load_error: Exception | None = None

    def load_backbone(self, settings: Settings) -> EchoBackbone:
        assert self.load_gate.wait(30)
        if self.load_error is not None:
            raise self.load_error
        return self.backbone

    def make_engine(
        self, backbone: object, settings: Settings, metrics: Metrics, load_prompt: LoadPrompt
    ) -> EchoEngine:
        self.engine = EchoEngine(max_waiting_rows=settings.max_waiting_rows, load_prompt=load_prompt)
        return self.engine


def make_prompt_file(value: float = 0.5, *, num_virtual_tokens: int = 4, hidden_size: int = HIDDEN_SIZE) -> bytes:
    """A prompt-tuning file whose numbers are all `value`: another value, another digest."""
    return save({"prompt_embeddings": np.full((num_virtual_tokens, hidden_size), value, dtype=np.float32)})


def make_prompt_config(*, num_virtual_tokens: int = 4, hidden_size: int = HIDDEN_SIZE, **changes: Any) -> bytes:
    config: dict[str, Any] = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": num_virtual_tokens,
        "token_dim": hidden_size,
        "num_transformer_submodules": 1,
        **changes,
    }
    return json.dumps(config).encode()
