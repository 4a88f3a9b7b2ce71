"""A finding: what was looked at, how it is, and what to do."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "slow", "wrong"]


@dataclass(frozen=True, slots=True)
class Finding:
    """`slow`: it works, but not as well as it could. `wrong`: a server would not start, or not be safe."""

    name: str
    status: Status
    detail: str
    advice: str | None = None

    def to_json(self) -> dict[str, str | None]:
        return dataclasses.asdict(self)


def look(name: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """The findings of a check; one that fails unforeseen is a finding too, and keeps no other from running."""
    try:
        yield from check()
    except Exception as error:
        yield Finding(name, "wrong", f"could not be looked at: {type(error).__name__}: {error}")


def size_text(num_bytes: float) -> str:
    """Bytes as people write them."""
    for unit in ("B", "KiB", "MiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"
