"""Which token of a packed pass belongs to which row, and what each row attends to: index tensors, built in one place.

A pass holds rows of many prompts in one sequence without padding. Every prompt's virtual tokens stand in it once, in
front, however many rows have it: rows attend to them and they to no row, so that their keys and values are the same
for all. What the last token of a row would predict is nobody's label; it is left out of the pass.

Knows numbers alone: no model, no prompt's values.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from tuning.examples import EncodedExample

_MAX_WASTE = 0.25
"""The share of a group's padded length that its shortest row may leave empty."""
_MIN_LENGTH_STEP = 8


@dataclass(frozen=True, slots=True)
class PromptSlot:
    """What packing must know of a prompt: its number of virtual tokens, and whether they are computed in the pass.

    `in_pass` is True for vectors, which run through the layers, and False for keys and values, which are given.
    """

    num_virtual_tokens: int
    in_pass: bool


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence: `token_ids` are run, and the last `len(target_ids)` of them predict `target_ids`.

    `prompt` is the place of its prompt among the pass's prompts.
    """

    prompt: int
    token_ids: tuple[int, ...]
    target_ids: tuple[int, ...]


@dataclass(slots=True)
class RowGroup:
    """Rows that attend together: they lie side by side in the packed sequence, and have equally long prompts.

    Padded they are `[num_rows, max_length]`. `slots [num_tokens]` are the tokens' places in that, None where no row
    needs padding. `num_prefix` virtual tokens stand in front of each row; `prompt_runs` are the rows' prompts in order,
    with how many rows on end have each. In a group of `virtual_prompts` the rows are these prompts themselves.
    """

    num_tokens: int
    num_rows: int
    max_length: int
    num_prefix: int = 0
    prompt_runs: tuple[tuple[int, int], ...] = ()
    virtual_prompts: tuple[int, ...] = ()
    slots: torch.Tensor | None = None
    _visible: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def visible(self, window: int | None, device: torch.device) -> torch.Tensor:
        """Which columns a token sees: bool `[max_length, num_prefix + max_length]`; True is seen.

        With a sliding window w: its own column and the w - 1 before it, virtual tokens counted.
        """
        if window not in self._visible:
            own = torch.arange(self.num_prefix, self.num_prefix + self.max_length, device=device)[:, None]
            columns = torch.arange(self.num_prefix + self.max_length, device=device)
            seen = columns <= own
            if window is not None:
                seen &= columns > own - window
            self._visible[window] = seen
        return self._visible[window]


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """T tokens: first the virtual ones of the prompts in `vector_prompts`, in that order, then those of `token_ids`.

    `target_tokens` are the places of the tokens that predict `target_ids`; `target_rows` and `target_prompts` say whose
    they are, by the places of rows and prompts in the lists that were packed.
    """

    vector_prompts: tuple[int, ...]
    token_ids: torch.Tensor  # [T - virtual tokens]
    positions: torch.Tensor  # [T]
    target_tokens: torch.Tensor  # [N]
    target_ids: torch.Tensor  # [N]
    target_rows: torch.Tensor  # [N]
    target_prompts: torch.Tensor  # [N]
    groups: tuple[RowGroup, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.positions)


def example_row(prompt: int, example: EncodedExample) -> Row:
    """The row whose targets are the example's completion."""
    return Row(prompt, (*example.prompt_ids, *example.completion_ids[:-1]), tuple(example.completion_ids))


def pack(rows: Sequence[Row], prompts: Sequence[PromptSlot], device: torch.device) -> PackedBatch:
    """Pack rows of at least one token each. Prompts that no row has take no place."""
    used = sorted({row.prompt for row in rows})
    vector_prompts = sorted(
        (p for p in used if prompts[p].in_pass and prompts[p].num_virtual_tokens),
        key=lambda p: (prompts[p].num_virtual_tokens, p),
    )
    positions: list[int] = []
    for prompt in vector_prompts:
        positions += range(prompts[prompt].num_virtual_tokens)
    groups = list(_virtual_groups(vector_prompts, prompts))
    token_ids: list[int] = []
    target_tokens: list[int] = []
    target_ids: list[int] = []
    target_rows: list[int] = []
    for members in _group_rows(rows, prompts):
        num_prefix = prompts[rows[members[0]].prompt].num_virtual_tokens
        for index in members:
            row = rows[index]
            token_ids += row.token_ids
            positions += range(num_prefix, num_prefix + len(row.token_ids))
            target_tokens += range(len(positions) - len(row.target_ids), len(positions))
            target_ids += row.target_ids
            target_rows += [index] * len(row.target_ids)
        lengths = [len(rows[index].token_ids) for index in members]
        runs = _runs([rows[index].prompt for index in members])
        groups.append(_make_group(lengths, num_prefix, runs, device))
    owners = torch.tensor([row.prompt for row in rows], dtype=torch.long)
    row_of = torch.tensor(target_rows, dtype=torch.long)
    return PackedBatch(
        vector_prompts=tuple(vector_prompts),
        token_ids=torch.tensor(token_ids, dtype=torch.long, device=device),
        positions=torch.tensor(positions, dtype=torch.long, device=device),
        target_tokens=torch.tensor(target_tokens, dtype=torch.long, device=device),
        target_ids=torch.tensor(target_ids, dtype=torch.long, device=device),
        target_rows=row_of.to(device),
        target_prompts=owners[row_of].to(device),
        groups=tuple(groups),
    )


def split_rows(
    rows: Sequence[Row], prompts: Sequence[PromptSlot], *, max_tokens: int, max_targets: int
) -> Iterator[list[int]]:
    """Cut rows into passes of at most so many tokens and targets; a row that is larger alone gets a pass of its own.

    Yields places in `rows`, in order. Rows of one prompt should lie together, for each pass computes its prompts'
    virtual tokens anew.
    """
    members: list[int] = []
    seen: set[int] = set()
    num_tokens = num_targets = 0
    for index, row in enumerate(rows):
        slot = prompts[row.prompt]
        extra = slot.num_virtual_tokens if slot.in_pass and row.prompt not in seen else 0
        needed = len(row.token_ids) + extra
        if members and (num_tokens + needed > max_tokens or num_targets + len(row.target_ids) > max_targets):
            yield members
            members, seen, num_tokens, num_targets = [], set(), 0, 0
            needed = len(row.token_ids) + (slot.num_virtual_tokens if slot.in_pass else 0)
        members.append(index)
        seen.add(row.prompt)
        num_tokens += needed
        num_targets += len(row.target_ids)
    if members:
        yield members


def _virtual_groups(vector_prompts: Sequence[int], prompts: Sequence[PromptSlot]) -> Iterator[RowGroup]:
    """The virtual tokens as rows of their own, which no prompt stands in front of; equally long ones together."""
    for k in sorted({prompts[p].num_virtual_tokens for p in vector_prompts}):
        members = tuple(p for p in vector_prompts if prompts[p].num_virtual_tokens == k)
        yield RowGroup(num_tokens=k * len(members), num_rows=len(members), max_length=k, virtual_prompts=members)


def _group_rows(rows: Sequence[Row], prompts: Sequence[PromptSlot]) -> Iterator[list[int]]:
    """Places of rows that attend together: prompts of one length, rows of about one length, by prompt."""
    order = sorted(
        range(len(rows)), key=lambda i: (prompts[rows[i].prompt].num_virtual_tokens, -len(rows[i].token_ids), i)
    )
    members: list[int] = []
    for index in order:
        if members:
            longest = rows[members[0]]
            limit = len(longest.token_ids)
            floor = limit - max(_MIN_LENGTH_STEP, int(limit * _MAX_WASTE))
            same_k = prompts[rows[index].prompt].num_virtual_tokens == prompts[longest.prompt].num_virtual_tokens
            if not same_k or len(rows[index].token_ids) < floor:
                yield sorted(members, key=lambda i: (rows[i].prompt, i))
                members = []
        members.append(index)
    if members:
        yield sorted(members, key=lambda i: (rows[i].prompt, i))


def _runs(values: Sequence[int]) -> tuple[tuple[int, int], ...]:
    runs: list[tuple[int, int]] = []
    for value in values:
        if runs and runs[-1][0] == value:
            runs[-1] = (value, runs[-1][1] + 1)
        else:
            runs.append((value, 1))
    return tuple(runs)


def _make_group(
    lengths: Sequence[int], num_prefix: int, runs: tuple[tuple[int, int], ...], device: torch.device
) -> RowGroup:
    longest = max(lengths)
    slots = None
    if min(lengths) < longest:
        places = [row * longest + i for row, length in enumerate(lengths) for i in range(length)]
        slots = torch.tensor(places, dtype=torch.long, device=device)
    return RowGroup(
        num_tokens=sum(lengths),
        num_rows=len(lengths),
        max_length=longest,
        num_prefix=num_prefix,
        prompt_runs=runs,
        slots=slots,
    )
