"""`promptmux doctor`: what would be slow or wrong here, as a table and an exit code."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.cli.connection import Json, Key, resolve_connection
from server.cli.http_client import DEFAULT_URL
from server.cli.output import ExitCode, is_terminal, print_json, print_table, say, to_stderr
from server.cli.setting_flags import ConfigFile, resolve_or_fail, with_setting_flags
from server.settings import Settings

if TYPE_CHECKING:
    from server.doctor.findings import Finding


@with_setting_flags
def doctor(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="As for serve.", show_default=False)] = None,
    url: Annotated[
        str | None, typer.Option(metavar="URL", help=f"Look at a running server too, such as {DEFAULT_URL}.")
    ] = None,
    key: Key = None,
    config: ConfigFile = None,
    as_json: Json = False,
    **flags: Any,
) -> None:
    """Look at the machine, the folders and the backbone as serve would use them; say what is slow or wrong.

    Takes the settings of serve. Nothing is changed. Exits with 1 when something is wrong.
    """
    settings = resolve_or_fail({"model": model, **flags}, config).settings
    findings: list[Finding] = []
    if is_terminal() and not as_json:
        with to_stderr().status("looking"):
            findings.extend(_look(settings, url, key))
    else:
        findings.extend(_look(settings, url, key))
    if as_json:
        print_json([finding.to_json() for finding in findings])
    else:
        _show(findings)
    if any(finding.status == "wrong" for finding in findings):
        raise typer.Exit(ExitCode.FAILED)


def _look(settings: Settings, url: str | None, key: str | None) -> "Iterator[Finding]":
    from server.doctor import backbone, compiler, machine, packages, remote, storage
    from server.doctor.findings import look

    checks = {
        "torch": packages.check_torch,
        "cpu": machine.check_cpu,
        "threads": machine.check_threads,
        "compiler": compiler.check_compiler,
        "backbone": backbone.check_backbone,
        "data folder": storage.check_data_folder,
        "data folder lock": storage.check_holder,
        "store": storage.check_store,
        "cache folder": storage.check_cache_folder,
        "temporary folder": machine.check_temporary_folder,
        "port": storage.check_port,
        "open files": machine.check_open_files,
        "clock": machine.check_clock,
        "peft": packages.check_tuning,
    }
    for name, check in checks.items():
        yield from look(name, lambda check=check: check(settings))  # type: ignore[misc]
    if url is not None:
        address, secret = resolve_connection(url, key)
        yield from look("server", lambda: remote.check_server(address, secret))


def _show(findings: "list[Finding]") -> None:
    print_table(("", "what", "how it is"), [(item.status, item.name, item.detail) for item in findings])
    for item in findings:
        if item.advice is not None and item.status != "ok":
            say(f"{item.status}: {item.name}: {item.advice}")
    wrong, slow = (sum(item.status == status for item in findings) for status in ("wrong", "slow"))
    say(f"{wrong} wrong, {slow} slow, {len(findings) - wrong - slow} ok")
