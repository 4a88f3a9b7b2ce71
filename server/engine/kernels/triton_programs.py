"""The Triton programs of paged attention: what runs on the device. `triton_attention` launches them.

Owns the arithmetic and the addresses, and refuses to know batches, devices and how work is divided: that is decided on
the host and arrives as numbers. It is the one module that imports Triton at the top, so it is imported when the first
kernel is launched and not before.

The softmax is computed in one pass over the columns, with a running maximum and sum (Milakov & Gimelshein 2018; Dao et
al. 2022, FlashAttention), in base 2. Splitting a long row over programs and combining their answers by their
log-sum-exps is Flash-Decoding (Dao et al. 2023); the order of the sums is fixed, so results repeat bit by bit. That a
program answers all query heads of one key-value head, so that a page is read once for the group, and that a program
finds its row by a search over `query_starts`, follows the ragged paged kernels of vLLM and FlashInfer.

Triton takes integer arguments that are 1 or divisible by 16 as reasons to compile anew; what changes from step to step
is therefore named in `do_not_specialize`.
"""

import triton
import triton.language as tl


def dot_dtype(name: str) -> tl.dtype:
    """The dtype that products of the elements "bfloat16", "float16" or "float32" are taken in."""
    # Triton's interpreter keeps bf16 as integers and would multiply those.
    return tl.float32 if triton.knobs.runtime.interpret else getattr(tl, name)


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def write_program(
    key: tl.tensor,  # [T, kv_heads, key_dim]
    value: tl.tensor,  # [T, kv_heads, value_dim]
    key_pages: tl.tensor,  # [pages, kv_heads, page_size, key_dim]
    value_pages: tl.tensor,  # [pages, kv_heads, page_size, value_dim]
    answers: tl.tensor,  # [T, heads, value_dim], contiguous
    write_slots: tl.tensor,  # [T], int64
    query_starts: tl.tensor,  # [R + 1], int32
    num_rows: tl.tensor,
    key_token_stride: tl.tensor,
    key_head_stride: tl.tensor,
    key_dim_stride: tl.tensor,
    value_token_stride: tl.tensor,
    value_head_stride: tl.tensor,
    value_dim_stride: tl.tensor,
    key_page_stride: tl.tensor,
    key_page_head_stride: tl.tensor,
    key_column_stride: tl.tensor,
    value_page_stride: tl.tensor,
    value_page_head_stride: tl.tensor,
    value_column_stride: tl.tensor,
    KV_HEADS: tl.constexpr,  # noqa: N803 (Triton's custom: compile-time constants in capitals)
    GROUP: tl.constexpr,  # noqa: N803
    KEY_DIM: tl.constexpr,  # noqa: N803
    VALUE_DIM: tl.constexpr,  # noqa: N803
    KEY_BLOCK: tl.constexpr,  # noqa: N803
    VALUE_BLOCK: tl.constexpr,  # noqa: N803
    HEADS_BLOCK: tl.constexpr,  # noqa: N803
    PAGE_SIZE: tl.constexpr,  # noqa: N803
) -> None:
    """Grid `(T, blocks of key-value heads)`: put a token's keys and values into its place, or zero a padding answer."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK)
    key_dims = tl.arange(0, KEY_BLOCK)
    value_dims = tl.arange(0, VALUE_BLOCK)
    key_mask = (heads < KV_HEADS)[:, None] & (key_dims < KEY_DIM)[None, :]
    value_mask = (heads < KV_HEADS)[:, None] & (value_dims < VALUE_DIM)[None, :]
    slot = tl.load(write_slots + token)
    if slot >= 0:
        page = slot // PAGE_SIZE
        column = slot % PAGE_SIZE
        keys = tl.load(
            key + token * key_token_stride + heads[:, None] * key_head_stride + key_dims[None, :] * key_dim_stride,
            mask=key_mask,
        )
        place = page * key_page_stride + column * key_column_stride
        tl.store(key_pages + place + heads[:, None] * key_page_head_stride + key_dims[None, :], keys, mask=key_mask)
        values = tl.load(
            value
            + token * value_token_stride
            + heads[:, None] * value_head_stride
            + value_dims[None, :] * value_dim_stride,
            mask=value_mask,
        )
        place = page * value_page_stride + column * value_column_stride
        tl.store(
            value_pages + place + heads[:, None] * value_page_head_stride + value_dims[None, :], values, mask=value_mask
        )
    if token >= tl.load(query_starts + num_rows):
        zeros = tl.full([HEADS_BLOCK, VALUE_BLOCK], 0.0, tl.float32)
        for member in range(GROUP):
            rows = (token * KV_HEADS + heads) * GROUP + member
            tl.store(answers + rows[:, None] * VALUE_DIM + value_dims[None, :], zeros, mask=value_mask)


@triton.jit  # type: ignore[untyped-decorator]
def _row_of_block(
    query_starts: tl.tensor,
    block: tl.tensor,
    first_row: tl.tensor,
    num_rows: tl.tensor,
    BLOCK_TOKENS: tl.constexpr,  # noqa: N803
) -> tl.tensor:
    """The row that the block of tokens belongs to, when each row from `first_row` on begins a block of its own.

    Row r begins at block `(query_starts[r] - first_row) // BLOCK_TOKENS + r - first_row`: at least as many blocks are
    left to every row as it needs, and the number of all blocks follows from the number of tokens and rows alone. The
    rows before `first_row` have one token each, so `first_row` is also their number of tokens.
    """
    low = first_row
    high = num_rows
    while low < high:
        middle = (low + high) // 2
        begins = (tl.load(query_starts + middle) - first_row) // BLOCK_TOKENS + middle - first_row
        if begins <= block:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit(do_not_specialize=["first_row", "num_rows", "table_stride", "num_splits"])  # type: ignore[untyped-decorator]
def attend_program(
    query: tl.tensor,  # [T, heads, key_dim]
    key_pages: tl.tensor,  # [pages, kv_heads, page_size, key_dim]
    value_pages: tl.tensor,  # [pages, kv_heads, page_size, value_dim]
    answers: tl.tensor,  # [T, heads, value_dim], contiguous
    parts: tl.tensor,  # [T - first_row, heads, num_splits, value_dim], fp32; with SPLIT alone
    part_sums: tl.tensor,  # [T - first_row, heads, num_splits], fp32: base-2 log-sum-exps; with SPLIT alone
    sinks: tl.tensor,  # [heads]; with HAS_SINKS alone
    page_table: tl.tensor,  # [R, table_stride], int32
    lengths: tl.tensor,  # [R], int32
    query_starts: tl.tensor,  # [R + 1], int32
    first_row: tl.tensor,
    num_rows: tl.tensor,
    table_stride: tl.tensor,
    num_splits: tl.tensor,
    scale: tl.tensor,  # what a product is multiplied by: to base-2 scores, or to what the tanh of the soft cap takes
    cap: tl.tensor,  # the soft cap, in base 2; with HAS_SOFTCAP alone
    query_token_stride: tl.tensor,
    query_head_stride: tl.tensor,
    query_dim_stride: tl.tensor,
    key_page_stride: tl.tensor,
    key_page_head_stride: tl.tensor,
    key_column_stride: tl.tensor,
    value_page_stride: tl.tensor,
    value_page_head_stride: tl.tensor,
    value_column_stride: tl.tensor,
    DECODING: tl.constexpr,  # noqa: N803
    SPLIT: tl.constexpr,  # noqa: N803
    SLIDING_WINDOW: tl.constexpr,  # noqa: N803 (0: none)
    HAS_SOFTCAP: tl.constexpr,  # noqa: N803
    HAS_SINKS: tl.constexpr,  # noqa: N803
    GROUP: tl.constexpr,  # noqa: N803
    KEY_DIM: tl.constexpr,  # noqa: N803
    VALUE_DIM: tl.constexpr,  # noqa: N803
    KEY_BLOCK: tl.constexpr,  # noqa: N803
    VALUE_BLOCK: tl.constexpr,  # noqa: N803
    BLOCK_QUERIES: tl.constexpr,  # noqa: N803
    BLOCK_TOKENS: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
    MIN_TILES: tl.constexpr,  # noqa: N803
    PAGE_SIZE: tl.constexpr,  # noqa: N803
    DOT_DTYPE: tl.constexpr,  # noqa: N803
) -> None:
    """Grid `(blocks of tokens, kv_heads, num_splits)`: answer BLOCK_TOKENS tokens of one row, all heads of a group.

    The queries of a block are its (token, head of the group) pairs. With DECODING, block r is row r, which has one
    token; a row of no tokens (padding of a captured batch) is left alone. With SPLIT, the columns that the block sees
    are divided evenly, in whole tiles and no less than MIN_TILES of them, by the row's own length and `num_splits`
    alone; what a program finds goes to `parts` and `part_sums`.
    """
    block = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    if DECODING:
        row = block
        block_of_row = 0
    else:
        row = _row_of_block(query_starts, block, first_row, num_rows, BLOCK_TOKENS)
        block_of_row = block - (tl.load(query_starts + row) - first_row) // BLOCK_TOKENS - row + first_row
    start = tl.load(query_starts + row)
    count = tl.load(query_starts + row + 1) - start
    first_token = block_of_row * BLOCK_TOKENS
    if first_token >= count:
        return
    past = tl.load(lengths + row) - count

    # The columns that some token of this block sees: [first_column, end_column). No other is read.
    end_column = past + tl.minimum(first_token + BLOCK_TOKENS, count)
    first_column = 0
    if SLIDING_WINDOW > 0:
        first_column = tl.maximum(past + first_token - SLIDING_WINDOW + 1, 0)
    first_tile = first_column // TILE
    end_tile = (end_column + TILE - 1) // TILE
    if SPLIT:
        share = tl.maximum((end_tile - first_tile + num_splits - 1) // num_splits, MIN_TILES)
        first_tile = first_tile + split * share
        end_tile = tl.minimum(first_tile + share, end_tile)

    queries = tl.arange(0, BLOCK_QUERIES)
    token = first_token + queries // GROUP
    heads = head * GROUP + queries % GROUP
    is_real = (queries // GROUP < BLOCK_TOKENS) & (token < count)
    # Queries that fill up the block see what its last token sees: their sums are never empty.
    own = tl.minimum(past + token, end_column - 1)
    token = (start + token).to(tl.int64)
    key_dims = tl.arange(0, KEY_BLOCK)
    value_dims = tl.arange(0, VALUE_BLOCK)
    asked = tl.load(
        query
        + token[:, None] * query_token_stride
        + heads[:, None] * query_head_stride
        + key_dims[None, :] * query_dim_stride,
        mask=is_real[:, None] & (key_dims < KEY_DIM)[None, :],
        other=0.0,
    ).to(DOT_DTYPE)

    top = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
    total = tl.full([BLOCK_QUERIES], 0.0, tl.float32)
    if HAS_SINKS:
        sink = tl.load(sinks + heads, mask=is_real, other=0.0).to(tl.float32) * 1.4426950408889634
        top = tl.where(split == 0, sink, top)
        total = tl.where(split == 0, 1.0, total)
    answered = tl.full([BLOCK_QUERIES, VALUE_BLOCK], 0.0, tl.float32)
    table_row = page_table + row.to(tl.int64) * table_stride
    for tile in range(first_tile, end_tile):
        columns = tile * TILE + tl.arange(0, TILE)
        is_read = (columns >= first_column) & (columns < end_column)
        pages = tl.load(table_row + columns // PAGE_SIZE, mask=is_read, other=0).to(tl.int64)
        offsets = columns % PAGE_SIZE
        keys = tl.load(
            key_pages
            + (pages * key_page_stride + head * key_page_head_stride + offsets * key_column_stride)[None, :]
            + key_dims[:, None],
            mask=is_read[None, :] & (key_dims < KEY_DIM)[:, None],
            other=0.0,
        )
        values = tl.load(
            value_pages
            + (pages * value_page_stride + head * value_page_head_stride + offsets * value_column_stride)[:, None]
            + value_dims[None, :],
            mask=is_read[:, None] & (value_dims < VALUE_DIM)[None, :],
            other=0.0,
        )
        scores = tl.dot(asked, keys.to(DOT_DTYPE), input_precision="ieee") * scale
        if HAS_SOFTCAP:
            # tanh by an exponential that cannot overflow.
            shrunk = tl.exp2(-2.8853900817779268 * tl.abs(scores))
            bent = (1.0 - shrunk) / (1.0 + shrunk)
            scores = tl.where(scores < 0, -bent, bent) * cap
        is_seen = is_read[None, :] & (columns[None, :] <= own[:, None])
        if SLIDING_WINDOW > 0:
            is_seen = is_seen & (columns[None, :] > own[:, None] - SLIDING_WINDOW)
        scores = tl.where(is_seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        # A token may see nothing of a tile that its neighbours see: then nothing is subtracted from minus infinity.
        subtracted = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - subtracted[:, None])
        shrink = tl.exp2(top - subtracted)
        total = total * shrink + tl.sum(weights, axis=1)
        weights = weights.to(value_pages.dtype.element_ty).to(DOT_DTYPE)
        answered = tl.dot(weights, values.to(DOT_DTYPE), answered * shrink[:, None], input_precision="ieee")
        top = new_top

    rows = token * (tl.num_programs(1) * GROUP) + heads
    if SPLIT:
        rows = (rows - first_row * (tl.num_programs(1) * GROUP)) * num_splits + split
        has_seen = total > 0.0
        safe_total = tl.where(has_seen, total, 1.0)
        tl.store(part_sums + rows, tl.where(has_seen, top + tl.log2(safe_total), float("-inf")), mask=is_real)
        tl.store(
            parts + rows[:, None] * VALUE_DIM + value_dims[None, :],
            answered / safe_total[:, None],
            mask=(is_real & has_seen)[:, None] & (value_dims < VALUE_DIM)[None, :],
        )
    else:
        tl.store(
            answers + rows[:, None] * VALUE_DIM + value_dims[None, :],
            (answered / total[:, None]).to(answers.dtype.element_ty),
            mask=is_real[:, None] & (value_dims < VALUE_DIM)[None, :],
        )


@triton.jit(do_not_specialize=["first_token", "num_rows", "num_splits"])  # type: ignore[untyped-decorator]
def combine_program(
    parts: tl.tensor,  # [T - first_token, heads, num_splits, value_dim], fp32
    part_sums: tl.tensor,  # [T - first_token, heads, num_splits], fp32
    answers: tl.tensor,  # [T, heads, value_dim], contiguous
    query_starts: tl.tensor,  # [R + 1], int32
    first_token: tl.tensor,
    num_rows: tl.tensor,
    num_splits: tl.tensor,
    VALUE_DIM: tl.constexpr,  # noqa: N803
    VALUE_BLOCK: tl.constexpr,  # noqa: N803
    SPLITS_BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    """Grid `(T - first_token, heads)`: weigh the answers of a token's splits by their sums. Padding is left alone."""
    token = tl.program_id(0)
    if token + first_token >= tl.load(query_starts + num_rows):
        return
    row = token.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    splits = tl.arange(0, SPLITS_BLOCK)
    dims = tl.arange(0, VALUE_BLOCK)
    sums = tl.load(part_sums + row * num_splits + splits, mask=splits < num_splits, other=float("-inf"))
    weights = tl.exp2(sums - tl.max(sums, axis=0))
    # A split that saw nothing has written no part.
    is_written = sums > float("-inf")
    found = tl.load(
        parts + (row * num_splits + splits)[:, None] * VALUE_DIM + dims[None, :],
        mask=is_written[:, None] & (dims < VALUE_DIM)[None, :],
        other=0.0,
    )
    answer = tl.sum(found * weights[:, None], axis=0) / tl.sum(weights, axis=0)
    place = answers + (row + first_token * tl.num_programs(1)) * VALUE_DIM + dims
    tl.store(place, answer.to(answers.dtype.element_ty), mask=dims < VALUE_DIM)
