"""docs/api.md is the contract: its tables of routes and errors are what the code has, no more and no less."""

import re
from collections.abc import Iterator
from pathlib import Path

from fastapi.routing import APIRoute

from server.api.auth import OPEN_PATHS, required_scope
from server.app import ROUTERS
from server.errors import PromptmuxError

PAGE = (Path(__file__).resolve().parents[2] / "docs/api.md").read_text(encoding="utf-8")


def documented_routes() -> dict[tuple[str, str], str]:
    rows = re.findall(r"^\| `([A-Z]+) (/[^`]*)` \| (\w+) \|", PAGE, re.MULTILINE)
    assert len(rows) == len({row[:2] for row in rows}), "a route is there twice"
    return {(method, path): scope for method, path, scope in rows}


def served_routes() -> dict[tuple[str, str], str]:
    found: dict[tuple[str, str], str] = {}
    for router in ROUTERS:
        for route in router.routes:
            assert isinstance(route, APIRoute)
            for method in route.methods:
                path = re.sub(r":\w+\}", "}", route.path)
                scope = required_scope(method, re.sub(r"\{[^}]*\}", "1", path))
                found[method, path] = "none" if path in OPEN_PATHS else str(scope)
    return found


def errors_below(base: type[PromptmuxError]) -> Iterator[type[PromptmuxError]]:
    yield base
    for child in base.__subclasses__():
        if child.__module__ == PromptmuxError.__module__:
            yield from errors_below(child)


def test_every_route_is_documented_with_its_scope_and_every_documented_route_exists() -> None:
    assert documented_routes() == served_routes()


def test_the_table_of_errors_is_the_tree_of_errors() -> None:
    documented = set(re.findall(r"^\| (\d{3}) \| `(\w+)` \| `(\w+)` \|", PAGE, re.MULTILINE))
    raised = {(str(e.status), e.error_type, e.default_code) for e in errors_below(PromptmuxError)}

    assert documented == raised


def test_headers_that_tell_whether_to_try_again_are_documented() -> None:
    for error in errors_below(PromptmuxError):
        row = re.search(rf"^\| {error.status} \| `\w+` \| `{error.default_code}` \|.*$", PAGE, re.MULTILINE)
        assert row is not None, error.__name__
        documented = set(re.findall(r"`([A-Za-z-]+)(?:: false)?`", row.group().rsplit("|", 2)[1]))
        assert documented == set(error("x").headers()), error.__name__


def test_the_tree_drawn_in_the_module_of_errors_is_the_tree() -> None:
    import server.errors

    drawn = re.findall(r"(\w*Error) +(\d{3}) (\w+)", server.errors.__doc__ or "")

    assert set(drawn) == {(e.__name__, str(e.status), e.default_code) for e in errors_below(PromptmuxError)}
