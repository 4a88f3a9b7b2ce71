"""Records of requests, made by hand."""

from collections.abc import Sequence

from server.bench.load import Failure, LoadResult, RequestRecord


def record(
    token_times_s: Sequence[float],
    *,
    due_s: float = 0.0,
    sent_s: float | None = None,
    ended_s: float | None = None,
    prompt: int | None = None,
    failure: Failure | None = None,
) -> RequestRecord:
    last_s = token_times_s[-1] if token_times_s else due_s
    return RequestRecord(
        prompt=prompt,
        num_prompt_tokens=10,
        num_new_tokens=len(token_times_s),
        due_s=due_s,
        sent_s=due_s if sent_s is None else sent_s,
        token_times_s=tuple(token_times_s),
        ended_s=last_s if ended_s is None else ended_s,
        num_cached_tokens=4,
        failure=failure,
    )


def load_of(*records: RequestRecord) -> LoadResult:
    return LoadResult(records=records, wall_s=max(item.ended_s for item in records))
