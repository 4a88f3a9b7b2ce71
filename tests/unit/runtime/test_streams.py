"""A request's stream of outputs: order, merging, bounds, and its two ends."""

import asyncio
from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from server.engine.request import RowOutput, TokenLogprob
from server.errors import NumericalError
from server.runtime.streams import MAX_PENDING_PER_ROW, RowStream, merge_outputs


class Recorder:
    def __init__(self) -> None:
        self.cancelled: list[str] = []
        self.num_ends = 0

    def cancel(self, row_ids: Iterable[str]) -> None:
        self.cancelled.extend(sorted(row_ids))

    def on_end(self, stream: RowStream) -> None:
        self.num_ends += 1


def make_stream(*row_ids: str) -> tuple[RowStream, Recorder]:
    recorder = Recorder()
    return RowStream(row_ids, cancel=recorder.cancel, on_end=recorder.on_end), recorder


@st.composite
def row_outputs(draw: st.DrawFn) -> list[RowOutput]:
    """What an engine may deliver for three rows: any interleaving, each row's last output last."""
    outputs: list[RowOutput] = []
    for row_id in ("a", "b", "c"):
        texts = draw(st.lists(st.text(max_size=3), max_size=60))
        outputs += [
            RowOutput(row_id=row_id, text=text, token_ids=(i,), logprobs=(TokenLogprob(i, -1.0),))
            for i, text in enumerate(texts)
        ]
        outputs.append(RowOutput(row_id=row_id, text=".", finish_reason="stop", stop_reason=row_id))
    order = draw(st.permutations([output.row_id for output in outputs]))
    by_row = {row_id: iter([o for o in outputs if o.row_id == row_id]) for row_id in ("a", "b", "c")}
    return [next(by_row[row_id]) for row_id in order]


@given(outputs=row_outputs(), reads=st.data())
def test_reads_add_up_to_what_was_pushed_whenever_they_happen(outputs: list[RowOutput], reads: st.DataObject) -> None:
    async def run() -> list[RowOutput]:
        stream, recorder = make_stream("a", "b", "c")
        read: list[RowOutput] = []
        for output in outputs:
            assert stream.push(output)
            assert stream.num_pending <= MAX_PENDING_PER_ROW * 3
            if reads.draw(st.integers(0, 9)) == 0:
                read += await stream.read()
        if not stream.is_finished:
            read += await stream.read()
        assert stream.is_finished
        assert recorder.num_ends == 1
        assert recorder.cancelled == []
        return read

    read = asyncio.run(run())
    assert sorted(merge_outputs(read), key=lambda o: o.row_id) == sorted(merge_outputs(outputs), key=lambda o: o.row_id)


def test_merged_output_keeps_prompt_logprobs_and_the_end() -> None:
    first = RowOutput(row_id="a", text="x", prompt_logprobs=(None,))
    error = NumericalError("bad")

    (merged,) = merge_outputs([first, RowOutput(row_id="a", error=error)])

    assert (merged.text, merged.prompt_logprobs, merged.error) == ("x", (None,), error)
    assert merged.is_last


def test_read_waits_for_news_and_times_out_empty() -> None:
    async def run() -> None:
        stream, _ = make_stream("a")
        assert await stream.read(0.01) == []
        asyncio.get_running_loop().call_later(0.01, stream.push, RowOutput(row_id="a", text="x"))
        assert [output.text for output in await stream.read(5)] == ["x"]
        assert not stream.is_finished

    asyncio.run(run())


def test_close_cancels_what_runs_and_wakes_the_reader() -> None:
    async def run() -> None:
        stream, recorder = make_stream("a", "b")
        stream.push(RowOutput(row_id="a", finish_reason="stop"))
        assert len(await stream.read()) == 1
        reader = asyncio.ensure_future(stream.read())
        await asyncio.sleep(0)
        stream.close()
        stream.close()

        assert await reader == []
        assert stream.is_finished
        assert recorder.cancelled == ["b"]
        assert recorder.num_ends == 1
        assert not stream.push(RowOutput(row_id="b", text="late"))

    asyncio.run(run())


def test_close_after_the_end_cancels_nothing() -> None:
    async def run() -> None:
        stream, recorder = make_stream("a")
        stream.push(RowOutput(row_id="a", finish_reason="stop"))
        await stream.read()
        stream.close()

        assert recorder.cancelled == []
        assert recorder.num_ends == 1

    asyncio.run(run())


def test_fail_ends_the_rows_that_have_not_ended() -> None:
    async def run() -> None:
        stream, recorder = make_stream("a", "b")
        stream.push(RowOutput(row_id="a", finish_reason="stop"))
        stream.fail(NumericalError("bad"))

        assert [output.error is not None for output in await stream.read()] == [False, True]
        assert stream.is_finished
        assert recorder.num_ends == 1

    asyncio.run(run())
