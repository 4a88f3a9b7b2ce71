"""Greedy completions of one server: asked for one by one, or for many tasks in one request.

Owns the request's body, waiting when the server is busy, and reading digest, tokens and log-probabilities out of an
answer. Refuses to judge them.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx

NUM_ALTERNATIVES = 5
_BUSY = frozenset({429, 503})
_MAX_WAIT_S = 60.0
_DEFAULT_RETRY_S = 1.0


class AskError(Exception):
    """The server refused, failed, or answered something that is no completion. `code` is its own, if it gave one.

    `status` is the HTTP status, or for what needs no answer of its own the one that would tell of it; None where nobody
    answered as a promptmux server does.
    """

    def __init__(self, message: str, *, status: int | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


@dataclass(frozen=True, slots=True)
class Question:
    """A text for what `reference` names: a task, a version of one, or the backbone."""

    reference: str
    text: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back. `digest` is None for the bare backbone; `alternatives[i]` are the likeliest tokens at place i."""

    digest: str | None
    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]
    alternatives: tuple[Mapping[str, float], ...]


class Server:
    """The server at `url`. Methods raise AskError."""

    def __init__(self, url: str, key: str | None, *, max_tokens: int, read_timeout_s: float = 300.0) -> None:
        self._max_tokens = max_tokens
        self._http = httpx.AsyncClient(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(read_timeout_s, connect=5.0, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=2.0),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def get(self, path: str) -> dict[str, Any]:
        """A JSON object."""
        return _as_object(await self._send("GET", path))

    async def task(self, task: str) -> dict[str, Any]:
        return await self.get(f"/v1/tasks/{quote(task, safe='')}")

    async def version(self, task: str, version: int) -> dict[str, Any]:
        return await self.get(f"/v1/tasks/{quote(task, safe='')}/versions/{version}")

    async def metric(self, name: str) -> float | None:
        """A metric's value, summed over its labels; None where metrics cannot be read."""
        try:
            response = await self._http.get("/metrics")
        except httpx.HTTPError:
            return None
        if not response.is_success:
            return None
        lines = [
            line.rpartition(" ") for line in response.text.splitlines() if line.startswith((f"{name} ", f"{name}{{"))
        ]
        try:
            return sum(float(value) for _, _, value in lines) if lines else None
        except ValueError:
            return None

    async def ask(self, question: Question) -> Answer:
        """One question in a request of its own."""
        body = await self._complete({"model": question.reference, "prompt": question.text})
        (answer,) = _read_answers(body, [body.get("prompt")])
        return answer

    async def ask_together(self, questions: Sequence[Question]) -> list[Answer]:
        """Several questions in one request, which names a task for each."""
        references = [question.reference for question in questions]
        body = await self._complete({"tasks": references, "prompt": [question.text for question in questions]})
        choices = _choices(body)
        if [choice.get("task") for choice in choices] != references:
            raise AskError("the choices of one request do not name the tasks that were asked for, in their order")
        return _read_answers(body, [choice.get("prompt") for choice in choices])

    async def _complete(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        sampling = {
            "temperature": 0,
            "max_tokens": self._max_tokens,
            "logprobs": NUM_ALTERNATIVES,
            # As many tokens as asked for: an early end would leave little to compare.
            "ignore_eos": True,
        }
        return _as_object(await self._send("POST", "/v1/completions", json={**fields, **sampling}))

    async def _send(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        """Waits, within bounds, for a server that says it is busy."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _MAX_WAIT_S
        while True:
            try:
                response = await self._http.request(method, path, **arguments)
            except httpx.HTTPError as error:
                raise AskError(str(error) or type(error).__name__) from error
            pause_s = _retry_after(response)
            if pause_s is None or loop.time() + pause_s > deadline:
                break
            await asyncio.sleep(pause_s)
        if not response.is_success:
            raise _to_error(response)
        return response


def _retry_after(response: httpx.Response) -> float | None:
    """How long to wait before asking again; None: the answer is final."""
    if response.status_code not in _BUSY or response.headers.get("x-should-retry") == "false":
        return None
    try:
        return min(30.0, max(0.05, float(response.headers["retry-after"])))
    except (KeyError, ValueError):
        return _DEFAULT_RETRY_S


def _to_error(response: httpx.Response) -> AskError:
    try:
        error = response.json()["error"]
        message, code = str(error["message"]), error.get("code")
    except (ValueError, KeyError, TypeError, AttributeError):
        message, code = response.reason_phrase, None
    return AskError(f"{message} (HTTP {response.status_code})", status=response.status_code, code=code)


def _as_object(response: httpx.Response) -> dict[str, Any]:
    try:
        body = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise AskError(f"{response.url} answers, but not as a promptmux server")
    return body


def _choices(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    choices = body.get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise AskError("an answer has no choices")
    return sorted(choices, key=lambda choice: int(choice.get("index", 0)))


def _read_answers(body: Mapping[str, Any], prompts: Sequence[Any]) -> list[Answer]:
    choices = _choices(body)
    if len(choices) != len(prompts):
        raise AskError(f"{len(choices)} choices came back for {len(prompts)} questions")
    try:
        return [_read_answer(choice, prompt) for choice, prompt in zip(choices, prompts, strict=True)]
    except (KeyError, TypeError, ValueError) as error:
        raise AskError(f"an answer's log-probabilities cannot be read: {error!r}") from error


def _read_answer(choice: Mapping[str, Any], prompt: Mapping[str, Any] | None) -> Answer:
    found = choice["logprobs"]
    tokens = tuple(str(token) for token in found["tokens"])
    logprobs = tuple(float(number) for number in found["token_logprobs"])
    alternatives = tuple({str(k): float(v) for k, v in (top or {}).items()} for top in found["top_logprobs"])
    if not len(tokens) == len(logprobs) == len(alternatives):
        raise ValueError("lists of unequal length")
    digest = None if prompt is None else str(prompt["digest"]).removeprefix("sha256:")
    return Answer(digest=digest, tokens=tokens, logprobs=logprobs, alternatives=alternatives)
