"""The commands that make, list and revoke API keys: at a running server, or with `--data` on the store itself.

The first key of a server that is not running is made on its store; servers may also be running beside that.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prompt_store.names import DEFAULT_TENANT
from server.cli.connection import Json, Key, Url, connect
from server.cli.output import ExitCode, fail, print_json, print_table, say, when

if TYPE_CHECKING:
    from prompt_store.manifest import Key as StoredKey
    from prompt_store.store import PromptStore

app = typer.Typer(no_args_is_help=True, help="Make, list and revoke API keys.")

Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        "--data-dir",
        metavar="DIR|URL",
        help="Work on the store in this folder, or at this URL of PostgreSQL, without a server.",
        show_default="none: ask the server",
    ),
]


@app.command()
def create(
    tenant: Annotated[
        str | None,
        typer.Option(help="Who owns the tasks that this key sees and makes.", show_default="the key's own, or default"),
    ] = None,
    scope: Annotated[
        list[str] | None,
        typer.Option(help="What it may do: infer, write or admin. May be given more than once.", show_default="infer"),
    ] = None,
    label: Annotated[str, typer.Option(help="A note for people.")] = "",
    data: Data = None,
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Make a key. The secret is printed once, on stdout; the store keeps its hash alone."""
    scopes = sorted(set(scope or ["infer"]))
    if data is not None:
        with _open_store(data) as store:
            stored, secret = store.create_key(tenant or DEFAULT_TENANT, frozenset(scopes), label)
        made = _describe(stored) | {"secret": secret}
    else:
        with connect(url, key) as client:
            made = client.create_key({"tenant": tenant, "scopes": scopes, "label": label})
    if as_json:
        print_json(made)
        return
    say(f"key {made.get('id')} of tenant {made.get('tenant')} ({', '.join(scopes)}); keep it, it is not shown again:")
    typer.echo(made.get("secret"))


@app.command("ls")
def list_keys(data: Data = None, url: Url = None, key: Key = None, as_json: Json = False) -> None:
    """List keys, revoked ones too; never their secrets."""
    keys: Sequence[dict[str, Any]]
    if data is not None:
        with _open_store(data, is_new=False) as store:
            keys = [_describe(stored) for stored in store.list_keys()]
    else:
        with connect(url, key) as client:
            keys = list(client.keys())
    if as_json:
        print_json(keys)
        return
    if not keys:
        say("no keys: everyone who reaches the server is tenant `default`, and it listens on loopback only")
        return
    print_table(
        ("id", "tenant", "scopes", "label", "created", "revoked"),
        [
            (
                item["id"],
                item.get("tenant"),
                ",".join(item.get("scopes") or ()),
                item.get("label"),
                when(item.get("created")),
                when(item.get("revoked")),
            )
            for item in keys
        ],
    )


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As `promptmux keys ls` shows it.")],
    force: Annotated[
        bool, typer.Option("--force", help="Also if no other key of the server has the scope admin.")
    ] = False,
    data: Data = None,
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Revoke a key: a running server refuses it within seconds."""
    if data is not None:
        with _open_store(data, is_new=False) as store:
            store.revoke_key(key_id)
    else:
        with connect(url, key) as client:
            client.revoke_key(key_id, force=force)
    if as_json:
        print_json({"id": key_id, "revoked": True})
        return
    say(f"key {key_id} is revoked")


@contextmanager
def _open_store(data: str, *, is_new: bool = True) -> "Iterator[PromptStore]":
    """The store beside whoever serves it, made if it `is_new`. Its errors end the command."""
    from prompt_store.errors import InvalidValue, KeyNotFound, PromptStoreError, StorageUnavailable
    from prompt_store.folder import CATALOG_FILE
    from prompt_store.location import read_location, show_location
    from prompt_store.store import PromptStore

    hint = "--data DIR, the folder that the server runs on, or the URL that is its setting `store`"
    try:
        location = read_location(data)
        if isinstance(location, Path) and not is_new and not (location / CATALOG_FILE).exists():
            fail(f"there is no store in {location}", code=ExitCode.NOT_FOUND, hint=hint)
        with PromptStore.open(location, exclusive=False) as store:
            yield store
    except InvalidValue as error:
        fail(error.message, code=ExitCode.USAGE)
    except KeyNotFound as error:
        fail(error.message, code=ExitCode.NOT_FOUND, hint=f"promptmux keys ls --data {show_location(location)}")
    except StorageUnavailable as error:
        fail(error.message, code=ExitCode.UNREACHABLE, hint=hint)
    except PromptStoreError as error:
        fail(error.message, hint=hint)


def _describe(key: "StoredKey") -> dict[str, Any]:
    return {
        "id": key.id,
        "tenant": key.tenant,
        "scopes": sorted(key.scopes),
        "label": key.label,
        "created": int(key.created_at.timestamp()),
        "revoked": None if key.revoked_at is None else int(key.revoked_at.timestamp()),
    }
