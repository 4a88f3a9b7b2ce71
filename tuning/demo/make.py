"""Makes the demo prompts and measures them: `python -m tuning.demo train|evaluate --backbone DIR`.

Owns the layout of the demo folder: `<task>/adapter_config.json`, `<task>/adapter_model.safetensors` and
`<task>/card.json` (see `tuning.demo.card`), and `README.md`, the table of all cards.
"""

import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import PeftConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tuning.config import RunConfig, TrainConfig
from tuning.demo.card import Card, ExactMatch, ShownItem, read_cards, rich_table, write_card, write_table
from tuning.demo.data import Dataset, TaskDataError, TaskSpec, build_dataset, worked_examples
from tuning.demo.evaluate import evaluate_instruction, evaluate_prompt, max_target_tokens
from tuning.demo.tasks import TASKS
from tuning.encoding import encode_examples, encode_label
from tuning.examples import Example
from tuning.methods import save_peft_files
from tuning.prefixes import PROMPT_FILE, load_prefix
from tuning.records import TrainedPrompt, TrainEvent, TrainTask, TuningError
from tuning.trainer import Trainer

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
    datasets = {spec.name: build_dataset(spec, seed=seed) for spec in specs}
    tasks = [train_task(spec, datasets[spec.name], tokenizer, seed=seed) for spec in specs]
    with tempfile.TemporaryDirectory(prefix="promptmux-demo-") as made:
        results = _train_with_progress(tasks, model, tokenizer, Path(made), base_model_name)
        for spec, trained in zip(specs, tasks, strict=True):
            _save(spec, results[spec.name], out / spec.name)
            dataset, config, result = datasets[spec.name], trained.config, results[spec.name]
            measured = measure(spec, dataset, out / spec.name, model, tokenizer, seed=seed)
            losses = [point.loss for point in result.history[-10:]]
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
                learning_rate=config.usual_learning_rate,
                train_seconds=round(result.seconds, 1),
                final_loss=round(sum(losses) / len(losses), 4),
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
            write_card(out / spec.name, card)
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
        none = evaluate_prompt(backbone, tokenizer, None, spec, dataset.heldout)
        forms = evaluate_instruction(backbone, tokenizer, spec, dataset, seed=seed)
        # The file is read back, so that what is measured is what a server will load.
        prefix = load_prefix(folder, backbone, base_model_name=BASE_MODEL_NAME)
        prompt = evaluate_prompt(backbone, tokenizer, prefix, spec, dataset.heldout)
        # Items picked by hand first, then held-out ones; shown with what the prompt really answers.
        candidates = (*dataset.showcase, *dataset.heldout)[: max(NUM_SHOWN, len(dataset.showcase))]
        answers = evaluate_prompt(backbone, tokenizer, prefix, spec, candidates).answers
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


def load_backbone(folder: Path, *, dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a backbone folder frozen and in eval mode; bf16 where this CPU has the instructions, else fp32."""
    if dtype is None:
        has_bf16 = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()
        dtype = torch.bfloat16 if has_bf16 else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True)
    model.requires_grad_(False).eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), AutoTokenizer.from_pretrained(folder)


def train_task(spec: TaskSpec, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> TrainTask:
    """The demo's recipe of one prompt, as the trainer takes it. A prefix is trained as it is, without an MLP."""
    init_text = None
    if spec.init == "text":
        # Each item yields at least two tokens, so k items always fill k virtual tokens.
        rng = random.Random(f"{seed}:{spec.name}:text")  # noqa: S311 - a reproducible choice, not a secret
        init_text = worked_examples(spec, rng.sample(dataset.train, min(spec.k, len(dataset.train))))
    config = TrainConfig(
        method="prompt_tuning" if spec.method == "prompt_tuning" else "p_tuning_v2",
        num_virtual_tokens=spec.k,
        init=spec.init,
        init_text=init_text,
        num_steps=spec.num_steps,
        learning_rate=spec.learning_rate,
        seed=seed,
    )
    examples = [Example(spec.prompt_text(item), spec.completion_text(item)) for item in dataset.train]
    return TrainTask(
        name=spec.name,
        config=config,
        train=encode_examples(examples, tokenizer),
        label_ids=[encode_label(label, tokenizer) for label in spec.labels or ()],
    )


def _train_with_progress(
    tasks: Sequence[TrainTask],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    base_model_name: str,
) -> dict[str, TrainedPrompt]:
    """All prompts in one run. Raises TuningError when one of them fails."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bars: dict[str, TaskID] = {
            task.name: progress.add_task(task.name, total=task.config.num_steps, loss=float("nan")) for task in tasks
        }

        def show(event: TrainEvent) -> None:
            if event.kind == "step":
                progress.update(bars[event.task], completed=event.step, loss=event.loss)

        trainer = Trainer(
            model,
            tokenizer,
            tasks,
            run=RunConfig(),
            folder=folder,
            listener=show,
            base_model_name=base_model_name,
        )
        results = trainer.run()
    for failure in trainer.failures.values():
        raise TuningError(f"{failure.name}: {failure.reason}")
    return results


def _save(spec: TaskSpec, trained: TrainedPrompt, folder: Path) -> None:
    # A prefix is k times layers*2*kv_dim numbers, and is halved; an embedding is small enough to stay as trained.
    dtype = torch.float16 if spec.method == "prefix_tuning" else torch.float32
    config = PeftConfig.from_pretrained(str(trained.folder))
    save_peft_files(folder, config, load_file(trained.folder / PROMPT_FILE), dtype)


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
    except (TaskDataError, TuningError) as error:
        raise SystemExit(f"error: {error}") from error
