"""One architecture, measured: which way it is served, which prompts PEFT makes for it, and how far the engine is off.

A mixed batch of rows with several prompts and with none, ragged, cut into chunks that page and window boundaries cross,
is compared row by row with PEFT's own model and with a batch of one.
"""

import logging
import random
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import PreTrainedModel

from prompt_store.errors import PromptStoreError
from server.engine.backbone import Backbone
from server.engine.checkpoint import BackboneError
from tests.factories import MadePrompt, load_model, read_prompt, save_prompt, save_tiny_backbone
from tests.integration.decoders.architectures import Architecture
from tests.integration.isolation.comparison import largest_difference_from_alone, largest_difference_from_oracle
from tests.integration.isolation.driver import Case
from tests.integration.isolation.oracle import PeftOracle
from tests.integration.isolation.world import MAX_VIRTUAL_TOKENS, World

PROMPTS: dict[str, tuple[str, int]] = {
    "prompt-tuning": ("prompt_tuning", 20),
    "prompt-tuning-short": ("prompt_tuning", 5),
    # Same k as another prompt: what is exchanged between the two has the right shape everywhere.
    "p-tuning": ("p_tuning", 20),
    "prefix": ("prefix", 18),
    "prefix-even": ("prefix", 16),
}
"""Name → kind and k: less than a page of sixteen, exactly one, and more."""

KINDS_OF_PROMPTS = {kind for kind, _ in PROMPTS.values()}

NUM_TOKENS = {"prompt-tuning": 2, "prompt-tuning-short": 23, "p-tuning": 1, "prefix": 30, "prefix-even": 9}
"""The client's tokens of each row with a prompt."""

BARE_NUM_TOKENS = (2, 17, 40)

MAX_TOKENS = 5
PREFILL_CHUNK = 7


@dataclass(slots=True, kw_only=True)
class Measured:
    """What was seen of one architecture. Differences are in nats, the gate's error is relative.

    `checked` are kind → k's of the prompts that were compared, `refused` are kind → who refuses it and why.
    `packed_reason` says why the architecture is not served packed, `failures` where a row is not what it should be.
    """

    architecture: Architecture
    path: str
    packed_reason: str | None = None
    refusal: str | None = None
    gate_error: float = 0.0
    checked: dict[str, list[int]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    from_peft: float = 0.0
    from_alone: float = 0.0
    failures: list[str] = field(default_factory=list)


def measure(architecture: Architecture, folder: Path) -> Measured:
    """Make the architecture's model and prompts under `folder` and compare. Takes about a second."""
    model_folder = save_tiny_backbone(architecture.model_type, folder / "backbone", config_fields=architecture.config)
    with _packed_reasons() as packed_reasons:
        try:
            backbone = Backbone.load(
                str(model_folder), dtype="float32", device="cpu", name=architecture.name.replace(" ", "-")
            )
        except BackboneError as error:
            return Measured(architecture=architecture, path="refused", refusal=str(error))
    measured = Measured(
        architecture=architecture,
        path=backbone.path,
        packed_reason=next(iter(packed_reasons), None),
        gate_error=backbone.gate.error,
    )
    _compare(_make_world(measured, backbone, model_folder, folder), measured)
    return measured


def _make_world(measured: Measured, backbone: Backbone, model_folder: Path, folder: Path) -> World:
    """The backbone with every prompt that PEFT can make for it and run."""
    architecture = measured.architecture
    base = load_model(model_folder)
    shape = backbone.shape(MAX_VIRTUAL_TOKENS)
    prompts: dict[str, MadePrompt] = {}
    for seed, (name, (kind, k)) in enumerate(PROMPTS.items()):
        with warnings.catch_warnings():
            # What PEFT thinks of models that it does not know shows in what it answers.
            warnings.simplefilter("ignore")
            try:
                saved = save_prompt(
                    model_folder,
                    kind,
                    k,
                    folder / name,
                    seed=seed,
                    base=base,
                    prompt_fields=architecture.prompt_fields,
                    **architecture.prefix_fields,
                )
                _run_in_peft(base, saved)
            except Exception as error:
                measured.refused[kind] = f"PEFT fails ({type(error).__name__}: {_first_sentence(error)})"
                continue
        try:
            prompts[name] = read_prompt(name, saved, shape)
        except PromptStoreError as error:
            measured.refused[kind] = f"refused at upload ({_first_sentence(error)})"
            continue
        measured.checked.setdefault(kind, []).append(k)
    return World(architecture.name, model_folder, backbone, prompts, PeftOracle(base, prompts.values()))


def _compare(world: World, measured: Measured) -> None:
    cases = _make_cases(world)
    with world.driver(max_rows=len(cases), max_step_tokens=len(cases) + 6, prefill_chunk=PREFILL_CHUNK) as driver:
        driver.make_resident()
        results = driver.run(cases)
    measured.failures += world.differences(cases, results)
    for case in cases:
        if results[case.row_id].error is None:
            from_peft = largest_difference_from_oracle(case, results[case.row_id], world.oracle)
            from_alone = largest_difference_from_alone(results[case.row_id], world.alone(case))
            measured.from_peft = max(measured.from_peft, from_peft)
            measured.from_alone = max(measured.from_alone, from_alone)


def _make_cases(world: World) -> list[Case]:
    rng = random.Random(world.family)
    wanted: list[tuple[str | None, int]] = [(name, NUM_TOKENS[name]) for name in world.prompts]
    wanted += [(None, num_tokens) for num_tokens in BARE_NUM_TOKENS]
    rng.shuffle(wanted)
    return [
        world.case(rng, f"row-{i}", prompt, num_tokens, max_tokens=MAX_TOKENS)
        for i, (prompt, num_tokens) in enumerate(wanted)
    ]


@contextmanager
def _packed_reasons() -> Iterator[list[str]]:
    """Collects why a backbone is not served packed, which the log says."""
    reasons: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            reasons.extend(re.findall(r"not served packed: (.+)", record.getMessage(), re.DOTALL))

    listener = Listener()
    logger = logging.getLogger("server.engine.backbone")
    logger.addHandler(listener)
    try:
        yield reasons
    finally:
        logger.removeHandler(listener)


def _run_in_peft(base: PreTrainedModel, folder: Path) -> None:
    """Load the prompt back and generate with it. Raises whatever PEFT and transformers raise for what does not fit."""
    model: Any = peft.PeftModel.from_pretrained(base, str(folder)).eval()
    ids = torch.tensor([[5, 6, 7]])
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)


def _first_sentence(error: Exception) -> str:
    return re.split(r"[.;](?:\s|$)|\n", str(error), maxsplit=1)[0]
