"""Judges that score: heads share a reading, others are asked for a score."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mara.actors.heads import HeadRewardModel, RewardHead
from mara.actors.llm import load_llm
from mara.common.contracts import Conversation
from mara.common.errors import UserError
from mara.deploy.comparison import judges as module
from mara.deploy.comparison.config import ComparisonConfig
from mara.deploy.comparison.judges import Judges
from mara.deploy.config import RunConfig

SAID = [Conversation("why", "so it is"), Conversation("why", ""), Conversation("how so", "abc")]


@pytest.fixture
def made(tiny_run: tuple[Path, RunConfig], monkeypatch: pytest.MonkeyPatch) -> tuple[Judges, list[int]]:
    """Two heads, and how many texts were read."""
    _, config = tiny_run
    llm = load_llm(config.llm)
    read: list[int] = []
    really = module.read_responses

    def counted(llm, said):
        read.append(len(said))
        return really(llm, said)

    monkeypatch.setattr(module, "read_responses", counted)
    return Judges(config.rewards, lambda: llm, Path.cwd()), read


def test_heads_and_likelihood_come_from_one_reading(made, tiny_run) -> None:
    judges, read = made
    found = judges.judge(["likelihood", "helpful", "cost"], SAID, ["how so", "how so", None])
    assert read == [3, 2]
    assert [row["likelihood"]["num_tokens"] for row in found] == [8, 0, 3]
    elsewhere = judges.judge(["likelihood"], [Conversation("how so", "so it is")], [None])[0]["likelihood"]
    assert found[0]["likelihood"]["logprob_elsewhere"] == pytest.approx(elsewhere["logprob"], abs=1e-3)
    assert found[0]["likelihood"]["logprob"] != pytest.approx(elsewhere["logprob"], abs=1e-2)
    assert found[1]["likelihood"]["logprob_elsewhere"] == 0.0
    assert found[2]["likelihood"]["logprob_elsewhere"] is None
    for name, config in tiny_run[1].rewards.items():
        llm = load_llm(tiny_run[1].llm)
        head = module.load_head(config.path)
        wanted = HeadRewardModel(llm, head).score(SAID).tolist()
        assert [row[name]["score"] for row in found] == pytest.approx(wanted, abs=1e-4)


def test_weighted_judges_are_one_reward_model(made) -> None:
    judges, _ = made
    rows = judges.judge(["helpful", "cost"], SAID)
    total_B = judges.weighted(["helpful", "cost"]).score(SAID)
    wanted = [row["helpful"]["score"] - 0.5 * row["cost"]["score"] for row in rows]
    assert total_B.tolist() == pytest.approx(wanted, abs=1e-5) and total_B.dtype == torch.float32


def test_a_judge_that_is_no_head_is_given_the_text_and_no_llm_is_loaded_for_it(tmp_path: Path) -> None:
    """With the settings that ``rewards`` of a training would have."""
    (tmp_path / "judge_of_lengths.py").write_text(
        "def length(prompts, responses): return [len(response) for response in responses]\n"
        "def broken(prompts, responses): raise OSError('away\\nfor good')\n"
    )
    content = {
        "llm": {"model": "m"},
        "systems": {"base": {"kind": "llm"}, "sampled": {"kind": "llm", "sampling": True}},
        "datasets": {"d": {"path": "p.jsonl"}},
        "baseline": "base",
        "judges": {
            name: {"kind": "function", "function": f"judge_of_lengths:{name}", "weight": 1}
            for name in ("length", "broken")
        },
    }
    config = ComparisonConfig.model_validate(content)

    def no_llm():
        raise AssertionError("nothing reads the text")

    judges = Judges(config.scoring_judges, no_llm, tmp_path)
    assert judges.judge(["length"], SAID) == [{"length": {"score": float(n)}} for n in (8, 0, 3)]
    with pytest.raises(UserError, match=r"judges\.broken: no scores \(.*away\); look") as caught:
        judges.judge(["broken"], SAID)
    assert "\n" not in str(caught.value)


def test_a_score_that_is_no_number_is_told(made, monkeypatch) -> None:
    judges, _ = made
    monkeypatch.setattr(
        RewardHead, "score_states", lambda self, states: torch.full((len(states),), torch.nan)
    )
    with pytest.raises(UserError, match=r"judges\.cost: a score is not finite"):
        judges.judge(["cost"], SAID)
