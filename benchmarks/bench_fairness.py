"""What does a tenant with a thousand queued requests cost another? Time to the first token, and to the whole answer.

One tenant sends one request at a time, each as soon as the last has ended. Beside it, in every other block, another
tenant keeps a thousand requests queued, each answered one being followed by a new one. Both have fresh client tokens
and no prompt, so that nothing is found in a cache and nothing has to be loaded. The physics: an arrival waits for the
end of the step under way, which belongs to the flood, then for its own; and each later token is made in a step with as
many rows of the flood as the scheduler lets in. What the flood gets meanwhile is compared with what it gets alone,
measured after each block.
"""

import argparse
import itertools
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np
import numpy.typing as npt

from benchmarks.machine import describe_machine, report
from benchmarks.rounds import load_backbone, make_parser, parse
from prompt_store.manifest import SoftPrompt
from server.engine.backbone import Backbone
from server.engine.caution import CALM_S
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.request import PromptRef, RowOutput, RowRequest, SamplingParams
from server.metrics import Metrics

CALM, FLOOD = "calm", "flood"
GOAL = 2.0
WARM_UP_REQUESTS = 5
ANSWER_TIMEOUT_S = 120.0
FILL_S, FLOOD_ALONE_S = 4.0, 5.0


class TwoTenants:
    """An engine with a client that waits for each answer, and a flood that can be switched on."""

    def __init__(self, backbone: Backbone, args: argparse.Namespace) -> None:
        config = EngineConfig(audit_share=0.0, compiles=False, max_waiting_rows=2 * args.queued)
        self._engine = Engine(backbone, config, Metrics(), _no_prompt)
        self._vocab_size = backbone.vocab_size
        self._args = args
        self._rng = np.random.default_rng(args.seed)
        self._numbers = itertools.count()
        self._flood: set[str] = set()
        self._is_flooding = False
        self._has_answered_flood = threading.Event()
        self.num_flood_tokens = 0
        self._first = threading.Event()
        self._ended = threading.Event()
        self._first_s = 0.0

    def __enter__(self) -> "TwoTenants":
        self._engine.start(self._deliver)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._engine.stop(timeout_s=ANSWER_TIMEOUT_S)

    def ask(self) -> tuple[float, float]:
        """Seconds to the first token and to the end of one request."""
        self._first.clear()
        self._ended.clear()
        started_s = time.monotonic()
        self._engine.submit([self._row(CALM, self._args.tokens, self._args.new_tokens)])
        if not self._ended.wait(ANSWER_TIMEOUT_S):
            raise TimeoutError("a request was not answered")
        return self._first_s - started_s, time.monotonic() - started_s

    def start_flood(self) -> None:
        """Returns when the flood is under way: how many of its rows run by then is the scheduler's affair."""
        self._is_flooding = True
        self._has_answered_flood.clear()
        self._submit_flood(self._args.queued)
        if not self._has_answered_flood.wait(ANSWER_TIMEOUT_S):
            raise TimeoutError("none of the flood's requests was answered")

    def flood_alone(self) -> float:
        """Tokens a second that the flood gets when the other tenant has been away for long enough."""
        time.sleep(CALM_S + FILL_S)
        before, started_s = self.num_flood_tokens, time.monotonic()
        time.sleep(FLOOD_ALONE_S)
        return (self.num_flood_tokens - before) / (time.monotonic() - started_s)

    def stop_flood(self) -> None:
        self._is_flooding = False
        self._engine.cancel(tuple(self._flood))
        while self._engine.status().num_running or self._engine.status().num_waiting:
            time.sleep(0.01)

    def _submit_flood(self, num_rows: int) -> None:
        rows = [self._row(FLOOD, self._args.flood_tokens, self._args.flood_new_tokens) for _ in range(num_rows)]
        self._flood.update(row.row_id for row in rows)
        self._engine.submit(rows)

    def _row(self, tenant: str, num_tokens: int, num_new: int) -> RowRequest:
        return RowRequest(
            row_id=f"{tenant}-{next(self._numbers)}",
            tenant=tenant,
            token_ids=tuple(self._rng.integers(3, self._vocab_size, num_tokens).tolist()),
            prompt=None,
            sampling=SamplingParams(max_tokens=num_new, temperature=0.0, ignore_eos=True),
        )

    def _deliver(self, outputs: Sequence[RowOutput]) -> None:
        """On the engine thread."""
        num_ended = 0
        for output in outputs:
            if output.row_id.startswith(FLOOD):
                self.num_flood_tokens += len(output.token_ids)
                if output.is_last:
                    self._flood.discard(output.row_id)
                    num_ended += 1
                continue
            if output.token_ids and not self._first.is_set():
                self._first_s = time.monotonic()
                self._first.set()
            if output.is_last:
                self._ended.set()
        if num_ended and self._is_flooding:
            self._has_answered_flood.set()
            self._submit_flood(num_ended)


def main() -> None:
    args = _parse()
    machine = describe_machine()
    backbone = load_backbone(args)
    times: dict[str, list[tuple[float, float]]] = {"alone": [], "beside the flood": []}
    flood_speeds: dict[str, list[float]] = {"alone": [], "beside the other": []}
    with TwoTenants(backbone, args) as tenants:
        for _ in range(WARM_UP_REQUESTS):
            tenants.ask()
        for _ in range(args.rounds):
            times["alone"] += [tenants.ask() for _ in range(args.requests)]
            with ExitStack() as stack:
                tenants.start_flood()
                stack.callback(tenants.stop_flood)
                before, started_s = tenants.num_flood_tokens, time.monotonic()
                times["beside the flood"] += [tenants.ask() for _ in range(args.requests)]
                seconds = time.monotonic() - started_s
                flood_speeds["beside the other"].append((tenants.num_flood_tokens - before) / seconds)
                flood_speeds["alone"].append(tenants.flood_alone())
    names = ("first token", "whole request")
    figures = {
        name: {where: _percentiles([pair[index] for pair in pairs]) for where, pairs in times.items()}
        for index, name in enumerate(names)
    }
    ratios = {
        name: {p: figures[name]["beside the flood"][p] / figures[name]["alone"][p] for p in ("p50", "p99")}
        for name in names
    }
    lines = ["| ms | first token p50 | p99 | whole request p50 | p99 |", "|---|---:|---:|---:|---:|"]
    for where in times:
        cells = [f"{1000 * figures[name][where][p]:.1f}" for name in names for p in ("p50", "p99")]
        lines.append(f"| {where} | {' | '.join(cells)} |")
    cells = [f"{ratios[name][p]:.2f}" for name in names for p in ("p50", "p99")]
    lines.append(f"| ratio (goal: ≤ {GOAL:g}) | {' | '.join(cells)} |")
    speeds = {where: float(np.median(values)) for where, values in flood_speeds.items()}
    share = speeds["beside the other"] / speeds["alone"]
    lines += [
        "",
        f"The flood got {speeds['beside the other']:.0f} tokens/s meanwhile, {share:.2f} of what it gets alone "
        f"({speeds['alone']:.0f}).",
    ]
    report(
        "fairness",
        args,
        machine,
        dtype=backbone.dtype_name,
        table=lines,
        result={
            "requests": args.requests,
            "queued": args.queued,
            "tokens": [args.tokens, args.new_tokens],
            "flood_tokens": [args.flood_tokens, args.flood_new_tokens],
            "percentiles_s": figures,
            "ratios": ratios,
            "goal": GOAL,
            "flood_tokens_per_s": flood_speeds,
            "flood_share": share,
        },
    )


def _percentiles(times: Sequence[float]) -> dict[str, float]:
    values: npt.NDArray[np.float64] = np.percentile(np.array(times), [50, 99])
    return {"p50": float(values[0]), "p99": float(values[1])}


def _no_prompt(ref: PromptRef) -> SoftPrompt:
    raise AssertionError(f"no row has a prompt, but {ref.task} is loaded")


def _parse() -> argparse.Namespace:
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument("--requests", type=int, default=40, help="requests of the calm tenant a block")
    parser.add_argument("--queued", type=int, default=1000, help="requests that the other keeps in the engine")
    parser.add_argument("--tokens", type=int, default=64, help="client tokens of the calm tenant's requests")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--flood-tokens", type=int, default=64)
    parser.add_argument("--flood-new-tokens", type=int, default=64)
    args = parse(parser)
    if args.quick:
        args.requests, args.queued = 10, 200
    return args


if __name__ == "__main__":
    main()
