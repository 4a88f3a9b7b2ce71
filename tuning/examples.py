"""Labelled examples: what they are, and how they are read from JSON lines.

Three formats, found by the first line of a file and kept to by all others: `{"prompt", "completion"}`, `{"text",
"label"}` and `{"messages": […]}`. Owns their limits and their errors, each with file, line and field. Refuses to know
splits (`tuning.splits`), tokens (`tuning.encoding`) and where a file came from.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from prompt_store.strict_json import StrictJsonError, parse_object

MAX_LINE_BYTES: Final = 4 * 1024 * 1024
MAX_EXAMPLES: Final = 1_000_000
MAX_TEXT_CHARS: Final = 1_000_000
MAX_LABEL_CHARS: Final = 200
MAX_LABELS: Final = 1000
MAX_MESSAGES: Final = 1000
MAX_PROBLEMS: Final = 20
# What a classified text becomes when no other template is given: the text as it is.
PLAIN_TEMPLATE: Final = "{text}"
ROLES: Final = ("system", "user", "assistant")

FORMATS: Final = 'one of {"prompt", "completion"}, {"text", "label"} and {"messages": [{"role", "content"}, …]}'


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong in a file. `line` counts from 1, and is None where the file as a whole is meant."""

    file: str
    line: int | None
    field: str | None
    message: str

    def __str__(self) -> str:
        where = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{where}: {self.message}" if self.field is None else f"{where}: {self.field}: {self.message}"


class DataError(ValueError):
    """Examples that cannot be used. `problems` are the first of what was found, at most MAX_PROBLEMS, in order."""

    def __init__(self, problems: Sequence[Problem], *, num_more: int = 0) -> None:
        self.problems = tuple(problems)
        self.num_more = num_more
        tail = [f"… and {num_more} more lines like these"] if num_more else []
        super().__init__("\n".join([*map(str, problems), *tail]))


def list_problems(problems: Iterable[Problem]) -> DataError:
    """The error that tells the first of them, by file and line."""
    ordered = sorted(problems, key=lambda problem: (problem.file, problem.line or 0))
    return DataError(ordered[:MAX_PROBLEMS], num_more=max(0, len(ordered) - MAX_PROBLEMS))


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """An example's token ids. The completion ends with the end-of-sequence token, and the loss is on it alone.

    `is_truncated`: the prompt has lost its beginning.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    is_truncated: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(frozen=True, slots=True)
class Example:
    """A text that a client sends and the answer that it should get.

    `label` is the class, for a completion that is one. `is_rendered`: the prompt comes from a chat template, which
    has written all special tokens itself. `file` and `line` say where it was read; they are no part of what it is.
    """

    prompt: str
    completion: str
    label: str | None = None
    is_rendered: bool = False
    file: str = field(default="", compare=False)
    line: int | None = field(default=None, compare=False)

    def problem(self, field_name: str | None, message: str) -> Problem:
        return Problem(self.file, self.line, field_name, message)


@dataclass(frozen=True, slots=True)
class TaskData:
    """A task's examples, split. `labels` in order of name, none for free text; `digest` is `tuning.splits`' own."""

    name: str
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    labels: tuple[str, ...]
    digest: str


class ChatTemplate(Protocol):
    """The one method of a tokenizer that chat examples need."""

    def apply_chat_template(self, conversation: Any, *, add_generation_prompt: bool, tokenize: bool) -> Any: ...


def label_completion(label: str) -> str:
    """The completion that a class stands for: words inside a line start with a space in most tokenizers."""
    return f" {label}"


def check_template(template: str) -> str:
    """Return the template of `{"text", "label"}` lines. Raises ValueError unless it holds `{text}` exactly once."""
    if template.count("{text}") != 1:
        raise ValueError("the template must hold {text} exactly once")
    return template


def read_examples(
    path: Path, *, template: str = PLAIN_TEMPLATE, tokenizer: ChatTemplate | None = None, name: str | None = None
) -> tuple[Example, ...]:
    """All examples of a file, in order; empty lines are passed over.

    `template` makes the prompt of a `{"text", "label"}` line. `tokenizer` renders messages; without one they are
    refused. `name` is what errors call the file (default: its path). Raises DataError with all that is wrong in it, as
    far as MAX_PROBLEMS.
    """
    name = str(path) if name is None else name
    try:
        with path.open("rb") as file:
            return parse_examples(_lines(file.readline), name, template=template, tokenizer=tokenizer)
    except OSError as error:
        raise DataError([Problem(name, None, None, f"cannot be read: {error.strerror}")]) from None


def parse_examples(
    lines: Iterable[bytes], name: str, *, template: str = PLAIN_TEMPLATE, tokenizer: ChatTemplate | None = None
) -> tuple[Example, ...]:
    """As `read_examples`, for lines that come from elsewhere. A line over MAX_LINE_BYTES may be cut off behind that."""
    check_template(template)
    parser = _Parser(name, template, tokenizer)
    examples: list[Example] = []
    problems: list[Problem] = []
    num_bad = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if len(examples) + num_bad == MAX_EXAMPLES:
            problems.append(Problem(name, number, None, f"has more than the {MAX_EXAMPLES} examples that are allowed"))
            break
        try:
            examples.append(parser.parse(line, number))
        except _Bad as bad:
            num_bad += 1
            if num_bad <= MAX_PROBLEMS:
                problems.append(Problem(name, number, bad.field, bad.message))
            if parser.format is None:
                # Nothing else can be said of lines whose format is not known.
                break
    if problems:
        raise DataError(problems, num_more=max(0, num_bad - MAX_PROBLEMS))
    if not examples:
        raise DataError([Problem(name, None, None, f"holds no example; write JSON lines, {FORMATS}")])
    labels = {example.label for example in examples} - {None}
    if len(labels) > MAX_LABELS:
        message = f"{len(labels)} different labels, at most {MAX_LABELS} are allowed; is this free text? then write it "
        raise DataError([Problem(name, None, "label", message + 'as {"prompt", "completion"}')])
    return tuple(examples)


class _Bad(Exception):  # noqa: N818 - never leaves this module
    def __init__(self, field_name: str | None, message: str) -> None:
        super().__init__(message)
        self.field, self.message = field_name, message


class _Parser:
    """Turns a file's lines into examples, all in the format of the first."""

    def __init__(self, name: str, template: str, tokenizer: ChatTemplate | None) -> None:
        self._name = name
        self._template = template
        self._tokenizer = tokenizer
        self.format: frozenset[str] | None = None
        self._read: Mapping[frozenset[str], Callable[[dict[str, Any], int], Example]] = {
            frozenset({"prompt", "completion"}): self._read_completion,
            frozenset({"text", "label"}): self._read_label,
            frozenset({"messages"}): self._read_messages,
        }

    def parse(self, line: bytes, number: int) -> Example:
        if len(line) > MAX_LINE_BYTES:
            raise _Bad(None, f"is longer than {MAX_LINE_BYTES} bytes; leave it out or shorten it")
        try:
            fields = parse_object(line)
        except StrictJsonError as error:
            raise _Bad(None, f"{error}; write one JSON object a line, {FORMATS}") from None
        if self.format is None:
            self.format = self._find_format(fields)
        self._check_fields(fields)
        return self._read[self.format](fields, number)

    def _find_format(self, fields: Mapping[str, Any]) -> frozenset[str]:
        matches = [known for known in self._read if known <= fields.keys()]
        if len(matches) != 1:
            found = f"has the fields {_listed(fields)}" if fields else "has no fields"
            raise _Bad(None, f"{found}; write {FORMATS}")
        return matches[0]

    def _check_fields(self, fields: Mapping[str, Any]) -> None:
        assert self.format is not None
        for name in sorted(self.format - fields.keys()):
            raise _Bad(name, f"is missing; the first line of this file has {_listed(self.format)}, and so must all")
        for name in sorted(fields.keys() - self.format):
            raise _Bad(_shorten(name), f"is not known here; leave it out, only {_listed(self.format)} are read")

    def _read_completion(self, fields: dict[str, Any], number: int) -> Example:
        prompt, completion = _text(fields, "prompt"), _text(fields, "completion")
        return Example(prompt, completion, file=self._name, line=number)

    def _read_label(self, fields: dict[str, Any], number: int) -> Example:
        text = _text(fields, "text")
        label = fields["label"]
        # Whole numbers are what many published data sets have.
        if isinstance(label, int) and not isinstance(label, bool):
            label = str(label)
        label = _checked_text(label, "label", MAX_LABEL_CHARS)
        if label != label.strip() or not label.isprintable():
            raise _Bad("label", f"must have neither space around it nor control characters, found {_shown(label)}")
        prompt = self._template.replace("{text}", text)
        return Example(prompt, label_completion(label), label=label, file=self._name, line=number)

    def _read_messages(self, fields: dict[str, Any], number: int) -> Example:
        messages = _check_messages(fields["messages"])
        if self._tokenizer is None:
            raise _Bad("messages", 'the backbone has no chat template; write {"prompt", "completion"}')
        prompt = self._render(messages[:-1], add_generation_prompt=True)
        whole = self._render(messages, add_generation_prompt=False)
        answer = messages[-1]["content"]
        if whole.startswith(prompt) and answer.strip() in (rest := whole[len(prompt) :]):
            # As the template writes it, which may put a space before it; what follows, the end of the turn, is the
            # end-of-sequence token's to say.
            answer = rest[: rest.index(answer.strip()) + len(answer.strip())]
        return Example(prompt, answer, is_rendered=True, file=self._name, line=number)

    def _render(self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool) -> str:
        assert self._tokenizer is not None
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=add_generation_prompt, tokenize=False
            )
        except Exception as error:
            # A template is a program over the messages: it may refuse them in any way.
            raise _Bad("messages", f"the backbone's chat template refuses them: {_shorten(str(error))}") from None
        return str(text)


def _check_messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not 2 <= len(value) <= MAX_MESSAGES:
        raise _Bad("messages", f"must be a list of 2 to {MAX_MESSAGES} messages, found {_shown(value)}")
    for index, message in enumerate(value):
        here = f"messages[{index}]"
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            raise _Bad(here, f'must be {{"role", "content"}} and nothing else, found {_shown(message)}')
        if message["role"] not in ROLES:
            raise _Bad(f"{here}.role", f"must be one of {', '.join(ROLES)}, found {_shown(message['role'])}")
        _checked_text(message["content"], f"{here}.content", MAX_TEXT_CHARS)
    if value[-1]["role"] != "assistant":
        raise _Bad("messages", "must end with the assistant's answer, which is what is learnt")
    return value


def _text(fields: Mapping[str, Any], name: str) -> str:
    return _checked_text(fields[name], name, MAX_TEXT_CHARS)


def _checked_text(value: Any, name: str, max_chars: int) -> str:
    if not isinstance(value, str):
        raise _Bad(name, f"must be a text, found {_shown(value)}")
    if not value.strip():
        raise _Bad(name, "must not be empty")
    if len(value) > max_chars:
        raise _Bad(name, f"has {len(value)} characters, at most {max_chars} are allowed")
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise _Bad(name, "holds half a surrogate pair")
    return value


def _lines(readline: Callable[[int], bytes]) -> Iterator[bytes]:
    """A file's lines. One that is too long is cut a byte after the limit, and the rest of it passed over."""
    is_first = True
    while line := readline(MAX_LINE_BYTES + 1):
        if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
            while (rest := readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                pass
        # Some editors begin a UTF-8 file with a mark.
        yield line.removeprefix(b"\xef\xbb\xbf") if is_first else line
        is_first = False


def _listed(names: Iterable[str]) -> str:
    shown = [f'"{_shorten(name)}"' for name in sorted(names)[:10]]
    return " and ".join([", ".join(shown[:-1]), shown[-1]]) if len(shown) > 1 else "".join(shown)


def _shown(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", bool: "a truth value", int: "a number", float: "a number"}
    if value is None:
        return "null"
    return _shorten(repr(value)) if isinstance(value, str) else kinds.get(type(value), type(value).__name__)


def _shorten(text: str, max_chars: int = 60) -> str:
    cut = text if len(text) <= max_chars else text[:max_chars] + "…"
    return "".join(char if char.isprintable() else "�" for char in cut)
