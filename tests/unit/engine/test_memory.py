"""How much memory rows get where nothing is said."""

import pytest
import torch

from server.engine.memory import CUDA_MEMORY_SHARE, default_kv_bytes

CUDA = torch.device("cuda")
MIB = 1 << 20


@pytest.mark.parametrize(("free_mib", "left_mib"), [(1000, 800), (200, 0), (50, 0)])
def test_rows_on_cuda_share_what_is_left_by_prompts_and_their_tails(
    free_mib: int, left_mib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_mib * MIB, 2000 * MIB))
    assert default_kv_bytes(CUDA, 100 * MIB) == int(left_mib * MIB * CUDA_MEMORY_SHARE)
