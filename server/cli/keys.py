"""The commands that make, list and revoke API keys, on the store's folder; a server may be running beside them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from server.cli.output import ExitCode, fail, print_json, print_table, say
from server.cli.setting_flags import resolve_or_fail

if TYPE_CHECKING:
    from prompt_store.manifest import Key
    from prompt_store.store import PromptStore

app = typer.Typer(no_args_is_help=True, help="Make, list and revoke API keys.")

Data = Annotated[
    Path | None,
    typer.Option(
        "--data", "--data-dir", metavar="DIR", help="The store's folder.", show_default="the server's data_dir"
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def create(
    tenant: Annotated[str, typer.Option(help="Who owns the tasks that this key sees and makes.")] = "default",
    scope: Annotated[
        list[str] | None,
        typer.Option(help="What it may do: infer, write or admin. May be given more than once.", show_default="infer"),
    ] = None,
    label: Annotated[str, typer.Option(help="A note for people.")] = "",
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Make a key. The secret is printed once, on stdout; the store keeps its hash alone."""
    with _open_store(data) as store:
        key, secret = store.create_key(tenant, frozenset(scope or ["infer"]), label)
    if as_json:
        print_json(_describe(key) | {"secret": secret})
        return
    say(f"key {key.id} of tenant {key.tenant} ({', '.join(sorted(key.scopes))}); keep it, it is not shown again:")
    typer.echo(secret)


@app.command("ls")
def list_keys(data: Data = None, as_json: Json = False) -> None:
    """List keys, revoked ones too; never their secrets."""
    with _open_store(data) as store:
        keys = store.list_keys()
    if as_json:
        print_json([_describe(key) for key in keys])
        return
    if not keys:
        say("no keys: everyone who reaches the server is tenant `default`, and it listens on loopback only")
        return
    print_table(
        ("id", "tenant", "scopes", "label", "created", "revoked"),
        [(key.id, key.tenant, ",".join(sorted(key.scopes)), key.label, key.created_at, key.revoked_at) for key in keys],
    )


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As `promptmux keys ls` shows it.")],
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Revoke a key: a running server refuses it within seconds."""
    with _open_store(data) as store:
        store.revoke_key(key_id)
    if as_json:
        print_json({"id": key_id, "revoked": True})
        return
    say(f"key {key_id} is revoked")


@contextmanager
def _open_store(data: Path | None) -> "Iterator[PromptStore]":
    """The store beside whoever serves it. Its errors end the command."""
    from prompt_store.errors import InvalidValue, KeyNotFound, PromptStoreError
    from prompt_store.store import PromptStore

    root = resolve_or_fail({"data_dir": data}, None).settings.data_dir
    try:
        with PromptStore.open(root, exclusive=False) as store:
            yield store
    except InvalidValue as error:
        fail(error.message, code=ExitCode.USAGE)
    except KeyNotFound as error:
        fail(error.message, code=ExitCode.NOT_FOUND, hint="promptmux keys ls")
    except PromptStoreError as error:
        fail(error.message, hint="--data DIR, the folder that the server runs on")


def _describe(key: "Key") -> dict[str, object]:
    return {
        "id": key.id,
        "tenant": key.tenant,
        "scopes": sorted(key.scopes),
        "label": key.label,
        "created": int(key.created_at.timestamp()),
        "revoked": None if key.revoked_at is None else int(key.revoked_at.timestamp()),
    }
