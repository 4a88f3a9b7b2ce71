"""Compiles a backbone's forward pass into a package, in a process of its own: `python -m server.engine.compile_worker`.

Owns the export and the compiler's options. Refuses to serve anything: it reads one request, a line of JSON, on its
standard input, writes the package, and ends. When that input is closed before, its parent is gone, and it ends at once.
The graph holds one step for any number of tokens; products and attention are calls of `torch.ops.promptmux`, everything
between them is fused by inductor (Ansel et al. 2024). Weights stay outside the package: whoever loads it hands in its
own.
"""

import contextlib
import json
import os
import signal
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

NICENESS = 10
OOM_SCORE = 1000
"""Whoever runs out of memory kills this process, and not the server."""

_EXAMPLE_TOKENS, _EXAMPLE_LOGITS = 8, 5


@dataclass(frozen=True, slots=True)
class CompileRequest:
    """What to compile. `handle` is the number under which the graph looks for its pool and its step.

    `scratch` is a folder for this alone; `native_folder` is where the parent's native library lies.
    """

    folder: str
    dtype: str
    form: str
    quantization: str
    handle: int
    package: str
    scratch: str
    native_folder: str

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def compile_package(request: CompileRequest) -> None:
    """Load the model of `request.folder`, export it packed, and write `request.package` whole or not at all."""
    # Imported here: the parent imports this module for `CompileRequest` alone.
    import torch
    from torch._inductor import aoti_compile_and_package
    from transformers import AutoModelForCausalLM

    from server.engine.attention import ATTENTION_NAME, StepContext, attach_context
    from server.engine.built_files import publish
    from server.engine.forward import PackedForward
    from server.engine.kernels.native import load_native
    from server.engine.linear import prepare_linears
    from server.engine.model_limits import freeze

    # More than one, or inductor leaves the parallel regions out; how many there are is asked when the package runs.
    torch.set_num_threads(2)
    load_native(Path(request.native_folder))
    model: Any = AutoModelForCausalLM.from_pretrained(
        request.folder, dtype=getattr(torch, request.dtype), use_safetensors=True, attn_implementation="eager"
    )
    freeze(model)
    quantization: Any = request.quantization
    form: Any = request.form
    prepare_linears(model, quantization=quantization, form=form)
    context = StepContext(kernel=_unbound)
    attach_context(model, context)
    model.set_attn_implementation(ATTENTION_NAME)
    layers = PackedForward(model, context).layers
    # In a graph a layer's pool is looked up by number, so the number stands where the tensor would.
    numbers: Any = _Numbers(range(len(layers)), range(len(layers)))
    no_batch: Any = request.handle
    context.pool, context.batch, context.kernel = numbers, no_batch, _attend_by_number
    with torch.no_grad():
        made = aoti_compile_and_package(
            _export(model),
            package_path=str(Path(request.scratch) / "package.pt2"),
            inductor_configs={"aot_inductor.package_constants_in_so": False, "cpp.dynamic_threads": True},
        )
    publish(Path(made), Path(request.package))


@dataclass(frozen=True, slots=True)
class _Numbers:
    """Stands for a pool while a graph is traced: each layer's "pages" are the layer's number."""

    key_pages: range
    value_pages: range


def _unbound(*_: object) -> Any:
    raise RuntimeError("attention is traced, not computed, in this process")


def _attend_by_number(
    query: Any, key: Any, value: Any, key_pages: Any, value_pages: Any, batch: Any, layer: Any
) -> Any:
    """The attention kernel of a traced graph: `key_pages` is the layer's number, `batch` the handle."""
    import torch

    return torch.ops.promptmux.attend(
        query,
        key,
        value,
        batch,
        key_pages,
        layer.scaling,
        layer.sliding_window or 0,
        layer.softcap or 0.0,
        layer.sinks,
    )


def _export(model: Any) -> Any:
    import torch

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, embeds: torch.Tensor, positions: torch.Tensor, logits_tokens: torch.Tensor) -> torch.Tensor:
            output = self.model(
                inputs_embeds=embeds, position_ids=positions, use_cache=False, logits_to_keep=logits_tokens
            )
            logits: torch.Tensor = output.logits[0]
            return logits

    # Two at least: torch compiles a dimension of one for one alone.
    tokens, logits = torch.export.Dim("tokens", min=2), torch.export.Dim("logits", min=2)
    width = model.get_input_embeddings().weight.shape[1]
    return torch.export.export(
        Step(),
        (
            torch.zeros((1, _EXAMPLE_TOKENS, width), dtype=model.dtype),
            torch.arange(_EXAMPLE_TOKENS)[None],
            torch.arange(_EXAMPLE_LOGITS),
        ),
        dynamic_shapes={"embeds": {1: tokens}, "positions": {1: tokens}, "logits_tokens": {0: logits}},
        strict=False,
    )


def _end_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpgrp(), signal.SIGKILL)  # the C++ compiler with it
    os._exit(1)


def main() -> None:
    request = CompileRequest(**json.loads(sys.stdin.readline()))
    os.nice(NICENESS)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    compile_package(request)


if __name__ == "__main__":
    main()
