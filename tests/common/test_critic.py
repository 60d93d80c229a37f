"""The stacked critic against two plain networks."""

from pathlib import Path

import pytest
import torch
from torch import nn

from mara.common.agent import CRITIC_FILE
from mara.common.critic import TwinCritic, load_critic, save_critic
from mara.common.errors import UserError


def plain_head(critic: TwinCritic, head: int) -> nn.Module:
    """One head as an ordinary stack of layers with the same weights."""
    first, second = critic.widths
    layers = [nn.Linear(critic.linear1.in_features, first), nn.Linear(first, second), nn.Linear(second, 2)]
    with torch.no_grad():
        layers[0].weight.copy_(critic.linear1.weight[head * first : (head + 1) * first])
        layers[0].bias.copy_(critic.linear1.bias[head * first : (head + 1) * first])
        for layer, stacked in ((layers[1], critic.linear2), (layers[2], critic.output_linear)):
            layer.weight.copy_(stacked.weight_HIO[head].T)
            layer.bias.copy_(stacked.bias_H1O[head, 0])
    return nn.Sequential(critic.ln, layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


def test_the_stacked_heads_equal_two_plain_networks_behind_one_norm() -> None:
    torch.manual_seed(0)
    critic = TwinCritic(10, (8, 6))
    with torch.no_grad():
        critic.output_linear.weight_HIO.mul_(100)
    states = torch.randn(5, 10)
    q = critic(states)
    for head in range(2):
        torch.testing.assert_close(q[head], plain_head(critic, head)(states))
    assert not torch.allclose(q[0], q[1])


def test_a_saved_critic_comes_back_and_one_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    critic = TwinCritic(16, (8, 4))
    save_critic(critic, tmp_path)
    states = torch.randn(5, 16)
    assert torch.equal(load_critic(tmp_path, 16)(states), critic(states))
    with torch.no_grad():
        critic.ln.weight[3] = torch.nan
    save_critic(critic, tmp_path)
    with pytest.raises(UserError, match=r"ln\.weight is not finite; train it again"):
        load_critic(tmp_path)


def test_a_critic_that_is_missing_or_cannot_be_read_is_one_line_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="x.steering=value needs the agent's critic.*add x.steering=policy"):
        load_critic(tmp_path, 16, "x.steering")
    save_critic(TwinCritic(16, (8, 4)), tmp_path)
    path = tmp_path / CRITIC_FILE
    content = path.read_bytes()
    path.write_bytes(content[:-9])
    with pytest.raises(UserError, match=r"cannot be read \(.*add x.steering=policy"):
        load_critic(tmp_path, 16, "x.steering")
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="critic.safetensors: Is a directory; make it readable"):
        load_critic(tmp_path)


def test_an_untrained_critic_prefers_neither_action() -> None:
    torch.manual_seed(0)
    q = TwinCritic(64, (128, 64))(torch.randn(200, 64))
    assert (q[..., 1] - q[..., 0]).abs().max().item() < 0.02


def test_sixteen_bit_states_give_float32_values() -> None:
    torch.manual_seed(0)
    critic = TwinCritic(10, (8, 6))
    states = torch.randn(5, 10).bfloat16()
    assert critic(states).dtype == torch.float32
    torch.testing.assert_close(critic(states), critic(states.float()))
