"""What goes to the device in one piece and comes back when it is looked at."""

import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis import given, settings

from server.engine.transfers import Array, Download, cut, join, joined_size, upload

DTYPES = (np.int64, np.int32, np.float32, np.float64)

arrays = st.lists(
    st.builds(
        lambda shape, dtype, seed: (np.random.default_rng(seed).normal(size=shape) * 1000).astype(dtype),
        st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple),
        st.sampled_from(DTYPES),
        st.integers(0, 99),
    ),
    max_size=6,
)


@given(arrays)
@settings(deadline=None, max_examples=100)
def test_joined_arrays_come_apart_as_they_were(given_arrays: list[Array]) -> None:
    joined = torch.full((joined_size(given_arrays),), 255, dtype=torch.uint8)
    join(given_arrays, joined)
    parts = cut(joined, given_arrays)
    assert len(parts) == len(given_arrays)
    for part, array in zip(parts, given_arrays, strict=True):
        assert part.data_ptr() % 16 == joined.data_ptr() % 16 or not part.numel()
        np.testing.assert_array_equal(part.numpy(), array)
        assert part.numpy().dtype == array.dtype


def test_slices_and_transposed_arrays_are_joined_in_their_own_order() -> None:
    table = np.arange(12, dtype=np.int32).reshape(3, 4)
    given_arrays = [table.T, table[:, 1:3], table[::2]]
    joined = torch.zeros(joined_size(given_arrays), dtype=torch.uint8)
    join(given_arrays, joined)
    for part, array in zip(cut(joined, given_arrays), given_arrays, strict=True):
        np.testing.assert_array_equal(part.numpy(), array)


def test_on_the_cpu_nothing_is_copied() -> None:
    array = np.arange(3)
    (tensor,) = upload([array], torch.device("cpu"))
    array[1] = 7
    assert tensor.tolist() == [0, 7, 2]
    (same,) = Download([tensor]).wait()
    assert same is tensor
