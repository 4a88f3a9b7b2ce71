"""The self-check's tests use the command line's live server."""

from tests.unit.cli.conftest import _quiet, clean_environment, live

__all__ = ["_quiet", "clean_environment", "live"]
