"""What an attention kernel is given: the index tensors of one step, and how a layer attends.

Every kernel does the same two things for one layer. It writes the keys and values of this step's tokens to their
places in the pool, and it answers every token over the columns of its own row. It learns from these tensors alone who
is who; nothing in them is made here (`server.engine.plan` makes them, `server.engine.isolation` checks them).
"""

from dataclasses import dataclass

import torch

from server.engine.pages import PAGE_SIZE as PAGE_SIZE

NO_SLOT = -1
"""The `write_slots` entry of a padding token, whose keys and values go nowhere."""


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """R rows, T packed tokens. All tensors are contiguous and lie on the pool's device.

    Row r owns tokens `query_starts[r] .. query_starts[r+1] - 1` (at least one). With this step's tokens it is
    `lengths[r]` columns long; its token i lies at column `lengths[r] - count + i` and sees the columns up to its own.
    Column c of row r is in page `page_table[r, c // PAGE_SIZE]` at offset `c % PAGE_SIZE`; entries of the table beyond
    a row's last page are -1 and must not be followed. Token t's own keys and values go to page
    `write_slots[t] // PAGE_SIZE`, offset `write_slots[t] % PAGE_SIZE`. Tokens from `query_starts[R]` on are padding:
    they are written nowhere, and their answers are zero. A batch of one fixed shape may also be padded with rows: they
    have length 0 and no tokens, and come last.

    `num_decoding`: the first so many rows have exactly one token, which is then token r. `max_length` is the largest
    length of a row, known on the host without asking the device.
    """

    page_table: torch.Tensor  # [R, P], int32
    lengths: torch.Tensor  # [R], int32
    query_starts: torch.Tensor  # [R + 1], int32
    write_slots: torch.Tensor  # [T], int64
    num_decoding: int
    max_length: int


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """How one layer attends, beyond its shapes. `sinks` is `[heads]`, one learned logit a head (gpt-oss).

    `sliding_window` w: a token sees its own column and the w - 1 before it. `softcap` c: scores become
    c * tanh(score / c) before the softmax (Gemma 2).
    """

    scaling: float
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
