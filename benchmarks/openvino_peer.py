"""OpenVINO GenAI's continuous batching, driven over a pipe: one JSON line in, one out.

Owns both ends. `main` is run by an interpreter that has `openvino-genai` (a benchmark extra, in an environment of its
own, for it must not change the versions that the rest runs with); `OpenVinoPeer` starts it and is what benchmarks call.
This file imports nothing but the standard library at its top, because the other interpreter has nothing else.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

# OpenVINO's names of what torch calls float32, bfloat16 and float16.
PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


class PeerError(RuntimeError):
    """The peer cannot be started or has ended; the message says what it wrote."""


@dataclass(frozen=True, slots=True)
class PeerRun:
    """New tokens of each request, and the seconds that the peer itself took for all of them."""

    tokens: list[list[int]]
    seconds: float


class OpenVinoPeer:
    """A running peer. Use as a context manager; one call at a time."""

    def __init__(
        self,
        python: str,
        model: Path,
        *,
        dtype: str,
        kv_precision: str,
        threads: int,
        max_rows: int,
        max_step_tokens: int,
        cache_gib: int = 2,
    ) -> None:
        """Start it and load the GGUF file `model`. Takes seconds.

        `dtype` is torch's name (float32, bfloat16, float16) and what products are computed in; `kv_precision` is
        OpenVINO's (f32, bf16, f16, u8). Raises PeerError.
        """
        options = {
            "model": str(model),
            "precision": PRECISIONS[dtype],
            "kv_precision": kv_precision,
            "threads": threads,
            "max_rows": max_rows,
            "max_step_tokens": max_step_tokens,
            "cache_gib": cache_gib,
        }
        # Its own count of threads must not be cut by what was set for ours.
        env = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "PYTHON"))}
        try:
            self._process = subprocess.Popen(
                [python, str(Path(__file__)), json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=env,
            )
        except OSError as error:
            raise PeerError(f"{python} cannot be run: {error}") from error
        self.about: dict[str, Any] = self._read()

    def __enter__(self) -> "OpenVinoPeer":
        return self

    def __exit__(self, *exc_info: object) -> None:
        _pipe(self._process.stdin).close()
        self._process.wait(timeout=60)
        _pipe(self._process.stdout).close()

    def run(self, token_ids: Sequence[Sequence[int]], num_new_tokens: Sequence[int]) -> PeerRun:
        """Answer all requests, submitted at once; greedy, EOS ignored. Raises PeerError."""
        requests = {"token_ids": [list(ids) for ids in token_ids], "num_new_tokens": list(num_new_tokens)}
        try:
            stdin = _pipe(self._process.stdin)
            stdin.write(json.dumps(requests) + "\n")
            stdin.flush()
        except OSError as error:
            raise PeerError(f"the peer has ended: {error}") from error
        answer = self._read()
        return PeerRun(answer["tokens"], answer["seconds"])

    def cpu_s(self) -> float:
        """CPU seconds that the process has used so far: shows that it sleeps while others are timed (Linux)."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _read(self) -> dict[str, Any]:
        line = _pipe(self._process.stdout).readline()
        if not line:
            raise PeerError(f"the peer ended with code {self._process.wait()}; it wrote why on stderr")
        answer: dict[str, Any] = json.loads(line)
        return answer


def _pipe(pipe: IO[str] | None) -> IO[str]:
    if pipe is None:
        raise PeerError("the peer has no pipe")
    return pipe


def main() -> None:
    """The other end: says what it is, then answers lines until stdin ends. Runs under the peer's interpreter."""
    import openvino
    import openvino_genai

    # Libraries may print: the pipe is for answers alone.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    options = json.loads(sys.argv[1])
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.max_num_seqs = options["max_rows"]
    scheduler.max_num_batched_tokens = options["max_step_tokens"]
    scheduler.cache_size = options["cache_gib"]
    scheduler.enable_prefix_caching = False
    scheduler.dynamic_split_fuse = True
    pipeline = openvino_genai.ContinuousBatchingPipeline(
        options["model"],
        scheduler,
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": options["precision"],
            "KV_CACHE_PRECISION": options["kv_precision"],
            "INFERENCE_NUM_THREADS": options["threads"],
        },
    )
    versions = {"openvino": openvino.__version__, "openvino_genai": openvino_genai.__version__}
    can = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    _answer(answers, {**versions, **options, "model": Path(options["model"]).name, "capabilities": list(can)})
    for line in sys.stdin:
        requests = json.loads(line)
        inputs = [openvino.Tensor(_array(ids)) for ids in requests["token_ids"]]
        configs = [_generation(openvino_genai, count) for count in requests["num_new_tokens"]]
        started_s = time.perf_counter()
        results = pipeline.generate(inputs, configs)
        seconds = time.perf_counter() - started_s
        _answer(answers, {"tokens": [list(r.m_generation_ids[0]) for r in results], "seconds": seconds})


def _array(token_ids: list[int]) -> Any:
    import numpy as np

    return np.array([token_ids], dtype=np.int64)


def _generation(genai: Any, num_new_tokens: int) -> Any:
    config = genai.GenerationConfig()
    config.max_new_tokens = num_new_tokens
    config.ignore_eos = True
    config.do_sample = False
    return config


def _answer(pipe: IO[str], answer: dict[str, Any]) -> None:
    pipe.write(json.dumps(answer) + "\n")
    pipe.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("options", help="JSON, as OpenVinoPeer writes it")
    parser.parse_args()
    main()
