"""A toy language: twelve letters and an end, a reward that is known, a transformer of width 32.

A response is at most twelve tokens, its end among them. The gold reward is a weight for each letter
plus a bonus for each, so what a recipe did to a policy can be measured without a judge.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastpref import linear_logprobs, losses
from fastpref.losses import PairLogps
from fastpref.rounds.acquire import entropy

LETTERS = 12
END = LETTERS
LONGEST, WIDTH, HEADS, PROMPT = 12, 32, 4, 3
PAD = -100
END_LOGIT = 0.7  # responses of about six tokens at the start


class Policy(nn.Module):
    """A causal transformer of one layer with random weights."""

    def __init__(self, seed: int) -> None:
        """Draw the weights."""
        super().__init__()
        torch.manual_seed(seed)
        self.tokens = nn.Embedding(LETTERS + 2, WIDTH)
        self.places = nn.Parameter(0.5 * torch.randn(PROMPT + LONGEST, WIDTH))
        self.mixed = nn.Linear(WIDTH, WIDTH)
        nn.init.zeros_(self.mixed.bias)
        self.read = nn.Parameter(nn.init.xavier_uniform_(torch.empty(3 * WIDTH, WIDTH)))
        self.read_bias = nn.Parameter(torch.zeros(3 * WIDTH))
        self.wide, self.narrow = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.head = nn.Parameter(0.15 * torch.randn(LETTERS + 1, WIDTH))
        self.bias = nn.Parameter(torch.tensor([0.0] * LETTERS + [END_LOGIT]))

    def forward(self, ids: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Hidden states of tokens, and what those after them read.

        Args:
            ids: Token ids, ``(B, T)``; a single one where there is a past.
            past: The second result for the tokens before.

        Returns:
            ``(B, T, 32)``, and keys and values of all tokens so far, ``(2, B, heads, tokens, 8)``.
        """
        first = 0 if past is None else past.shape[-2]
        x = self.tokens(ids) + self.places[first : first + ids.shape[1]]
        parts = nn.functional.linear(self.norms[0](x), self.read, self.read_bias)
        parts = parts.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        seen = parts[1:] if past is None else torch.cat([past, parts[1:]], -2)
        causal = past is None
        found = nn.functional.scaled_dot_product_attention(parts[0], *seen, is_causal=causal)
        x = x + self.mixed(found.transpose(1, 2).flatten(2))
        x = x + self.narrow(self.wide(self.norms[1](x)).relu())
        return self.norms[2](x), seen


def logps(policy: Policy, prompts: Tensor, responses: Tensor) -> Tensor:
    """Sums of the log-probabilities of responses ``(B, 12)``, padded with -100. ``(B,)``, nats."""
    ids = torch.cat([prompts, responses.clamp(min=0)], 1)
    hidden = policy(ids[:, :-1])[0][:, PROMPT - 1 :]
    return linear_logprobs(hidden, policy.head, responses, bias=policy.bias).sum(1)


@torch.no_grad()
def likelihoods(policy: Policy, prompts: Tensor, samples: Tensor) -> Tensor:
    """:func:`logps` of what :func:`sample` gave. ``(len(prompts), n)``, nats."""
    n = samples.shape[1]
    found = logps(policy, prompts.repeat_interleave(n, 0), samples.flatten(0, 1))
    return found.view(-1, n)


@torch.no_grad()
def sample(
    policy: Policy, prompts: Tensor, n: int, draw: torch.Generator, greedy: bool = False
) -> Tensor:
    """``n`` responses to each prompt at temperature 1. ``(len(prompts), n, 12)``."""
    ids, past = prompts.repeat_interleave(n, 0), None
    ended = torch.zeros(len(ids), dtype=torch.bool)
    made = []
    for _ in range(LONGEST):
        hidden, past = policy(ids, past)
        logits = hidden[:, -1] @ policy.head.T + policy.bias
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=draw)[:, 0]
        token = logits.argmax(-1) if greedy else drawn
        made.append(token.masked_fill(ended, PAD))
        ended = ended | (token == END)
        ids = token[:, None]
    return torch.stack(made, 1).view(len(prompts), n, LONGEST)


def lengths(responses: Tensor) -> Tensor:
    """Tokens of responses, their end among them."""
    return (responses != PAD).sum(-1)


@dataclass(frozen=True)
class Gold:
    """The reward: a weight for each letter, and ``bonus`` for each."""

    weights: Tensor
    bonus: float = 0.0

    def __call__(self, responses: Tensor) -> Tensor:
        """Rewards of responses."""
        values = torch.cat([self.weights + self.bonus, torch.zeros(1)])
        return (values[responses.clamp(min=0)] * (responses != PAD)).sum(-1)


@dataclass(frozen=True)
class Pairs:
    """Preference pairs: prompts ``(n, 3)``, responses ``(n, 12)``, and what a loss wants more.

    ``fields`` are fields of :class:`fastpref.losses.PairLogps` that do not change in training,
    pairs last; ``third`` a further response to each prompt, ``corrupted`` another prompt.
    """

    prompts: Tensor
    chosen: Tensor
    rejected: Tensor
    third: Tensor | None = None
    corrupted: Tensor | None = None
    fields: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.prompts)

    def texts(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Prompts and responses whose log-probabilities the loss takes, by its field."""
        found = {
            "chosen": (self.prompts, self.chosen),
            "rejected": (self.prompts, self.rejected),
        }
        if self.third is not None:
            found["third"] = (self.prompts, self.third)
        if self.corrupted is not None:
            found["corrupted"] = (self.corrupted, self.chosen)
        return found

    def columns(self) -> tuple[Tensor, Tensor, Tensor]:
        """Prompts, chosen and rejected responses."""
        return self.prompts, self.chosen, self.rejected

    def and_also(self, others: Pairs) -> Pairs:
        """These pairs and, after them, others; of both what :meth:`columns` says."""
        both = zip(self.columns(), others.columns(), strict=True)
        return Pairs(*(torch.cat(rows) for rows in both))

    def pick(self, index: Tensor) -> Pairs:
        """Some of the pairs."""
        rows = [
            None if rows is None else rows[index]
            for rows in (self.prompts, self.chosen, self.rejected, self.third, self.corrupted)
        ]
        return Pairs(*rows, {name: rows[..., index] for name, rows in self.fields.items()})


def sums(policy: Policy, pairs: Pairs) -> dict[str, Tensor]:
    """Log-probability sums of all texts of pairs, by field, in one forward pass."""
    texts = pairs.texts()
    prompts, responses = (torch.cat(column) for column in zip(*texts.values(), strict=True))
    return dict(zip(texts, logps(policy, prompts, responses).chunk(len(texts)), strict=True))


@torch.no_grad()
def frozen_sums(policy: Policy, pairs: Pairs) -> dict[str, Tensor]:
    """:func:`sums` of a policy that is measured, not trained."""
    return sums(policy, pairs)


def reference_cache(policy: Policy, pairs: Pairs) -> dict[str, Tensor]:
    """The sums of a frozen reference, once for all pairs."""
    return {f"ref_{name}": values for name, values in frozen_sums(policy, pairs).items()}


def tune(
    start: Policy,
    pairs: Pairs,
    name: str,
    *,
    cache: Mapping[str, Tensor] | None = None,
    steps: int = 120,
    rate: float = 1e-3,
    size: int = 32,
    seed: int = 0,
    log: list[dict[str, float]] | None = None,
    **arguments: Any,
) -> Policy:
    """A copy of ``start``, trained with a loss of :mod:`fastpref.losses` and its state.

    Args:
        start: Policy to go on from.
        pairs: What to train on.
        name: Of the loss.
        cache: Sums of the reference; None: ``start`` is the reference.
        steps: Of Adam.
        rate: Its learning rate.
        size: Pairs of a step.
        seed: Of their order.
        log: Filled with loss, mean reward and state of each step.
        **arguments: Of the loss.
    """
    loss, policy = losses.get(name), copy.deepcopy(start)
    cache = reference_cache(start, pairs) if cache is None else cache
    beta = arguments.get("beta", loss.entry.defaults["beta"])
    state = loss.entry.state(beta=beta) if loss.entry.state in STATES else None
    optimizer = torch.optim.Adam(policy.parameters(), lr=rate, fused=True)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        index = torch.randperm(len(pairs), generator=draw)[:size]
        picked = pairs.pick(index)
        batch = PairLogps(
            **sums(policy, picked),
            **{key: values[..., index] for key, values in cache.items()},
            chosen_lengths=lengths(picked.chosen),
            rejected_lengths=lengths(picked.rejected),
            **picked.fields,
        )
        more = {} if state is None else state.kwargs(batch.pick(state.reads))
        value = loss(batch, **arguments, **more).mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if log is not None:
            rewards = beta * torch.cat(batch.logratios).detach()
            numbers = {} if state is None else state.state_dict()
            log.append({"loss": value.item(), "reward": rewards.mean().item(), **numbers})
    return policy


STATES = {losses.registry["mpo"].entry.state}
"""States that depend on what was seen before; the others compute what the loss does by itself."""


@dataclass
class World:
    """What an experiment of one seed stands on: a start policy and two gold rewards."""

    seed: int

    def __post_init__(self) -> None:
        """Draw them."""
        self.draw = torch.Generator().manual_seed(1000 + self.seed)
        self.start = Policy(self.seed)
        first, second = 0.5 * torch.randn(2, LETTERS, generator=self.draw)
        self.gold, self.other = Gold(first), Gold(second - 0.5 * first)

    def prompts(self, n: int) -> Tensor:
        """``n`` prompts of three letters."""
        return torch.randint(LETTERS, (n, PROMPT), generator=self.draw)

    def label(self, prompts: Tensor, two: Tensor, gap: Tensor, noise: bool) -> Pairs:
        """Two responses to each prompt as pairs, by the gap of their rewards.

        Args:
            prompts: ``(n, 3)``.
            two: Responses, ``(n, 2, 12)``.
            gap: Reward of the first minus that of the second.
            noise: The label is drawn with probability ``sigmoid(gap)``; else the sign decides.
        """
        drawn = torch.rand(len(gap), generator=self.draw) < gap.sigmoid()
        first = drawn if noise else gap > 0
        order = torch.where(first, 0, 1)
        rows = torch.arange(len(two))
        return Pairs(prompts, two[rows, order], two[rows, 1 - order])

    def pairs(self, n: int, gold: Gold, noise: bool = True, source: Policy | None = None) -> Pairs:
        """About ``n`` labelled pairs of a policy's samples; the few with equal rewards are out."""
        prompts = self.prompts(n)
        two = sample(source or self.start, prompts, 2, self.draw)
        gap = gold(two[:, 0]) - gold(two[:, 1])
        differ = gap != 0
        return self.label(prompts[differ], two[differ], gap[differ], noise)

    def answers(self, policy: Policy, n: int = 1024) -> Tensor:
        """``n`` answers to as many prompts, the same prompts and draws for every policy."""
        draw = torch.Generator().manual_seed(7)
        prompts = torch.randint(LETTERS, (n, PROMPT), generator=draw)
        return sample(policy, prompts, 1, draw)[:, 0]

    def reward(self, policy: Policy, gold: Gold | None = None) -> float:
        """Mean gold reward of a policy's answers."""
        return (gold or self.gold)(self.answers(policy)).mean().item()

    def rewards(self, policy: Policy, name: str) -> dict[str, float]:
        """Both mean rewards of a policy's answers, as numbers of an experiment."""
        return {
            f"reward 1, {name}": self.reward(policy),
            f"reward 2, {name}": self.reward(policy, self.other),
        }

    def length(self, policy: Policy) -> float:
        """Mean length of a policy's answers, tokens."""
        return lengths(self.answers(policy)).double().mean().item()


def accuracy(
    policy: Policy, pairs: Pairs, cache: Mapping[str, Tensor], per_token: bool = False
) -> float:
    """Share of pairs whose chosen response has the larger implicit reward, or reward per token."""
    chosen, rejected = PairLogps(**frozen_sums(policy, pairs), **cache).logratios
    if per_token:
        chosen, rejected = chosen / lengths(pairs.chosen), rejected / lengths(pairs.rejected)
    return (chosen > rejected).double().mean().item()


def entropies(w: World, policy: Policy, prompts: Tensor) -> list[float]:
    """Of prompts under a policy, from 8 samples each."""
    samples = sample(policy, prompts, 8, w.draw)
    return [entropy(own) for own in likelihoods(policy, prompts, samples).tolist()]
