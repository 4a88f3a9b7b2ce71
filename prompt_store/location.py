"""Where a store is: a folder, or the URL of a PostgreSQL database. Read, checked, and shown without its password."""

from pathlib import Path

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from prompt_store.errors import InvalidValue

SCHEME = "postgresql"
_DRIVER = "postgresql+psycopg"
# Of libpq's parameters those that are secrets.
_SECRETS = ("password", "sslpassword", "oauth_client_secret", "scram_client_key", "scram_server_key")

Location = Path | str
"""A folder, or the text of a URL."""


def parse_store_url(text: str) -> URL:
    """The URL of a shared store. Raises InvalidValue, whose message never holds the password."""
    if text.count("@") > 1:
        # Where such a password ends is anybody's guess, and what is taken for the host would be shown.
        raise InvalidValue(
            "The store's URL has more than one @: those in a name or a password are written %40.", param="store"
        )
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise InvalidValue(
            "The store is not a URL: postgresql://USER:PASSWORD@HOST:PORT/DATABASE is expected.", param="store"
        ) from None
    if url.drivername not in (SCHEME, _DRIVER):
        raise InvalidValue(
            "The store's URL must begin with postgresql://; without one the store is in the data folder.",
            param="store",
        )
    if not url.database:
        raise InvalidValue("The store's URL names no database.", param="store")
    return url.set(drivername=_DRIVER)


def read_location(text: str) -> Location:
    """What a person wrote: a URL of PostgreSQL, or a folder. Raises InvalidValue."""
    if "://" not in text:
        return Path(text).expanduser()
    parse_store_url(text)
    return text


def show_location(location: Location) -> str:
    """For people and logs: a password, and any secret among the parameters, is hidden."""
    if isinstance(location, Path):
        return str(location)
    url = parse_store_url(location).set(drivername=SCHEME)
    url = url.update_query_dict({name: "***" for name in _SECRETS if name in url.query})
    return url.render_as_string(hide_password=True)
