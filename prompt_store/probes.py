"""A version's probe set: inputs and the answers expected to them, as JSON lines of `{"prompt": …, "completion": …}`.

Pure functions over bytes. Who asks a model the probes is not known here.
"""

from dataclasses import dataclass

from prompt_store.errors import InvalidValue
from prompt_store.intake import check_size
from prompt_store.manifest import StoreLimits
from prompt_store.names import check_text
from prompt_store.strict_json import StrictJsonError, parse_object

MAX_TEXT_CHARS = 32_768
_FIELDS = {"prompt", "completion"}


@dataclass(frozen=True, slots=True)
class Probe:
    prompt: str
    completion: str


def read_probes(data: bytes, limits: StoreLimits) -> tuple[Probe, ...]:
    """At least one probe; empty lines are passed over. Raises InvalidValue, naming the line, or FileTooLarge."""
    check_size("probes", data, limits.max_probes_bytes, "probes")
    probes: list[Probe] = []
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        if len(probes) == limits.max_probes:
            raise InvalidValue(f"probes has more than the {limits.max_probes} lines that are allowed.", param="probes")
        probes.append(_read_probe(line, number))
    if not probes:
        raise InvalidValue("probes holds no line.", param="probes")
    return tuple(probes)


def _read_probe(line: bytes, number: int) -> Probe:
    try:
        fields = parse_object(line)
    except StrictJsonError as error:
        raise InvalidValue(f"Line {number} of probes {error}.", param="probes") from error
    if set(fields) != _FIELDS or not all(isinstance(text, str) and text for text in fields.values()):
        raise InvalidValue(
            f"Line {number} of probes must have the fields prompt and completion, texts that are not empty, and no "
            "others.",
            param="probes",
        )
    for name, text in fields.items():
        check_text(text, f"{name} in line {number} of probes", MAX_TEXT_CHARS)
    return Probe(**fields)
