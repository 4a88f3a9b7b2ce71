"""The attention of every architecture that the engine promises: real heads and dims, shrunk in length alone.

Windows are shrunk with the lengths, so that rows are longer than they are; so is gpt-oss's.
"""

from dataclasses import dataclass, replace

from tests.unit.engine.kernels.batches import HeadShape


@dataclass(frozen=True, slots=True)
class Family:
    """One layer of a published model."""

    name: str
    shape: HeadShape
    sliding_window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False

    def __str__(self) -> str:
        return self.name

    def with_fewer_heads(self, kv_heads: int) -> HeadShape:
        """The shape with no more key-value heads than that, and groups as large as they are."""
        shape = self.shape
        kept = min(kv_heads, shape.kv_heads)
        return replace(shape, heads=shape.heads // shape.kv_heads * kept, kv_heads=kept)


FAMILIES = (
    Family("smollm2-135m (llama)", HeadShape(9, 3, 64, 64)),
    Family("llama-3.1-8b (llama, granite)", HeadShape(32, 8, 128, 128)),
    Family("mistral-7b (mistral, mixtral)", HeadShape(32, 8, 128, 128), sliding_window=20),
    Family("qwen2-0.5b (qwen2)", HeadShape(14, 2, 64, 64)),
    Family("qwen2-7b (qwen2)", HeadShape(28, 4, 128, 128)),
    Family("qwen1.5-moe (qwen2_moe)", HeadShape(16, 16, 128, 128)),
    Family("qwen3-14b (qwen3, llama4_text)", HeadShape(40, 8, 128, 128)),
    Family("qwen3-30b-a3b (qwen3_moe)", HeadShape(32, 4, 128, 128)),
    Family("gemma-2b (gemma)", HeadShape(8, 1, 256, 256)),
    Family("gemma2-9b, full layer (gemma2)", HeadShape(16, 8, 256, 256), softcap=50.0),
    Family("gemma2-2b, sliding layer (gemma2)", HeadShape(8, 4, 256, 256), sliding_window=20, softcap=50.0),
    Family("gemma3-1b (gemma3)", HeadShape(4, 1, 256, 256), sliding_window=12),
    Family("gpt2 (gpt2, opt)", HeadShape(12, 12, 64, 64)),
    Family("starcoder (gpt_bigcode)", HeadShape(48, 1, 128, 128)),
    Family("opt-2.7b (opt, phi-2)", HeadShape(32, 32, 80, 80)),
    Family("gpt-neox-20b (gpt_neox)", HeadShape(64, 64, 96, 96)),
    Family("biogpt (biogpt)", HeadShape(16, 16, 64, 64)),
    Family("phi-3-mini (phi3)", HeadShape(32, 32, 96, 96), sliding_window=25),
    Family("phi-3-medium (phi3)", HeadShape(40, 10, 128, 128)),
    Family("starcoder2-3b (starcoder2)", HeadShape(24, 2, 128, 128), sliding_window=33),
    Family("olmo2-1b (olmo2)", HeadShape(16, 16, 128, 128)),
    Family("command-r (cohere)", HeadShape(64, 64, 128, 128)),
    Family("command-r7b (cohere2)", HeadShape(32, 8, 128, 128), sliding_window=16),
    Family("granite-3-2b (granite)", HeadShape(32, 8, 64, 64)),
    Family("glm-4-9b (glm4)", HeadShape(32, 2, 128, 128)),
    Family("smollm3-3b (smollm3)", HeadShape(16, 4, 128, 128)),
    Family("exaone4-32b (exaone4)", HeadShape(40, 8, 128, 128), sliding_window=17),
    Family("gpt-oss-20b (gpt_oss)", HeadShape(64, 8, 64, 64), sliding_window=8, has_sinks=True),
    Family("gpt-oss-20b, full layer (gpt_oss)", HeadShape(64, 8, 64, 64), has_sinks=True),
    Family("stablelm-3b (stablelm)", HeadShape(32, 32, 80, 80)),
    Family("minitron-4b (nemotron)", HeadShape(24, 8, 128, 128)),
    Family("deepseek-v3 (deepseek_v3)", HeadShape(128, 128, 192, 128)),
)
