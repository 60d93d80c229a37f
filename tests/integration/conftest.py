"""A tiny LLM, reward heads and prompts made on the fly, and the real command line on them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

MARKER = "MARA_TEST_MARKER"
"""Environment variable inherited by every process of a run: how the tests find what is left running."""
HIDDEN_SIZE = 32
WORDS = ("what how why is are the a cat dog sun rain house tree good bad day night help make find").split()  # noqa: SIM905


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an LLM, two reward heads, prompts and ``run.yaml``."""
    folder = tmp_path_factory.mktemp("world")
    make_llm(folder / "llm")
    for name in ("helpful", "harmless"):
        make_head(folder / name)
    prompts = [f"{a} {b}?" for a in WORDS for b in WORDS[:5]]
    lines = [json.dumps({"prompt": prompt}) for prompt in prompts]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "run.yaml").write_text(CONFIG)
    return folder


CONFIG = """
llm: {model: LLM, dtype: float32, device: cpu}
prompts: {train: prompts.jsonl}
rewards:
  helpful: {path: helpful, weight: 1.0}
  harmless: {path: harmless, weight: 0.5}
decoding: {max_new_tokens: 8, truncation: {top_k: 4}, steering: value, min_advantage: 0}
agent: {widths: [16, 8]}
rollout: {num_actors: 2, rows: 4, num_cpus: 0.5}
shaping: {discount: 1.0}
replay: {capacity_transitions: 20000, log_max_bytes: 16777216}
learner:
  num_episodes: 60
  batch_size: 32
  start_batches: 2
  gradient_steps_per_episode: 0.5
  log_period_s: 0.5
  publish_period_s: 0.2
  device: cpu
  sac: {critic_widths: [16, 8]}
evaluation: {after_training: false}
"""


def make_llm(folder: Path) -> None:
    """Save a Llama of 32 hidden units with random weights and a tokenizer of whole words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "<user>", "<assistant>"]
    vocabulary = {word: index for index, word in enumerate([*special, "?", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<user>", "<assistant>"],
    )
    fast.chat_template = (
        "<s>{% for message in messages %}<user> {{ message.content }} {% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=vocabulary["<s>"],
        eos_token_id=vocabulary["</s>"],
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def make_head(folder: Path) -> None:
    """Save a reward head with random weights."""
    import torch

    from mara.actors.head_config import HeadShape
    from mara.actors.heads import RewardHead, save_head

    head = RewardHead(HeadShape(hidden_size=HIDDEN_SIZE))
    generator = torch.Generator().manual_seed(len(folder.name))
    for parameter in head.parameters():
        parameter.data.normal_(generator=generator)
    save_head(folder, head, card={})


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Mara:
    """The ``mara`` command in a process group of its own, with everything it starts marked."""

    def __init__(self, folder: Path, arguments: Sequence[str]) -> None:
        self.marker = f"{os.getpid()}-{time.monotonic_ns()}"
        self._known: set[psutil.Process] = set()
        self.output = folder / f"output-{self.marker}.txt"
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "RAY_"))}
        environment |= {MARKER: self.marker, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        environment["NETRC"] = str(folder / "no-netrc")  # Whoever runs the tests may have a W&B login.
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mara.deploy.cli", *arguments],
                cwd=folder,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def text(self) -> str:
        return self.output.read_text()

    @property
    def run_folder(self) -> Path:
        """Of the training, which has said it."""
        line = next(line for line in self.text.splitlines() if line.startswith("run folder: "))
        return Path(line.removeprefix("run folder: "))

    def records(self) -> list[dict[str, float]]:
        """What the training has recorded so far."""
        if "run folder: " not in self.text:
            return []
        return [json.loads(line) for line in (self.run_folder / "metrics.jsonl").read_text().splitlines()]

    def wait(self, timeout_s: float = 180) -> int:
        """Wait for the end; the exit status."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.end()
            pytest.fail(f"mara did not end within {timeout_s} s:\n{self.text}")

    def wait_until(self, condition: Callable[[], bool], what: str, timeout_s: float = 180) -> None:
        """Wait for ``condition`` while the command runs."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.end()
                pytest.fail(f"{what} did not come about:\n{self.text}")
            time.sleep(0.05)
        self.processes()

    def signal_group(self, number: signal.Signals) -> None:
        """What Ctrl-C in a terminal, or ``timeout``, does."""
        os.killpg(self.process.pid, number)

    def processes(self) -> list[psutil.Process]:
        """Every living process that descends from the command, wherever it went.

        Some of Ray's processes write their title over their environment: those are known by their parents.
        """
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARKER) == self.marker:
                    self._known |= {process, *process.children(recursive=True)}
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return [process for process in self._known if is_alive(process)]

    def left_running(self, within_s: float = 5) -> list[str]:
        """Command lines of what still runs after the end."""
        deadline = time.monotonic() + within_s
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return [" ".join(process.cmdline()) for process in left]

    def end(self) -> None:
        for process in self.processes():
            process.kill()
        self.process.wait()


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Callable[..., Mara]]:
    """Start ``mara`` with arguments; whatever happens, nothing outlives the test."""
    started: list[Mara] = []

    def start(*arguments: str) -> Mara:
        started.append(Mara(tmp_path, arguments))
        return started[-1]

    yield start
    for one in started:
        one.end()


@pytest.fixture(scope="session")
def check_what_a_signal_leaves() -> Callable[[Path, str], None]:
    """Of a training that one has ended: ``check(run folder, output)``."""

    def check(folder: Path, text: str) -> None:
        from mara.common.agent import load_agent

        assert "Traceback" not in text
        _, card = load_agent(folder / "agent", hidden_size=HIDDEN_SIZE)
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert rows[-1]["learner/gradient_step"] == card["training"]["gradient_steps"] >= 1
        latest = folder.parent / "latest"
        assert latest.exists() == (card["training"]["policy_steps"] > 0)
        assert not latest.exists() or latest.resolve() == folder
        assert f"`mara train --resume {folder}` goes on with the training" in text.splitlines()[-1]
        assert not list(folder.rglob("running.lock"))

    return check


@pytest.fixture
def mara(world: Path, command: Callable[..., Mara]) -> Callable[..., Mara]:
    """Start ``mara train`` on the tiny world with overrides."""

    def start(*overrides: str) -> Mara:
        return command("train", str(world / "run.yaml"), f"llm.model={world / 'llm'}", *overrides)

    return start
