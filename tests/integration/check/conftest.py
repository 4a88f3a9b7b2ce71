"""The server runs in the process of the tests: its log lines must not mix with what the command prints."""

from tests.unit.cli.conftest import _quiet, clean_environment

__all__ = ["_quiet", "clean_environment"]
