"""`promptmux train`: from labelled examples to prompts that are served.

Owns the options and what they exclude. Refuses to know how prompts are trained (`tuning`), and what is shown and pushed
meanwhile (`train_run`), which it imports only when it runs.
"""

import importlib.util
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from server.cli.connection import Json, Key, Url
from server.cli.output import ExitCode, fail, is_terminal

_DATA, _PROMPT, _STEPS, _MACHINE, _OUTPUT, _PUSH = "Data", "Prompt", "Steps", "Machine", "Output", "Push"
DEFAULT_STEPS = 200

MethodName = Literal["prompt_tuning", "prefix_tuning", "p_tuning_v2", "p_tuning", "cartridge"]


def train(
    context: typer.Context,
    task: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="The task; repeat it, with its --data, for several.", rich_help_panel=_DATA),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Its examples as JSON lines.", rich_help_panel=_DATA),
    ] = None,
    tasks: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="All tasks of a folder: NAME.jsonl, with NAME.toml for what is its own.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    validation: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="Validation examples, one file a task; none: split off.", rich_help_panel=_DATA
        ),
    ] = None,
    test: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Test examples, one file a task; none: split off.", rich_help_panel=_DATA),
    ] = None,
    validation_share: Annotated[
        float, typer.Option(min=0, max=0.49, help="Share of the prompts that validate.", rich_help_panel=_DATA)
    ] = 0.1,
    test_share: Annotated[
        float,
        typer.Option(min=0, max=0.49, help="Share of the prompts that the result is tested on.", rich_help_panel=_DATA),
    ] = 0.1,
    template: Annotated[
        str,
        typer.Option(help="What becomes of the text of {text, label} lines; holds {text}.", rich_help_panel=_DATA),
    ] = "{text}",
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Cut the beginning of prompts that are too long.", rich_help_panel=_DATA)
    ] = False,
    method: Annotated[MethodName, typer.Option(help="How it is trained.", rich_help_panel=_PROMPT)] = "prompt_tuning",
    k: Annotated[int, typer.Option("--k", "-k", min=1, max=4096, help="Virtual tokens.", rich_help_panel=_PROMPT)] = 20,
    init: Annotated[
        Literal["random", "vocab", "labels", "text"] | None,
        typer.Option(help="Where they start.", show_default="the method's usual", rich_help_panel=_PROMPT),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The text to start from, or the document of a cartridge.",
            show_default="training examples",
            rich_help_panel=_PROMPT,
        ),
    ] = None,
    encoder_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=65536,
            help="Width of prefix tuning's MLP or P-tuning's encoder.",
            show_default="PEFT's",
            rich_help_panel=_PROMPT,
        ),
    ] = None,
    steps: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="Optimizer steps.", rich_help_panel=_STEPS)
    ] = DEFAULT_STEPS,
    batch_size: Annotated[int, typer.Option(min=1, max=4096, help="Examples a step.", rich_help_panel=_STEPS)] = 16,
    lr: Annotated[
        float | None,
        typer.Option(
            min=1e-9, max=100, help="Learning rate.", show_default="the method's usual", rich_help_panel=_STEPS
        ),
    ] = None,
    optimizer: Annotated[
        Literal["adamw", "adafactor"], typer.Option(help="What takes the steps.", rich_help_panel=_STEPS)
    ] = "adamw",
    weight_decay: Annotated[
        float, typer.Option(min=0, max=1, help="Pulls the prompt towards zero.", rich_help_panel=_STEPS)
    ] = 0.0,
    schedule: Annotated[
        Literal["constant", "linear", "cosine"],
        typer.Option(help="How the learning rate falls.", rich_help_panel=_STEPS),
    ] = "linear",
    warmup: Annotated[
        int, typer.Option(min=0, max=1_000_000, help="Steps in which it rises first.", rich_help_panel=_STEPS)
    ] = 10,
    max_grad_norm: Annotated[
        float, typer.Option(min=1e-9, max=1e6, help="Gradients are clipped to it.", rich_help_panel=_STEPS)
    ] = 1.0,
    eval_every: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1_000_000,
            help="Steps between two looks at the validation loss.",
            show_default="a tenth of the steps",
            rich_help_panel=_STEPS,
        ),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1_000_000,
            help="Stop after so many looks in vain.",
            show_default="never",
            rich_help_panel=_STEPS,
        ),
    ] = None,
    min_delta: Annotated[
        float, typer.Option(min=0, max=1000, help="What a look must gain not to be in vain.", rich_help_panel=_STEPS)
    ] = 0.0,
    seed: Annotated[
        int,
        typer.Option(min=0, max=2**31 - 1, help="Of splits, beginnings and batches.", rich_help_panel=_STEPS),
    ] = 0,
    backbone: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The frozen model: a folder, a hub id or a GGUF file.",
            show_default="the embedded one",
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        typer.Option(help="Of the backbone; prompts are in fp32.", rich_help_panel=_MACHINE),
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel=_MACHINE)] = "auto",
    checkpointing: Annotated[
        bool,
        typer.Option(
            "--checkpointing", help="Recompute activations: less memory, more time.", rich_help_panel=_MACHINE
        ),
    ] = False,
    tokens_per_pass: Annotated[
        int, typer.Option(min=1, max=10_000_000, help="Bounds a forward pass.", rich_help_panel=_MACHINE)
    ] = 2048,
    tasks_at_once: Annotated[
        int, typer.Option(min=1, max=4096, help="So many tasks share a step.", rich_help_panel=_MACHINE)
    ] = 16,
    checkpoint_every: Annotated[
        int,
        typer.Option(min=1, max=1_000_000, help="Steps between states to go on from.", rich_help_panel=_MACHINE),
    ] = 50,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Each prompt goes to DIR/NAME.", rich_help_panel=_OUTPUT)
    ] = Path("prompts"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run that was interrupted in DIR.", rich_help_panel=_OUTPUT)
    ] = False,
    plot: Annotated[bool, typer.Option("--plot", help="Draw the curves too.", rich_help_panel=_OUTPUT)] = False,
    as_json: Json = False,
    push: Annotated[
        bool, typer.Option("--push", help="Upload what was trained to the server.", rich_help_panel=_PUSH)
    ] = False,
    activate: Annotated[
        bool,
        typer.Option("--activate/--no-activate", help="Let requests use it at once.", rich_help_panel=_PUSH),
    ] = True,
    gate: Annotated[
        float | None,
        typer.Option(
            "--gate-threshold",
            "--gate",
            min=0,
            max=1,
            metavar="THRESHOLD",
            help="Activate it only if so large a share of the held-out examples is answered as expected.",
            rich_help_panel=_PUSH,
        ),
    ] = None,
    url: Url = None,
    key: Key = None,
) -> None:
    """Train soft prompts over a frozen backbone, test them on held-out examples, and push them if asked to.

    Exits with 1 when a training failed or a gate did not pass, with 7 when examples, values or backbone are refused.
    """
    given = {name for name in context.params if str(context.get_parameter_source(name)).endswith("COMMANDLINE")}
    _check_options(given, task or (), data or (), tasks, validation or (), test or ())
    if importlib.util.find_spec("peft") is None:
        fail("training needs PEFT", hint="pip install 'promptmux[train]'")
    options: dict[str, Any] = {
        "method": method,
        "num_virtual_tokens": k,
        "init": init,
        "init_text": _read_text(text),
        "encoder_hidden_size": encoder_size,
        "num_steps": steps,
        "batch_size": batch_size,
        "learning_rate": lr,
        "optimizer": optimizer,
        "weight_decay": weight_decay,
        "schedule": schedule,
        "num_warmup_steps": warmup,
        "max_grad_norm": max_grad_norm,
        "eval_every": eval_every,
        "patience": patience,
        "min_delta": min_delta,
        "seed": seed,
    }
    if not is_terminal():
        # Libraries draw their progress bars with tqdm; in a log they are noise.
        os.environ.setdefault("TQDM_DISABLE", "1")
    # Imported here: torch and transformers are slow to import, and --help needs neither.
    from server.cli.train_run import TrainOptions, run_train

    run_train(
        TrainOptions(
            names=tuple(task or ()),
            data=tuple(data or ()),
            validation=tuple(validation or ()),
            test=tuple(test or ()),
            folder=tasks,
            validation_share=validation_share,
            test_share=test_share,
            template=template,
            truncates=truncate,
            config={name: value for name, value in options.items() if value is not None},
            run={
                "max_tokens_per_pass": tokens_per_pass,
                "activation_checkpointing": checkpointing,
                "max_tasks_at_once": tasks_at_once,
                "checkpoint_every": checkpoint_every,
            },
            backbone=backbone,
            dtype=dtype,
            device=device,
            out=out,
            resumes=resume,
            plots=plot,
            as_json=as_json,
            pushes=push,
            activates=activate,
            gate=gate,
            url=url,
            key=key,
        )
    )


def _check_options(
    given: set[str],
    names: "list[str] | tuple[()]",
    data: "list[Path] | tuple[()]",
    folder: Path | None,
    validation: "list[Path] | tuple[()]",
    test: "list[Path] | tuple[()]",
) -> None:
    """Ends the command where options contradict each other."""
    if folder is not None:
        for name in ("task", "data", "validation", "test"):
            if name in given:
                fail(f"--{name} contradicts --tasks, whose folder has all", code=ExitCode.USAGE)
    elif not names:
        fail("there is nothing to train", code=ExitCode.USAGE, hint="--task NAME --data FILE, or --tasks FOLDER")
    elif len(data) != len(names):
        fail(f"{len(names)} --task and {len(data)} --data were given", code=ExitCode.USAGE, hint="one --data a --task")
    for option, files in (("--validation", validation), ("--test", test)):
        if files and len(files) != len(names):
            fail(f"{len(names)} --task and {len(files)} {option} were given", code=ExitCode.USAGE)
    if "push" not in given:
        for name, option in (("gate", "--gate-threshold"), ("activate", "--no-activate"), ("url", "--url")):
            if name in given:
                fail(f"{option} needs --push", code=ExitCode.USAGE)


def _read_text(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}", code=ExitCode.USAGE)
    except UnicodeDecodeError:
        fail(f"{path} is not UTF-8", code=ExitCode.USAGE)
