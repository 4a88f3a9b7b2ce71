"""The committed demo prompts: sound files, complete cards, and a table that says what the cards say."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from tuning.demo.card import Card, CardError, read_card, read_cards, render_readme
from tuning.demo.data import TASK_NAME, build_dataset
from tuning.demo.make import BASE_MODEL_NAME
from tuning.demo.tasks import TASKS

DEMO = Path(__file__).resolve().parents[4] / "demo"
CARDS = read_cards(DEMO)
HIDDEN_SIZE, NUM_LAYERS, KV_HEADS, HEAD_DIM = 576, 30, 3, 64

each_card = pytest.mark.parametrize("card", CARDS.values(), ids=CARDS.keys())


def test_there_are_enough_prompts_of_both_kinds_and_of_several_lengths() -> None:
    assert CARDS.keys() == TASKS.keys()
    assert len(CARDS) >= 8
    methods = [card.method for card in CARDS.values()]
    assert methods.count("PREFIX_TUNING") >= 2
    assert methods.count("PROMPT_TUNING") >= 2
    assert len({card.k for card in CARDS.values()}) >= 3


@each_card
def test_folder_holds_the_two_files_of_peft_and_the_card(card: Card) -> None:
    folder = DEMO / card.task
    names = {"adapter_config.json", "adapter_model.safetensors", "card.json"}
    assert {path.name for path in folder.iterdir()} == names
    assert (folder / "adapter_model.safetensors").stat().st_size <= 500_000


@each_card
def test_configuration_fits_the_embedded_backbone(card: Card) -> None:
    config = json.loads((DEMO / card.task / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"]) == (card.method, "CAUSAL_LM")
    assert config["num_virtual_tokens"] == card.k
    assert config["base_model_name_or_path"] == card.base_model == BASE_MODEL_NAME
    assert config["num_layers"] == NUM_LAYERS
    assert config["token_dim"] == (KV_HEADS * HEAD_DIM if card.method == "PREFIX_TUNING" else HIDDEN_SIZE)
    assert config["inference_mode"] is True


@each_card
def test_tensor_is_finite_and_has_its_shape(card: Card) -> None:
    with safe_open(DEMO / card.task / "adapter_model.safetensors", framework="numpy") as file:
        assert list(file.keys()) == ["prompt_embeddings"]
        values = file.get_tensor("prompt_embeddings")
    if card.method == "PREFIX_TUNING":
        assert (values.dtype, values.shape) == (np.float16, (card.k, NUM_LAYERS * 2 * KV_HEADS * HEAD_DIM))
    else:
        assert (values.dtype, values.shape) == (np.float32, (card.k, HIDDEN_SIZE))
    assert np.isfinite(values).all()
    assert len(np.unique(values, axis=0)) == card.k, "two virtual tokens are the same"


@each_card
def test_card_describes_its_task(card: Card) -> None:
    spec = TASKS[card.task]
    assert TASK_NAME.fullmatch(card.task)
    assert (card.method, card.k, card.init) == (spec.method.upper(), spec.k, spec.init)
    assert (card.description, card.template, card.labels) == (spec.description, spec.template, spec.labels)
    assert (card.num_steps, card.learning_rate) == (spec.num_steps, spec.learning_rate)
    assert card.instruction == spec.instruction
    assert card.train_seconds > 0
    assert 0 < card.final_loss < 5
    assert 1 < card.max_tokens <= 64


@each_card
def test_figures_are_shares_of_the_heldout_items(card: Card) -> None:
    scores = card.exact_match
    for share in (scores.prompt, scores.none, *scores.instruction_forms.values()):
        assert 0 <= share <= 1
        assert share * card.num_heldout == pytest.approx(round(share * card.num_heldout), abs=0.01)
    assert scores.instruction == max(scores.instruction_forms.values())
    assert scores.instruction == scores.instruction_forms[scores.instruction_form]
    assert set(scores.instruction_forms) == {"chat", "chat-examples", "plain-examples"}


@each_card
def test_items_can_be_built_again_and_shown_ones_were_not_trained_on(card: Card) -> None:
    spec = TASKS[card.task]
    if spec.source != card.data_source:
        pytest.skip(f"the figures are of {card.data_source}, installed is {spec.source}")
    dataset = build_dataset(spec, seed=card.seed)
    assert (card.data_digest, card.num_train, card.num_heldout) == (
        dataset.digest,
        len(dataset.train),
        len(dataset.heldout),
    )
    untrained = {spec.prompt_text(item): item.target for item in (*dataset.showcase, *dataset.heldout)}
    assert len(card.examples) >= 2
    for item in card.examples:
        assert untrained[item.prompt] == item.target
    assert card.examples[0].answer == card.examples[0].target, "the line to paste should show a right answer"


def test_table_is_made_of_the_cards() -> None:
    assert (DEMO / "README.md").read_text(encoding="utf-8") == render_readme(DEMO, list(CARDS.values()))


def test_no_file_names_a_path_of_the_machine_that_made_it() -> None:
    for path in (*DEMO.rglob("*.json"), DEMO / "README.md"):
        assert not re.search(r"[\"'\s(]/(?:home|root|tmp|work|Users|mnt)/", path.read_text(encoding="utf-8")), path


def test_card_with_a_missing_or_unknown_field_is_refused(tmp_path: Path) -> None:
    good = json.loads(next(DEMO.glob("*/card.json")).read_text())
    for broken in ({k: v for k, v in good.items() if k != "seed"}, {**good, "surprise": 1}, [good]):
        path = tmp_path / "card.json"
        path.write_text(json.dumps(broken))
        with pytest.raises(CardError, match=r"card\.json"):
            read_card(path)
