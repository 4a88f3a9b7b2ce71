"""The commands about what a tenant may use: quota ls, show and set."""

from typing import Annotated, Any

import typer

from server.cli.connection import Json, Key, Url, connect
from server.cli.output import ExitCode, fail, print_json, print_table, say, when

app = typer.Typer(no_args_is_help=True, help="Look at and set what a tenant may use.")

LIMITS = (
    "requests_per_minute",
    "tokens_per_minute",
    "max_running_rows",
    "max_prompts",
    "max_prompt_bytes",
    "max_virtual_tokens",
)
_NO_LIMIT = "none"
# More than any server takes.
_MAX_DIGITS = 18

Tenant = Annotated[str, typer.Argument(metavar="TENANT", help="The tenant's name.")]

# What the server calls the use of each limit.
_USED = dict(
    zip(
        LIMITS,
        ("requests_per_minute", "tokens_per_minute", "running_rows", "prompts", "prompt_bytes", "virtual_tokens"),
        strict=True,
    )
)


def _option(help_text: str) -> Any:
    return typer.Option(metavar=f"N|{_NO_LIMIT}", help=help_text, show_default="as it is")


@app.command("ls")
def list_tenants(url: Url = None, key: Key = None, as_json: Json = False) -> None:
    """List the tenants that the server knows: what each uses, of how much."""
    with connect(url, key) as client:
        tenants = list(client.tenants())
    if as_json:
        print_json(tenants)
        return
    print_table(
        ("tenant", *(name.replace("_", " ") for name in LIMITS)),
        [(item["tenant"], *(_use_text(item, name) for name in LIMITS)) for item in tenants],
    )


@app.command()
def show(
    tenant: Annotated[
        str | None, typer.Argument(metavar="TENANT", help="The tenant's name. None: the key's own.", show_default=False)
    ] = None,
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Show a tenant's limits, and what it uses."""
    with connect(url, key) as client:
        found = client.quota(tenant)
    _report(found, as_json)


@app.command("set")
def set_limits(
    tenant: Tenant,
    requests_per_minute: Annotated[str | None, _option("Requests a minute.")] = None,
    tokens_per_minute: Annotated[str | None, _option("Tokens a minute, of prompts and of answers.")] = None,
    max_running_rows: Annotated[str | None, _option("Rows that run or wait at once.")] = None,
    max_prompts: Annotated[str | None, _option("Versions that it may keep.")] = None,
    max_prompt_bytes: Annotated[str | None, _option("Bytes of them together.")] = None,
    max_virtual_tokens: Annotated[str | None, _option("Virtual tokens of them together.")] = None,
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Set some of a tenant's own limits; those that are not given stay. `none`: the server's default holds."""
    given = dict(
        zip(
            LIMITS,
            (
                requests_per_minute,
                tokens_per_minute,
                max_running_rows,
                max_prompts,
                max_prompt_bytes,
                max_virtual_tokens,
            ),
            strict=True,
        )
    )
    changes = {name: _parse(name, value) for name, value in given.items() if value is not None}
    if not changes:
        fail("no limit is given", code=ExitCode.USAGE, hint=f"promptmux quota set {tenant} --requests-per-minute 600")
    with connect(url, key) as client:
        before = client.quota(tenant)
        found = client.set_quota(tenant, {name: before.get(name) for name in LIMITS} | changes)
    _report(found, as_json)


def _parse(name: str, value: str) -> int | None:
    if value == _NO_LIMIT:
        return None
    if not (value.isascii() and value.isdigit() and len(value) <= _MAX_DIGITS):
        flag = "--" + name.replace("_", "-")
        fail(f"{flag} {value[:80]} is neither a number nor `{_NO_LIMIT}`", code=ExitCode.USAGE, hint=f"{flag} 100")
    return int(value)


def _report(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    updated = when(found.get("updated"))
    say(f"tenant {found.get('tenant')}: " + (f"limits set {updated}" if updated else "no limits of its own"))
    in_force, usage = found.get("in_force") or {}, found.get("usage") or {}
    print_table(
        ("limit", "its own", "in force", "used"),
        [(name, _limit(found.get(name)), _limit(in_force.get(name)), usage.get(_USED[name])) for name in LIMITS],
    )


def _limit(value: int | None) -> int | str:
    return _NO_LIMIT if value is None else value


def _use_text(tenant: dict[str, Any], name: str) -> str:
    used = (tenant.get("usage") or {}).get(_USED[name])
    limit = (tenant.get("in_force") or {}).get(name)
    return str(used) if limit is None else f"{used} of {limit}"
