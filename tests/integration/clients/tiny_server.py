"""A real server over a tiny random backbone whose tokens are bytes, with a chat template and two prompts.

Random weights write random bytes: characters cut in two, bytes that are no UTF-8, and ends at any moment.
"""

import json
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from server.app import create_app
from server.engine.backbone import Backbone
from server.settings import Settings
from tests.factories import CONFIGS, load_model, read_prompt, save_prompt, save_tiny_backbone
from tests.integration.isolation.oracle import PeftOracle
from tests.unit.api.live_server import TIMEOUT_S, serving

SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")
EOS_ID = 2
# Two of them join what a stop string may cut, and a space with the letter behind it.
MERGES = (("Ġ", "t"), ("e", "r"), ("Ã", "©"))
CHAT_TEMPLATE = (
    "{% for message in messages %}<bos>{{ message['role'] }}\n{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant\n{% endif %}"
)
TASKS = {"front": "prompt_tuning", "layers": "prefix"}
LABELS = ["good", "bad"]
MAX_VIRTUAL_TOKENS = 16
# Nothing here is encrypted; httpx would read all certificates anew for each client.
_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


@dataclass(frozen=True, slots=True)
class TinyServer:
    """`oracle` answers for the tasks by name, and for the bare backbone by None."""

    url: str
    backbone: str
    tokenizer: PreTrainedTokenizerFast
    oracle: PeftOracle

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, verify=_TLS)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        with self.client() as client:
            response = client.post(path, json=body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def stream(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The data of the events, `[DONE]` left out."""
        with self.client() as client:
            response = client.post(path, json=body | {"stream": True})
        assert response.status_code == 200, response.text
        assert response.text.endswith("data: [DONE]\n\n")
        return [json.loads(event.removeprefix("data: ")) for event in response.text.split("\n\n")[:-2]]


@contextmanager
def tiny_server(folder: Path) -> Iterator[TinyServer]:
    model_folder = save_tiny_backbone("llama", folder / "tiny", config_fields=CONFIGS["llama"] | {"vocab_size": 263})
    tokenizer = make_byte_tokenizer()
    tokenizer.save_pretrained(model_folder)
    base = load_model(model_folder)
    shape = Backbone.load(str(model_folder), dtype="float32", device="cpu").shape(MAX_VIRTUAL_TOKENS)
    prompts = {
        name: read_prompt(name, save_prompt(model_folder, kind, 5, folder / name, seed=3, base=base), shape)
        for name, kind in TASKS.items()
    }
    app = create_app(
        Settings(
            model=str(model_folder),
            dtype="float32",
            device="cpu",
            compile="off",
            max_virtual_tokens=MAX_VIRTUAL_TOKENS,
            data_dir=folder / "data",
        )
    )
    with serving(app) as (_, port):
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(url)
        for name, prompt in prompts.items():
            _upload(url, name, prompt.folder)
        yield TinyServer(url, app.state.runtime.parts.backbone.name, tokenizer, PeftOracle(base, prompts.values()))


def make_byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: i for i, name in enumerate([*SPECIALS, *alphabet, *(a + b for a, b in MERGES)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, list(MERGES)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
    )


def _wait_until_ready(url: str) -> None:
    """Asks until the backbone is loaded; pytest's own time limit ends a wait in vain."""
    with httpx.Client(base_url=url, timeout=TIMEOUT_S, verify=_TLS) as client:
        while (answer := client.get("/readyz")).status_code != 200:
            assert answer.json()["error"]["code"] == "loading", answer.text


def _upload(url: str, name: str, folder: Path) -> None:
    files = {
        "file": ("adapter_model.safetensors", (folder / "adapter_model.safetensors").read_bytes()),
        "config": ("adapter_config.json", (folder / "adapter_config.json").read_bytes()),
    }
    data = {"metadata": json.dumps({"labels": LABELS})}
    response = httpx.post(f"{url}/v1/tasks/{name}/versions", files=files, data=data, timeout=TIMEOUT_S, verify=_TLS)
    assert response.status_code == 201, response.text
