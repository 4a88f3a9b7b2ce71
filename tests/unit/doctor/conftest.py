"""The doctor reads variables and a file at home; those of whoever runs the tests do not count."""

from tests.unit.cli.conftest import clean_environment

__all__ = ["clean_environment"]
