"""One sequence being generated, from submission to its end. Bookkeeping only: no tensors, no torch."""

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from server.engine.request import RowRequest, TokenLogprob
from server.engine.slots import Slot

if TYPE_CHECKING:
    from server.engine.prefix import Prefix
    from server.engine.text import TextStream


class RowState(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Row:
    """A row's own state. Only the engine thread touches it.

    `serial` is the row's name in the ledger of slots, unique in the process. `token_ids` are the client's tokens
    followed by the generated ones; token i lies at column and position `num_virtual_tokens + i` of the slot, because
    the prefix fills the columns before. `num_computed` counts the tokens whose keys and values are in the slot.
    `prefix` and the digest in `request.prompt` are held from admission to the end, whatever is rolled out meanwhile.
    """

    request: RowRequest
    serial: int
    arrived_at_s: float
    text: "TextStream"
    state: RowState = RowState.WAITING
    token_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    slot: Slot | None = None
    prefix: "Prefix | None" = None
    is_audited: bool = False
    seed: int = 0
    first_scheduled_at_s: float | None = None
    last_token_at_s: float | None = None
    audit_logprobs: list[float] = field(default_factory=list)
    pending_prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.token_ids)

    @property
    def row_id(self) -> str:
        return self.request.row_id

    @property
    def num_virtual_tokens(self) -> int:
        return self.request.prompt.num_virtual_tokens if self.request.prompt is not None else 0

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.token_ids)

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - len(self.request.token_ids)

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def max_total_tokens(self) -> int:
        """Columns that the row may come to need: virtual, client and new tokens."""
        return self.num_virtual_tokens + self.num_prompt_tokens + self.request.sampling.max_tokens

    @property
    def next_column(self) -> int:
        return self.num_virtual_tokens + self.num_computed

    @property
    def queue_s(self) -> float | None:
        """Seconds from submission to admission; None before it."""
        return self.first_scheduled_at_s - self.arrived_at_s if self.first_scheduled_at_s is not None else None

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.request.sampling.prompt_logprobs is not None

    def check_invariants(self) -> None:
        """Raises RuntimeError when the row contradicts itself."""
        if not 0 <= self.num_computed <= len(self.token_ids):
            raise RuntimeError(f"row {self.row_id}: {self.num_computed} computed of {len(self.token_ids)}")
        if self.state is RowState.RUNNING and self.slot is None:
            raise RuntimeError(f"row {self.row_id} runs without a slot")
        if self.state is not RowState.RUNNING and self.slot is not None:
            raise RuntimeError(f"row {self.row_id} holds a slot but is {self.state.value}")
        if self.slot is not None and self.num_virtual_tokens + len(self.token_ids) > self.slot.capacity + 1:
            raise RuntimeError(f"row {self.row_id} outgrew its slot of {self.slot.capacity}")
