"""`promptmux reload`: a running server reads again what it can change while it runs."""

from server.cli.connection import Json, Key, Url, connect
from server.cli.output import print_json, say


def reload(url: Url = None, key: Key = None, as_json: Json = False) -> None:
    """Have a running server read its settings anew, as SIGHUP does. If any is wrong, the old ones stay in force."""
    with connect(url, key) as client:
        found = client.reload()
    if as_json:
        print_json(found)
        return
    changed, waiting = found.get("changed") or [], found.get("needs_restart") or []
    say(f"in force now: {', '.join(changed)}" if changed else "nothing has changed")
    if waiting:
        say(f"in force after a restart only: {', '.join(waiting)}")
