"""What is written beside an agent lets another machine tell what it was trained with."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from mara.actors.head_config import HeadShape
from mara.actors.heads import RewardHead, head_digests, save_head
from mara.common.agent import Agent, load_agent, save_agent
from mara.common.config import AgentConfig
from mara.deploy.agent_card import agent_card
from mara.deploy.config_file import find_config, load_config
from mara.deploy.model_shape import LLMIdentity
from mara.deploy.preflight import Checked, preflight


def test_a_head_is_named_without_its_place_and_known_by_its_content(
    config_path: Path, tmp_path: Path
) -> None:
    cards, head = [], RewardHead(HeadShape(hidden_size=32))
    for place in ("one", "two"):
        folder = tmp_path / place / "kind"
        save_head(folder, head, {})
        config = load_config(config_path, [f"rewards.helpful.path={folder}", "rewards.helpful.weight=0.5"])
        cards.append(agent_card(config, preflight(config), "run-1")["rewards"])
    assert cards[0] == cards[1]
    told = cards[0]["helpful"]
    assert (told["head"], told["weight"]) == ("kind", 0.5)
    assert told["sha256"] == {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("head.json", "head.safetensors")
    }
    (folder / "head.safetensors").write_bytes((folder / "head.safetensors").read_bytes() + b" ")
    assert head_digests(folder) != told["sha256"]


def test_a_shipped_head_has_the_name_that_a_configuration_gives_it(tmp_path: Path) -> None:
    config = load_config(find_config("quickstart"))
    checked = Checked(
        (), "", 576, LLMIdentity(None, None), "", {name: {} for name in config.rewards}, {}, False, None
    )
    card = agent_card(config, checked, "run-1")
    assert card["rewards"]["helpful"]["head"] == "mara:heads/helpful-smollm2-135m-instruct"
    given = [f"rewards.{name}.path={head['head']}" for name, head in card["rewards"].items()]
    assert load_config(find_config("quickstart"), given).rewards == config.rewards
    save_agent(Agent(576, AgentConfig(widths=(4, 4))), tmp_path, card)
    assert load_agent(tmp_path)[1]["rewards"] == json.loads(json.dumps(card["rewards"]))
    assert str(config.rewards["helpful"].path) not in (tmp_path / "agent.json").read_text()
