"""Makes the demo prompts and measures them: `python -m tuning.demo train|evaluate --backbone DIR`.

Owns the layout of the demo folder: `<task>/adapter_config.json`, `<task>/adapter_model.safetensors` and
`<task>/card.json` (see `tuning.card`), and `README.md`, the table of all cards.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from peft import PeftModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tuning.card import Card, ExactMatch, ShownItem, read_cards, rich_table, write_card, write_table
from tuning.data import Dataset, TaskDataError, TaskSpec, build_dataset
from tuning.evaluate import evaluate_instruction, evaluate_prompt, max_target_tokens
from tuning.tasks import TASKS
from tuning.train import StepReport, TrainConfig, TrainResult, load_backbone, save_prompt, train_prompt

BASE_MODEL_NAME = "SmolLM2-135M-Instruct"
NUM_SHOWN = 3

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
console = Console()

BackboneOption = Annotated[
    Path, typer.Option("--backbone", exists=True, file_okay=False, help="Folder of the frozen model.")
]
OutOption = Annotated[Path, typer.Option("--out", help="Demo folder.")]
TaskOption = Annotated[list[str] | None, typer.Option("--task", help="A task's name; may be repeated. Default: all.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Fixes the split, the start and the order of the batches.")]


@dataclass(frozen=True, slots=True)
class Measurement:
    """What `evaluate` finds out about one prompt."""

    exact_match: ExactMatch
    shown: tuple[ShownItem, ...]


@app.command()
def train(
    backbone: BackboneOption,
    out: OutOption = Path("demo"),
    task: TaskOption = None,
    seed: SeedOption = 0,
    base_model_name: Annotated[
        str, typer.Option(help="What adapter_config.json calls the backbone.")
    ] = BASE_MODEL_NAME,
) -> None:
    """Tune the prompts, save them, measure the saved files, and write their cards and the table."""
    specs = _chosen(task)
    model, tokenizer = load_backbone(backbone)
    for spec in specs:
        dataset = build_dataset(spec, seed=seed)
        config = TrainConfig(seed=seed)
        result = _train_with_progress(spec, dataset, model, tokenizer, config, base_model_name)
        folder = out / spec.name
        # A prefix is k times layers*2*kv_dim numbers, and is halved; an embedding is small enough to stay as trained.
        save_prompt(result.model, folder, dtype=torch.float16 if spec.method == "prefix_tuning" else torch.float32)
        measured = measure(spec, dataset, folder, model, tokenizer, seed=seed)
        card = Card(
            task=spec.name,
            description=spec.description,
            template=spec.template,
            labels=spec.labels,
            method=spec.method.upper(),
            k=spec.k,
            init=spec.init,
            seed=seed,
            num_steps=result.num_steps,
            batch_size=config.batch_size,
            learning_rate=result.learning_rate,
            train_seconds=round(result.seconds, 1),
            final_loss=round(sum(result.losses[-10:]) / len(result.losses[-10:]), 4),
            base_model=base_model_name,
            data_source=spec.source,
            data_digest=dataset.digest,
            num_train=len(dataset.train),
            num_heldout=len(dataset.heldout),
            exact_match=measured.exact_match,
            instruction=spec.instruction,
            max_tokens=_max_tokens(spec, dataset, tokenizer),
            examples=measured.shown,
        )
        write_card(folder, card)
        _print_card(card)
    _finish(out)


@app.command()
def evaluate(
    backbone: BackboneOption,
    out: OutOption = Path("demo"),
    task: TaskOption = None,
) -> None:
    """Measure the saved prompts again, and write the figures into their cards and the table."""
    cards = read_cards(out)
    model, tokenizer = load_backbone(backbone)
    for spec in _chosen(task):
        if spec.name not in cards:
            raise typer.BadParameter(f"{out / spec.name} holds no card.json; train it first", param_hint="--task")
        card = cards[spec.name]
        dataset = build_dataset(spec, seed=card.seed)
        if dataset.digest != card.data_digest:
            # Another version of a data package: its held-out items may have been trained on.
            raise typer.BadParameter(
                f"{spec.name}: {spec.source} gives other items than {card.data_source}", param_hint="--task"
            )
        folder = out / spec.name
        measured = measure(spec, dataset, folder, model, tokenizer, seed=card.seed)
        card = card.replace(exact_match=measured.exact_match, examples=measured.shown)
        write_card(folder, card)
        _print_card(card)
    _finish(out)


def measure(
    spec: TaskSpec,
    dataset: Dataset,
    folder: Path,
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
) -> Measurement:
    """Score the prompt saved in `folder`, and the backbone without it, on the held-out items."""
    with console.status(f"{spec.name}: measuring on {len(dataset.heldout)} held-out items"):
        none = evaluate_prompt(backbone, tokenizer, spec, dataset.heldout)
        forms = evaluate_instruction(backbone, tokenizer, spec, dataset, seed=seed)
        # The file is read back, so that what is measured is what a server will load.
        model = PeftModel.from_pretrained(backbone, str(folder))
        model.eval()
        prompt = evaluate_prompt(model, tokenizer, spec, dataset.heldout)
        # Items picked by hand first, then held-out ones; shown with what the prompt really answers.
        candidates = (*dataset.showcase, *dataset.heldout)[: max(NUM_SHOWN, len(dataset.showcase))]
        answers = evaluate_prompt(model, tokenizer, spec, candidates).answers
    best_form = max(forms, key=lambda form: forms[form].exact_match)
    shown = [
        ShownItem(prompt=spec.prompt_text(item), target=item.target, answer=answer)
        for item, answer in zip(candidates, answers, strict=True)
    ]
    # The first one becomes a line for people to paste: a right answer, if there is one.
    shown.sort(key=lambda item: item.answer != item.target)
    return Measurement(
        exact_match=ExactMatch(
            prompt=round(prompt.exact_match, 4),
            none=round(none.exact_match, 4),
            instruction=round(forms[best_form].exact_match, 4),
            instruction_form=best_form,
            instruction_forms={form: round(score.exact_match, 4) for form, score in sorted(forms.items())},
        ),
        shown=tuple(shown),
    )


def _train_with_progress(
    spec: TaskSpec,
    dataset: Dataset,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainConfig,
    base_model_name: str,
) -> TrainResult:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("{task.fields[rate]:.1f} examples/s"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(spec.name, total=config.num_steps or spec.num_steps, loss=float("nan"), rate=0.0)

        def report(step: StepReport) -> None:
            elapsed = progress.tasks[bar].elapsed or 0.0
            rate = (step.step + 1) * step.num_examples / elapsed if elapsed else 0.0
            progress.update(bar, advance=1, loss=step.loss, rate=rate)

        return train_prompt(
            spec, dataset, model, tokenizer, config=config, base_model_name=base_model_name, report=report
        )


def _max_tokens(spec: TaskSpec, dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> int:
    # One more for the end-of-sequence token, so that an answer ends by itself.
    return max_target_tokens(spec, (*dataset.train, *dataset.heldout, *dataset.showcase), tokenizer) + 1


def _chosen(names: Sequence[str] | None) -> list[TaskSpec]:
    unknown = sorted(set(names or ()) - TASKS.keys())
    if unknown:
        raise typer.BadParameter(f"unknown: {', '.join(unknown)}; there are {', '.join(TASKS)}", param_hint="--task")
    return [TASKS[name] for name in names] if names else list(TASKS.values())


def _print_card(card: Card) -> None:
    scores = card.exact_match
    console.print(
        f"{card.task}: exact match on {card.num_heldout} held-out items {scores.prompt:.2f} with the prompt, "
        f"{scores.none:.2f} without, {scores.instruction:.2f} with an instruction ({scores.instruction_form})"
    )


def _finish(out: Path) -> None:
    cards = list(read_cards(out).values())
    write_table(out, cards)
    console.print(rich_table(cards))


def main() -> None:
    try:
        app()
    except TaskDataError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
