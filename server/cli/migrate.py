"""`promptmux migrate`: moves a whole store from a folder to PostgreSQL, or back, without a server."""

from pathlib import Path
from typing import Annotated

import typer

from server.cli.connection import Json
from server.cli.output import ExitCode, fail, is_terminal, print_json, print_table, say, to_stderr

_WHERE = "a store's folder (--data-dir), or postgresql://USER:PASSWORD@HOST/DATABASE"


def migrate(
    source: Annotated[str, typer.Option("--from", metavar="DIR|URL", help=f"Where it is: {_WHERE}.")],
    target: Annotated[str, typer.Option("--to", metavar="DIR|URL", help="Where it is to go: the same. Must be empty.")],
    as_json: Json = False,
) -> None:
    """Copy a store to another place: from its folder to PostgreSQL, or back.

    Everything or nothing: prompts, their digests verified, history, keys, quotas, logs, training files and jobs. The
    place to copy to must be empty, and the one to copy from must not be served from a folder meanwhile; where it is in
    PostgreSQL, servers go on answering, and changes are refused. What was there stays.

    A password is better given by ~/.pgpass or PGPASSWORD than on the command line, where other users see it.
    """
    from prompt_store.errors import InvalidValue, PromptCorrupt, PromptStoreError, StorageUnavailable, StoreInUse
    from prompt_store.folder import CATALOG_FILE
    from prompt_store.location import read_location, show_location
    from prompt_store.transfer import transfer

    try:
        old, new = read_location(source), read_location(target)
        if isinstance(old, Path) and not (old / CATALOG_FILE).exists():
            # Opening it would make one.
            fail(f"there is no store in {old}", code=ExitCode.NOT_FOUND, hint="--from DIR, a server's data_dir")
        if is_terminal() and not as_json:
            with to_stderr().status("copying") as status:
                done = transfer(
                    old, new, progress=lambda what, number, total: status.update(f"copying {what} {number}/{total}")
                )
        else:
            done = transfer(old, new)
    except InvalidValue as error:
        fail(error.message, code=ExitCode.USAGE, hint="promptmux migrate --from DIR --to postgresql://HOST/DATABASE")
    except StoreInUse as error:
        fail(error.message, code=ExitCode.BUSY)
    except StorageUnavailable as error:
        fail(error.message, code=ExitCode.UNREACHABLE, hint="psql URL, which says more about what is wrong")
    except PromptCorrupt as error:
        # A version that is asked for is quarantined, and only then does an upload of the same file repair it.
        hint = "delete what needs those bytes; or call that version once and upload its file again; then copy"
        fail(f"{error.message} Nothing was copied.", hint=hint)
    except PromptStoreError as error:
        fail(error.message)
    if as_json:
        print_json(
            {
                "from": show_location(old),
                "to": show_location(new),
                "rows": done.num_rows,
                "blobs": done.num_blobs,
                "bytes": done.num_bytes,
                "damaged": list(done.damaged),
            }
        )
        return
    print_table(("table", "rows"), [*done.num_rows.items(), ("files of prompts and examples", done.num_blobs)])
    say(f"copied to {show_location(new)}; every digest was verified ({done.num_bytes} bytes)")
    for digest in done.damaged:
        say(f"left out: the bytes of sha256:{digest}, which are damaged; its versions are quarantined")
