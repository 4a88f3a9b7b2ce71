"""JSON from strangers: UTF-8, one object, no duplicate key at any depth, no number that is not finite."""

import json
import math
from typing import Any, NoReturn


class StrictJsonError(ValueError):
    """Why the text was refused, in words fit for a client."""


def parse_object(data: bytes) -> dict[str, Any]:
    """The object in `data`. The caller bounds its size. Raises StrictJsonError."""
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique_object,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
        )
    except StrictJsonError:
        raise
    except UnicodeDecodeError as error:
        raise StrictJsonError("is not UTF-8 text") from error
    except json.JSONDecodeError as error:
        raise StrictJsonError(f"is not JSON: {error.msg} at character {error.pos}") from error
    except RecursionError as error:
        raise StrictJsonError("is nested too deeply") from error
    except ValueError as error:
        raise StrictJsonError("holds an integer with too many digits") from error
    if not isinstance(value, dict):
        raise StrictJsonError("is not a JSON object")
    return value


def _unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise StrictJsonError("holds a duplicate key")
    return value


def _refuse_constant(literal: str) -> NoReturn:
    raise StrictJsonError(f"holds the number {literal}")


def _finite_float(literal: str) -> float:
    value = float(literal)
    if not math.isfinite(value):
        raise StrictJsonError("holds a number that is not finite")
    return value
