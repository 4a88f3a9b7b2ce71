"""How much a JSON body may be made of, told from its bytes: nesting, fields, and texts, objects and lists together.

A body of a few megabytes can hold hundreds of thousands of fields, each of which would become an error object of its
own, or an integer's worth of lists in each other. What is refused here was never turned into Python objects. Nearly all
bodies pass by four counts of single bytes; only where those leave it open is the body walked, strings as wholes, until
the first bound is passed. Refuses to know what the fields mean, and whether the body is JSON at all.
"""

import re

from server.errors import InvalidRequestError

MAX_DEPTH = 64
# Of a conversation of as many messages as there may be, of two parts each.
MAX_FIELDS = 8192
# A list of texts may be as long as the largest `max_prompts`.
MAX_ITEMS = 1 << 17

# A string as a whole (or what is left of one that never ends), or one character that makes structure.
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{}:]', re.DOTALL)
_OPENING, _CLOSING, _COLON = b"[{", b"]}", ord(":")


def check_bounds(body: bytes) -> None:
    """Raises InvalidRequestError for a body that is nested too deeply or made of too much."""
    num_opened = body.count(b"[") + body.count(b"{")
    num_strings = body.count(b'"') // 2
    if num_opened <= MAX_DEPTH and body.count(b":") <= MAX_FIELDS and num_opened + num_strings <= MAX_ITEMS:
        return
    depth = num_fields = num_items = 0
    for token in _TOKEN.finditer(body):
        character = body[token.start()]
        if character in _CLOSING:
            depth -= 1
            if depth < 0:
                return  # no JSON, and refused as such: whoever reads it comes no farther either
        elif character == _COLON:
            num_fields += 1
            if num_fields > MAX_FIELDS:
                raise InvalidRequestError(f"The body has more than {MAX_FIELDS} fields.")
        else:
            num_items += 1
            if num_items > MAX_ITEMS:
                raise InvalidRequestError(f"The body has more than {MAX_ITEMS} texts, objects and lists.")
            if character in _OPENING:
                depth += 1
                if depth > MAX_DEPTH:
                    raise InvalidRequestError(f"The body is nested more than {MAX_DEPTH} deep.")
