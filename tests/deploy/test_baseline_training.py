"""The baselines by the real TRL, on a tiny LLM: what the adapters learn, and what the cards say of it."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner, Result

from mara.actors.adapters import load_adapted
from mara.actors.config import LLMConfig
from mara.actors.head_config import HeadShape
from mara.actors.heads import RewardHead, answer_ids, save_head
from mara.actors.llm import LLM
from mara.deploy.baselines.card import read_report
from mara.deploy.baselines.config import BaselineReport
from mara.deploy.baselines.scoring import Scorer
from mara.deploy.cli import app
from mara.deploy.comparison.config import fill_template

RANK = 4
PAIRS = [
    ("why this", "because", "no idea"),
    ("how come", "by luck", "who now"),
    ("what for", "for fun", "nothing"),
    ("where to", "up here", "nowhere"),
]
"""Prompts, chosen and rejected answers, each of the same length, so that nothing is padded."""
TEMPLATE = "better {prompt}: {response}"


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A training ends with its process; what it sets for all of that is set back for the other tests."""
    offline = huggingface_hub.constants
    monkeypatch.setattr(offline, "HF_HUB_OFFLINE", offline.HF_HUB_OFFLINE)
    verbosity = transformers.utils.logging.get_verbosity()
    yield
    transformers.utils.logging.set_verbosity(verbosity)


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    rows = [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in PAIRS]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def added_product(_: Any, left: Sequence[int], right: Sequence[int], **__: Any) -> int:
    """Operations by the shapes of the matrices."""
    return 2 * left[0] * left[1] * right[1]


def train(method: str, llm_folder: Path, out: Path, *arguments: str) -> tuple[Result, int]:
    """The command, and the operations of products with weights that torch counted in it."""
    settings = ("llm.dtype=float32", "llm.device=cpu", f"lora_rank={RANK}", *arguments)
    # Torch's counter passes over the product that TRL adds in place: the gradient of the last states.
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added_product}) as counter:
        result = CliRunner().invoke(
            app, ["baseline", method, "--llm", str(llm_folder), "--out", str(out), *settings]
        )
    by_operator = counter.get_flop_counts().get("Global", {})
    weights = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
    return result, sum(by_operator.get(operator, 0) for operator in weights)


def on_pairs(
    method: str, llm_folder: Path, pairs: Path, out: Path, *arguments: str
) -> tuple[BaselineReport, int]:
    """Train on all pairs, all in one step; report and operations."""
    result, num_flops = train(
        method,
        llm_folder,
        out,
        f"--pairs={pairs}",
        "held_out=0",
        "share=0,1",
        "batch_size=4",
        "micro_batch_size=2",
        *arguments,
    )
    assert result.exit_code == 0, result.stderr or result.exception
    return read_report(out), num_flops


def adapted(llm_folder: Path, adapter: Path | None) -> LLM:
    config = LLMConfig(model=str(llm_folder), dtype="float32", device="cpu")
    return load_adapted(config, adapter, pack=False)


def logprob(llm: LLM, prompt_ids: Sequence[int], text: str) -> float:
    """Of an answer and the token that ends it, by a plain pass."""
    ids = [*answer_ids(llm, text), llm.eos_id]
    with torch.no_grad():
        logits_LV = llm.model(torch.tensor([[*prompt_ids, *ids]])).logits[0]
    logprobs_NV = logits_LV[len(prompt_ids) - 1 : -1].log_softmax(-1)
    return float(logprobs_NV[torch.arange(len(ids)), torch.tensor(ids)].sum())


def sample(llm: LLM, prompts: Sequence[str], max_new_tokens: int) -> list[list[int]]:
    """An answer to each prompt; all prompts of the same length."""
    ids_BL = torch.tensor([llm.render(prompt) for prompt in prompts])
    whole_BL = llm.model.generate(
        ids_BL,
        attention_mask=torch.ones_like(ids_BL),
        do_sample=True,
        top_k=0,
        max_new_tokens=max_new_tokens,
        pad_token_id=llm.eos_id,
    )
    answers = whole_BL[:, ids_BL.shape[1] :].tolist()
    ends = [ids.index(llm.eos_id) + 1 if llm.eos_id in ids else len(ids) for ids in answers]
    return [ids[:end] for ids, end in zip(answers, ends, strict=True)]


def not_needed(llm: LLM, num_tokens: int) -> int:
    """Operations that the formula counts and torch need not do: below the first layer nothing is trained, so
    no gradient passes through the first projections."""
    attention = llm.model.model.layers[0].self_attn
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    return sum(2 * num_tokens * (p.weight.numel() + RANK * p.in_features) for p in projections)


def test_dpo_widens_the_margin_that_its_card_names(
    llm_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "dpo"
    report, num_flops = on_pairs(
        "dpo", llm_folder, pairs_file, out, "num_epochs=10", "learning_rate=1e-2", "beta=0.5"
    )
    plain, trained = adapted(llm_folder, None), adapted(llm_folder, out)
    margins = []
    for prompt, chosen, rejected in PAIRS:
        prompt_ids = plain.render(prompt)
        chosen_gain, rejected_gain = (
            logprob(trained, prompt_ids, text) - logprob(plain, prompt_ids, text)
            for text in (chosen, rejected)
        )
        margins.append(chosen_gain - rejected_gain)
    assert min(margins) > 1.0
    # The last step, whose learning rate is a tenth, comes after the last measurement.
    assert report.last["rewards/margins"] == pytest.approx(0.5 * sum(margins) / len(margins), rel=0.1)
    assert report.last["loss"] < math.log(2) / 2
    assert report.num_steps == 10 and report.data.num_used == len(PAIRS)
    num_tokens = 10 * sum(
        2 * len(plain.render(prompt)) + len(chosen) + len(rejected) + 2 for prompt, chosen, rejected in PAIRS
    )
    assert report.compute.tokens["read"] == report.last["num_tokens"] == num_tokens
    assert report.compute.total - num_flops == not_needed(plain, num_tokens)


def test_the_corrector_learns_the_better_answer_to_what_it_is_asked(
    llm_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "aligner"
    report, num_flops = on_pairs(
        "aligner",
        llm_folder,
        pairs_file,
        out,
        "num_epochs=15",
        "learning_rate=2e-2",
        f"template={TEMPLATE}",
    )
    plain, trained = adapted(llm_folder, None), adapted(llm_folder, out)
    # The tiny tokenizer writes a space between letters.
    asked = [
        plain.render(fill_template(TEMPLATE, prompt, plain.decode(answer_ids(plain, rejected))))
        for prompt, _, rejected in PAIRS
    ]
    num_answer_tokens = sum(len(chosen) + 1 for _, chosen, _ in PAIRS)
    before, after = (
        -sum(logprob(llm, ids, chosen) for ids, (_, chosen, _) in zip(asked, PAIRS, strict=True))
        / num_answer_tokens
        for llm in (plain, trained)
    )
    assert after < before / 3
    assert report.last["loss"] == pytest.approx(after, rel=0.1)
    num_tokens = 15 * (sum(map(len, asked)) + num_answer_tokens)
    assert report.compute.tokens["read"] == report.last["num_tokens"] == num_tokens
    assert report.compute.total - num_flops == not_needed(plain, num_tokens)
    assert f'template: "{TEMPLATE}"' in (out / "README.md").read_text()


def test_rlhf_raises_the_reward_of_what_is_sampled(llm_folder: Path, tmp_path: Path) -> None:
    head = RewardHead(HeadShape(hidden_size=32, width=8)).requires_grad_(False)
    for parameter in head.parameters():
        parameter.normal_(generator=torch.Generator().manual_seed(0))
    save_head(tmp_path / "head", head, {})
    prompts = [prompt for prompt, _, _ in PAIRS]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    out = tmp_path / "rlhf"
    result, _ = train(
        "rlhf",
        llm_folder,
        out,
        f"--prompts={tmp_path / 'prompts.txt'}",
        f"rewards.helpful.path={tmp_path / 'head'}",
        f"rewards.harmless.path={tmp_path / 'head'}",
        "rewards.harmless.weight=0",
        "max_new_tokens=4",
        "num_answers=320",
        "answers_at_once=32",
        "batch_size=32",
        "micro_batch_size=16",
        "learning_rate=2e-2",
        "kl_weight=0.01",
    )
    assert result.exit_code == 0, result.stderr or result.exception
    report = read_report(out)
    plain, trained = adapted(llm_folder, None), adapted(llm_folder, out)
    asked = prompts * 16
    torch.manual_seed(0)
    rewards = [
        statistics.mean(
            Scorer(plain, {"helpful": head}, {"helpful": 1.0}).score(
                asked, sample(llm, asked, max_new_tokens=4), lambda *_: None
            )
        )
        for llm in (plain, trained)
    ]
    assert rewards[1] > rewards[0] + 1.0
    assert report.last["reward"] == pytest.approx(rewards[1], abs=0.5)
    assert report.num_steps == 10 and report.data.num_used == 320
    tokens = report.compute.tokens
    assert tokens["prompts"] == 320 * len(plain.render(prompts[0]))
    assert tokens["prompts"] + tokens["answers"] == report.last["num_tokens"]
    # Eight prompts of four answers at a time, each of them read once for its answers.
    assert 0 < tokens["prompts read for the rewards"] <= tokens["prompts"] / 4


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            ["num_epochs=2", "learning_rate=1e38"],
            "learning_rate=1e+38: the adapter is not finite after 2 steps",
        ),
        (["batch_size=16"], "pairs to train on make a single step of batch_size=16"),
    ],
)
def test_an_adapter_of_no_use_is_told_and_not_kept(
    settings: list[str], told: str, llm_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "dpo"
    result, _ = train("dpo", llm_folder, out, f"--pairs={pairs_file}", "held_out=0", "share=0,1", *settings)
    assert result.exit_code == 2, result.output
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert told in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]
