"""What the runtime needs of the backbone and the engine, and nothing more.

The engine's own classes satisfy these protocols; so does the fake that the tests of HTTP run on. Torch stays out.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from prompt_store.manifest import BackboneShape, SoftPrompt
from server.engine.background import BackgroundWork
from server.engine.norms import NormStats
from server.engine.request import PromptRef, RowOutput, RowRequest
from server.engine.status import CompiledState

Residency = Literal["device", "host", "store"]
Deliver = Callable[[Sequence[RowOutput]], None]
LoadPrompt = Callable[[PromptRef], SoftPrompt]


class Tokenizer(Protocol):
    """The part of a transformers fast tokenizer that HTTP needs. Encoding and decoding are thread-safe."""

    @property
    def all_special_ids(self) -> Sequence[int]: ...

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> Mapping[str, Any]:
        """A mapping whose `input_ids` are the text's token ids."""
        ...

    def decode(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> str: ...

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """The names that the vocabulary has for these ids."""
        ...

    @property
    def chat_template(self) -> Any:
        """A Jinja template, several by name, or None."""
        ...

    def get_chat_template(self) -> str:
        """The one to use. Raises ValueError when there is none."""
        ...

    def apply_chat_template(
        self,
        conversation: list[dict[str, str]],
        *,
        chat_template: str,
        add_generation_prompt: bool,
        tokenize: bool,
    ) -> Any:
        """The text that a conversation is for the backbone, where `tokenize` is false."""
        ...

    @property
    def special_tokens_map(self) -> Mapping[str, Any]: ...

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]:
        """Tokens beside the model's own vocabulary, by id; `lstrip` says that one takes the white space before it."""
        ...


class NearestTokensLike(Protocol):
    @property
    def token_ids(self) -> npt.NDArray[np.int64]: ...
    @property
    def cosines(self) -> npt.NDArray[np.float32]: ...


class VocabularyLike(Protocol):
    """The backbone's input embeddings. Any thread may ask."""

    @property
    def size(self) -> int: ...
    @property
    def norms(self) -> NormStats: ...
    def nearest(self, vectors: npt.NDArray[np.float32], top: int) -> NearestTokensLike:
        """Tokens of largest cosine for each of `vectors [k, hidden_size]`, `[k, top]`. Blocking."""
        ...


class BackboneLike(Protocol):
    """The loaded backbone as seen from outside the engine."""

    @property
    def name(self) -> str: ...
    @property
    def fingerprint(self) -> str:
        """SHA-256 over the weights, 64 hex digits."""
        ...

    @property
    def path(self) -> Literal["packed", "dense"]: ...
    @property
    def kernel(self) -> Literal["native", "triton", "gather"]: ...
    @property
    def quantization(self) -> Literal["none", "int8"]: ...
    @property
    def compiled_state(self) -> CompiledState: ...
    @property
    def compiled_sizes(self) -> list[int]: ...
    @property
    def dtype_name(self) -> str: ...
    @property
    def device_name(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def max_model_len(self) -> int:
        """Virtual, prompt and new tokens together."""
        ...

    @property
    def vocabulary(self) -> VocabularyLike: ...

    @property
    def tokenizer(self) -> Any:
        """A `Tokenizer`; the hints of transformers' own class are too wide to say so."""
        ...

    def shape(self, max_virtual_tokens: int) -> BackboneShape: ...


class EngineStatusLike(Protocol):
    @property
    def num_running(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...
    @property
    def kv_usage_ratio(self) -> float: ...
    @property
    def prompts_resident(self) -> int: ...
    @property
    def heartbeat_age_s(self) -> float: ...
    @property
    def usual_step_s(self) -> float | None:
        """The slowest of late of steps like the one that runs now; None when it is like none before, or none runs."""
        ...

    @property
    def failure(self) -> str | None: ...


class EngineLike(Protocol):
    """The step loop. All methods may be called from any thread."""

    def start(self, deliver: Deliver) -> None:
        """Starts the engine's thread, which calls `deliver` once a step."""
        ...

    def submit(self, rows: Sequence[RowRequest]) -> None:
        """Takes all rows or none. Raises `QueueFullError`, `DrainingError` or `EngineFailedError`."""
        ...

    def cancel(self, row_ids: Iterable[str]) -> None: ...
    def status(self) -> EngineStatusLike: ...
    def residency(self, prefix_key: str) -> Residency: ...
    def evict(self, prefix_key: str) -> None: ...
    def pin(self, refs: Sequence[PromptRef]) -> None: ...
    def set_background(self, work: BackgroundWork) -> None:
        """Runs this in the gaps that serving leaves; called again, it asks the work again."""
        ...

    def start_drain(self) -> None: ...
    def stop(self, timeout_s: float) -> None: ...


class BackgroundRunner(Protocol):
    """What a server does beside requests, on the event loop: begun when it is ready, ended when it drains."""

    def stop(self) -> None:
        """Begins no more, and gives up what runs. Returns at once; may be called twice."""
        ...

    async def wait_stopped(self) -> None:
        """Waits until what ran has been given back. Call `stop` before."""
        ...
