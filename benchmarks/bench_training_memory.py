"""How much memory does training need at its peak: prompts with and without activation checkpointing, LoRA, all weights?

Each is a few steps in a process of its own, over batches of 16 examples of one length. Memory is what is needed beyond
the loaded model: activations, gradients, optimizer state, logits. Frozen weights have neither gradients nor state, but
without checkpointing the activations of every layer are kept all the same: prompts alone save storage, and not training
memory. LoRA is PEFT's and full fine-tuning transformers' usual loop; the latter loads its model in fp32, which its
figure does not hold. "Passes of 2,048 tokens" cuts the batch, which changes no result.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.machine import describe_machine, report
from benchmarks.peak_memory import PeakMemory
from benchmarks.rounds import backbone_folder, make_parser, parse
from benchmarks.training_peers import UsualLoop, attach_lora, load_model
from server.engine.checkpoint import choose_dtype
from tuning.config import RunConfig, TrainConfig
from tuning.examples import EncodedExample
from tuning.records import TrainTask
from tuning.trainer import Trainer

PROMPTS = ("prompt_tuning", "prefix_tuning", "p_tuning_v2")
LORA, FULL = "lora", "full"
NUM_STEPS = 2
LORA_RANK = 8
FIRST_TOKEN_ID = 3
ONE_PASS, SHORT_PASS = 10_000_000, 2048


@dataclass(frozen=True, slots=True)
class Variant:
    """A row of the table."""

    method: str
    checkpointing: bool
    max_tokens_per_pass: int = ONE_PASS

    @property
    def name(self) -> str:
        parts = [self.method.replace("_", " "), *(["checkpointing"] if self.checkpointing else [])]
        return ", ".join([*parts, *(["passes of 2,048 tokens"] if self.max_tokens_per_pass == SHORT_PASS else [])])


VARIANTS = (
    *(Variant(method, checkpointing) for method in (*PROMPTS, LORA, FULL) for checkpointing in (False, True)),
    Variant("prompt_tuning", False, SHORT_PASS),
    Variant("prompt_tuning", True, SHORT_PASS),
)


def main() -> None:
    args = _parse()
    if args.measure is not None:
        print(json.dumps(_measure(args, VARIANTS[args.measure], args.lengths[0])))
        return
    machine = describe_machine()
    dtype = choose_dtype(args.dtype, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    found: dict[str, dict[int, list[float]]] = {}
    for number in range(args.rounds):
        for place, variant in enumerate(VARIANTS):
            for length in args.lengths:
                peak_mb = _run_child(args, place, length)
                found.setdefault(variant.name, {}).setdefault(length, []).append(peak_mb)
                print(f"{number + 1}/{args.rounds} {variant.name}, {length} tokens: {peak_mb} MB", file=sys.stderr)
    columns = [f"{length} tokens | ÷ full fine-tuning" for length in args.lengths]
    lines = [f"| peak memory beyond the model, MB | {' | '.join(columns)} |", f"|---|{'--:|--:|' * len(args.lengths)}"]
    full = {length: statistics.median(found[Variant(FULL, False).name][length]) for length in args.lengths}
    for name, by_length in found.items():
        cells = []
        for length in args.lengths:
            peak_mb = statistics.median(by_length[length])
            cells.append(f"{peak_mb:,.0f} | {peak_mb / full[length]:.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    report(
        "training-memory",
        args,
        machine,
        dtype=str(dtype).removeprefix("torch."),
        table=lines,
        result={"batch_size": args.batch_size, "k": args.k, "lora_rank": LORA_RANK, "peak_mb": found},
    )


def _run_child(args: argparse.Namespace, place: int, length: int) -> float:
    command = [sys.executable, "-m", "benchmarks.bench_training_memory", "--measure", str(place)]
    command += ["--lengths", str(length), "--batch-size", str(args.batch_size), "--k", str(args.k)]
    command += ["--backbone", backbone_folder(args), "--dtype", args.dtype, "--threads", str(args.threads)]
    command += ["--seed", str(args.seed)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def _measure(args: argparse.Namespace, variant: Variant, length: int) -> float:
    """Peak megabytes of a few steps, beyond the loaded model."""
    folder = backbone_folder(args)
    dtype = choose_dtype(args.dtype, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    is_full = variant.method == FULL
    model = load_model(folder, torch.float32 if is_full else dtype, frozen=not is_full)
    _warm_up(model)
    examples = _examples(args, length, int(model.config.get_text_config().vocab_size))
    if variant.method in PROMPTS:
        return _measure_prompt(args, variant, model, AutoTokenizer.from_pretrained(folder), examples)
    peak = PeakMemory()
    trained = model if is_full else attach_lora(model, rank=LORA_RANK, seed=args.seed)
    loop = UsualLoop(
        trained,
        learning_rate=1e-4,
        num_steps=NUM_STEPS,
        num_warmup_steps=0,
        checkpointing=variant.checkpointing,
        autocast=is_full and dtype == torch.bfloat16,
    )
    for _ in range(NUM_STEPS):
        loop.step(examples)
    return peak.mb


def _warm_up(model: PreTrainedModel) -> None:
    """A pass forward and backward over a few tokens: what libraries need once is no method's."""
    embeds = model.get_input_embeddings()(torch.arange(4, device=model.device)).detach().requires_grad_()
    run: Any = model
    torch.autograd.grad(run(inputs_embeds=embeds[None], use_cache=False).logits.float().sum(), embeds)


def _measure_prompt(
    args: argparse.Namespace,
    variant: Variant,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[EncodedExample],
) -> float:
    config = TrainConfig.model_validate(
        {
            "method": variant.method,
            "num_virtual_tokens": args.k,
            "num_steps": NUM_STEPS,
            "batch_size": args.batch_size,
            "seed": args.seed,
        }
    )
    run = RunConfig.model_validate(
        {"max_tokens_per_pass": variant.max_tokens_per_pass, "activation_checkpointing": variant.checkpointing}
    )
    peak = PeakMemory()
    with tempfile.TemporaryDirectory() as scratch:
        task = TrainTask(name="memory", config=config, train=examples)
        trainer = Trainer(model, tokenizer, [task], run=run, folder=Path(scratch))
        for _ in range(NUM_STEPS):
            trainer.step()
        if trainer.failures:
            raise RuntimeError(f"training failed: {trainer.failures}")
    return peak.mb


def _examples(args: argparse.Namespace, length: int, vocab_size: int) -> list[EncodedExample]:
    """One batch of random tokens; an eighth of each example is completion."""
    rng = np.random.default_rng(args.seed)
    num_completion = max(1, length // 8)
    drawn = rng.integers(FIRST_TOKEN_ID, vocab_size, (args.batch_size, length)).tolist()
    return [EncodedExample(tuple(ids[:-num_completion]), tuple(ids[-num_completion:])) for ids in drawn]


def _parse() -> argparse.Namespace:
    parser = make_parser(__doc__, rounds=1)
    parser.add_argument("--lengths", nargs="+", type=int, default=[44, 512], help="tokens an example; each is measured")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    args = parse(parser)
    if args.quick:
        args.lengths, args.batch_size = args.lengths[:1], 2
    return args


if __name__ == "__main__":
    main()
