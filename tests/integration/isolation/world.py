"""A backbone, prompts of every kind for it, and their oracle; and the rows to ask of them."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server.engine.backbone import Backbone
from tests.factories import CONFIGS, PREFIX_OVERRIDES, TEST_DEVICE, MadePrompt, load_model, read_prompt, save_prompt
from tests.integration.isolation.comparison import differences_from_alone, differences_from_oracle
from tests.integration.isolation.driver import Case, EngineDriver, RowResult
from tests.integration.isolation.oracle import PeftOracle

MAX_VIRTUAL_TOKENS = 256

PACKED = tuple(family for family in CONFIGS if family not in ("gptj", "bloom", "falcon"))
DENSE = ("gptj", "bloom", "falcon")

PROMPTS: dict[str, tuple[str, int]] = {
    "prompt-tuning": ("prompt_tuning", 20),
    "p-tuning": ("p_tuning", 7),
    "cpt": ("cpt", 5),
    "multitask": ("multitask", 12),
    "prefix": ("prefix", 9),
    "prefix-projection": ("prefix_projection", 3),
    "cartridge": ("cartridge", 16),
    "one-vector": ("prompt_tuning", 1),
    # Longer than the smallest slot: rows of two capacities share a step.
    "long": ("prompt_tuning", 140),
    "long-prefix": ("prefix", 131),
    # Same k as another prompt: what is exchanged between the two has the right shape everywhere.
    "twin": ("p_tuning", 20),
    "prefix-twin": ("prefix", 9),
}
"""Name → kind and k. The multi-task file is read as two prompts, `multitask-0` and `multitask-2`."""

TWINS = (("prompt-tuning", "twin"), ("prefix", "prefix-twin"), ("multitask-0", "multitask-2"))


@dataclass(slots=True)
class World:
    """One family's backbone with everything the tests compare."""

    family: str
    folder: Path
    backbone: Backbone
    prompts: dict[str, MadePrompt]
    oracle: PeftOracle
    _alone: dict[tuple[Any, ...], RowResult] = field(default_factory=dict)

    def driver(self, **config: Any) -> EngineDriver:
        return EngineDriver(self.backbone, self.prompts, **config)

    def alone(self, case: Case) -> RowResult:
        """The row as a batch of one, in an engine of its own that never held another row."""
        key = (case.prompt, case.token_ids, case.max_tokens, case.temperature, case.seed)
        if key not in self._alone:
            with self.driver() as driver:
                self._alone[key] = driver.run_alone(case)
        return self._alone[key]

    def differences(self, cases: Sequence[Case], results: dict[str, RowResult]) -> list[str]:
        """Of every row from PEFT and from its batch of one."""
        found = []
        for case in cases:
            found += differences_from_oracle(case, results[case.row_id], self.oracle)
            found += differences_from_alone(case, results[case.row_id], self.alone(case), self.oracle)
        return found

    def cases(self, seed: int, *, max_tokens: int = 8) -> list[Case]:
        """A mixed batch in random order: every prompt, some of them twice, rows with none, ragged client tokens."""
        rng = random.Random(seed)
        names: list[str | None] = [*self.prompts, "prefix", "prompt-tuning", None, None]
        rng.shuffle(names)
        lengths = [1, 2, *(rng.randint(3, 40) for _ in names[2:])]
        rng.shuffle(lengths)
        cases = [
            self.case(rng, f"{seed}-{i}", name, length, max_tokens=rng.randint(1, max_tokens))
            for i, (name, length) in enumerate(zip(names, lengths, strict=True))
        ]
        return [*cases, self.case(rng, f"{seed}-long", None, 150, max_tokens=max_tokens)]

    def case(self, rng: random.Random, row_id: str, prompt: str | None, length: int, **fields: Any) -> Case:
        token_ids = tuple(rng.randrange(4, self.backbone.vocab_size) for _ in range(length))
        return Case(row_id=row_id, prompt=prompt, token_ids=token_ids, **fields)


def make_world(
    family: str,
    model_folder: Path,
    folder: Path,
    *,
    scale: float = 0.5,
    first_text: Sequence[int] = (),
    trained: Iterable[Path] = (),
) -> World:
    """Load the backbone and let PEFT make and save every prompt under `folder`: see `save_prompt`.

    `trained` are folders of prompts that exist already; each goes by its folder's name.
    """
    backbone = Backbone.load(str(model_folder), dtype="float32", device=TEST_DEVICE)
    # Where bits do not matter, so that prompts that share a pass are put to every test.
    backbone.prefixes_share_passes = backbone.path == "packed"
    base = load_model(model_folder)
    shape = backbone.shape(MAX_VIRTUAL_TOKENS)
    prompts = {ready.name: read_prompt(ready.name, ready, shape) for ready in trained}
    for seed, (name, (kind, k)) in enumerate(PROMPTS.items()):
        overrides = PREFIX_OVERRIDES.get(family, {})
        saved = save_prompt(
            model_folder,
            kind,
            k,
            folder / name,
            seed=seed,
            scale=scale,
            base=base,
            first_text=first_text[seed:],
            **overrides,
        )
        task_indices = (0, 2) if kind == "multitask" else (None,)
        for task_index in task_indices:
            prompt_name = name if task_index is None else f"{name}-{task_index}"
            prompts[prompt_name] = read_prompt(prompt_name, saved, shape, task_index=task_index)
    return World(family, model_folder, backbone, prompts, PeftOracle(base, prompts.values()))
