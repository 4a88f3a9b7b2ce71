"""What the routes of training refuse, and how; that jobs run is shown by tests/integration/training."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch

from server.api.fine_tuning_schemas import NOT_OF_CONFIG, TrainingOptions
from server.api.upload_form import MAX_FILENAME_CHARS
from server.errors import InvalidRequestError
from server.runtime.training_jobs import JobRunner
from server.runtime.training_specs import Hyperparameters, JobLimits, JobRequest, make_spec, num_parameters, read_spec
from tests.fakes import EchoBackbone
from tests.unit.api.live_server import LiveServer, running_server
from tuning.attention import LayerShape
from tuning.config import TrainConfig
from tuning.methods import BackboneFacts
from tuning.methods.cartridge import Cartridge
from tuning.methods.p_tuning import PTuning
from tuning.methods.p_tuning_v2 import PTuningV2
from tuning.methods.prefix_tuning import PrefixTuning
from tuning.methods.prompt_tuning import PromptTuning

GOOD = b'{"prompt": "a", "completion": " b"}\n'
JOBS = "/v1/fine_tuning/jobs"


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """Its backbone is no model: files are taken, and jobs are refused when all else about them is right."""
    # What it imports at its start takes longer than a test waits for a server.
    assert JobRunner
    with running_server(tmp_path_factory.mktemp("data"), allow_training="on", max_training_file_bytes=2048) as live:
        yield live


def send(live: LiveServer, data: bytes = GOOD, name: str = "x.jsonl", **fields: str) -> httpx.Response:
    with live.client() as client:
        return client.post("/v1/files", files={"file": (name, data)}, data={"purpose": "fine-tune"} | fields)


def create(live: LiveServer, **body: Any) -> httpx.Response:
    with live.client() as client:
        return client.post(JOBS, json={"model": "tiny/echo", "training_file": "file-x"} | body)


def error_of(response: httpx.Response) -> tuple[int, str, str | None]:
    error = response.json()["error"]
    return response.status_code, error["code"], error["param"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/files"),
        ("GET", "/v1/files/x"),
        ("GET", "/v1/files/x/content"),
        ("DELETE", "/v1/files/x"),
        ("GET", JOBS),
        ("GET", f"{JOBS}/x"),
        ("GET", f"{JOBS}/x/events"),
        ("GET", f"{JOBS}/x/checkpoints"),
        ("POST", f"{JOBS}/x/cancel"),
    ],
)
def test_a_server_that_makes_no_prompts_says_so(server: LiveServer, method: str, path: str) -> None:
    with server.client() as client:
        assert error_of(client.request(method, path)) == (403, "training_disabled", None)
    assert error_of(send(server)) == (403, "training_disabled", None)
    assert error_of(create(server)) == (403, "training_disabled", None)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "holds no example"),
        (b"\n\n", "holds no example"),
        (GOOD + b"[]\n", "x.jsonl:2"),
        (GOOD + b'{"prompt": "a"}\n', "x.jsonl:2: completion: is missing"),
        (GOOD + b'{"prompt": "", "completion": "b"}\n', "x.jsonl:2: prompt: must not be empty"),
        (GOOD + b'{"prompt": "a", "completion": "b", "more": 1}\n', "x.jsonl:2: more"),
        (GOOD + b'{"prompt": "a", "prompt": "a", "completion": "b"}\n', "x.jsonl:2"),
        (b'{"prompt": NaN, "completion": "b"}\n', "x.jsonl:1"),
        (b"\xff\xfe\n", "x.jsonl:1"),
        (b"PK\x03\x04", "x.jsonl:1"),
    ],
)
def test_a_file_that_cannot_be_trained_on_is_refused_by_line(training: LiveServer, data: bytes, message: str) -> None:
    response = send(training, data)

    assert error_of(response) == (400, "invalid_training_file", "file")
    assert message in response.json()["error"]["message"]


def test_a_file_too_large_is_refused_while_it_comes(training: LiveServer) -> None:
    assert error_of(send(training, GOOD * 100))[:2] == (413, "payload_too_large")
    assert error_of(send(training, GOOD * 10_000))[:2] == (413, "payload_too_large")


@pytest.mark.parametrize(
    ("fields", "param"), [({"purpose": "batch"}, "purpose"), ({"expires_after": "1"}, "expires_after")]
)
def test_what_is_not_supported_of_files_is_named(training: LiveServer, fields: dict[str, str], param: str) -> None:
    status, _, found = error_of(send(training, **fields))

    assert (status, found) == (400, param)


@pytest.mark.parametrize("name", ["../../etc/passwd", "a\\b\\passwd", "x" * 500, "\x1b[31mred"])
def test_a_files_name_is_a_word_in_a_list_and_no_path(training: LiveServer, name: str) -> None:
    response = send(training, name=name)

    kept = response.json()["filename"]
    assert response.status_code == 200
    assert "/" not in kept
    assert kept.isprintable()
    assert len(kept) <= MAX_FILENAME_CHARS


def test_a_file_comes_back_as_it_was(training: LiveServer) -> None:
    file = send(training).json()

    with training.client() as client:
        content = client.get(f"/v1/files/{file['id']}/content")
        assert content.content == GOOD
        assert content.headers["etag"].startswith('"sha256:')
        assert client.delete(f"/v1/files/{file['id']}").json() == {"id": file["id"], "object": "file", "deleted": True}
        assert error_of(client.get(f"/v1/files/{file['id']}")) == (404, "not_found", "file_id")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"model": "nobody"}, "model"),
        ({"training_file": ""}, "training_file"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**31}, "seed"),
        ({"suffix": "x" * 65}, "suffix"),
        ({"integrations": [{"type": "wandb"}]}, "integrations"),
        ({"metadata": {str(n): "x" for n in range(17)}}, "metadata"),
        ({"method": {"type": "dpo"}}, "method.type"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"batch_size": "many"}}, "hyperparameters.batch_size"),
        ({"hyperparameters": {"learning_rate_multiplier": -1}}, "hyperparameters.learning_rate_multiplier"),
        ({"promptmux": {"method": "lora"}}, "promptmux.method"),
        ({"promptmux": {"num_virtual_tokens": 10**9}}, "promptmux.num_virtual_tokens"),
        ({"promptmux": {"gate_threshold": 1.5}}, "promptmux.gate_threshold"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_a_wrong_field_of_a_job_is_named(training: LiveServer, body: dict[str, Any], param: str) -> None:
    status, _, found = error_of(create(training, **body))

    assert (status, found) == (400, param)


def test_a_backbone_that_cannot_be_trained_over_refuses_jobs_and_says_why(training: LiveServer) -> None:
    response = create(training, training_file=send(training).json()["id"])

    assert error_of(response) == (400, "training_unsupported", "model")


SHAPE = EchoBackbone().shape(64)
MAX_PARAMETERS = 20_000


def spec_of(num_examples: int = 100, **fields: Any) -> dict[str, Any]:
    request = JobRequest(model="m", training_file="f", **fields)
    limits = JobLimits(max_steps=5000, max_tokens=100, max_parameters=MAX_PARAMETERS)
    spec = make_spec(request, num_examples=num_examples, limits=limits, shape=SHAPE)
    kept = spec.to_json()
    assert read_spec(json.loads(json.dumps(kept))) == spec
    return kept


def test_options_are_the_fields_of_the_configuration() -> None:
    assert set(TrainingOptions.model_fields) - NOT_OF_CONFIG == set(TrainConfig.model_fields)


@pytest.mark.parametrize(
    ("num_examples", "hyperparameters", "num_steps", "batch_size"),
    [
        (4, Hyperparameters(), 150, 4),
        (1600, Hyperparameters(), 300, 16),
        (100_000, Hyperparameters(), 1000, 16),
        (100, Hyperparameters(n_epochs=3, batch_size=8), 39, 8),
        (100, Hyperparameters(n_epochs=1), 7, 16),
    ],
)
def test_epochs_become_steps(
    num_examples: int, hyperparameters: Hyperparameters, num_steps: int, batch_size: int
) -> None:
    config = spec_of(num_examples, hyperparameters=hyperparameters)["config"]

    assert (config["num_steps"], config["batch_size"]) == (num_steps, batch_size)


def test_the_multiplier_is_of_the_methods_usual_rate() -> None:
    for method, usual in (("prompt_tuning", 0.03), ("prefix_tuning", 0.001)):
        spec = spec_of(hyperparameters=Hyperparameters(learning_rate_multiplier=2.0), options={"method": method})
        assert spec["config"]["learning_rate"] == pytest.approx(2 * usual)


def test_a_validation_file_is_looked_at_ten_times() -> None:
    assert spec_of(validation_file="v", options={"num_steps": 200})["config"]["eval_every"] == 20
    assert spec_of(options={"num_steps": 200})["config"]["eval_every"] is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"options": {"num_steps": 5001}}, "promptmux.num_steps"),
        ({"hyperparameters": Hyperparameters(n_epochs=1000)}, "hyperparameters.n_epochs"),
        ({"options": {"num_steps": 5}, "hyperparameters": Hyperparameters(n_epochs=1)}, "promptmux.num_steps"),
        ({"options": {"batch_size": 5}, "hyperparameters": Hyperparameters(batch_size=5)}, "promptmux.batch_size"),
        (
            {"options": {"learning_rate": 1.0}, "hyperparameters": Hyperparameters(learning_rate_multiplier=2.0)},
            "promptmux.learning_rate",
        ),
        ({"options": {"seed": 5}, "seed": 6}, "promptmux.seed"),
        ({"options": {"num_virtual_tokens": 65}}, "promptmux.num_virtual_tokens"),
        ({"options": {"method": "p_tuning", "encoder_hidden_size": 65_536}}, "promptmux.encoder_hidden_size"),
        ({"options": {"method": "prefix_tuning", "encoder_hidden_size": 65_536}}, "promptmux.encoder_hidden_size"),
        ({"options": {"init": "text", "method": "prefix_tuning"}}, "promptmux.init"),
        ({"options": {"patience": 2}}, "promptmux.patience"),
        ({"gate_threshold": 0.5}, "promptmux.gate_threshold"),
    ],
)
def test_a_contradiction_names_the_field_that_is_to_change(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        spec_of(**fields)

    assert refused.value.param == param


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "prefix_tuning", "p_tuning_v2", "cartridge"])
@pytest.mark.parametrize("width", [None, 5])
def test_what_is_trained_is_counted_before_it_takes_memory(method: str, width: int | None) -> None:
    has_encoder = method in ("p_tuning", "prefix_tuning")
    config = TrainConfig(
        method=method, num_virtual_tokens=3, num_steps=1, encoder_hidden_size=width if has_encoder else None
    )
    layers = (LayerShape(kv_heads=1, key_dim=4, value_dim=4),) * SHAPE.num_layers
    facts = BackboneFacts("b", SHAPE.hidden_size, 1, layers, torch.device("cpu"))
    makers = {
        "prompt_tuning": lambda: PromptTuning(facts, 3, init="random", start=None, seed=0),
        "p_tuning": lambda: PTuning(facts, 3, encoder_hidden_size=config.encoder_hidden_size, seed=0),
        "prefix_tuning": lambda: PrefixTuning(facts, 3, encoder_hidden_size=config.encoder_hidden_size, seed=0),
        "p_tuning_v2": lambda: PTuningV2(facts, 3, start=None, seed=0),
        "cartridge": lambda: Cartridge(facts, 3, start=None, seed=0),
    }
    made = sum(tensor.numel() for tensor in (*makers[method]().parameters(), *makers[method]().buffers()))

    assert num_parameters(config, SHAPE) == made


def test_layers_that_differ_take_no_prefix() -> None:
    shape = dataclasses.replace(SHAPE, kv_heads=None, head_dim=None)

    with pytest.raises(InvalidRequestError) as refused:
        num_parameters(TrainConfig(method="p_tuning_v2", num_steps=1), shape)

    assert refused.value.param == "promptmux.method"


def test_the_usual_number_of_virtual_tokens_is_never_too_many() -> None:
    limits = JobLimits(max_steps=5000, max_tokens=100, max_parameters=MAX_PARAMETERS)
    request = JobRequest(model="m", training_file="f")

    spec = make_spec(request, num_examples=9, limits=limits, shape=EchoBackbone().shape(4))

    assert spec.config.num_virtual_tokens == 4
