import numpy as np
import pytest
import torch

from mara.actors.config import DecodingConfig, TruncationConfig
from mara.actors.decoding.engine import Generation, Request
from mara.actors.evaluation import fluency, preference_rate


def test_the_rate_is_wins_less_losses_over_all():
    rate = preference_rate([np.array([1.0, 2.0, -1.0, 0.0, 3.0])])
    assert (rate.wins, rate.ties, rate.losses) == (3, 1, 1)
    assert rate.rate == pytest.approx(0.4)


def test_a_joint_win_needs_every_judge_and_equals_the_mean_of_the_rates():
    rng = np.random.default_rng(0)
    helpful, harmless = rng.normal(0.3, 1, 500), rng.normal(0.1, 1, 500)
    joint = preference_rate([helpful, harmless])
    alone = [preference_rate([values]).rate for values in (helpful, harmless)]
    assert joint.rate == pytest.approx(np.mean(alone))
    assert joint.wins == int(((helpful > 0) & (harmless > 0)).sum())


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        rate = preference_rate([rng.choice([-1.0, 1.0], p=[0.4, 0.6], size=100)], seed=trial)
        covered += rate.low <= 0.2 <= rate.high
    assert 0.88 <= covered / 200 <= 0.99


def generation(logprobs, reason="length"):
    made = Generation(Request([1]), 0.0)
    made.token_logprobs = list(logprobs)
    made.response_ids = [0] * len(logprobs)
    made.finish_reason = reason
    return made


def test_fluency_counts_as_its_names_say():
    found = fluency([generation(np.log([0.5, 0.25])), generation(np.log([0.5]), "eos")], ["a b a b", "A c"])
    assert found.perplexity == pytest.approx((2 * 4 * 2) ** (1 / 3))
    assert found.distinct_1 == pytest.approx(3 / 6)
    assert found.distinct_2 == pytest.approx(3 / 4)
    assert found.distinct_3 == pytest.approx(2 / 2)
    assert found.mean_tokens == pytest.approx(1.5)
    assert found.eos_share == pytest.approx(0.5)


def test_settings_of_the_decoder_have_the_papers_defaults():
    config = DecodingConfig()
    assert config.truncation == TruncationConfig(top_k=40, top_p=0.95, temperature=0.8)
    assert config.max_new_tokens == 512
    assert config.fallback == "last"
    assert torch.isfinite(torch.tensor(config.threshold))
