"""One sequence being generated, from submission to its end. Bookkeeping only: no tensors, no torch."""

import enum
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from server.engine.request import RowRequest, TokenLogprob
from server.engine.row_pages import RowPages
from server.engine.text import TextStream, Tokenizer

if TYPE_CHECKING:
    from server.engine.prefix import Prefix


class RowState(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Row:
    """A row's own state. Only the engine thread touches it.

    `serial` is the row's name in the ledger of pages, unique in the process. `token_ids` are the client's tokens
    followed by the generated ones; token i lies at column and position `num_virtual_tokens + i`, because the prefix
    fills the columns before. `num_computed` counts the tokens whose keys and values are in the row's pages, and
    `num_cached` those of the client's that were found there when the row was first admitted. A preempted row gives its
    pages back, waits, and computes its tokens again; `prefix` and the digest in `request.prompt` are held to the end
    all the same, whatever is rolled out meanwhile. A row that waits for nothing but pages holds its prefix already.

    A step may have been launched whose results are not collected yet. `num_computed` counts its tokens already, and
    `num_in_flight` of them are its. `num_pending` tokens have been sampled on the device and are not in `token_ids`
    yet; the latest of them is number `sample_place` of the sample that it comes from.
    """

    request: RowRequest
    serial: int
    arrived_at_s: float
    text: TextStream
    state: RowState = RowState.WAITING
    token_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_in_flight: int = 0
    num_pending: int = 0
    sample_place: int = 0
    pages: RowPages | None = None
    num_cached: int = 0
    num_preemptions: int = 0
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
        """Tokens that a next step may compute, the one that only the device knows among them.

        None when that one is the row's last: nothing comes after it.
        """
        num_tokens = len(self.token_ids) + self.num_pending
        if self.num_pending and num_tokens - len(self.request.token_ids) >= self.request.sampling.max_tokens:
            return 0
        return num_tokens - self.num_computed

    @property
    def num_settled_columns(self) -> int:
        """Columns whose step has been collected, and found sound."""
        return self.next_column - self.num_in_flight

    @property
    def num_pages(self) -> int:
        """Pages that the row itself holds; those of its prefix are not counted."""
        return len(self.pages.held) if self.pages is not None else 0

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
        """Whether log-probabilities of the client's own tokens are still owed. They go out with the first new token."""
        return self.request.sampling.prompt_logprobs is not None and not self.num_generated

    def check_invariants(self) -> None:
        """Raises RuntimeError when the row contradicts itself."""
        if not 0 <= self.num_computed <= len(self.token_ids) + self.num_pending:
            raise RuntimeError(f"row {self.row_id}: {self.num_computed} computed of {len(self.token_ids)}")
        if not 0 <= self.num_in_flight <= self.num_computed or not 0 <= self.num_pending <= 1:
            raise RuntimeError(
                f"row {self.row_id} has {self.num_in_flight} tokens in flight, {self.num_pending} pending"
            )
        if self.state is RowState.RUNNING and self.pages is None:
            raise RuntimeError(f"row {self.row_id} runs without pages")
        if self.state is not RowState.RUNNING and self.pages is not None:
            raise RuntimeError(f"row {self.row_id} holds pages but is {self.state.value}")
        if self.pages is not None and self.pages.num_columns < self.next_column:
            raise RuntimeError(f"row {self.row_id} has outgrown its {self.pages.num_pages} pages")


def make_row(
    request: RowRequest,
    *,
    serial: int,
    arrived_at_s: float,
    tokenizer: Tokenizer,
    is_audited: bool,
) -> Row:
    """A waiting row. One without a seed of its own gets a random one, so that every row can be repeated."""
    sampling = request.sampling
    return Row(
        request=request,
        serial=serial,
        arrived_at_s=arrived_at_s,
        text=TextStream(
            tokenizer,
            context=request.token_ids,
            stop=sampling.stop,
            skip_special_tokens=sampling.skip_special_tokens,
        ),
        is_audited=is_audited,
        seed=sampling.seed if sampling.seed is not None else secrets.randbits(63),
    )
