"""Files made to harm are refused with the right error, and nothing else ever escapes."""

import dataclasses
import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prompt_store.errors import InvalidConfig, PromptMismatch, PromptStoreError, UnsupportedFile
from prompt_store.formats import check_file
from prompt_store.store import PromptStore
from prompt_store.tensor_file import read_tensors
from tests.unit.prompt_store.prompt_files import (
    BACKBONE,
    HIDDEN,
    PREFIX_WIDTH,
    K,
    assemble,
    header_for,
    make_config,
    make_file,
    make_multitask_file,
    make_prefix_file,
    random_embeddings,
)

GOOD = make_file()
TENSOR = {"prompt_embeddings": random_embeddings(0)}
BODY = TENSOR["prompt_embeddings"].tobytes()


def with_entry(**changes: Any) -> bytes:
    header = header_for(TENSOR)
    header["prompt_embeddings"] |= changes
    return assemble(header, BODY)


def with_metadata(metadata: Any) -> bytes:
    return assemble(header_for(TENSOR) | {"__metadata__": metadata}, BODY)


def with_value(value: float, dtype: Any = np.float32) -> bytes:
    embeddings = random_embeddings(0).astype(dtype)
    embeddings[3, 2] = value
    return make_file({"prompt_embeddings": embeddings})


def header_text(old: str, new: str) -> bytes:
    text = json.dumps(header_for(TENSOR))
    assert old in text
    return assemble(text.replace(old, new).encode(), BODY)


def zip_bytes() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", b"x" * 100)
    return buffer.getvalue()


def npy_bytes() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, TENSOR["prompt_embeddings"])
    return buffer.getvalue()


def two_tensors(first: list[int], second: list[int], body: bytes) -> bytes:
    entry = {"dtype": "F32", "shape": [K, HIDDEN]}
    return assemble({"prompt_embeddings": entry | {"data_offsets": first}, "b": entry | {"data_offsets": second}}, body)


N = len(BODY)

UNSOUND: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "only 0 bytes"),
    "seven bytes": (GOOD[:7], "only 7 bytes"),
    "header cut off": (GOOD[:40], "ends before"),
    "body cut off": (GOOD[:-1], "bytes long"),
    "bytes after the end": (GOOD + b"\0", "bytes long"),
    "pickle": (pickle.dumps({"prompt_embeddings": [1.0] * 500}), "Python pickle"),
    "old pickle": (pickle.dumps({"prompt_embeddings": [1.0] * 500}, protocol=2), "Python pickle"),
    "zip": (zip_bytes(), "zip archive"),
    "npy": (npy_bytes(), "NumPy"),
    "gguf": (b"GGUF" + bytes(100), "GGUF"),
    "json": (make_config(), "JSON"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
    "header of a million bytes": (assemble(b"{" + b" " * 1_000_000 + b"}", b""), "1000002 bytes"),
    "header length 2**63": (struct.pack("<Q", 2**63) + GOOD[8:], "header of"),
    "header not JSON": (assemble(b"{nope}", BODY), "not JSON"),
    "header not UTF-8": (assemble(b'{"\xff": 1}', BODY), "UTF-8"),
    "header a list": (assemble(b"[]", b""), "not a JSON object"),
    "header nested too deeply": (assemble(b"[" * 16_000, b""), "nested|JSON"),
    "header with an endless integer": (assemble(b'{"a":' + b"9" * 10_000 + b"}", b""), "digits"),
    "no tensors": (assemble({}, b""), "found none"),
    "a million tensors": (assemble({str(i): {} for i in range(1_000)}, b""), "header|tensors"),
    "five tensors": (assemble({str(i): {} for i in range(5)}, b""), "5 tensors"),
    "wrong name": (make_file({"embeddings": random_embeddings(0)}), "found embeddings"),
    "one name too many": (make_file(TENSOR | {"extra": random_embeddings(1)}), "found extra"),
    "duplicate tensor": (
        assemble(json.dumps(header_for(TENSOR))[:-1].encode() + b', "prompt_embeddings": {}}', BODY),
        "duplicate key",
    ),
    "duplicate key inside": (header_text('"shape"', '"dtype": "F32", "shape"'), "duplicate key"),
    "duplicate key in metadata": (header_text('"format": "pt"', '"a": "b", "a": "c"'), "duplicate key"),
    "NaN literal": (header_text(f"[0, {N}]", f"[NaN, {N}]"), "NaN"),
    "Infinity literal": (header_text(f"[0, {N}]", "[0, Infinity]"), "Infinity"),
    "1e999": (header_text(f"[0, {N}]", "[0, 1e999]"), "not finite"),
    "metadata not strings": (with_metadata({"a": 1}), "__metadata__"),
    "metadata a list": (with_metadata([]), "__metadata__"),
    "metadata too large": (with_metadata({"a": "x" * 5_000}), "__metadata__ has"),
    "entry a number": (assemble({"prompt_embeddings": 7}, b""), "exactly dtype"),
    "entry with more keys": (with_entry(strides=[1]), "exactly dtype"),
    "dtype F64": (make_file({"prompt_embeddings": random_embeddings(0).astype(np.float64)}), "F64"),
    "dtype I8": (with_entry(dtype="I8"), "I8"),
    "dtype a list": (with_entry(dtype=["F32"]), "dtype"),
    "zero dimension": (with_entry(shape=[0, HIDDEN]), "size zero"),
    "negative dimension": (with_entry(shape=[-1, HIDDEN]), "whole number"),
    "fractional dimension": (with_entry(shape=[K, 8.0]), "whole number"),
    "true as a dimension": (with_entry(shape=[True, HIDDEN]), "whole number"),
    "scalar": (with_entry(shape=[]), "dimensions"),
    "too many dimensions": (with_entry(shape=[1, 1, 1, K, HIDDEN]), "dimensions"),
    "shape that overflows 64 bits": (with_entry(shape=[2**39, 2**39]), "needs"),
    "huge dimension": (with_entry(shape=[10**30, 1]), "whole number"),
    "offsets not covering": (with_entry(data_offsets=[0, N - 4]), "span"),
    "offsets backwards": (with_entry(data_offsets=[N, 0]), "span"),
    "offsets negative": (with_entry(data_offsets=[-4, N - 4]), "whole numbers"),
    "offsets three": (with_entry(data_offsets=[0, 4, N]), "whole numbers"),
    "offsets past the end": (with_entry(data_offsets=[4, N + 4]), "gap or an overlap"),
    "NaN": (with_value(float("nan")), "not finite"),
    "Inf": (with_value(float("inf")), "not finite"),
    "Inf in half precision": (with_value(float("-inf"), np.float16), "not finite"),
    "NaN in bfloat16": (make_file({"prompt_embeddings": np.full((K, HIDDEN), 0x7FC0, np.uint16)}), "not finite"),
}


@pytest.mark.parametrize("case", UNSOUND)
def test_unsound_file_is_refused_saying_why(case: str) -> None:
    data, reason = UNSOUND[case]
    with pytest.raises(UnsupportedFile, match=reason) as caught:
        check_file(data, make_config(), backbone=BACKBONE)
    assert caught.value.param == "file"
    assert len(caught.value.message) < 500


@pytest.mark.parametrize(
    ("first", "second", "body"),
    [([0, N], [0, N], BODY), ([0, N], [N - 4, 2 * N - 4], BODY * 2), ([0, N], [N + 4, 2 * N + 4], BODY * 2 + b"1234")],
)
def test_tensors_that_overlap_or_leave_gaps_are_refused(first: list[int], second: list[int], body: bytes) -> None:
    with pytest.raises(UnsupportedFile, match="gap or an overlap"):
        read_tensors(two_tensors(first, second, body), expected_names=("prompt_embeddings", "b"), max_header_bytes=9999)
    touching = two_tensors([N, 2 * N], [0, N], BODY * 2)
    assert read_tensors(touching, expected_names=("prompt_embeddings", "b"), max_header_bytes=9999)["b"].shape == (K, 8)


MISFITS: dict[str, tuple[bytes, dict[str, Any], str]] = {
    "other width": (make_file({"prompt_embeddings": random_embeddings(0, width=9)}), {}, r"needs \[20, 8\]"),
    "one dimension": (make_file({"prompt_embeddings": random_embeddings(0).reshape(-1)}), {}, "2 dimensions"),
    "too many virtual tokens": (make_file({"prompt_embeddings": random_embeddings(0, k=65)}), {}, "at most 64"),
    "other num_virtual_tokens": (GOOD, {"num_virtual_tokens": 19}, "num_virtual_tokens 19"),
    "other token_dim": (GOOD, {"token_dim": 9}, "token_dim 9"),
    "other num_layers": (GOOD, {"num_layers": 4}, "num_layers 4"),
    "prefix file as embeddings": (make_prefix_file(), {}, r"needs \[20, 8\]"),
    "embeddings file as prefix": (GOOD, {"peft_type": "PREFIX_TUNING"}, rf"needs \[20, {PREFIX_WIDTH}\]"),
    "prefix with other heads": (
        make_prefix_file(),
        {"peft_type": "PREFIX_TUNING", "num_attention_heads": 4},
        "num_attention_heads 4",
    ),
    "prefix with other token_dim": (make_prefix_file(), {"peft_type": "CARTRIDGE", "token_dim": 16}, "token_dim 16"),
    "factors of other rank": (make_multitask_file(), {"peft_type": "MULTITASK_PROMPT_TUNING", "num_ranks": 3}, "rank"),
    "infinite in float16": (with_value(70_000.0), {}, "infinite in float16"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_file_that_does_not_fit_says_what_was_found_and_what_is_needed(case: str) -> None:
    data, fields, reason = MISFITS[case]
    served = dataclasses.replace(BACKBONE, dtype="float16") if "float16" in case else BACKBONE
    task_index = 0 if "MULTITASK" in fields.get("peft_type", "") else None
    with pytest.raises(PromptMismatch, match=reason):
        check_file(data, make_config(**fields), backbone=served, task_index=task_index)


def test_what_rounds_to_infinity_in_bfloat16_is_refused() -> None:
    served = dataclasses.replace(BACKBONE, dtype="bfloat16")
    # Halfway between the largest bfloat16 and what would follow it: ties go to even, which is infinity here.
    for bits, fits in ((0x7F7F7FFF, True), (0x7F7F8000, False), (0x7F7FFFFF, False), (0xFF7F0000, True)):
        data = with_value(float(np.array([bits], np.uint32).view(np.float32)[0]))
        check_file(data, make_config(), backbone=BACKBONE)
        if fits:
            check_file(data, make_config(), backbone=served)
        else:
            with pytest.raises(PromptMismatch, match="infinite in bfloat16"):
                check_file(data, make_config(), backbone=served)


def test_product_of_factors_that_overflows_is_refused() -> None:
    big = np.full((1, K, 1), 1e30, np.float32)
    data = make_file(
        {
            "prefix_task_cols": big,
            "prefix_task_rows": np.full((1, 1, HIDDEN), 1e30, np.float32),
            "prompt_embeddings": random_embeddings(0),
        }
    )
    with pytest.raises(PromptMismatch, match="not finite"):
        check_file(data, make_config(peft_type="MULTITASK_PROMPT_TUNING"), backbone=BACKBONE)


def test_prefix_is_refused_where_layers_differ() -> None:
    uneven = dataclasses.replace(BACKBONE, kv_heads=None, head_dim=None)
    with pytest.raises(PromptMismatch, match="PROMPT_TUNING instead"):
        check_file(make_prefix_file(), make_config(peft_type="PREFIX_TUNING"), backbone=uneven)
    check_file(GOOD, make_config(), backbone=uneven)


CONFIGS: dict[str, tuple[bytes, str]] = {
    "not JSON": (b"peft_type: PROMPT_TUNING", "config"),
    "a list": (b"[]", "config"),
    "duplicate key": (b'{"peft_type": "P_TUNING", "peft_type": "PROMPT_TUNING"}', "config"),
    "duplicate key deep": (b'{"peft_type": "P_TUNING", "x": [{"a": 1, "a": 2}]}', "config"),
    "NaN": (b'{"peft_type": "P_TUNING", "x": NaN}', "config"),
    "deep": (b'{"x":' + b"[" * 60_000, "config"),
    "no peft_type": (b"{}", "config.peft_type"),
    "unknown peft_type": (make_config(peft_type="LORA"), "config.peft_type"),
    "peft_type a list": (make_config(peft_type=["P_TUNING"]), "config.peft_type"),
    "lower case": (make_config(peft_type="prompt_tuning"), "config.peft_type"),
    "encoder-decoder": (make_config(task_type="SEQ_2_SEQ_LM"), "config.task_type"),
    "classification": (make_config(task_type="SEQ_CLS"), "config.task_type"),
    "two submodules": (make_config(num_transformer_submodules=2), "config.num_transformer_submodules"),
    "true submodules": (make_config(num_transformer_submodules=True), "config.num_transformer_submodules"),
    "modules_to_save": (make_config(modules_to_save=["lm_head"]), "config.modules_to_save"),
    "text for a number": (make_config(num_virtual_tokens="20"), "config.num_virtual_tokens"),
    "true for a number": (make_config(num_virtual_tokens=True), "config.num_virtual_tokens"),
    "zero": (make_config(num_layers=0), "config.num_layers"),
    "enormous": (make_config(token_dim=10**400), "config.token_dim"),
    "base model a list": (make_config(base_model_name_or_path=[]), "config.base_model_name_or_path"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_wrong_config_names_the_field(case: str) -> None:
    data, param = CONFIGS[case]
    with pytest.raises(InvalidConfig) as caught:
        check_file(GOOD, data, backbone=BACKBONE)
    assert caught.value.param == param
    assert len(caught.value.message) < 500


@pytest.mark.parametrize(
    ("data", "fields", "task_index"),
    [
        (make_multitask_file(3), {"peft_type": "MULTITASK_PROMPT_TUNING"}, None),
        (make_multitask_file(3), {"peft_type": "MULTITASK_PROMPT_TUNING"}, 3),
        (make_multitask_file(3), {"peft_type": "MULTITASK_PROMPT_TUNING"}, -1),
        (GOOD, {}, 0),
    ],
)
def test_task_index_is_demanded_bounded_and_refused_where_it_means_nothing(
    data: bytes, fields: dict[str, Any], task_index: int | None
) -> None:
    with pytest.raises(InvalidConfig) as caught:
        check_file(data, make_config(**fields), backbone=BACKBONE, task_index=task_index)
    assert caught.value.param == "task_index"


def test_file_of_one_task_needs_no_task_index() -> None:
    config = make_config(peft_type="MULTITASK_PROMPT_TUNING", num_tasks=1)
    assert check_file(make_multitask_file(1), config, backbone=BACKBONE).task_index == 0


def test_one_file_read_for_two_tasks_has_two_prefix_keys() -> None:
    config, data = make_config(peft_type="MULTITASK_PROMPT_TUNING"), make_multitask_file(3)
    first, second = (check_file(data, config, backbone=BACKBONE, task_index=task) for task in (0, 1))
    assert first.digest == second.digest
    assert first.prefix_key != second.prefix_key


def test_what_the_literature_warns_of_is_a_warning() -> None:
    few = make_file({"prompt_embeddings": random_embeddings(0, k=5)})
    checked = check_file(few, make_config(base_model_name_or_path="org/other"), backbone=BACKBONE)
    assert [warning.partition(":")[0] for warning in checked.warnings] == ["few_virtual_tokens", "other_base_model"]
    assert not check_file(GOOD, make_config(base_model_name_or_path="org/TINY"), backbone=BACKBONE).warnings


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
entry_values = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "U8", ""]) | json_values,
        "shape": st.lists(st.integers(-1, 70), max_size=4) | json_values,
        "data_offsets": st.lists(st.integers(-1, 2000), max_size=3) | json_values,
    }
)
headers = st.dictionaries(
    st.sampled_from(["prompt_embeddings", "__metadata__", "prefix_task_cols", "prefix_task_rows", "x"]),
    entry_values | json_values,
    max_size=5,
)
configs = st.dictionaries(
    st.sampled_from(["peft_type", "task_type", "num_virtual_tokens", "token_dim", "num_layers", "modules_to_save"]),
    json_values | st.sampled_from(["PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "CAUSAL_LM", 20, 8]),
).map(lambda fields: json.dumps(fields).encode())


@st.composite
def mutated(draw: Callable[..., Any]) -> bytes:
    data = bytearray(draw(st.sampled_from([GOOD, make_prefix_file(), make_multitask_file()])))
    for position, value in draw(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=6)):
        data[position] = value
    return bytes(data[: draw(st.integers(0, len(data)) | st.just(len(data)))])


hostile = st.binary(max_size=300) | mutated() | st.builds(assemble, headers, st.binary(max_size=200))


def test_nothing_but_the_stores_own_errors_escapes_and_nothing_is_stored(store: PromptStore) -> None:
    @settings(max_examples=400, deadline=None)
    @given(
        data=hostile,
        config=configs | st.binary(max_size=60) | st.just(make_config()),
        task_index=st.none() | st.integers(),
    )
    def attack(data: bytes, config: bytes, task_index: int | None) -> None:
        before = store.counts()
        try:
            version, _ = store.upload("t", "task", file=data, config=config, task_index=task_index)
        except PromptStoreError as error:
            refusal = error
        else:
            # A mutation may land in the numbers or the metadata and leave a sound file.
            assert np.isfinite(store.load(version).values).all()
            return
        assert len(refusal.message.encode("utf-8")) < 900
        assert store.counts() == before
        store.check_invariants()

    attack()
