from pathlib import Path

import pytest

from prompt_store.errors import InvalidValue
from prompt_store.location import parse_store_url, read_location, show_location


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://host/db", "postgresql://host/db"),
        ("postgresql+psycopg://u@host:5433/db", "postgresql://u@host:5433/db"),
        ("postgresql://u:hunter2@host/db?sslmode=require", "postgresql://u:***@host/db?sslmode=require"),
        ("postgresql://u:hunt%40er2@host/db", "postgresql://u:***@host/db"),
        ("postgresql://u:hun/ter2@host/db", "postgresql://u:***@host/db"),
        ("postgresql://u:hun?ter2@host/db", "postgresql://u:***@host/db"),
        ("postgresql://u@/db?host=/run/pg&password=hunter2", "postgresql://u@/db?host=%2Frun%2Fpg&password=%2A%2A%2A"),
        ("postgresql://h/db?sslkey=a.key&sslpassword=hunter2", "postgresql://h/db?sslkey=a.key&sslpassword=%2A%2A%2A"),
    ],
)
def test_url_is_shown_without_its_password(url: str, shown: str) -> None:
    assert show_location(url) == shown


@pytest.mark.parametrize(
    "text",
    [
        "",
        "db",
        "mysql://u:hunter2@host/db",
        "postgresql://u:hunter2@host",
        "postgresql://u:hun@ter2@host/db",
        "postgresql://u:hunter2@host:port/db",
    ],
)
def test_what_is_no_url_of_a_database_is_refused_without_repeating_it(text: str) -> None:
    with pytest.raises(InvalidValue) as refused:
        parse_store_url(text)
    assert "hunter2" not in str(refused.value)
    assert "ter2" not in str(refused.value)


def test_text_without_a_scheme_is_a_folder() -> None:
    assert read_location("~/store") == Path.home() / "store"
    assert read_location("postgresql://host/db") == "postgresql://host/db"
    with pytest.raises(InvalidValue):
        read_location("sqlite:///x")
