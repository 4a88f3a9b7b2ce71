"""The type of the setting `store`: the URL of a shared store, checked when it is read and printed without its password.

SQLAlchemy, which reads URLs, is slow to import, and most commands have no need of it: it is imported for a URL alone.
"""

from typing import Annotated

from pydantic import AfterValidator, PlainSerializer, SecretStr


def _check(value: SecretStr) -> SecretStr:
    from prompt_store.errors import InvalidValue
    from prompt_store.location import parse_store_url

    try:
        parse_store_url(value.get_secret_value())
    except InvalidValue as error:
        raise ValueError(error.message) from None
    return value


def _show(value: SecretStr) -> str:
    from prompt_store.location import show_location

    return show_location(value.get_secret_value())


StoreUrl = Annotated[SecretStr, AfterValidator(_check), PlainSerializer(_show)]
