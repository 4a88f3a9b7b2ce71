"""Random lives of an engine, with rows submitted and cancelled, prompts pinned, deleted and rolled out meanwhile.

Every row that finishes has the tokens of its batch of one, and nothing of it is left behind.
"""

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from server.engine.backbone import Backbone
from server.engine.kv import KeysValues
from server.engine.request import FINISH_CANCELLED, FINISH_LENGTH, FINISH_STOP, PromptRef
from tests.unit.engine.prompts import make_prompt, make_ref
from tests.unit.engine.stepped import SteppedEngine, make_request

pytestmark = pytest.mark.usefixtures("each_way")

MAX_TOKENS = 5

VERSIONS: dict[str, list[PromptRef]] = {
    "short": [make_ref(f"short-{v}", k=3, task="short", version=v) for v in (1, 2, 3)],
    "prefix": [make_ref(f"prefix-{v}", k=3, kind="prefix", task="prefix", version=v) for v in (1, 2)],
    # Several shared pages and a tail.
    "long": [make_ref("long-1", k=140, task="long")],
}
"""Tasks and their versions. Versions 1 and 2 of `short` and both of `prefix` have one k: confusion fits everywhere."""

TEXTS = ((5,), (9, 8, 7, 6), tuple(range(20, 51)), tuple(range(20, 110)))


class EngineLife(RuleBasedStateMachine):
    """`expected` are each row's tokens if nobody cancels it; `alone` those of every possible row as a batch of one.

    Some rows end before their length, which nobody knows a step ahead; some must have their tokens known.
    """

    backbone: Backbone
    alone: dict[tuple[str | None, int], tuple[int, ...]]

    @initialize(
        rows_of_room=st.integers(1, 3),
        prefix_tokens=st.sampled_from([18 * 16, 400, 1000]),
        keeps_texts=st.booleans(),
        is_deterministic=st.booleans(),
        max_rows=st.integers(1, 5),
        chunk=st.integers(3, 40),
    )
    def start(
        self,
        rows_of_room: int,
        prefix_tokens: int,
        keeps_texts: bool,
        is_deterministic: bool,
        max_rows: int,
        chunk: int,
    ) -> None:
        per_token = self.backbone.bytes_per_token
        self.stepped = SteppedEngine(
            self.backbone,
            {
                ref.prefix_key: make_prompt(self.backbone, ref, seed=seed)
                for seed, ref in enumerate(ref for refs in VERSIONS.values() for ref in refs)
            },
            kv_cache_bytes=rows_of_room * self.backbone.max_model_len * per_token,
            prefix_cache_bytes=prefix_tokens * per_token,
            max_virtual_tokens=144,
            host_prompt_bytes=2000,
            keeps_texts=keeps_texts,
            is_deterministic=is_deterministic,
            max_rows=max_rows,
            max_step_tokens=max(max_rows + 20, chunk),
            prefill_chunk=chunk,
            max_waiting_rows=1000,
        )
        self.active = {task: refs[0] for task, refs in VERSIONS.items()}
        self.expected: dict[str, tuple[int, ...]] = {}
        self.cancelled: set[str] = set()

    @rule(
        task=st.sampled_from([None, *VERSIONS]),
        text=st.integers(0, len(TEXTS) - 1),
        max_tokens=st.integers(1, MAX_TOKENS),
        tenant=st.sampled_from("ab"),
        copies=st.integers(1, 3),
        stops_at=st.none() | st.integers(0, MAX_TOKENS - 1),
        is_penalised=st.booleans(),
    )
    def submit(
        self,
        task: str | None,
        text: int,
        max_tokens: int,
        tenant: str,
        copies: int,
        stops_at: int | None,
        is_penalised: bool,
    ) -> None:
        prompt = self.active[task] if task is not None else None
        tokens = self.alone[prompt.prefix_key if prompt is not None else None, text]
        fields: dict[str, Any] = {"max_tokens": max_tokens, "tenant": tenant}
        if stops_at is not None:
            fields["stop_token_ids"] = (tokens[stops_at],)
            tokens = tokens[: tokens.index(tokens[stops_at]) + 1]
        if is_penalised:
            fields["presence_penalty"] = 1e-9  # asks for the tokens, and changes none
        requests = []
        for _ in range(copies):
            row_id = f"row-{len(self.expected)}"
            self.expected[row_id] = tokens[:max_tokens]
            requests.append(make_request(row_id, TEXTS[text], prompt, **fields))
        self.stepped.submit(*requests)

    @rule(times=st.integers(1, 3), load=st.booleans())
    def step(self, times: int, load: bool) -> None:
        for _ in range(times):
            self.stepped.turn(load=load)

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        row_id = data.draw(st.sampled_from(sorted(self.expected)))
        self.stepped.engine.cancel([row_id, "nobody"])
        self.cancelled.add(row_id)

    @rule(task=st.sampled_from([*VERSIONS]))
    def roll_out_the_next_version(self, task: str) -> None:
        versions = VERSIONS[task]
        self.active[task] = versions[self.active[task].version % len(versions)]

    @rule(task=st.sampled_from([*VERSIONS]), index=st.integers(0, 2))
    def evict(self, task: str, index: int) -> None:
        versions = VERSIONS[task]
        self.stepped.engine.evict(versions[index % len(versions)].prefix_key)

    @rule(tasks=st.sets(st.sampled_from([*VERSIONS])))
    def pin(self, tasks: set[str]) -> None:
        self.stepped.engine.pin([self.active[task] for task in sorted(tasks)])

    @invariant()
    def tokens_so_far_are_those_of_the_batch_of_one(self) -> None:
        if not hasattr(self, "stepped"):
            return
        self.stepped.engine.check_invariants()
        for row_id, expected in self.expected.items():
            tokens = self.stepped.tokens(row_id)
            assert tokens == expected[: len(tokens)], f"row {row_id} has another's tokens"

    def teardown(self) -> None:
        if not hasattr(self, "stepped"):
            return
        self.stepped.finish()
        for row_id, expected in self.expected.items():
            result = self.stepped.result(row_id)
            assert result.error is None
            if result.finish_reason == FINISH_CANCELLED:
                assert row_id in self.cancelled
            else:
                assert result.finish_reason in (FINISH_LENGTH, FINISH_STOP)
                assert result.token_ids == expected
        assert self.stepped.is_idle()
        assert self.stepped.count("isolation_violations_total") == 0
        assert self.stepped.count("isolation_checks_total") >= sum(
            bool(self.stepped.tokens(row_id)) for row_id in self.expected
        )


def tokens_alone(backbone: Backbone) -> dict[tuple[str | None, int], tuple[int, ...]]:
    """Each possible row alone, by the model's own attention: no engine, no slot, no plan."""
    found: dict[tuple[str | None, int], tuple[int, ...]] = {}
    refs: list[PromptRef | None] = [None, *(ref for refs in VERSIONS.values() for ref in refs)]
    for seed, ref in enumerate(refs, start=-1):
        vectors, prefix = None, None
        if ref is not None:
            values = torch.from_numpy(make_prompt(backbone, ref, seed=seed).values)
            if ref.kind == "embeddings":
                vectors = values
            else:
                prefix = KeysValues(tuple(layer[0] for layer in values), tuple(layer[1] for layer in values))
        for text, token_ids in enumerate(TEXTS):
            ids = list(token_ids)
            for _ in range(MAX_TOKENS):
                ids.append(int(backbone.reference(ids, vectors=vectors, prefix=prefix)[-1].argmax()))
            found[ref.prefix_key if ref is not None else None, text] = tuple(ids[len(token_ids) :])
    return found


def test_rows_finish_with_the_tokens_of_their_batch_of_one_in_any_life_of_the_engine(llama: Backbone) -> None:
    alone = tokens_alone(llama)
    assert len({tokens for (_, text), tokens in alone.items() if text == 1}) == 7, "prompts must tell rows apart"
    EngineLife.backbone, EngineLife.alone = llama, alone
    run_state_machine_as_test(
        EngineLife,
        settings=settings(
            max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
        ),
    )
