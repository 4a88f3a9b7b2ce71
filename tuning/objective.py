"""What is made small: a loss for every target token of a packed batch, whatever its prompt's method asks for.

Most prompts learn the tokens of the completions. A cartridge learns the distributions of the model that has read the
whole text (Eyuboglu et al. 2025), which are computed here first, in a packed pass of their own.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from tuning.forward import PackedPass, PromptValues
from tuning.losses import cross_entropies, divergences
from tuning.methods.cartridge import Teacher
from tuning.packing import PackedBatch, PromptSlot, Row, pack


@contextmanager
def target_losses(
    packed: PackedPass,
    rows: Sequence[Row],
    slots: Sequence[PromptSlot],
    prompts: Sequence[PromptValues],
    teachers: Sequence[Teacher | None],
) -> Iterator[tuple[PackedBatch, torch.Tensor]]:
    """The batch of the rows and its targets' losses `[N]`, fp32, in nats. A backward pass must run inside the block.

    `slots`, `prompts` and `teachers` have an entry a prompt.
    """
    batch = pack(rows, slots, packed.device)
    taught = torch.tensor([teacher is not None for teacher in teachers], device=packed.device)[batch.target_prompts]
    if not bool(taught.any()):
        with packed.logits(batch, prompts) as logits:
            yield batch, cross_entropies(logits, batch.target_ids)
        return
    teacher_logits = _teach(packed, rows, teachers)
    # Both in the order of rows, whatever order the two passes were packed in.
    learning = taught.nonzero()[:, 0]
    learning = learning[torch.argsort(batch.target_rows[learning], stable=True)]
    others = (~taught).nonzero()[:, 0]
    with packed.logits(batch, prompts) as logits:
        losses = torch.cat(
            [divergences(logits[learning], teacher_logits), cross_entropies(logits[others], batch.target_ids[others])]
        )
        yield batch, losses[torch.argsort(torch.cat([learning, others]))]


@torch.no_grad()
def _teach(packed: PackedPass, rows: Sequence[Row], teachers: Sequence[Teacher | None]) -> torch.Tensor:
    """The teachers' logits of their rows' targets, row after row in the order of `rows`."""
    chosen = [row for row in rows if teachers[row.prompt] is not None]
    slots = [PromptSlot(teacher.num_tokens if teacher else 0, in_pass=False) for teacher in teachers]
    batch = pack(chosen, slots, packed.device)
    with packed.logits(batch, [teacher.layers if teacher else None for teacher in teachers]) as logits:
        return logits[torch.argsort(batch.target_rows, stable=True)]
