"""A small server that speaks the routes of `/v1/tasks` over a real socket, for the commands that talk to one."""

import hashlib
import json
from dataclasses import dataclass, field
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, urlsplit

PAGE = 2


@dataclass
class TaskServer:
    """Tasks held in memory. `refuse` makes every request fail with that status and error body."""

    url: str = ""
    key: str | None = None
    refuse: tuple[int, dict[str, Any] | bytes] | None = None
    tasks: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    files: dict[str, tuple[bytes, bytes]] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    fields: dict[str, str] = field(default_factory=dict)

    def active(self, task: str) -> int | None:
        return next((item["version"] for item in self.tasks[task] if item["state"] == "active"), None)

    def view(self, task: str) -> dict[str, Any]:
        return {
            "object": "task",
            "task": task,
            "tenant": "default",
            "active_version": self.active(task),
            "pinned": False,
            "num_versions": len(self.tasks[task]),
            "created": 1_750_000_000,
        }

    def add(self, task: str, file: bytes, config: bytes, *, activate: bool = True) -> dict[str, Any]:
        versions = self.tasks.setdefault(task, [])
        if activate:
            for item in versions:
                item["state"] = "inactive"
        version = {
            "object": "prompt_version",
            "task": task,
            "version": len(versions) + 1,
            "digest": hashlib.sha256(file).hexdigest(),
            "peft_type": "PROMPT_TUNING",
            "num_virtual_tokens": 20,
            "bytes": len(file),
            "created": 1_750_000_000,
            "state": "active" if activate else "inactive",
            "warnings": ["few virtual tokens"],
        }
        versions.append(version)
        self.files[f"{task}/{version['version']}"] = (file, config)
        return version


class TaskHandler(BaseHTTPRequestHandler):
    state: TaskServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, status: int, body: Any) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("x-request-id", "req-7")
        self.end_headers()
        self.wfile.write(content)

    def fail(self, status: int, message: str, param: str | None = None) -> None:
        self.answer(status, {"error": {"message": message, "type": "t", "param": param, "code": "c"}})

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        split = urlsplit(self.path)
        self.state.requests.append((self.command, split.path))
        if self.state.refuse is not None:
            self.answer(*self.state.refuse)
            return
        if self.state.key is not None and self.headers.get("Authorization") != f"Bearer {self.state.key}":
            self.fail(401, "No API key was given.")
            return
        parts = split.path.removeprefix("/v1/tasks").strip("/").split("/")
        if parts == [""]:
            self.page([self.state.view(task) for task in sorted(self.state.tasks)], parse_qs(split.query), "task")
        elif self.command == "POST":
            self.upload(parts[0], body)
        elif parts[0] not in self.state.tasks:
            self.fail(404, f"The task {parts[0]!r} does not exist.")
        else:
            self.on_task(parts, body, parse_qs(split.query))

    do_GET = do_POST = do_PATCH = do_DELETE = handle_any  # noqa: N815

    def page(self, items: list[dict[str, Any]], query: dict[str, list[str]], name: str) -> None:
        after = query.get("after", [None])[0]
        names = [str(item[name]) for item in items]
        rest = items if after is None else items[names.index(after) + 1 :]
        self.answer(200, {"object": "list", "data": rest[:PAGE], "has_more": len(rest) > PAGE})

    def upload(self, task: str, body: bytes) -> None:
        head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        form = {
            str(part.get_param("name", header="content-disposition")): part.get_payload(decode=True)
            for part in message_from_bytes(head + body).walk()
            if not part.is_multipart()
        }
        file, config = form.pop("file"), form.pop("config")
        self.state.fields = {name: value.decode() for name, value in form.items()}
        self.answer(201, self.state.add(task, file, config, activate=form["activate"] == b"true"))

    def on_task(self, parts: list[str], body: bytes, query: dict[str, list[str]]) -> None:
        task = parts[0]
        if self.command == "DELETE":
            del self.state.tasks[task]
            self.answer(200, {"deleted": True})
        elif self.command == "PATCH":
            change = json.loads(body)
            if "expected_version" in change and change["expected_version"] != self.state.active(task):
                self.fail(409, "Another version is active.")
                return
            for item in self.state.tasks[task]:
                item["state"] = "active" if item["version"] == change["active_version"] else "inactive"
            self.answer(200, self.state.view(task))
        elif len(parts) == 1:
            self.answer(200, self.state.view(task))
        elif len(parts) == 2:
            self.page(self.state.tasks[task][::-1], query, "version")
        elif f"{task}/{parts[2]}" not in self.state.files:
            self.fail(404, "no such version")
        elif len(parts) == 3:
            self.answer(200, self.state.tasks[task][int(parts[2]) - 1])
        else:
            self.answer(200, self.state.files[f"{task}/{parts[2]}"][parts[3] == "config"])
