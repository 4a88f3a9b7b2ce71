"""What is said of a finished prompt: how it was made, of which data, and how good it is. Kept beside it as
`training.json`, and in short with the version when it is uploaded.

Owns the record's form. Refuses to know how a prompt is trained, and where its record is sent.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from transformers import PreTrainedTokenizerBase

from tuning.evaluation import Evaluation
from tuning.examples import EncodedExample, Example
from tuning.plans import PreparedTask
from tuning.records import TrainedPrompt
from tuning.reports import thin_curve

RECORD_FILE: Final = "training.json"
HELD_OUT_FILE: Final = "held_out.jsonl"
RECORD_FORMAT: Final = 1
# What a server takes as probes of a version.
MAX_PROBES: Final = 1000
MAX_PROBE_BYTES: Final = 1024 * 1024
MAX_PROBE_CHARS: Final = 32_768
# Of labels that a version's metadata may name, so that inputs are classified among them.
MAX_METADATA_LABELS: Final = 128
MAX_METADATA_BYTES: Final = 12 * 1024
_PACKAGES: Final = ("promptmux", "torch", "transformers")
_SHOWN_ANSWERS: Final = 10


@dataclass(frozen=True, slots=True)
class Measured:
    """Figures on the held-out examples: with the prompt, and of the bare backbone on the same texts."""

    prompt: Evaluation
    without_prompt: Evaluation


def make_record(
    prepared: PreparedTask,
    trained: TrainedPrompt,
    measured: Measured | None,
    *,
    backbone: Mapping[str, Any],
    warnings: Sequence[str],
    file_digest: str,
) -> dict[str, Any]:
    """The whole record, fit for JSON."""
    config, data = prepared.plan.config, prepared.data
    evaluation = None
    if measured is not None:
        evaluation = {
            "of": prepared.held_out_part,
            "prompt": measured.prompt.figures(),
            "without_prompt": measured.without_prompt.figures(),
            "answers": _shown_answers(prepared.held_out, measured.prompt.answers),
        }
    return {
        "format": RECORD_FORMAT,
        "task": prepared.plan.name,
        "method": config.method,
        "config": config.model_dump() | {"init": config.usual_init, "learning_rate": config.usual_learning_rate},
        "template": prepared.plan.template,
        "backbone": dict(backbone),
        "data": {
            "digest": data.digest,
            "num_train": len(data.train),
            "num_validation": len(data.validation),
            "num_test": len(data.test),
            "labels": list(data.labels),
            "notes": list(prepared.notes),
        },
        "training": {
            "num_steps": trained.num_steps,
            "best_step": trained.best_step,
            "best_loss": trained.best_loss,
            "stopped_early": trained.stopped_early,
            "num_examples": trained.num_examples,
            "num_parameters": trained.num_parameters,
            "seconds": round(trained.seconds, 3),
        },
        "evaluation": evaluation,
        "curve": thin_curve(trained.history),
        "warnings": list(warnings),
        "file_digest": file_digest,
        "versions": _versions(),
    }


def same_training(record: Mapping[str, Any], prepared: PreparedTask, backbone: Mapping[str, Any]) -> bool:
    """Whether a record is of this plan's data and configuration, over this backbone."""
    config = prepared.plan.config
    wanted = config.model_dump() | {"init": config.usual_init, "learning_rate": config.usual_learning_rate}
    data = record.get("data")
    return (
        record.get("format") == RECORD_FORMAT
        and record.get("config") == wanted
        and record.get("template") == prepared.plan.template
        and record.get("backbone") == backbone
        and isinstance(data, Mapping)
        and data.get("digest") == prepared.data.digest
    )


def upload_metadata(record: Mapping[str, Any]) -> dict[str, Any]:
    """What of a record goes with the version: method, seed, figures; labels, then the curve, where there is room."""
    config, data, evaluation = record["config"], record["data"], record["evaluation"]
    training: dict[str, Any] = {
        "method": record["method"],
        "seed": config["seed"],
        "init": config["init"],
        "learning_rate": config["learning_rate"],
        "batch_size": config["batch_size"],
        "optimizer": config["optimizer"],
        "schedule": config["schedule"],
        "num_steps": record["training"]["num_steps"],
        "best_step": record["training"]["best_step"],
        "best_loss": record["training"]["best_loss"],
        "num_train": data["num_train"],
        "versions": record["versions"],
    }
    if evaluation is not None:
        training["evaluation"] = {name: evaluation[name] for name in ("of", "prompt", "without_prompt")}
    with_curve = {**training, "curve": record["curve"]}
    forms: list[dict[str, Any]] = [{"training": with_curve}, {"training": training}]
    if 2 <= len(data["labels"]) <= MAX_METADATA_LABELS:
        forms = [form | {"labels": data["labels"]} for form in forms] + forms
    return next((form for form in forms if len(json.dumps(form)) <= MAX_METADATA_BYTES), forms[-1])


def training_run(record: Mapping[str, Any]) -> str:
    """A name for the training that gives the same prompt each time: of data, configuration and backbone."""
    parts = [record["config"], record["template"], record["data"]["digest"], record["backbone"]["name"]]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return f"{record['task']}-{record['method']}-seed{record['config']['seed']}-{digest[:12]}"


def write_held_out(
    path: Path, examples: Sequence[Example], encoded: Sequence[EncodedExample], tokenizer: PreTrainedTokenizerBase
) -> int:
    """Held-out examples as a server takes probes: as many as it takes, none that is too long for the backbone.

    `encoded` are the examples' token ids, in the same order. Returns how many were written.
    """
    bos = tokenizer.bos_token
    adds_bos = isinstance(bos, str) and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    lines: list[str] = []
    num_bytes = 0
    for example, ids in zip(examples[:MAX_PROBES], encoded[:MAX_PROBES], strict=True):
        prompt = example.prompt
        if example.is_rendered and adds_bos:
            # The template wrote it, and the server would write it again.
            prompt = prompt.removeprefix(str(bos))
        if ids.is_truncated or max(len(prompt), len(example.completion)) > MAX_PROBE_CHARS:
            continue
        line = json.dumps({"prompt": prompt, "completion": example.completion}, ensure_ascii=False) + "\n"
        num_bytes += len(line.encode())
        if num_bytes > MAX_PROBE_BYTES:
            break
        lines.append(line)
    path.write_text("".join(lines), encoding="utf-8")
    return len(lines)


def _shown_answers(examples: Sequence[Example], answers: Sequence[str]) -> list[dict[str, str]]:
    return [
        {"prompt": example.prompt, "completion": example.completion, "answer": answer}
        for example, answer in zip(examples[:_SHOWN_ANSWERS], answers[:_SHOWN_ANSWERS], strict=True)
    ]


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            # Run from a source tree that was not installed.
            continue
    return found
