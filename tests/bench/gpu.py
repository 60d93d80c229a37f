"""The decoding engine on a GPU, on random weights: speed against ``generate`` and the paper's procedure,
memory, and whether lazy, wide and compiled passes still give the same answers. And the learner's gradient
step and loop, in every precision.

The agent is random too, with a bias at which it accepts about 70 % of the first candidates, as the paper's
do.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mara.actors.config import DecodingConfig, TruncationConfig
from mara.actors.decoding.engine import Engine
from mara.actors.decoding.generation import Request
from mara.actors.decoding.policies import AgentPolicy
from mara.common.agent import ACCEPT, REJECT, Agent
from mara.common.config import AgentConfig
from mara.common.contracts import TransitionBatch
from mara.deploy.bench.decoding import Subject, bench_decode, bench_rollout
from mara.deploy.bench.figures import Figure, machine, report
from mara.deploy.bench.learner import learner_figures
from mara.deploy.bench.learner_step import LearnerSizes, Precision, fill, make_mirror
from mara.learner.config import SACConfig
from mara.learner.sac import SAC

SHAPES: dict[str, dict[str, int]] = {
    "8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    },
    "small": {
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
    },
    "tiny": {
        "vocab_size": 2000,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
    },
}
PROMPT_TOKENS = range(40, 121)
ACCEPTED_FIRST = 0.7
NEW_TOKENS = 64
ROLLOUT_TOKENS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--limit-s", type=float, default=540.0, help="no new measurement is begun after this")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="regular expression: what of the titles is measured")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    end_s = time.monotonic() + options.limit_s
    figures: list[Figure] = []
    for title, measure in measurements(options.shape, device, options.rounds):
        if not re.search(options.only, title):
            continue
        if time.monotonic() > end_s:
            print(f"no time left for {title}")
            continue
        print(f"{title} ({end_s - time.monotonic():.0f} s left)", flush=True)
        try:
            figures += measure()
        except Exception as error:  # one that fails must not cost the others
            print(f"{title} failed: {type(error).__name__}: {error}")
            figures.append(
                Figure(figure=f"failed: {title}", value=0, unit="", conditions={"error": repr(error)})
            )
        content = [figure.model_dump(mode="json") for figure in figures]
        (options.out / f"figures-{options.shape}.json").write_text(json.dumps(content, indent=2) + "\n")
    report(figures, None)


def learner(
    shape: str, device: torch.device, precision: Precision, num_rounds: int, capacity: int
) -> list[Figure]:
    """The gradient step at the paper's widths, the loop on a log that grows, and whether they are right."""
    D = SHAPES[shape]["hidden_size"]
    capacity = capacity if device.type == "cuda" else 2048
    sizes = LearnerSizes(D, capacity=capacity, precision=precision, live_s=8.0)
    return [*same_steps(sizes, device), *learner_figures(sizes, num_rounds, print)]


def same_steps(sizes: LearnerSizes, device: torch.device) -> list[Figure]:
    """How far ten steps on the device, as a graph and kernel by kernel, are from float32 on the CPU.

    Compared is how far the parameters have moved: the first steps of Adam go by the signs of gradients, so
    that the smallest count as much as the largest.
    """
    mirror = make_mirror(replace(sizes, capacity=4096), device)
    fill(mirror, replace(sizes, capacity=4096))
    batches = []
    for number in range(10):
        batch = mirror.sample(sizes.batch_size, torch.Generator().manual_seed(number))
        columns = {name: getattr(batch, name) for name in TransitionBatch.__slots__}
        batches.append(
            TransitionBatch(**{name: None if c is None else c.clone() for name, c in columns.items()})
        )

    def moved(config: SACConfig, where: torch.device) -> tuple[torch.Tensor, float]:
        sac = SAC(sizes.hidden_size, sizes.agent, config, where)
        parameters = [*sac.agent.parameters(), *sac.critic.parameters()]
        before = torch.cat([p.detach().flatten() for p in parameters])
        losses = [sac.update(batch.to(where)).critic_loss for batch in batches]
        return (torch.cat([p.detach().flatten() for p in parameters]) - before).cpu(), losses[-1]

    plain, plain_loss = moved(SACConfig(critic_widths=sizes.widths), torch.device("cpu"))
    eager, eager_loss = moved(sizes.sac.model_copy(update={"cuda_graph": False}), device)
    graph, graph_loss = moved(sizes.sac, device)
    conditions = {"precision": sizes.precision, **machine()}

    def figure(name: str, value: float) -> Figure:
        return Figure(figure=name, value=value, unit="relative", conditions=conditions)

    return [
        figure("moved_graph_vs_kernels", float((graph - eager).norm() / eager.norm())),
        figure("moved_vs_cpu", float((eager - plain).norm() / plain.norm())),
        figure("critic_loss_vs_cpu", graph_loss / plain_loss - 1),
        figure("critic_loss_graph_vs_kernels", graph_loss / eager_loss - 1),
    ]


def measurements(
    shape: str, device: torch.device, num_rounds: int
) -> list[tuple[str, Callable[[], list[Figure]]]]:
    """Titles and what to call for their figures, the most important first."""

    @functools.cache
    def subject() -> Subject:
        return make_subject(shape, device, torch.bfloat16 if device.type == "cuda" else torch.float32)

    def train(precision: Precision, capacity: int) -> Callable[[], list[Figure]]:
        return lambda: learner(shape, device, precision, num_rounds, capacity)

    def decode(batch: int, **changes: Any) -> Callable[[], list[Figure]]:
        return lambda: bench_decode(subject(), decoding(**changes), [batch], num_rounds, print)

    def rollout(**changes: Any) -> Callable[[], list[Figure]]:
        changed = decoding(max_new_tokens=ROLLOUT_TOKENS, **changes)
        return lambda: bench_rollout(subject(), changed, 64, num_rounds, 1, print)

    def same(waits: bool = False, **changes: Any) -> Callable[[], list[Figure]]:
        def measure() -> list[Figure]:
            small = make_subject("tiny" if shape == "tiny" else "small", device, torch.float32)
            if waits:
                small.model.base_model.layers[0].register_forward_pre_hook(wait)
            return same_answers(small, {"mode": "wide", **changes})

        return measure

    return [
        ("learner, float32", train("float32", 1_000_000)),
        ("learner, bfloat16", train("bfloat16", 131_072)),
        ("learner, tf32", train("tf32", 131_072)),
        ("same answers", same()),
        ("same answers, many shapes", same(mode="auto")),
        ("same answers, no graph can hold the model", same(waits=True)),
        *[(f"decode, batch {batch}", decode(batch)) for batch in (64, 16)],
        ("memory", lambda: [memory(subject())]),
        ("rollout, 64 rows", rollout()),
        ("decode, batch 1", decode(1)),
        ("same answers, compiled", same(compile=True)),
        *[(f"decode, batch {batch}, compiled", decode(batch, compile=True)) for batch in (64, 16, 1)],
        ("rollout, 64 rows, compiled", rollout(compile=True)),
        ("decode, batch 64, lazy", decode(64, mode="lazy")),
    ]


def decoding(**changes: Any) -> DecodingConfig:
    truncation = TruncationConfig(top_k=40, top_p=0.95, temperature=0.8)
    return DecodingConfig(
        **{"truncation": truncation, "max_new_tokens": NEW_TOKENS, "mode": "auto"} | changes
    )


def _make_model(shape: str, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape]))
    torch.set_default_dtype(torch.float32)
    return model.eval().requires_grad_(False)


def make_subject(shape: str, device: torch.device, dtype: torch.dtype) -> Subject:
    """A model of random weights, prompts of random tokens, and an agent that accepts 70 % of first
    candidates."""
    # The engine has its model attend in another way than ``generate`` does.
    model, plain_model = (_make_model(shape, device, dtype) for _ in range(2))
    draws = torch.Generator().manual_seed(1)
    prompts = [
        torch.randint(0, SHAPES[shape]["vocab_size"], (length,), generator=draws).tolist()
        for length in torch.randint(PROMPT_TOKENS.start, PROMPT_TOKENS.stop, (128,), generator=draws).tolist()
    ]
    agent = Agent(SHAPES[shape]["hidden_size"], AgentConfig()).to(device).eval().requires_grad_(False)
    torch.nn.init.normal_(agent.output_linear.weight, std=4.0)
    engine = Engine(model, [], decoding(max_new_tokens=16), "greedy", 16, max(map(len, prompts)))
    generations = list(engine.generate(map(Request, prompts[:16])))
    states_ND = torch.stack([state for generation in generations for state in generation.token_states])
    logprobs_N2 = agent(states_ND)
    odds_N = logprobs_N2[:, ACCEPT] - logprobs_N2[:, REJECT]
    agent.output_linear.bias[ACCEPT] -= torch.quantile(odds_N, 1 - ACCEPTED_FIRST)
    return Subject(model, plain_model, f"random Llama {shape}", (), agent, "random, 70 % accepted", prompts)


def wait(layer: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
    """What a graph cannot hold: the host asks the GPU for a number."""
    arguments[0].sum().item()


def same_answers(subject: Subject, changes: dict[str, Any]) -> list[Figure]:
    """Share of answers that are the same tokens as lazy decoding gives, up to the first that differs."""
    answers: list[dict[int, list[int]]] = []
    first_shares = []
    for settings in ({"mode": "lazy"}, changes):
        longest = max(map(len, subject.prompts))
        engine = Engine(subject.model, [], decoding(**settings), AgentPolicy(subject.agent, 0.5), 16, longest)
        requests = [Request(ids, tag=tag) for tag, ids in enumerate(subject.prompts[:16])]
        generations = list(engine.generate(requests))
        answers.append({generation.request.tag: generation.response_ids for generation in generations})
        taken = [d.rank for generation in generations for d in generation.decisions if d.action]
        first_shares.append(round(taken.count(0) / len(taken), 3))
    return [
        Figure(
            figure="same_tokens_as_lazy",
            value=_same_tokens(answers[1], answers[0]),
            unit="share of tokens",
            conditions={
                "first_candidate_accepted": first_shares,
                "llm": subject.name,
                "dtype": str(subject.model.dtype).removeprefix("torch."),
                **changes,
                **machine(),
            },
        )
    ]


def _same_tokens(found: dict[int, list[int]], expected: dict[int, list[int]]) -> float:
    same = total = 0
    for tag, tokens in expected.items():
        differs = [i for i, (a, b) in enumerate(zip(found[tag], tokens, strict=False)) if a != b]
        same += differs[0] if differs else len(tokens)
        total += len(tokens)
    return same / total


def memory(subject: Subject) -> Figure:
    """Bytes of keys and values of a row, and what a decoding of 64 rows adds to the weights at its peak."""
    longest = max(map(len, subject.prompts))
    on_gpu = subject.model.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    reserved_before = torch.cuda.memory_reserved() if on_gpu else 0
    engine = Engine(
        subject.model, [], decoding(), AgentPolicy(subject.agent, 0.5), min(64, len(subject.prompts)), longest
    )
    list(engine.generate(map(Request, subject.prompts[:64])))
    peak = torch.cuda.max_memory_allocated() - before if on_gpu else 0
    return Figure(
        figure="cache_bytes_per_row",
        value=engine.cache_nbytes / engine.num_rows,
        unit="bytes",
        conditions={
            "tokens_a_row": longest + NEW_TOKENS,
            "rows": engine.num_rows,
            "peak_beside_weights_bytes": peak,
            # With what the graphs keep for themselves, in use or not.
            "reserved_beside_weights_bytes": torch.cuda.memory_reserved() - reserved_before if on_gpu else 0,
            **machine(),
        },
    )


if __name__ == "__main__":
    main()
