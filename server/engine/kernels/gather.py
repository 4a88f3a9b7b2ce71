"""The kernel in plain torch: pages are gathered row by row. The oracle of the other kernels, and the fallback.

Reads cost a copy of every page that is read (8 to 20 times a contiguous read on CPU, docs/log.md), so it serves only
where neither a C++ compiler nor CUDA is at hand.
"""

import torch

from server.engine.kernels.batch import NO_SLOT, PAGE_SIZE, LayerAttention, PagedBatch


def gather_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    batch: PagedBatch,
    layer: LayerAttention,
) -> torch.Tensor:
    """Write this step's keys and values to the pool, then answer every token.

    `query [T, heads, key_dim]`, `key [T, kv_heads, key_dim]`, `value [T, kv_heads, value_dim]`, any strides;
    `key_pages [pages, kv_heads, PAGE_SIZE, key_dim]` and `value_pages [pages, kv_heads, PAGE_SIZE, value_dim]` are
    written in place. All of one float dtype; softmax in fp32. Returns `[T, heads, value_dim]`.
    """
    write_kv(key, value, key_pages, value_pages, batch.write_slots)
    answers = query.new_zeros((query.shape[0], query.shape[1], value.shape[2]))
    starts = batch.query_starts.tolist()
    for row, length in enumerate(batch.lengths.tolist()):
        tokens = slice(starts[row], starts[row + 1])
        if starts[row] == starts[row + 1]:
            continue
        pages = batch.page_table[row, : -(-length // PAGE_SIZE)].long()
        answers[tokens] = _answer_row(
            query[tokens], read_columns(key_pages, pages, length), read_columns(value_pages, pages, length), layer
        )
    return answers


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    write_slots: torch.Tensor,
) -> None:
    """Put each token's keys and values into its place; padding tokens are left out."""
    tokens = torch.nonzero(write_slots != NO_SLOT)[:, 0]
    slots = write_slots[tokens]
    pages, offsets = slots // PAGE_SIZE, slots % PAGE_SIZE
    key_pages[pages, :, offsets] = key[tokens]
    value_pages[pages, :, offsets] = value[tokens]


def read_columns(pool: torch.Tensor, pages: torch.Tensor, length: int) -> torch.Tensor:
    """The first `length` columns of the row whose pages are `pages`: `[kv_heads, length, dim]`."""
    gathered = pool[pages].transpose(0, 1)  # [kv_heads, pages, PAGE_SIZE, dim]
    return gathered.reshape(pool.shape[1], -1, pool.shape[3])[:, :length]


def answer_alone(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: LayerAttention) -> torch.Tensor:
    """Answer the tokens of one row that has no other columns: `[T, heads, value_dim]` from `[T, heads, dim]` each."""
    return _answer_row(query, key.transpose(0, 1), value.transpose(0, 1), layer)


def _answer_row(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, layer: LayerAttention) -> torch.Tensor:
    """`query [n, heads, d]`, the last n columns of `keys [kv_heads, length, d]`. Returns `[n, heads, value_dim]`."""
    count, heads, _ = query.shape
    kv_heads, length, _ = keys.shape
    grouped = query.transpose(0, 1).reshape(kv_heads, heads // kv_heads * count, -1)
    scores = torch.matmul(grouped.float(), keys.float().transpose(1, 2)) * layer.scaling
    if layer.softcap is not None:
        scores = torch.tanh(scores / layer.softcap) * layer.softcap
    own = torch.arange(length - count, length, device=query.device)[:, None]
    columns = torch.arange(length, device=query.device)
    visible = columns <= own
    if layer.sliding_window is not None:
        visible &= columns > own - layer.sliding_window
    scores = scores.masked_fill(~visible.repeat(heads // kv_heads, 1), float("-inf"))
    if layer.sinks is None:
        weights = torch.softmax(scores, dim=-1)
    else:
        sinks = layer.sinks.float().reshape(kv_heads, -1, 1).repeat_interleave(count, dim=1)
        weights = torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]
    # A column outside every window may hold anything; 0 times NaN would be NaN.
    seen = visible.any(dim=0)[None, :, None]
    answered = torch.matmul(weights, values.float().masked_fill(~seen, 0.0))
    return answered.reshape(heads, count, -1).transpose(0, 1).to(query.dtype)
