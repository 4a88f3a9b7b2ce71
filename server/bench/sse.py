"""Server-sent events, read as the standard says (WHATWG HTML, 9.2.6), from bytes that are cut anywhere.

Owns framing: line ends of three kinds, comments, data over several lines, the name of an event. Refuses to know what
an event says. `id` and `retry` are for clients that connect again, which a benchmark does not.
"""

import re
from dataclasses import dataclass

_LINE_END = re.compile(rb"\r\n|\r|\n")


@dataclass(frozen=True, slots=True)
class Event:
    """One event; `name` is "message" unless the stream gave another."""

    name: str
    data: str


class EventParser:
    """Takes the bytes of one stream in pieces."""

    def __init__(self) -> None:
        self._rest = b""
        self._name = ""
        self._data: list[str] = []

    def feed(self, piece: bytes) -> list[Event]:
        """The events that `piece` completes. An event that the stream's end cuts short is never returned."""
        self._rest += piece
        events: list[Event] = []
        start = 0
        for end in _LINE_END.finditer(self._rest):
            # A carriage return at the very end may be half of a pair.
            if end.group() == b"\r" and end.end() == len(self._rest):
                break
            event = self._take_line(self._rest[start : end.start()])
            start = end.end()
            if event is not None:
                events.append(event)
        self._rest = self._rest[start:]
        return events

    def _take_line(self, line: bytes) -> Event | None:
        if not line:
            event = Event(self._name or "message", "\n".join(self._data)) if self._data else None
            self._name, self._data = "", []
            return event
        # A line that begins with a colon is a comment: its field's name is empty.
        field, _, value = line.decode("utf-8", "replace").partition(":")
        value = value.removeprefix(" ")
        if field == "data":
            self._data.append(value)
        elif field == "event":
            self._name = value
        return None
