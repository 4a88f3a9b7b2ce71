"""How fast are 16 prompts trained together, beside PEFT's usual loop that trains them one after the other?

The same backbone, examples, order, first vectors, steps and batch; a round is a few steps of every prompt by each, in
turn. PEFT's loop is transformers' forward over a padded batch with `labels`, AdamW and clipping. On a CPU mixing tasks
alone wins nothing, for a small batch keeps it busy already: what wins is that nothing is padded, that the vectors of a
prompt run once a pass and not once a row, and that logits are made only where there is a label. On a GPU small batches
leave the device idle, and mixing wins too. The losses of both are in the table: they must agree.
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.machine import describe_machine, report
from benchmarks.rounds import (
    Seconds,
    backbone_folder,
    interleave,
    make_parser,
    parse,
    plain,
    ratio,
    ratio_table,
    rounded,
    timed,
)
from benchmarks.training_peers import UsualLoop, attach_prompt, load_model
from server.bench.workload import Lengths
from server.engine.checkpoint import choose_dtype
from tuning.config import RunConfig, TrainConfig
from tuning.examples import EncodedExample
from tuning.forward import PackedPass
from tuning.methods import PromptBuilder
from tuning.optimizers import DataOrder
from tuning.records import TrainEvent, TrainTask
from tuning.trainer import Trainer

METHODS = ("prompt_tuning", "p_tuning_v2", "prefix_tuning")
TOGETHER, PEFT = "together", "PEFT, one after the other"
NUM_WARM_UP_STEPS = 1
LOSS_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""Largest relative difference of a first step's loss, of which no update is a part."""
FIRST_TOKEN_ID = 3

Losses = dict[str, list[float]]
"""By task, one a step."""


class BenchmarkError(RuntimeError):
    """The two did not compute the same."""


def main() -> None:
    args = _parse()
    machine = describe_machine()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = choose_dtype(args.dtype, device)
    folder = backbone_folder(args)
    model = load_model(folder, dtype, frozen=True)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    goal = "≥ 3" if device.type == "cuda" else "≥ 1.5"
    lines = [
        "| method, tokens an example | together: examples/s | PEFT: examples/s | loss at step 1: together | PEFT "
        "| loss at the last step: together | PEFT |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    ratios, results = {}, {}
    for method in args.method:
        for lengths in args.lengths:
            name = f"{method}, {lengths}"
            tasks = _tasks(args, method, Lengths.parse(lengths), model)
            seconds, losses = _compare(args, model, tokenizer, tasks)
            _require_same_start(losses, dtype)
            ratios[name] = ratio(seconds[PEFT], seconds[TOGETHER], goal=goal)
            results[name] = _result(args, seconds, losses)
            cells = [f"{results[name]['examples_per_s'][system]:.1f}" for system in (TOGETHER, PEFT)]
            cells += [f"{_mean(losses[system], step):.4f}" for step in (0, -1) for system in (TOGETHER, PEFT)]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    ratios_of = {f"{name}: together ÷ PEFT": value for name, value in ratios.items()}
    report(
        "training",
        args,
        machine,
        dtype=str(dtype).removeprefix("torch."),
        table=[*lines, "", *ratio_table(ratios_of)],
        result={
            "tasks": args.tasks,
            "steps_a_round": args.steps,
            "batch_size": args.batch_size,
            "k": args.k,
            "completion_tokens": args.completion_tokens,
            "methods": results,
            "ratios": plain(ratios_of),
        },
    )


def _compare(
    args: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[TrainTask]
) -> tuple[Seconds, dict[str, Losses]]:
    together, peft = _Together(), _OneAfterTheOther(model, tokenizer, tasks)
    with tempfile.TemporaryDirectory() as scratch:
        run = RunConfig.model_validate(
            {
                "max_tokens_per_pass": args.max_tokens_per_pass,
                "activation_checkpointing": args.checkpointing,
                "max_tasks_at_once": len(tasks),
            }
        )
        trainer = Trainer(model, tokenizer, tasks, run=run, folder=Path(scratch), listener=together.listen)

        def run_together(_: int) -> float:
            return timed(lambda: [trainer.step() for _ in range(args.steps)])

        for _ in range(NUM_WARM_UP_STEPS):
            trainer.step()
            peft.run(1)
        seconds = interleave({TOGETHER: run_together, PEFT: lambda _: timed(lambda: peft.run(args.steps))}, args.rounds)
    return seconds, {TOGETHER: together.losses, PEFT: peft.losses}


class _Together:
    """The losses that the trainer tells of."""

    def __init__(self) -> None:
        self.losses: Losses = {}

    def listen(self, event: TrainEvent) -> None:
        if event.kind == "step" and event.loss is not None:
            self.losses.setdefault(event.task, []).append(event.loss)


class _OneAfterTheOther:
    """PEFT's loop of every task, each from the same first vectors and over the same batches as the trainer's."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[TrainTask]) -> None:
        builder = PromptBuilder(PackedPass(model), tokenizer)
        self.losses: Losses = {task.name: [] for task in tasks}
        self._tasks: list[tuple[TrainTask, UsualLoop, DataOrder]] = []
        for task in tasks:
            config = task.config
            loop = UsualLoop(
                attach_prompt(model, builder.build(task)),
                learning_rate=config.usual_learning_rate,
                num_steps=config.num_steps,
                num_warmup_steps=config.num_warmup_steps,
                max_grad_norm=config.max_grad_norm,
            )
            self._tasks.append((task, loop, DataOrder(len(task.train), config.batch_size, config.seed)))

    def run(self, num_steps: int) -> None:
        for task, loop, order in self._tasks:
            losses = self.losses[task.name]
            for _ in range(num_steps):
                losses.append(loop.step([task.train[place] for place in order.batch(len(losses))]))


def _tasks(args: argparse.Namespace, method: str, lengths: Lengths, model: PreTrainedModel) -> list[TrainTask]:
    """Tasks of random tokens: what they are does not matter, how many there are does."""
    num_steps = NUM_WARM_UP_STEPS + args.rounds * args.steps
    # One step more than is taken: what happens at the end of training is not measured.
    values: dict[str, Any] = {
        "method": method,
        "num_virtual_tokens": args.k,
        "num_steps": num_steps + 1,
        "batch_size": args.batch_size,
    }
    vocab_size = int(model.config.get_text_config().vocab_size)
    tasks = []
    for number in range(args.tasks):
        rng = np.random.default_rng((args.seed, number))
        examples = [
            EncodedExample(
                tuple(rng.integers(FIRST_TOKEN_ID, vocab_size, max(1, int(length) - args.completion_tokens)).tolist()),
                tuple(rng.integers(FIRST_TOKEN_ID, vocab_size, args.completion_tokens).tolist()),
            )
            for length in lengths.draw(rng, num_steps * args.batch_size)
        ]
        config = TrainConfig.model_validate(values | {"seed": args.seed + number})
        tasks.append(TrainTask(name=f"task-{number}", config=config, train=examples))
    return tasks


def _require_same_start(losses: dict[str, Losses], dtype: torch.dtype) -> None:
    """Raises BenchmarkError when the first losses of a task are not the same."""
    for task, together in losses[TOGETHER].items():
        peft = losses[PEFT][task]
        if abs(together[0] - peft[0]) > LOSS_TOLERANCE[dtype] * max(1.0, abs(peft[0])):
            raise BenchmarkError(f"{task}: the first loss is {together[0]:.4f} together and {peft[0]:.4f} by PEFT")


def _result(args: argparse.Namespace, seconds: Seconds, losses: dict[str, Losses]) -> dict[str, Any]:
    num_examples = args.tasks * args.steps * args.batch_size
    pairs = [
        [abs(a - b) for a, b in zip(together, losses[PEFT][task], strict=True)]
        for task, together in losses[TOGETHER].items()
    ]
    return {
        "seconds": rounded(seconds),
        "examples_per_s": {name: round(num_examples / statistics.median(found), 2) for name, found in seconds.items()},
        "mean_loss_a_step": {
            system: [round(_mean(losses[system], step), 5) for step in range(len(pairs[0]))] for system in losses
        },
        "largest_difference_of_a_task_a_step": [round(max(column), 5) for column in zip(*pairs, strict=True)],
    }


def _mean(losses: Losses, step: int) -> float:
    return statistics.fmean(found[step] for found in losses.values())


def _parse() -> argparse.Namespace:
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument("--tasks", type=int, default=16)
    parser.add_argument("--steps", type=int, default=2, help="steps of every prompt a round")
    parser.add_argument("--batch-size", type=int, default=16, help="examples a step of one prompt")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--lengths", nargs="+", default=["24-64", "44"], help="tokens an example; each is measured")
    parser.add_argument("--completion-tokens", type=int, default=8, help="of them of the completion")
    parser.add_argument("--max-tokens-per-pass", type=int, default=4096)
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing, of the trainer's alone")
    args = parse(parser)
    if args.quick:
        args.tasks, args.steps, args.batch_size, args.lengths = 3, 1, 2, args.lengths[:1]
    return args


if __name__ == "__main__":
    main()
