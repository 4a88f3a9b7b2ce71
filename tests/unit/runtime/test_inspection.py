"""What an inspection says of prompts that PEFT itself made, compared with plain torch on the tensors in its files."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from prompt_store.manifest import SoftPrompt
from server.engine.backbone import Backbone
from server.errors import InvalidRequestError
from server.runtime.inspection import Inspection, inspect
from server.runtime.tokens import TokenCodec
from tests.factories import NUM_LAYERS, MadePrompt, read_prompt, save_prompt

TOP = 4


@pytest.fixture(scope="module")
def backbone(tiny_backbone_folder: Callable[[str], Path]) -> Backbone:
    return Backbone.load(str(tiny_backbone_folder("llama")), dtype="float32", device="cpu", max_model_len=128)


@pytest.fixture(scope="module")
def make(
    backbone: Backbone, tiny_backbone_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., MadePrompt]:
    def make(kind: str, k: int, seed: int) -> MadePrompt:
        folder = save_prompt(
            tiny_backbone_folder("llama"), kind, k, tmp_path_factory.mktemp("prompts") / kind, seed=seed
        )
        return read_prompt("task", folder, backbone.shape(64), task_index=1 if kind == "multitask" else None)

    return make


def look(backbone: Backbone, prompt: SoftPrompt, against: SoftPrompt | None = None) -> Inspection:
    codec = TokenCodec(backbone.tokenizer, backbone.vocab_size)
    return inspect(prompt, vocabulary=backbone.vocabulary, names=codec, top=TOP, against=against)


def tensor_of(made: MadePrompt) -> torch.Tensor:
    return load_file(made.folder / "adapter_model.safetensors")["prompt_embeddings"].double()


def embeddings(values: np.ndarray) -> SoftPrompt:
    return SoftPrompt(kind="embeddings", values=np.ascontiguousarray(values, dtype=np.float32))


@pytest.mark.parametrize("kind", ["prompt_tuning", "p_tuning", "cpt"])
def test_each_vector_has_its_norm_and_its_nearest_tokens(
    kind: str, backbone: Backbone, make: Callable[..., MadePrompt]
) -> None:
    made = make(kind, 6, seed=1)
    vectors = tensor_of(made)
    table = backbone.model.get_input_embeddings().weight.double()
    table_norms = table.norm(dim=1)

    found = look(backbone, made.soft_prompt)

    cosines = torch.nn.functional.normalize(vectors) @ torch.nn.functional.normalize(table).T
    expected = cosines.topk(TOP, dim=1)
    z_scores = (vectors.norm(dim=1) - table_norms.mean()) / table_norms.std(correction=0)
    assert [report.index for report in found.vectors] == list(range(6))
    assert [report.norm for report in found.vectors] == pytest.approx(vectors.norm(dim=1).tolist(), rel=1e-6)
    assert [report.z_score for report in found.vectors] == pytest.approx(z_scores.tolist(), rel=1e-4)
    for place, report in enumerate(found.vectors):
        assert [near.token_id for near in report.nearest] == expected.indices[place].tolist()
        assert [near.cosine for near in report.nearest] == pytest.approx(expected.values[place].tolist(), abs=1e-5)
        assert [near.text for near in report.nearest] == [
            backbone.tokenizer.decode([near.token_id]) for near in report.nearest
        ]
    own = torch.nn.functional.normalize(vectors) @ torch.nn.functional.normalize(vectors).T
    pairs = own[torch.triu_indices(6, 6, offset=1).unbind()]
    assert found.pairwise is not None
    assert [found.pairwise.mean, found.pairwise.min, found.pairwise.max] == pytest.approx(
        [float(pairs.mean()), float(pairs.min()), float(pairs.max())], abs=1e-6
    )
    assert found.norms is not None
    assert found.norms.mean == pytest.approx(float(vectors.norm(dim=1).mean()), rel=1e-6)
    assert found.layers == ()
    assert found.difference is None


def test_multitask_prompts_are_looked_at_after_their_product(
    backbone: Backbone, make: Callable[..., MadePrompt]
) -> None:
    made = make("multitask", 4, seed=1)
    tensors = {name: t.double() for name, t in load_file(made.folder / "adapter_model.safetensors").items()}
    product = tensors["prompt_embeddings"] * (tensors["prefix_task_cols"][1] @ tensors["prefix_task_rows"][1])

    found = look(backbone, made.soft_prompt)

    assert [report.norm for report in found.vectors] == pytest.approx(product.norm(dim=1).tolist(), rel=1e-5)


def test_a_prompt_made_of_tokens_is_told_as_those_tokens(backbone: Backbone) -> None:
    token_ids = [7, 70, 100]
    found = look(backbone, embeddings(backbone.model.get_input_embeddings().weight[token_ids].numpy()))

    assert [report.nearest[0].token_id for report in found.vectors] == token_ids
    assert [report.nearest[0].cosine for report in found.vectors] == pytest.approx([1.0] * 3, abs=1e-6)


def test_difference_is_told_vector_by_vector_over_what_both_have(
    backbone: Backbone, make: Callable[..., MadePrompt]
) -> None:
    one, other = make("prompt_tuning", 6, seed=1), make("prompt_tuning", 4, seed=2)
    first, second = tensor_of(one)[:4], tensor_of(other)

    found = look(backbone, one.soft_prompt, other.soft_prompt).difference

    assert found is not None
    cosines = torch.nn.functional.cosine_similarity(first, second)
    distances = (first - second).norm(dim=1)
    assert found.num_compared == 4
    assert [vector.cosine for vector in found.vectors] == pytest.approx(cosines.tolist(), abs=1e-6)
    assert [vector.distance for vector in found.vectors] == pytest.approx(distances.tolist(), rel=1e-6)
    assert found.overall is not None
    assert found.overall.mean_cosine == pytest.approx(float(cosines.mean()), abs=1e-6)
    assert found.overall.worst_cosine == pytest.approx(float(cosines.min()), abs=1e-6)
    assert found.overall.worst_index == int(cosines.argmin())
    assert found.overall.mean_distance == pytest.approx(float(distances.mean()), rel=1e-6)
    assert found.overall.worst_distance == pytest.approx(float(distances.max()), rel=1e-6)
    assert found.layers == ()


@pytest.mark.parametrize("kind", ["prefix", "cartridge", "prefix_projection"])
def test_prefixes_are_told_layer_by_layer(kind: str, backbone: Backbone, make: Callable[..., MadePrompt]) -> None:
    one, other = make(kind, 5, seed=1), make(kind, 3, seed=2)
    # As PEFT lays them out: keys and values of one layer after another.
    first = tensor_of(one).view(5, NUM_LAYERS, 2, -1)
    second = tensor_of(other).view(3, NUM_LAYERS, 2, -1)

    found = look(backbone, one.soft_prompt, other.soft_prompt)

    assert found.vectors == ()
    assert found.norms is None
    assert found.difference is not None
    assert found.difference.num_compared == 3
    assert [report.layer for report in found.layers] == list(range(NUM_LAYERS))
    for layer in range(NUM_LAYERS):
        difference = found.difference.layers[layer]
        for part, report, closeness in (
            (0, found.layers[layer].keys, difference.keys),
            (1, found.layers[layer].values, difference.values),
        ):
            assert report.mean == pytest.approx(float(first[:, layer, part].norm(dim=1).mean()), rel=1e-6)
            cosines = torch.nn.functional.cosine_similarity(first[:3, layer, part], second[:, layer, part])
            assert closeness.mean_cosine == pytest.approx(float(cosines.mean()), abs=1e-6)
            assert closeness.worst_index == int(cosines.argmin())


def test_a_version_is_no_distance_from_itself(backbone: Backbone, make: Callable[..., MadePrompt]) -> None:
    prompt = make("prompt_tuning", 3, seed=1).soft_prompt

    found = look(backbone, prompt, prompt).difference

    assert found is not None
    assert found.overall is not None
    assert found.overall.worst_cosine == pytest.approx(1.0)
    assert found.overall.worst_distance == 0


def test_vectors_are_not_compared_with_keys_and_values(backbone: Backbone, make: Callable[..., MadePrompt]) -> None:
    with pytest.raises(InvalidRequestError, match="against: ") as raised:
        look(backbone, make("prompt_tuning", 3, seed=1).soft_prompt, make("prefix", 3, seed=1).soft_prompt)

    assert raised.value.param == "against"


def test_zero_vectors_have_no_direction(backbone: Backbone) -> None:
    zero = embeddings(np.zeros((2, backbone.hidden_size)))

    found = look(backbone, zero, zero)

    assert [report.nearest for report in found.vectors] == [(), ()]
    assert found.pairwise is None
    assert found.difference is not None
    assert [vector.cosine for vector in found.difference.vectors] == [None, None]
    assert found.difference.overall is not None
    assert found.difference.overall.mean_cosine is None
    assert found.difference.overall.worst_index is None
