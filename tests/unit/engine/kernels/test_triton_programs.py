"""The Triton programs compile for CUDA devices, and fit into them; none is needed for that.

What is compiled here is what a launch would compile: the arguments that a launch would find to be 1 or divisible by 16
are declared so.
"""

import inspect
from pathlib import Path
from typing import Any

import pytest

from server.engine.kernels.batch import PAGE_SIZE
from server.engine.kernels.triton_attention import MIN_SPLIT_COLUMNS, divide
from tests.unit.engine.kernels.batches import HeadShape

triton = pytest.importorskip("triton")

TYPES = {
    "write_slots": "*i64",
    "page_table": "*i32",
    "lengths": "*i32",
    "query_starts": "*i32",
    "parts": "*fp32",
    "part_sums": "*fp32",
    "scale": "fp32",
    "cap": "fp32",
}
TENSORS = {"query", "key", "value", "key_pages", "value_pages", "answers", "sinks"}
SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024}
"""Bytes that one program may have, by compute capability; 8.6 and 8.9 run what 8.0 compiles, and have the least."""


@pytest.fixture(autouse=True)
def _fresh_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if triton.knobs.runtime.interpret:
        pytest.skip("Triton interprets in this process")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(name: str, capability: int, dtype: str, constants: dict[str, Any], num_warps: int = 4) -> Any:
    """The program `name`, compiled for a CUDA device of the compute capability."""
    from server.engine.kernels import triton_programs

    program = getattr(triton_programs, name)
    signature, attributes = {}, {}
    constants = dict(constants)
    for index, argument in enumerate(inspect.signature(program.fn).parameters):
        if argument.endswith("dim_stride"):
            constants[argument] = 1
        if argument in constants:
            signature[argument] = "constexpr"
        else:
            signature[argument] = f"*{dtype}" if argument in TENSORS else TYPES.get(argument, "i32")
            if signature[argument].startswith("*") or (argument.endswith("_stride") and argument != "table_stride"):
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(program, signature, constants, attributes)
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": num_warps, "num_stages": 2})


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("shape", "dtype", "element_size"),
    [
        (HeadShape(32, 8, 128, 128), "bf16", 2),
        (HeadShape(8, 1, 256, 256), "fp16", 2),
        (HeadShape(128, 128, 192, 128), "bf16", 2),
        (HeadShape(32, 32, 80, 80), "fp32", 4),
    ],
    ids=str,
)
@pytest.mark.parametrize("is_decoding", [True, False], ids=["decoding", "chunks"])
def test_attention_compiles_and_fits(
    capability: int, shape: HeadShape, dtype: str, element_size: int, is_decoding: bool
) -> None:
    import triton.language as tl

    group = shape.heads // shape.kv_heads
    division = divide(group, shape.key_dim, shape.value_dim, element_size, is_decoding=is_decoding)
    constants = {
        "DECODING": is_decoding,
        "SPLIT": capability == 80,
        "SLIDING_WINDOW": 128,
        "HAS_SOFTCAP": True,
        "HAS_SINKS": True,
        "GROUP": group,
        "KEY_DIM": shape.key_dim,
        "VALUE_DIM": shape.value_dim,
        "KEY_BLOCK": triton.next_power_of_2(shape.key_dim),
        "VALUE_BLOCK": triton.next_power_of_2(shape.value_dim),
        "BLOCK_QUERIES": division.block_queries,
        "BLOCK_TOKENS": division.block_tokens,
        "TILE": division.tile,
        "MIN_TILES": MIN_SPLIT_COLUMNS // division.tile,
        "PAGE_SIZE": PAGE_SIZE,
        "DOT_DTYPE": {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}[dtype],
    }
    made = compiled("attend_program", capability, dtype, constants, division.num_warps)
    assert made.metadata.shared <= SHARED_MEMORY[capability]
    assert ("mma" in made.asm["ptx"]) == (dtype != "fp32")  # tensor cores round fp32


def test_writing_and_combining_compile() -> None:
    constants = {"KV_HEADS": 8, "GROUP": 4, "KEY_DIM": 80, "VALUE_DIM": 128, "KEY_BLOCK": 128, "VALUE_BLOCK": 128}
    assert compiled("write_program", 80, "bf16", {**constants, "HEADS_BLOCK": 8, "PAGE_SIZE": PAGE_SIZE}).asm["cubin"]
    assert compiled("combine_program", 80, "bf16", {"VALUE_DIM": 80, "VALUE_BLOCK": 128, "SPLITS_BLOCK": 32}).asm[
        "cubin"
    ]
