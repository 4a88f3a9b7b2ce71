"""The command line's way to a running server: one small HTTP client over its routes.

Owns paths, time limits, and the translation of failures into exit codes and advice. Refuses to know how results are
shown, and where address and key come from (`server.cli.connection`).
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self
from urllib.parse import quote

import httpx

from server.cli.output import ExitCode, fail

DEFAULT_URL = "http://127.0.0.1:8000"
PROMPT_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_PAGE = 100
# Two versions answer up to hundreds of inputs.
_SLOW = httpx.Timeout(600.0, connect=5.0)

UNREACHABLE_HINT = "start one with `promptmux serve`, or give its address with --url or PROMPTMUX_URL"

EXIT_CODES = {
    400: ExitCode.REFUSED,
    401: ExitCode.DENIED,
    403: ExitCode.DENIED,
    404: ExitCode.NOT_FOUND,
    408: ExitCode.BUSY,
    409: ExitCode.CONFLICT,
    413: ExitCode.REFUSED,
    415: ExitCode.REFUSED,
    422: ExitCode.REFUSED,
    429: ExitCode.BUSY,
    503: ExitCode.BUSY,
}
# Where the answer says `x-should-retry: false`.
_FOR_EVER = {
    429: (
        ExitCode.REFUSED,
        "waiting does not help: `promptmux rm` what is not needed, or ask the operator for more (`promptmux quota`)",
    ),
    503: (
        ExitCode.FAILED,
        "waiting does not help: the stored file is damaged; push the prompt again, or restore a backup of the store",
    ),
}
_HINTS = {
    400: "`promptmux COMMAND --help` tells what may be given",
    401: "give a key with --key or PROMPTMUX_KEY; `promptmux keys create` makes one",
    403: "use a key that has it: `promptmux keys create --scope …`, asked with an admin's key or with --data",
    404: "`promptmux ls` shows the tasks that this key sees",
    408: "try again over a faster connection; the server's body_timeout_s and upload_timeout_s are the limits",
    409: "`promptmux show TASK` tells what is active now",
    413: "the server's max_upload_bytes is the limit",
    415: "the file must be the adapter_model.safetensors that PEFT's save_pretrained wrote",
    422: "train the prompt on the backbone that the server runs (`curl URL/v1/models` names it)",
    429: "wait a moment, then run the command again",
    503: "wait a moment, then run the command again; URL/readyz tells whether the server is loading or draining",
}


class ServerClient:
    """Calls the server at `url`. Every failure ends the command with its exit code and a hint (`typer.Exit`)."""

    def __init__(self, url: str, key: str | None, *, transport: httpx.BaseTransport | None = None) -> None:
        self.url = url.rstrip("/")
        try:
            self._http = httpx.Client(
                base_url=self.url,
                headers={"Authorization": f"Bearer {key}"} if key else {},
                timeout=httpx.Timeout(60.0, connect=5.0),
                transport=transport,
            )
        except (httpx.InvalidURL, ValueError, TypeError) as error:
            fail(f"{url!r} is not an address: {error}", code=ExitCode.USAGE, hint=f"--url {DEFAULT_URL}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def upload(self, task: str, folder: Path, fields: Mapping[str, str], probes: Path | None = None) -> dict[str, Any]:
        """Uploads the prompt in `folder`; returns the version object. `fields` are the form's optional fields."""
        with contextlib.ExitStack() as stack:
            file, config = (stack.enter_context((folder / name).open("rb")) for name in (PROMPT_FILE, CONFIG_FILE))
            files = {
                "file": (PROMPT_FILE, file, "application/octet-stream"),
                "config": (CONFIG_FILE, config, "application/json"),
            }
            if probes is not None:
                files["probes"] = (probes.name, stack.enter_context(probes.open("rb")), "application/jsonl")
            response = self._send("POST", f"{_task_path(task)}/versions", data=dict(fields), files=files)
        return _as_object(response) | {"was_new": response.status_code == httpx.codes.CREATED}

    def tasks(self) -> Iterator[dict[str, Any]]:
        """All tasks of the caller, page by page."""
        yield from self._pages("/v1/tasks", "task")

    def models(self) -> list[dict[str, Any]]:
        """What the caller may put into `model`: the backbone, whose `id` is its `root`, and its tasks."""
        found = _as_object(self._send("GET", "/v1/models")).get("data")
        if not isinstance(found, list) or not all(isinstance(item, dict) and "id" in item for item in found):
            self._not_ours()
        return found

    def model(self, reference: str) -> dict[str, Any]:
        """A task, `task@version` or `task@sha256:<hex>` that can be called."""
        return _as_object(self._send("GET", f"/v1/models/{quote(reference)}"))

    def server_version(self) -> dict[str, Any]:
        """The server's version, and the backbone that it serves."""
        return _as_object(self._send("GET", "/version"))

    def versions(self, task: str) -> Iterator[dict[str, Any]]:
        """All versions of a task, page by page."""
        yield from self._pages(f"{_task_path(task)}/versions", "version")

    def task(self, task: str) -> dict[str, Any]:
        return _as_object(self._send("GET", _task_path(task)))

    def active_version(self, task: str) -> int:
        """The version that answers; a task without one ends the command."""
        version = self.task(task).get("active_version")
        if not isinstance(version, int):
            fail(f"{task} has no active version", code=ExitCode.NOT_FOUND, hint=f"promptmux show {task}")
        return version

    def version(self, task: str, version: int) -> dict[str, Any]:
        return _as_object(self._send("GET", f"{_task_path(task)}/versions/{version}"))

    def update_task(self, task: str, change: Mapping[str, Any]) -> dict[str, Any]:
        """Changes all that is given, or nothing; returns the task object."""
        return _as_object(self._send("PATCH", _task_path(task), json=dict(change)))

    def rollback(self, task: str) -> dict[str, Any]:
        """Undoes the last activation; returns the task object."""
        return _as_object(self._send("POST", f"{_task_path(task)}/rollback"))

    def delete_task(self, task: str) -> None:
        self._send("DELETE", _task_path(task))

    def delete_version(self, task: str, version: int) -> None:
        self._send("DELETE", f"{_task_path(task)}/versions/{version}")

    def inspect(self, task: str, version: int, *, top: int, against: str | None) -> dict[str, Any]:
        query: dict[str, int | str] = {"top": top} | ({} if against is None else {"against": against})
        return _as_object(self._send("GET", f"{_task_path(task)}/versions/{version}/inspect", params=query))

    def compare(
        self,
        task: str,
        versions: Sequence[int | None],
        *,
        inputs: Sequence[Mapping[str, str]] | None,
        max_tokens: int,
    ) -> dict[str, Any]:
        """Both versions (None: the bare backbone) answer the same inputs (None: the probes kept with them)."""
        body: dict[str, Any] = {"versions": list(versions), "max_tokens": max_tokens}
        if inputs is not None:
            body["inputs"] = list(inputs)
        return _as_object(self._send("POST", f"{_task_path(task)}/compare", json=body, timeout=_SLOW))

    def keys(self) -> Iterator[dict[str, Any]]:
        """All keys, revoked ones too; never their secrets."""
        yield from self._pages("/v1/keys", "id")

    def create_key(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        return _as_object(self._send("POST", "/v1/keys", json=dict(fields)))

    def revoke_key(self, key_id: str, *, force: bool) -> dict[str, Any]:
        query = {"force": "true"} if force else {}
        return _as_object(self._send("DELETE", f"/v1/keys/{_segment(key_id)}", params=query))

    def tenants(self) -> Iterator[dict[str, Any]]:
        yield from self._pages("/v1/tenants", "tenant")

    def quota(self, tenant: str | None) -> dict[str, Any]:
        """A tenant's limits, those in force, and what it uses; None: the key's own tenant."""
        return _as_object(self._send("GET", "/v1/quota" if tenant is None else _quota_path(tenant)))

    def set_quota(self, tenant: str, limits: Mapping[str, int | None]) -> dict[str, Any]:
        """Replaces all limits of the tenant."""
        return _as_object(self._send("PUT", _quota_path(tenant), json=dict(limits)))

    def reload(self) -> dict[str, Any]:
        return _as_object(self._send("POST", "/v1/reload"))

    def audit(self, query: Mapping[str, str | int]) -> list[dict[str, Any]]:
        """Entries of the audit log, oldest first."""
        lines = self._send("GET", "/v1/audit", params=dict(query)).text.splitlines()
        try:
            entries = [json.loads(line) for line in lines if line]
        except ValueError:
            self._not_ours()
        if not all(isinstance(entry, dict) and isinstance(entry.get("id"), int) for entry in entries):
            self._not_ours()
        return entries

    def metrics(self) -> str:
        """Prometheus' text."""
        return self._send("GET", "/metrics").text

    def download(self, task: str, version: int) -> tuple[bytes, bytes]:
        """The prompt file and its configuration as uploaded; the file is checked against its digest."""
        expected = str(self.version(task, version).get("digest", ""))
        base = f"{_task_path(task)}/versions/{version}"
        file = self._send("GET", f"{base}/file").content
        found = hashlib.sha256(file).hexdigest()
        if found != expected.removeprefix("sha256:"):
            fail(f"{task}@{version} arrived with digest {found}, not {expected}", hint="run the command again")
        return file, self._send("GET", f"{base}/config").content

    def _pages(self, path: str, name: str) -> Iterator[dict[str, Any]]:
        after: str | None = None
        while True:
            query: dict[str, str | int] = {"limit": _PAGE} if after is None else {"limit": _PAGE, "after": after}
            page = _as_object(self._send("GET", path, params=query))
            items = page.get("data")
            if not isinstance(items, list) or not all(isinstance(item, dict) and name in item for item in items):
                self._not_ours()
            yield from items
            if not page.get("has_more") or not items:
                return
            after = str(items[-1][name])

    def _send(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **arguments)
        except httpx.UnsupportedProtocol:
            fail(f"{self.url!r} is not an address", code=ExitCode.USAGE, hint=f"--url {DEFAULT_URL}")
        except httpx.TransportError as error:
            fail(
                f"no server answers at {self.url} ({error or type(error).__name__})",
                code=ExitCode.UNREACHABLE,
                hint=UNREACHABLE_HINT,
            )
        if not response.is_success:
            code = EXIT_CODES.get(response.status_code, ExitCode.FAILED)
            hint = _HINTS.get(response.status_code, "the server's log has a line with this request's id")
            is_for_ever = response.headers.get("x-should-retry") == "false"
            if is_for_ever and response.status_code in _FOR_EVER:
                code, hint = _FOR_EVER[response.status_code]
            fail(_error_message(response), code=code, hint=hint.replace("URL", self.url))
        return response

    def _not_ours(self) -> NoReturn:
        fail(f"{self.url} answers, but not as a promptmux server", code=ExitCode.UNREACHABLE, hint="check --url")


def _segment(name: str) -> str:
    return quote(name, safe="")


def _task_path(task: str) -> str:
    return f"/v1/tasks/{_segment(task)}"


def _quota_path(tenant: str) -> str:
    return f"/v1/tenants/{_segment(tenant)}/quota"


def _as_object(response: httpx.Response) -> dict[str, Any]:
    try:
        body = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        fail(f"{response.url} answers, but not as a promptmux server", code=ExitCode.UNREACHABLE, hint="check --url")
    return body


def _error_message(response: httpx.Response) -> str:
    try:
        error = response.json()["error"]
        message, param = str(error["message"]), error.get("param")
    except (ValueError, KeyError, TypeError, AttributeError):
        message, param = response.reason_phrase, None
    where = f" (field {param})" if param else ""
    request_id = response.headers.get("x-request-id")
    tail = f" [request {request_id}]" if request_id and response.is_server_error else ""
    return f"{message}{where} (HTTP {response.status_code}){tail}"
