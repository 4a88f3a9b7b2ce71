"""What the gate's short rows cannot notice is asked of the configuration: long rows of each such model against it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from server.engine.backbone import Backbone
from server.engine.checkpoint import BackboneError
from server.engine.kv import KvPool, num_pages_for
from server.engine.plan import PlanEntry, build_plan
from tests.factories import CONFIGS, make_tokenizer

LONG = 60


def make_backbone(family: str, **fields: Any) -> Backbone:
    config = AutoConfig.for_model(family, **(CONFIGS["llama"] | fields), bos_token_id=1, eos_token_id=2, pad_token_id=0)
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 or name.endswith("scale"):
            torch.nn.init.normal_(parameter, std=0.2)
    return Backbone(model, make_tokenizer(), name=family, fingerprint="0" * 64)


def served_logits(backbone: Backbone, rows: list[list[int]]) -> list[torch.Tensor]:
    """Each row's logits, all rows in one packed step."""
    needed = [num_pages_for(len(row)) for row in rows]
    pool = KvPool(backbone.layers, row_pages=sum(needed), prefix_pages=0, dtype=backbone.dtype, device=backbone.device)
    entries = []
    for owner, (row, count) in enumerate(zip(rows, needed, strict=True), start=1):
        pages = pool.allocate(owner, count)
        assert pages is not None
        entries.append(PlanEntry(pages, 0, row, logits_from=0))
    plan, order = build_plan(entries)
    logits = backbone.forward(pool, plan)
    found = [logits[torch.from_numpy(plan.logits_entries == packed)] for packed in range(len(rows))]
    return [found[order.index(i)] for i in range(len(rows))]


def long_row(length: int = LONG) -> list[int]:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(4, 90, (length,), generator=generator).tolist()


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        (
            "phi3",
            {
                "original_max_position_embeddings": 32,
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 10000.0,
                    "short_factor": [1.0] * 4,
                    "long_factor": [4.0] * 4,
                    "original_max_position_embeddings": 32,
                },
            },
        ),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "dynamic",
                    "rope_theta": 10000.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 32,
                }
            },
        ),
    ],
)
def test_rows_end_where_their_neighbours_length_would_change_their_frequencies(
    family: str, fields: dict[str, Any]
) -> None:
    backbone = make_backbone(family, **fields)
    assert backbone.max_model_len == 32
    row = long_row(10)
    alone = served_logits(backbone, [row])[0]
    beside = served_logits(backbone, [row, long_row(backbone.max_model_len)])[0]
    torch.testing.assert_close(beside, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("family", "fields", "longest"),
    [
        (
            "llama4_text",
            {"floor_scale": 33, "num_local_experts": 2, "intermediate_size_mlp": 64, "head_dim": 8},
            32,
        ),
        ("doge", {"keep_window_size": 32}, 32),
    ],
)
def test_rows_end_where_the_model_counts_columns_in_the_batch(
    family: str, fields: dict[str, Any], longest: int
) -> None:
    backbone = make_backbone(family, no_rope_layers=[1, 0, 1], **fields)
    assert backbone.max_model_len == longest
    row = long_row(longest)
    found = served_logits(backbone, [long_row(20), row])[1]
    torch.testing.assert_close(found, backbone.reference(row), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("family", "fields", "reason"),
    [
        (
            "gemma3n_text",
            {
                "num_hidden_layers": 4,
                "num_kv_shared_layers": 2,
                "laurel_rank": 4,
                "activation_sparsity_pattern": [0.0] * 4,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            "answers otherwise when it is given the embeddings",
        ),
        ("gemma4_text", {}, "takes no vector in the place of a token's embedding"),
    ],
)
def test_model_that_looks_up_more_than_embeddings_by_token_id_is_refused(
    family: str, fields: dict[str, Any], reason: str
) -> None:
    per_layer = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128, "head_dim": 16}
    with pytest.raises(BackboneError, match=reason):
        make_backbone(family, **per_layer, **fields)


def test_model_whose_mask_cuts_attention_into_chunks_is_not_run_packed() -> None:
    fields = {"attention_chunk_size": 16, "num_local_experts": 2, "intermediate_size_mlp": 64, "head_dim": 8}
    backbone = make_backbone("llama4_text", **fields)
    assert backbone.path == "dense"
    row = long_row()
    torch.testing.assert_close(served_logits(backbone, [row])[0], backbone.reference(row), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt_oss"])
def test_windows_that_are_passed_on_are_kept_by_the_packed_path(
    tiny_backbone_folder: Callable[[str], Path], family: str
) -> None:
    backbone = Backbone.load(str(tiny_backbone_folder(family)), dtype="float32", device="cpu")
    assert backbone.path == "packed"
    row = long_row()
    torch.testing.assert_close(served_logits(backbone, [row])[0], backbone.reference(row), atol=1e-4, rtol=0)


def test_model_that_declares_windows_and_passes_none_is_not_run_packed() -> None:
    """The configuration of a model without windows is given one: what a model that applies it by a mask looks like."""
    backbone = make_backbone("llama", sliding_window=8, layer_types=["sliding_attention"] * 3)
    assert backbone.path == "dense"


def test_stop_ids_that_have_no_logits_are_left_out() -> None:
    config = AutoConfig.for_model("llama", **CONFIGS["llama"], bos_token_id=1, eos_token_id=[2, 100_000])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    backbone = Backbone(model, make_tokenizer(), name="llama", fingerprint="0" * 64)
    assert backbone.eos_token_ids == {2}
