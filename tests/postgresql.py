"""A real PostgreSQL for tests: a cluster of its own in a temporary folder, reached over a Unix socket alone.

The binaries are Debian's (`apt-get install postgresql-15`; `make test` and `.ci/run` do so where they may) or those on
the PATH. Where there are none, tests that need them fail and say so, unless TEST_POSTGRESQL=off leaves them out.
"""

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

MIN_VERSION = 15
SWITCH = "TEST_POSTGRESQL"
_START_TIMEOUT_S = 60
_OWNER = "postgres"


class PostgresServer:
    """Runs as another user where the tests run as root, which PostgreSQL refuses.

    `durable`: its commits wait for the disk, as those of one that matters do; tests have no need of it.
    """

    def __init__(self, *, durable: bool = False) -> None:
        self._durable = "on" if durable else "off"
        self._bin = find_binaries()
        self.folder = Path(tempfile.mkdtemp(prefix="pm-pg-"))
        self._data = self.folder / "data"
        self._names = itertools.count()
        self._process: subprocess.Popen[bytes] | None = None
        if os.geteuid() == 0:
            shutil.chown(self.folder, _OWNER)
        # A language's collation on purpose: pages of names must not depend on it.
        locale = ["--locale-provider=icu", "--icu-locale=en", "--locale=C.UTF-8", "--encoding=UTF8"]
        self._run("initdb", "--auth=trust", "--username=promptmux", "--no-sync", *locale, "-D", str(self._data))

    def start(self) -> None:
        """Returns when it takes connections. What it made durable before is there."""
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(self.folder),
            "fsync": self._durable,
            "full_page_writes": self._durable,
            "max_connections": "60",
            "shared_buffers": "32MB",
            "autovacuum": "off",
        }
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        log = (self.folder / "log").open("ab")
        command = [*as_owner(), str(self._bin / "postgres"), "-D", str(self._data), *options]
        self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd="/")
        log.close()
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL did not start: {(self.folder / 'log').read_text()[-2000:]}")
            time.sleep(0.02)

    def stop(self) -> None:
        """As a restart by an administrator does: connections are ended. May be called twice."""
        if self._process is not None:
            # "Fast": its other modes wait for clients, or leave a recovery to the next start.
            self._process.send_signal(signal.SIGINT)
            self._process.wait(_START_TIMEOUT_S)
            self._process = None

    def remove(self) -> None:
        if self._process is not None:
            # Nothing of it is wanted any more: not even a last checkpoint.
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(_START_TIMEOUT_S)
            self._process = None
        shutil.rmtree(self.folder)

    def url(self, database: str) -> str:
        return f"postgresql://promptmux@/{database}?host={self.folder}"

    def execute(self, statement: str, database: str = "postgres") -> str:
        """What psql prints of it, without headings."""
        arguments = ["-h", str(self.folder), "-U", "promptmux", "-d", database, "-XAtqc", statement]
        return self._run("psql", *arguments)

    def create_database(self, template: str = "template1") -> str:
        """The name of a fresh one."""
        name = f"t{next(self._names)}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY FILE_COPY")
        return name

    @contextlib.contextmanager
    def database(self, template: str = "template1") -> Iterator[str]:
        """The URL of a fresh database, which is dropped at the end."""
        name = self.create_database(template)
        try:
            yield self.url(name)
        finally:
            self.execute(f"DROP DATABASE {name} WITH (FORCE)")

    def _is_ready(self) -> bool:
        command = [str(self._bin / "pg_isready"), "-q", "-h", str(self.folder)]
        return subprocess.run(command, check=False, cwd="/").returncode == 0

    def _run(self, program: str, *arguments: str) -> str:
        command = [*as_owner(), str(self._bin / program), *arguments]
        done = subprocess.run(command, check=False, cwd="/", capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{program} failed: {done.stderr}")
        return done.stdout


def as_owner() -> list[str]:
    """What runs a command as the user that PostgreSQL accepts, and ends it when this process dies."""
    if os.geteuid() != 0:
        return ["setpriv", "--pdeathsig", "INT"]
    return ["setpriv", "--reuid", _OWNER, "--regid", _OWNER, "--clear-groups", "--pdeathsig", "INT"]


def find_binaries() -> Path:
    """The folder of the newest PostgreSQL here. Fails the test where there is none, or skips it if told to."""
    if os.environ.get(SWITCH) == "off":
        pytest.skip(f"{SWITCH}=off leaves tests of PostgreSQL out")
    found: dict[int, Path] = {}
    for folder in Path("/usr/lib/postgresql").glob("*/bin"):
        if folder.parent.name.isdigit() and (folder / "initdb").exists():
            found[int(folder.parent.name)] = folder
    on_path = shutil.which("postgres")
    if on_path is not None and (Path(on_path).parent / "initdb").exists():
        text = subprocess.run([on_path, "--version"], capture_output=True, text=True, check=True).stdout
        found.setdefault(int(re.findall(r"\d+", text)[0]), Path(on_path).parent)
    usable = [version for version in found if version >= MIN_VERSION]
    if not usable:
        pytest.fail(
            f"PostgreSQL {MIN_VERSION} or later is not installed, and these tests need one to start: "
            f"apt-get install postgresql-{MIN_VERSION}. {SWITCH}=off leaves them out."
        )
    return found[max(usable)]
