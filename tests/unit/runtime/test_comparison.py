"""Comparison over a real engine and prompts that PEFT made, compared with one row at a time by the reference.

A tiny random backbone says nothing sensible, but always the same.
"""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import torch

from prompt_store.manifest import PromptVersion
from server.app import make_engine_config
from server.engine.backbone import Backbone
from server.engine.engine import Engine
from server.engine.own_thread import run_in_own_thread
from server.metrics import Metrics
from server.runtime.answers import Question, is_expected, tokenize_questions
from server.runtime.comparison import compare
from server.runtime.service import Runtime
from server.runtime.tasks import PromptUpload
from server.settings import Settings
from server.tenancy.keys import LOCAL_CALLER
from tests.factories import save_prompt

MAX_TOKENS = 6
TEXTS = [("ab", "cd"), ("q", "x"), ("long text", "!"), ("z", None)]


@pytest.fixture(scope="module")
def backbone(tiny_backbone_folder: Callable[[str], Path]) -> Backbone:
    return Backbone.load(str(tiny_backbone_folder("llama")), dtype="float32", device="cpu", max_model_len=128)


@pytest.fixture(scope="module")
def folders(tiny_backbone_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    made = tmp_path_factory.mktemp("prompts")
    folder = tiny_backbone_folder("llama")
    return [save_prompt(folder, "prompt_tuning", 4, made / str(seed), seed=seed) for seed in (1, 2)]


def serve(data_dir: Path, backbone: Backbone, body: Callable[[Runtime], Awaitable[None]]) -> None:
    async def main() -> None:
        runtime = Runtime(
            Settings(data_dir=data_dir, text_cache="off", audit_share=0.0),
            Metrics(),
            load_backbone=lambda settings: backbone,
            make_engine=lambda _, settings, metrics, load_prompt: Engine(
                backbone, make_engine_config(settings), metrics, load_prompt
            ),
        )
        await runtime.start()
        await asyncio.wait_for(runtime.wait_until_settled(), 30)
        assert runtime.failure is None
        try:
            await body(runtime)
        finally:
            await runtime.stop()

    asyncio.run(main())


async def upload(runtime: Runtime, folder: Path) -> PromptVersion:
    sent = PromptUpload(
        task="tiny",
        file=(folder / "adapter_model.safetensors").read_bytes(),
        config=(folder / "adapter_config.json").read_bytes(),
    )
    view, _ = await runtime.call(runtime.parts.tasks.upload, LOCAL_CALLER, sent)
    return view.version


def oracle(
    backbone: Backbone, vectors: torch.Tensor | None, question: Question, max_tokens: int
) -> tuple[str, float | None]:
    """The greedy answer and the completion's log-likelihood, one token and one row at a time."""
    ids = list(question.prompt_ids)
    for _ in range(max_tokens):
        following = int(backbone.reference(ids, vectors=vectors)[-1].argmax())
        if following in backbone.eos_token_ids:
            break
        ids.append(following)
    text = backbone.tokenizer.decode(ids[len(question.prompt_ids) :], skip_special_tokens=True)
    if question.completion is None:
        return text, None
    whole = [*question.prompt_ids, *question.completion_ids]
    log_probs = backbone.reference(whole, vectors=vectors).float().log_softmax(-1)[-len(whole) :]
    start = len(question.prompt_ids)
    return text, sum(float(log_probs[place - 1, whole[place]]) for place in range(start, len(whole)))


def test_figures_are_those_of_each_version_asked_alone(tmp_path: Path, backbone: Backbone, folders: list[Path]) -> None:
    async def body(runtime: Runtime) -> None:
        first, second = [await upload(runtime, folder) for folder in folders]
        questions = tokenize_questions(TEXTS, runtime.parts.codec, max_model_len=4096, param="inputs")
        vectors = [
            torch.from_numpy((await runtime.call(runtime.parts.tasks.read_prompt, version)).values)
            for version in (first, second)
        ]
        expected = run_in_own_thread(
            lambda: [[oracle(backbone, one, question, MAX_TOKENS) for question in questions] for one in vectors]
        )

        found = await compare(
            runtime,
            LOCAL_CALLER,
            (f"tiny@{first.version}", f"tiny@{second.version}"),
            questions,
            max_tokens=MAX_TOKENS,
            param="inputs",
        )

        different = [i for i in range(len(TEXTS)) if expected[0][i][0] != expected[1][i][0]]
        assert different, "the two must be told apart"
        assert [shown.index for shown in found.differences] == different
        assert [shown.answers for shown in found.differences] == [
            (expected[0][i][0], expected[1][i][0]) for i in different
        ]
        assert found.agreement == 1 - len(different) / len(TEXTS)
        means = [sum(score for _, score in of if score is not None) / 3 for of in expected]
        assert found.num_scored == 3
        assert found.logprobs == pytest.approx(means, abs=1e-3)
        assert found.exact_match == tuple(
            sum(is_expected(of[i][0], TEXTS[i][1] or "") for i in range(3)) / 3 for of in expected
        )

    serve(tmp_path / "data", backbone, body)
