"""What `GET …/versions/{version}/inspect` takes and answers."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from prompt_store.manifest import PromptVersion
from server.engine.norms import NormStats
from server.runtime.inspection import (
    Closeness,
    CosineSummary,
    Inspection,
    LayerDifference,
    LayerReport,
    VectorDifference,
    VectorReport,
)
from server.runtime.protocols import VocabularyLike

MAX_NEAREST = 50


class InspectQuery(BaseModel):
    """The query of an inspection."""

    model_config = ConfigDict(extra="forbid")

    top: int = Field(5, ge=1, le=MAX_NEAREST, description="How many tokens of the vocabulary beside each vector.")
    against: str | None = Field(
        None,
        pattern=r"^([1-9][0-9]{0,8}|sha256:[0-9a-f]{64})$",
        description="Another version of the task: its number, or `sha256:<hex>`, the digest of its file.",
    )


class VocabularyObject(BaseModel):
    """The backbone's input embeddings, to compare with."""

    size: int
    norms: NormStats


class DifferenceObject(BaseModel):
    """How far the version is from another, over the first `num_compared` virtual tokens, which both have."""

    version: int
    digest: str
    num_virtual_tokens: int
    num_compared: int
    overall: Closeness | None = Field(description="Null for prefixes.")
    vectors: list[VectorDifference] = Field(description="Empty for prefixes.")
    layers: list[LayerDifference] = Field(description="Empty but for prefixes.")


class InspectionObject(BaseModel):
    """`vectors` where virtual tokens stand for embeddings; `layers` where they are keys and values (prefix tuning)."""

    object: Literal["prompt_inspection"] = "prompt_inspection"
    task: str
    version: int
    digest: str
    peft_type: str
    kind: Literal["embeddings", "prefix"]
    num_virtual_tokens: int
    vocabulary: VocabularyObject
    norms: NormStats | None = Field(description="Of the prompt's vectors; null for prefixes.")
    pairwise_cosine: CosineSummary | None = Field(
        description="Between its own vectors; null for prefixes, and where there are no two that are not zero."
    )
    vectors: list[VectorReport] = Field(description="Empty for prefixes.")
    layers: list[LayerReport] = Field(description="Empty but for prefixes.")
    against: DifferenceObject | None

    @classmethod
    def of(
        cls,
        version: PromptVersion,
        inspection: Inspection,
        *,
        vocabulary: VocabularyLike,
        against: PromptVersion | None,
    ) -> Self:
        difference = None
        if against is not None and inspection.difference is not None:
            found = inspection.difference
            difference = DifferenceObject(
                version=against.version,
                digest=against.digest,
                num_virtual_tokens=against.num_virtual_tokens,
                num_compared=found.num_compared,
                overall=found.overall,
                vectors=list(found.vectors),
                layers=list(found.layers),
            )
        return cls(
            task=version.task,
            version=version.version,
            digest=version.digest,
            peft_type=version.peft_type,
            kind=version.kind,
            num_virtual_tokens=version.num_virtual_tokens,
            vocabulary=VocabularyObject(size=vocabulary.size, norms=vocabulary.norms),
            norms=inspection.norms,
            pairwise_cosine=inspection.pairwise,
            vectors=list(inspection.vectors),
            layers=list(inspection.layers),
            against=difference,
        )
