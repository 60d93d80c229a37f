"""The order of the tests, tiny random language models, signals as of a terminal, and a judge's endpoint."""

from __future__ import annotations

import functools
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

# Tiny tensors gain nothing from a second thread, and threads that wait for each other lose much.
torch.set_num_threads(1)

VOCABULARY = 61
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}:{% endif %}"
)
FAMILIES: dict[str, tuple[str, str, float, dict[str, Any]]] = {
    "llama": ("Llama", "LlamaForCausalLM", 0.5, {}),
    "mistral": ("Mistral", "MistralForCausalLM", 0.5, {"sliding_window": 7}),
    "qwen2": ("Qwen2", "Qwen2ForCausalLM", 0.5, {}),
    "qwen2_mixed": (
        "Qwen2",
        "Qwen2ForCausalLM",
        0.5,
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", "Qwen3ForCausalLM", 0.5, {"head_dim": 16}),
    "gemma2": (
        "Gemma2",
        "Gemma2ForCausalLM",
        0.5,
        {"head_dim": 8, "sliding_window": 6, "final_logit_softcapping": 6.0},
    ),
    "gemma3": (
        "Gemma3Text",
        "Gemma3ForCausalLM",
        0.5,
        {"head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gpt2": ("GPT2", "GPT2LMHeadModel", 0.5, {"n_inner": 48}),
    "gpt_neox": ("GPTNeoX", "GPTNeoXForCausalLM", 0.5, {}),
    "granite": ("Granite", "GraniteForCausalLM", 2.0, {"logits_scaling": 4.0}),
    "cohere": ("Cohere", "CohereForCausalLM", 2.0, {"logit_scale": 0.3, "bos_token_id": 1}),
}
"""Names of the classes, a deviation of the output weights with which the distributions are neither flat nor
certain, and settings of its own: windows that hide part of a prompt, mixed with full attention."""
WITHOUT_GROUPED_HEADS = ("gpt2", "gpt_neox")
EAGER = ("gemma2",)
"""Families whose attention torch's own kernels cannot compute."""


@functools.cache
def _make_model(
    family: str = "llama",
    seed: int = 0,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float64,
    hidden_size: int = 32,
    intermediate_size: int = 48,
) -> Any:
    config_class, model_class, deviation, settings = FAMILIES[family]
    grouped = {} if family in WITHOUT_GROUPED_HEADS else {"num_key_value_heads": 2}
    config = getattr(transformers, f"{config_class}Config")(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        eos_token_id=2,
        attn_implementation="eager" if family in EAGER else attention,
        tie_word_embeddings=False,
        **grouped,
        **settings,
    )
    torch.manual_seed(seed)
    model = getattr(transformers, model_class)(config).to(dtype).eval().requires_grad_(False)
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=deviation)
    model.generation_config.eos_token_id = 2
    return model


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Each process begins with its share of the tests marked as long; short ones fill up the end.

    pytest-xdist gives each process a stretch of the list, all of the same length.
    """
    num_processes = getattr(config, "workerinput", {}).get("workercount", 1)
    if num_processes == 1:
        return
    long = [item for item in items if item.get_closest_marker("long")]
    short = [item for item in items if not item.get_closest_marker("long")]
    num, items[:] = len(items), []
    for number in range(num_processes):
        share = long[number::num_processes]
        length = (num - len(items)) // (num_processes - number)
        items += [*share, *short[: max(0, length - len(share))]]
        del short[: max(0, length - len(share))]
    items += short


@pytest.fixture(scope="session", autouse=True)
def hangups_count() -> Iterator[None]:
    """Under ``nohup`` SIGHUP is ignored, and every process started from there inherits that."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="session", autouse=True)
def own_state(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The key of whoever runs the tests is left alone, also by the commands that they start."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    """Makes a random two-layer model with grouped heads.

    ``make_model(family, seed, attention, dtype, hidden_size, intermediate_size)``.

    Float64 unless asked otherwise, so that two ways of computing the same thing agree to the last token.
    The same arguments give the same object: copy it before changing it.
    """
    return _make_model


@pytest.fixture(scope="session")
def llama() -> Any:
    return _make_model()


@pytest.fixture(scope="session")
def eager_llama() -> Any:
    """The same weights, with attention that adds its mask."""
    return _make_model(attention="eager")


@pytest.fixture(scope="session")
def llm_folder(make_llm_folder: Callable[..., Path]) -> Path:
    """A tiny model on disk, whose tokens are letters."""
    return make_llm_folder()


@pytest.fixture(scope="session")
def make_llm_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Saves what ``make_model`` makes of the same arguments, with a tokenizer of letters."""
    letters = {letter: number for number, letter in enumerate("_^$abcdefghijklmnopqrstuvwxyz<>:? ")}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="_"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="_", bos_token="^", eos_token="$", chat_template=TEMPLATE
    )

    def make(**sizes: Any) -> Path:
        path = tmp_path_factory.mktemp("llm")
        _make_model(**sizes).save_pretrained(path)
        fast.save_pretrained(path)
        return path

    return make


class Endpoint:
    """Answers questions as ``answer`` says: question → status and text. Remembers what came."""

    def __init__(self) -> None:
        self.answer: Callable[[str], tuple[int, str]] = lambda question: (200, "[[tie]]")
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.needs_key = False
        self.raw: bytes | None = None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                is_refused = outer.needs_key and self.headers["Authorization"] != "Bearer key"
                self._reply(401 if is_refused else 200, b'{"data": []}')

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append({"path": self.path, **request})
                outer.keys.append(self.headers["Authorization"])
                status, text = outer.answer(request["messages"][-1]["content"])
                content = {"choices": [{"message": {"role": "assistant", "content": text}}]}
                said = json.dumps(content) if status == 200 else text
                self._reply(status, outer.raw or said.encode())

            def _reply(self, status: int, content: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    """A real HTTP server that plays an OpenAI-compatible endpoint."""
    one = Endpoint()
    thread = threading.Thread(target=one.server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield one
    one.server.shutdown()
    one.server.server_close()
    thread.join()
