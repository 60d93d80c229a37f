import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mara.common.agent import (
    ACCEPT,
    CARD_FILE,
    REJECT,
    WEIGHTS_FILE,
    Agent,
    agent_digest,
    load_agent,
    normalised_linear,
    save_agent,
)
from mara.common.config import AgentConfig
from mara.common.errors import UserError
from mara.common.seeding import derive_seed


def random_agent(**settings) -> Agent:
    torch.manual_seed(0)
    agent = Agent(12, AgentConfig(widths=(16, 8), **settings))
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    return agent.eval()


def test_the_network_is_the_one_of_the_paper():
    agent = random_agent()
    states = torch.randn(5, 12)
    weights = {name: t.double().detach().numpy() for name, t in agent.state_dict().items()}
    for row, found in zip(states.double().numpy(), agent(states).double().detach().numpy(), strict=True):
        x = (row - row.mean()) / np.sqrt(row.var() + 1e-5) * weights["ln.weight"] + weights["ln.bias"]
        x = np.maximum(weights["linear1.weight"] @ x + weights["linear1.bias"], 0)
        x = np.maximum(weights["linear2.weight"] @ x + weights["linear2.bias"], 0)
        x = weights["output_linear.weight"] @ x + weights["output_linear.bias"]
        np.testing.assert_allclose(found, x - np.log(np.exp(x).sum()), atol=1e-5)


def test_the_first_layer_has_the_values_and_gradients_of_its_two_parts():
    torch.manual_seed(0)
    norm, linear = torch.nn.LayerNorm(12).double(), torch.nn.Linear(12, 7).double()
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    parameters = [*norm.parameters(), *linear.parameters()]
    states, weights = torch.randn(5, 12).double(), torch.randn(5, 7).double()

    in_parts = linear(norm(states))
    at_once = normalised_linear(states, norm, linear)
    with torch.no_grad():
        torch.testing.assert_close(normalised_linear(states, norm, linear), in_parts)
    torch.testing.assert_close(at_once, in_parts)
    for found, expected in zip(
        torch.autograd.grad((at_once * weights).sum(), parameters),
        torch.autograd.grad((in_parts * weights).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("widths", [(0, 8), (8, 0), (-1, 8)])
def test_layers_without_units_are_refused(widths):
    with pytest.raises(ValidationError, match="greater than 0"):
        AgentConfig(widths=widths)


def test_it_has_the_size_the_paper_states():
    count = sum(p.numel() for p in Agent(4096, AgentConfig()).parameters())
    assert round(count / 1e6, 2) == 4.47


@pytest.mark.parametrize("bias", [0.0, 1.0, -2.0])
def test_a_new_agent_accepts_as_its_bias_says(bias):
    agent = Agent(64, AgentConfig(widths=(32, 16), accept_bias=bias))
    logprobs = agent(torch.randn(200, 64))
    log_odds = (logprobs[:, ACCEPT] - logprobs[:, REJECT]).detach()
    assert (log_odds - bias).abs().max() < 0.1


def test_bounded_log_odds_never_exceed_the_bound_and_keep_the_sign():
    free, bounded = random_agent(), random_agent(max_log_odds=2.0)
    states = torch.randn(100, 12) * 5
    odds = (free(states)[:, ACCEPT] - free(states)[:, REJECT]).detach()
    bounded_odds = (bounded(states)[:, ACCEPT] - bounded(states)[:, REJECT]).detach()
    assert bounded_odds.abs().max() <= 2.0
    torch.testing.assert_close(bounded_odds, 2.0 * torch.tanh(odds / 2.0), atol=1e-5, rtol=1e-5)


def test_a_saved_agent_comes_back_the_same(tmp_path):
    agent = random_agent(max_log_odds=4.0)
    save_agent(agent, tmp_path / "agent", {"llm": {"model": "tiny"}})
    again, card = load_agent(tmp_path / "agent", hidden_size=12)
    states = torch.randn(3, 12)
    torch.testing.assert_close(again(states), agent(states), rtol=0, atol=0)
    assert card["llm"] == {"model": "tiny"}
    assert again.config == agent.config


def test_an_agent_for_another_hidden_size_is_refused_with_both_sizes(tmp_path):
    save_agent(random_agent(), tmp_path, {"llm": "tiny"})
    with pytest.raises(UserError, match="hidden size 12, the LLM has 576"):
        load_agent(tmp_path, hidden_size=576)


@pytest.mark.parametrize("name", [WEIGHTS_FILE, CARD_FILE])
def test_a_missing_file_is_named(tmp_path, name):
    save_agent(random_agent(), tmp_path, {})
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=name):
        load_agent(tmp_path)


DAMAGE = [
    "truncated weights",
    "no json",
    "other widths",
    "unknown setting",
    "a list",
    "no units",
    "a text for a size",
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_agent_is_one_clear_line(tmp_path, damage):
    save_agent(random_agent(), tmp_path, {})
    weights, card = tmp_path / WEIGHTS_FILE, tmp_path / CARD_FILE
    content = json.loads(card.read_text())
    if damage == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:100])
    elif damage == "no json":
        card.write_text("{")
    elif damage == "other widths":
        card.write_text(json.dumps(content | {"agent": content["agent"] | {"widths": [4, 4]}}))
    elif damage == "a list":
        card.write_text("[]")
    elif damage == "no units":
        card.write_text(json.dumps(content | {"agent": content["agent"] | {"widths": [0, 8]}}))
    elif damage == "a text for a size":
        card.write_text(json.dumps(content | {"hidden_size": "12"}))
    else:
        card.write_text(json.dumps(content | {"agent": content["agent"] | {"depth": 3}}))
    with pytest.raises(UserError, match="cannot be read") as caught:
        load_agent(tmp_path)
    assert "\n" not in str(caught.value)


@given(seed=st.integers(0, 2**40), name=st.text(max_size=5), other=st.text(max_size=5))
def test_seeds_depend_on_every_name(seed, name, other):
    assert derive_seed(seed, name) == derive_seed(seed, name)
    assert 0 <= derive_seed(seed, name) < 2**63
    if name != other:
        assert derive_seed(seed, name) != derive_seed(seed, other)


def test_an_agent_that_is_not_finite_is_refused_by_the_name_of_the_tensor(tmp_path):
    agent = Agent(8, AgentConfig(widths=(4, 4)))
    with torch.no_grad():
        agent.output_linear.weight[0, 0] = float("nan")
    save_agent(agent, tmp_path, {})
    with pytest.raises(UserError, match=r"agent\.safetensors: output_linear\.weight is not finite"):
        load_agent(tmp_path)


def test_a_digest_changes_with_everything_that_gives_weights_their_meaning() -> None:
    configs = [
        (16, AgentConfig(widths=(8, 4))),
        (17, AgentConfig(widths=(8, 4))),
        (16, AgentConfig(widths=(4, 8))),
        (16, AgentConfig(widths=(8, 4), max_log_odds=5.0)),
        (16, AgentConfig(widths=(8, 4), accept_bias=1.0)),
    ]
    digests = [agent_digest(*config) for config in configs]
    assert len(set(digests)) == len(configs)
    assert digests[0] == agent_digest(16, AgentConfig(widths=(8, 4)))
