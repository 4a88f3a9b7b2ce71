"""Attention over the paged pool on CUDA: how a step's work is divided among Triton programs, and their launch.

Owns the division: which rows one program answers, how wide its tiles are, when a long row is split. All of it follows
from shapes and from what `PagedBatch` knows on the host; nothing asks the device, so a launch never waits and can be
captured in a CUDA graph. Refuses to know the arithmetic (`triton_programs`) and who is who (the plan).

Importing this module needs no Triton; the first call does. With `TRITON_INTERPRET=1` set before Triton is first
imported, the same programs run on CPU tensors, slowly: that is how they are tested without a device.
"""

from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import torch

from server.engine.kernels.batch import PAGE_SIZE, LayerAttention, PagedBatch

MAX_SPLITS = 32
"""The most programs that one row's columns are divided among."""

MIN_SPLIT_COLUMNS = 128
"""Columns below which another program costs more than it saves."""

MAX_DECODE_COLUMNS = 4096
"""Columns that a program may read for one decoding row, however many rows there are: one long row must not be what a
step of short ones waits for."""

_PROGRAMS_A_PROCESSOR = 2
_MAX_TILE = 64
_TILE_BYTES = 64 * 1024  # of the keys and values that the pipeline holds in shared memory, both stages together
_NUM_STAGES = 2
_MIN_QUERIES = 16  # the smallest matrix that tensor cores take
_WRITE_ELEMENTS = 4096
_LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class Division:
    """How one launch is divided. `block_tokens` tokens and their group of heads are `block_queries` queries, at most;
    a tile is `tile` columns."""

    block_queries: int
    block_tokens: int
    tile: int
    num_warps: int


def triton_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    batch: PagedBatch,
    layer: LayerAttention,
    *,
    num_splits: int | None = None,
) -> torch.Tensor:
    """Write this step's keys and values to the pool, then answer every token: `gather_attention` on the device.

    Shapes, dtypes and strides as there, and the pages' last dimension is contiguous; bf16, fp16 or fp32, with sums in
    fp32. All tensors lie on the current CUDA device. Rows without tokens (`query_starts[r] == query_starts[r + 1]`)
    may follow the decoding ones in a batch of those alone, where `num_decoding` counts them too: they pad a captured
    batch and are left alone.

    `num_splits` fixes over how many programs a row's columns are divided, 1 for no division: a decoding row's bits
    then depend on the row alone. By default it follows from the number of rows and `max_length`.
    Raises ImportError without Triton.
    """
    answers = query.new_empty((query.shape[0], query.shape[1], value.shape[2]))
    _write(key, value, key_pages, value_pages, answers, batch)
    num_rows = batch.lengths.shape[0]
    for is_decoding in (True, False):
        if (batch.num_decoding if is_decoding else num_rows - batch.num_decoding) > 0:
            _attend(query, key_pages, value_pages, answers, batch, layer, is_decoding, num_splits)
    return answers


@lru_cache(maxsize=64)
def divide(group: int, key_dim: int, value_dim: int, element_size: int, *, is_decoding: bool) -> Division:
    """The division for `group` query heads a key-value head; dims in elements of `element_size` bytes."""
    width = max(_block(key_dim), _block(value_dim))
    # fp32 is multiplied exactly, without tensor cores: products are held in registers, and those are what runs short.
    is_exact = element_size == 4
    chunk_queries, most_for_four = (32, 32 * 128) if is_exact else (64, 64 * 128)
    block_queries = _block(group) if is_decoding else max(chunk_queries, _block(group))
    column_bytes = (_block(key_dim) + _block(value_dim)) * element_size * _NUM_STAGES
    return Division(
        block_queries=block_queries,
        block_tokens=1 if is_decoding else block_queries // group,
        tile=PAGE_SIZE
        if is_exact
        else max(PAGE_SIZE, min(_MAX_TILE, _power_of_two_below(_TILE_BYTES // column_bytes))),
        num_warps=8 if block_queries * width > most_for_four else 4,
    )


def choose_splits(num_programs: int, max_columns: int, num_processors: int, *, is_decoding: bool) -> int:
    """Over how many programs each row's columns are divided: a power of two up to `MAX_SPLITS`.

    `num_programs` would run without division, the longest over `max_columns` columns. Rows are divided while the
    device's processors are not all busy, and decoding rows also when they are longer than `MAX_DECODE_COLUMNS`.
    """
    wanted = _PROGRAMS_A_PROCESSOR * num_processors // num_programs
    if is_decoding:
        wanted = max(wanted, -(-max_columns // MAX_DECODE_COLUMNS))
    return _power_of_two_below(max(1, min(wanted, max_columns // MIN_SPLIT_COLUMNS, MAX_SPLITS)))


def _write(
    key: torch.Tensor,
    value: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    answers: torch.Tensor,
    batch: PagedBatch,
) -> None:
    num_tokens, kv_heads, key_dim = key.shape
    value_dim = value.shape[2]
    key_block, value_block = _power_of_two_above(key_dim), _power_of_two_above(value_dim)
    heads_block = min(
        _power_of_two_above(kv_heads), _power_of_two_below(max(1, _WRITE_ELEMENTS // max(key_block, value_block)))
    )
    _programs().write_program[(num_tokens, -(-kv_heads // heads_block))](
        key,
        value,
        key_pages,
        value_pages,
        answers,
        batch.write_slots,
        batch.query_starts,
        batch.lengths.shape[0],
        *key.stride(),
        *value.stride(),
        *key_pages.stride()[:3],
        *value_pages.stride()[:3],
        KV_HEADS=kv_heads,
        GROUP=answers.shape[1] // kv_heads,
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        KEY_BLOCK=key_block,
        VALUE_BLOCK=value_block,
        HEADS_BLOCK=heads_block,
        PAGE_SIZE=PAGE_SIZE,
    )


def _attend(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    answers: torch.Tensor,
    batch: PagedBatch,
    layer: LayerAttention,
    is_decoding: bool,
    num_splits: int | None,
) -> None:
    """Answer the decoding rows, or the chunks behind them."""
    num_tokens, heads, value_dim = answers.shape
    kv_heads, key_dim = key_pages.shape[1], key_pages.shape[3]
    division = divide(heads // kv_heads, key_dim, value_dim, query.element_size(), is_decoding=is_decoding)
    num_rows = batch.lengths.shape[0]
    first_row = 0 if is_decoding else batch.num_decoding
    if is_decoding:
        num_tokens = num_blocks = batch.num_decoding
    else:
        num_blocks = (num_tokens - first_row) // division.block_tokens + num_rows - first_row
    window = layer.sliding_window or 0
    if num_splits is None:
        max_columns = min(batch.max_length, window + division.block_tokens) if window else batch.max_length
        num_splits = choose_splits(
            num_blocks * kv_heads, max_columns, _num_processors(query.device), is_decoding=is_decoding
        )
    is_split = num_splits > 1
    parts = part_sums = answers  # stand in where there is no split
    if is_split:
        parts = answers.new_empty((num_tokens - first_row, heads, num_splits, value_dim), dtype=torch.float32)
        part_sums = answers.new_empty((num_tokens - first_row, heads, num_splits), dtype=torch.float32)
    softcap = layer.softcap
    programs = _programs()
    programs.attend_program[(num_blocks, kv_heads, num_splits)](
        query,
        key_pages,
        value_pages,
        answers,
        parts,
        part_sums,
        answers if layer.sinks is None else layer.sinks,
        batch.page_table,
        batch.lengths,
        batch.query_starts,
        first_row,
        num_rows,
        batch.page_table.stride(0),
        num_splits,
        layer.scaling * _LOG2_E if softcap is None else layer.scaling / softcap,
        0.0 if softcap is None else softcap * _LOG2_E,
        *query.stride(),
        *key_pages.stride()[:3],
        *value_pages.stride()[:3],
        DECODING=is_decoding,
        SPLIT=is_split,
        SLIDING_WINDOW=window,
        HAS_SOFTCAP=softcap is not None,
        HAS_SINKS=layer.sinks is not None,
        GROUP=heads // kv_heads,
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        KEY_BLOCK=_block(key_dim),
        VALUE_BLOCK=_block(value_dim),
        BLOCK_QUERIES=division.block_queries,
        BLOCK_TOKENS=division.block_tokens,
        TILE=division.tile,
        MIN_TILES=-(-MIN_SPLIT_COLUMNS // division.tile),
        PAGE_SIZE=PAGE_SIZE,
        DOT_DTYPE=programs.dot_dtype(str(query.dtype).removeprefix("torch.")),
        num_warps=division.num_warps,
        num_stages=_NUM_STAGES,
    )
    if is_split:
        programs.combine_program[(num_tokens - first_row, heads)](
            parts,
            part_sums,
            answers,
            batch.query_starts,
            first_row,
            num_rows,
            num_splits,
            VALUE_DIM=value_dim,
            VALUE_BLOCK=_power_of_two_above(value_dim),
            SPLITS_BLOCK=_power_of_two_above(num_splits),
        )


@lru_cache(maxsize=1)
def _programs() -> ModuleType:
    from server.engine.kernels import triton_programs

    return triton_programs


@lru_cache(maxsize=8)
def _num_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # the interpreter runs one program at a time
    processors: int = torch.cuda.get_device_properties(device).multi_processor_count
    return processors


def _power_of_two_above(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _power_of_two_below(number: int) -> int:
    return 1 << (number.bit_length() - 1)


def _block(number: int) -> int:
    """The side of a matrix that covers `number` rows or columns."""
    return max(_MIN_QUERIES, _power_of_two_above(number))
