"""What `promptmux train` does: plans, loads the backbone, has it trained, shows how far it is, and pushes the results.

Owns the order of these, exit codes, and what is printed of a finished run. Refuses to know how prompts are trained and
measured (`tuning.run`).
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from server.cli.connection import connect
from server.cli.http_client import ServerClient
from server.cli.output import ExitCode, fail, is_terminal, print_json, print_table, say, to_stderr
from server.cli.push import judge_gate, report_upload, wait_for_gate
from server.cli.serve import make_embedded_backbone
from server.cli.train_progress import LiveProgress, PlainProgress, SilentProgress, TrainProgress
from server.embedded import EmbeddedBackboneError, convert_gguf, default_cache_dir
from tuning.cautions import find_cautions
from tuning.config import ConfigError, make_run_config, make_train_config
from tuning.examples import DataError
from tuning.limits import context_length
from tuning.plans import PlanError, PreparedTask, TaskPlan, check_names, plan_folder, prepare_task
from tuning.provenance import HELD_OUT_FILE, training_run, upload_metadata
from tuning.records import TuningError
from tuning.reports import PlotsUnavailableError, require_matplotlib
from tuning.run import FinishedTask, TrainingBackbone, run_tasks
from tuning.splits import DataFiles


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """The command's options. `config` and `run` are fields of TrainConfig and RunConfig, not yet checked."""

    names: Sequence[str]
    data: Sequence[Path]
    validation: Sequence[Path]
    test: Sequence[Path]
    folder: Path | None
    validation_share: float
    test_share: float
    template: str
    truncates: bool
    config: Mapping[str, Any]
    run: Mapping[str, Any]
    backbone: str | None
    dtype: str
    device: str
    out: Path
    resumes: bool
    plots: bool
    as_json: bool
    pushes: bool
    activates: bool
    gate: float | None
    url: str | None
    key: str | None


def run_train(options: TrainOptions) -> None:
    """The whole command. Ends it with the exit code of the first thing that went wrong."""
    try:
        run = make_run_config(dict(options.run))
        plans = _make_plans(options)
    except (ConfigError, PlanError) as error:
        fail(str(error), code=ExitCode.REFUSED, hint="`promptmux train --help` tells what may be given")
    if options.plots:
        try:
            require_matplotlib()
        except PlotsUnavailableError as error:
            fail(str(error))
    backbone = _load_backbone(options)
    prepared = _prepare(options, plans, backbone)
    cautions = _find_cautions(prepared, backbone, says=not options.as_json)
    progress = _make_progress(options, prepared)
    try:
        with progress:
            finished = run_tasks(
                backbone,
                prepared,
                run=run,
                out=options.out,
                resumes=options.resumes,
                plots=options.plots,
                cautions=cautions,
                listener=progress.on_event,
                on_measuring=progress.on_measuring,
            )
    except KeyboardInterrupt:
        say(f"interrupted; the same command with --resume goes on from {options.out}")
        raise
    except TuningError as error:
        # Raised before the first step; a task that fails later is among the finished ones.
        fail(str(error), code=ExitCode.REFUSED)
    except OSError as error:
        fail(f"cannot write to {options.out}: {error.strerror}", code=ExitCode.FAILED)
    if not options.as_json:
        _print_results(finished)
    pushed, code = _push(options, finished) if options.pushes else ({}, ExitCode.OK)
    if options.as_json:
        print_json({"tasks": [_to_json(one, pushed.get(one.name)) for one in finished]})
    failures = [one for one in finished if one.failure is not None]
    if failures:
        fail("; ".join(f"{one.name}: {one.failure}" for one in failures), code=ExitCode.FAILED, hint="a lower --lr")
    if code is not ExitCode.OK:
        raise typer.Exit(code)


def _make_plans(options: TrainOptions) -> list[TaskPlan]:
    config = make_train_config(dict(options.config))
    shares: dict[str, Any] = {"validation_share": options.validation_share, "test_share": options.test_share}
    if options.folder is not None:
        files = DataFiles(train=options.folder, **shares)
        defaults = TaskPlan(name="defaults", files=files, config=config, template=options.template)
        return plan_folder(options.folder, defaults)
    nothing: Sequence[Path | None] = [None] * len(options.names)
    validation, test = options.validation or nothing, options.test or nothing
    plans = [
        TaskPlan(
            name=name,
            files=DataFiles(train=data, validation=validation_file, test=test_file, **shares),
            config=config,
            template=options.template,
        )
        for name, data, validation_file, test_file in zip(options.names, options.data, validation, test, strict=True)
    ]
    check_names(plans)
    return plans


def _load_backbone(options: TrainOptions) -> TrainingBackbone:
    import torch

    from server.engine.checkpoint import (
        BackboneError,
        choose_device,
        choose_dtype,
        load_folder,
        refuse_shipped_code,
        resolve_folder,
    )
    from server.engine.threads import choose_threads

    torch.set_num_threads(choose_threads())
    try:
        if options.backbone is None:
            folder = make_embedded_backbone(default_cache_dir())
        elif options.backbone.endswith(".gguf") and Path(options.backbone).is_file():
            folder = convert_gguf(Path(options.backbone), default_cache_dir(), progress=is_terminal())
        else:
            folder = resolve_folder(options.backbone)
        refuse_shipped_code(folder)
        device = choose_device(options.device)
        model, tokenizer = load_folder(folder, choose_dtype(options.dtype, device))
    except (BackboneError, EmbeddedBackboneError) as error:
        fail(str(error), code=ExitCode.REFUSED)
    except Exception as error:
        # transformers fails in many ways over files that are no model.
        fail(f"{options.backbone or 'the embedded backbone'} cannot be loaded: {error}", code=ExitCode.REFUSED)
    frozen: Any = model.requires_grad_(False)
    # The plainest attention is for references; answers are made by a faster one where the model has it.
    with suppress(ValueError):
        frozen.set_attn_implementation("sdpa")
    # As a server that loads the same backbone calls it.
    return TrainingBackbone(frozen.eval().to(device), tokenizer, folder.name)


def _prepare(options: TrainOptions, plans: Sequence[TaskPlan], backbone: TrainingBackbone) -> list[PreparedTask]:
    """All tasks' examples, or the end of the command with all that is wrong in them."""
    prepared, problems = [], []
    for plan in plans:
        try:
            prepared.append(
                prepare_task(
                    plan, backbone.tokenizer, max_tokens=context_length(backbone.model), truncates=options.truncates
                )
            )
        except (DataError, PlanError) as error:
            problems.append(str(error))
    if problems:
        hint = "docs/training.md shows what lines of examples look like"
        fail("these examples cannot be used\n" + "\n".join(problems), code=ExitCode.REFUSED, hint=hint)
    if options.pushes and options.gate is not None:
        for one in prepared:
            if not one.held_out:
                fail(f"{one.plan.name}: --gate-threshold needs held-out examples", code=ExitCode.USAGE)
    return prepared


def _find_cautions(
    prepared: Sequence[PreparedTask], backbone: TrainingBackbone, *, says: bool
) -> dict[str, tuple[str, ...]]:
    """Warnings by task. What many tasks share is said once."""
    num_parameters = backbone.model.num_parameters()
    found = {
        one.plan.name: find_cautions(
            one.plan.config, num_parameters=num_parameters, train=one.data.train, encoded=one.task.train
        )
        for one in prepared
    }
    if says:
        for one in prepared:
            for note in one.notes:
                say(f"{one.plan.name}: note: {note}")
        tasks_of: dict[str, list[str]] = {}
        for name, warnings in found.items():
            for warning in warnings:
                tasks_of.setdefault(warning, []).append(name)
        for warning, names in tasks_of.items():
            whose = names[0] if len(names) == 1 else f"{len(names)} tasks"
            say(f"{whose}: warning: {warning}")
    return found


def _make_progress(options: TrainOptions, prepared: Sequence[PreparedTask]) -> TrainProgress:
    steps = {one.plan.name: one.plan.config.num_steps for one in prepared}
    if is_terminal():
        return LiveProgress(to_stderr(), steps)
    return SilentProgress() if options.as_json else PlainProgress(say)


def _print_results(finished: Sequence[FinishedTask]) -> None:
    rows = []
    for one in finished:
        if one.record is None:
            rows.append((one.name, "failed", *[None] * 7))
            continue
        record, evaluation = one.record, one.record["evaluation"] or {}
        prompt, bare = evaluation.get("prompt", {}), evaluation.get("without_prompt", {})
        rows.append(
            (
                one.name,
                f"{record['method']}, k={record['config']['num_virtual_tokens']}",
                f"{record['training']['best_step']} of {record['training']['num_steps']}",
                prompt.get("num_examples"),
                *(_figure(figures.get(name)) for name in ("loss", "exact_match") for figures in (prompt, bare)),
                _figure(prompt.get("label_accuracy")),
            )
        )
    columns = (
        "task",
        "prompt",
        "kept step",
        "held out",
        "loss",
        "bare loss",
        "exact match",
        "bare match",
        "label accuracy",
    )
    print_table(columns, rows)
    for one in finished:
        if one.folder is not None:
            say(f"{one.name} is in {one.folder}")


def _push(options: TrainOptions, finished: Sequence[FinishedTask]) -> tuple[dict[str, dict[str, Any]], ExitCode]:
    """Upload all, and wait for their gates. What one task's upload comes to does not keep the others back."""
    pushed: dict[str, dict[str, Any]] = {}
    first = ExitCode.OK
    with connect(options.url, options.key) as client:
        for one in finished:
            if one.folder is None or one.record is None:
                continue
            try:
                version, code = _push_one(client, options, one, one.folder, one.record)
                pushed[one.name] = version
            except typer.Exit as ended:
                # What was wrong has been said.
                code = ExitCode(ended.exit_code)
            first = first if first is not ExitCode.OK else code
    return pushed, first


def _push_one(
    client: ServerClient, options: TrainOptions, one: FinishedTask, folder: Path, record: Mapping[str, Any]
) -> tuple[dict[str, Any], ExitCode]:
    probes = folder / HELD_OUT_FILE
    has_probes = probes.stat().st_size > 0
    metadata = upload_metadata(record)
    labels = record["data"]["labels"]
    if len(labels) > 1 and "labels" not in metadata:
        say(f"{one.name}: note: a version does not hold its {len(labels)} labels; name them when you classify")
    fields = {
        "activate": "true" if options.activates else "false",
        "metadata": json.dumps(metadata),
        "training_run": training_run(record),
        "data_digest": f"sha256:{record['data']['digest']}",
    }
    if options.gate is not None:
        fields["gate_threshold"] = f"{options.gate:.6f}".rstrip("0").rstrip(".")
    version = client.upload(one.name, folder, fields, probes if has_probes else None)
    if not options.as_json:
        report_upload(one.name, version)
    if options.gate is None:
        return version, ExitCode.OK
    version |= wait_for_gate(client, one.name, version, says=not options.as_json)
    verdict = judge_gate(one.name, version)
    if not options.as_json or verdict.code is not ExitCode.OK:
        say(f"{one.name}: {verdict.message}" + (f" ({verdict.hint})" if verdict.hint else ""))
    return version, verdict.code


def _to_json(one: FinishedTask, version: Mapping[str, Any] | None) -> dict[str, Any]:
    return {
        "task": one.name,
        "folder": None if one.folder is None else str(one.folder),
        "failure": one.failure,
        "record": one.record,
        "version": version,
    }


def _figure(value: object) -> str | None:
    return f"{value:.3f}" if isinstance(value, float) else None
