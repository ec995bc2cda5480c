"""CAST: the draft tree grown, and cut, against the measured cost of inference.

Yinrong Hong, Zhiquan Tan, Kai Hu, arXiv:2510.26577; another paper called CAST is unrelated.

Reproduced: the cost tables (`cost_table`), breadth and depth pruning, dynamic reranking, Algorithm
1, Theorem 4.1; the comparison with fixed trees at several batch sizes; the ablation of the parts.
Not reproduced: the paper's GPUs, whose costs are modelled (`cost_model`), and its six targets.
Read at second hand: equations, tables and constants come from transcriptions of the paper, which
leave open what the comments at `Config` name.
Departs from the paper:
- Algorithm 1 is written as the argmax that its scan finds, which stays right on plateaus;
- thresholds follow the running speedup, times a factor that `tuned` finds on other prompts, unless
  the hand-set triple is asked for;
- a utility of our own, "net_gain", charges a drafted level with its verification too: layer sums
  and pool gains draft levels whose nodes are worth less than their place in a pass;
- the best fixed tree of each batch size stands beside EAGLE-3's default as a baseline.
The tree never changes the output: it is drafted from what the drafter says and what was accepted
before, and the target verifies it as it would any other.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from specrepro import assets, checkpoints, cost_table, decoding, eagle3, replay
from specrepro.cost_table import CostTable, Grid
from specrepro.draft_tree import DraftTree, Growth, keep_best, take_shape
from specrepro.eagle3 import TreeConfig
from specrepro.target_model import Scores, Target
from specrepro.tree_verify import Verdict

PAPER_THRESHOLDS = (4.0, 3.0, 2.5)  # C1, C2, C3 by hand, retuned per model (second hand)
UTILITIES = ("layer_sum", "pool_gain", "net_gain")
FACTORS = (1.0, 1.5, 2.5, 5.0)  # on the running speedup, to choose from
USUAL_DECAY = 0.7  # of confidence from level to level, until some levels were seen
HUGE = 1e9  # a threshold that nothing is worth, yet of which multiples can be compared
# where no table is handed over
QUICK = Grid((1, 2, 4, 8), sizes=(1, 2, 4, 8, 12, 16, 24, 32, 48, 64), max_rows=256, repeats=8)


@dataclass(frozen=True, slots=True)
class Config:
    """How a tree is shaped; the transcriptions give no H_max, K and R, so those are our choice."""

    # K is its top_k; depth and size are what holds where a part is off
    tree: TreeConfig = field(default_factory=TreeConfig)
    depth: int = 9  # most expansions: ten levels, two above EAGLE-3's eight
    total_tokens: int = 129  # root included; 128 drafted nodes are the released code's bound
    num_ratios: int = 3  # R, the ratios that foretell the next level's utility
    keeps_ratios: bool = False  # from round to round; else every tree starts from {1}
    thresholds: tuple[float, float, float] | None = None  # C1, C2, C3; None is the running speedup
    strictness: float = 1.0  # times the thresholds
    expected_speedup: float = 1.5  # where the running speedup starts in every call
    expected_weight: float = 8.0  # how many autoregressive steps that start counts for
    # of breadth: the paper's, or the "pool_gain" of the released code, or our "net_gain"
    utility: str = "layer_sum"
    prunes_breadth: bool = True  # the three parts of Table 3
    prunes_depth: bool = True
    reranks: bool = True

    def __post_init__(self) -> None:
        if self.utility not in UTILITIES:
            raise ValueError(f"unknown utility {self.utility!r}; choose {', '.join(UTILITIES)}")
        wanted = (*(self.thresholds or ()), self.strictness, self.expected_speedup)
        if any(math.isnan(one) for one in wanted) or self.strictness < 0:
            raise ValueError(f"thresholds {wanted} must be numbers and strictness not negative")
        if self.num_ratios < 1 or self.depth < 0 or self.total_tokens < 2:
            raise ValueError(
                f"num_ratios >= 1, depth >= 0 and total_tokens >= 2 needed, not {self}"
            )


# --- the equations


def best_size(utility: np.ndarray, cost: np.ndarray, threshold: float) -> int:
    """Algorithm 1: how many of the ranked nodes pay, given u_k and c_k (K,) for k = 1, ..., K.

    The paper scans k upward and moves on where (u_k - u_k0) / (c_k - c_k0) reaches C. While costs
    rise that is u_k - C c_k >= u_k0 - C c_k0, so the scan ends at the last argmax of u_k - C c_k.
    The argmax needs no rising costs: on a plateau it takes the widest, and a size that costs less
    than a smaller one replaces it, where the ratio would change its sign. At least one node is
    kept; whether a level is drafted at all is the depth test's question.
    """
    worth = utility - min(threshold, HUGE) * cost
    return len(worth) - int(worth[::-1].argmax())


def path_sums(confidence: Tensor) -> np.ndarray:
    """u_k (K,): sums of the k best path confidences (B, K), best first, averaged over B."""
    return confidence.cpu().numpy().mean(0, dtype=float).cumsum()  # one copy from the device


def pool_gain(confidence: Tensor, pool: Tensor) -> np.ndarray:
    """What the best m nodes gain in all from k more candidates (B, K), given those so far (B, m).

    Both are ranked. The s-th candidate takes the place of the s-th worst of the m, if it is better:
    a node that would not be verified is worth nothing.
    """
    places = pool.flip(1)[:, : confidence.shape[1]]
    gains = (confidence[:, : places.shape[1]] - places).clamp_min(0)
    missing = confidence.shape[1] - gains.shape[1]
    return path_sums(torch.nn.functional.pad(gains, (0, missing)))


def net_gain(confidence: Tensor, decay: float, price: float) -> np.ndarray:
    """What the children of the k best nodes (B, K) gain beyond the `price` of verifying them.

    The best child of a node is expected to be as sure as the node times `decay`; one that is worth
    less than its price would not be verified, and counts nothing.
    """
    return path_sums((decay * confidence - price).clamp_min(0))


def pays_to_descend(utility: float, cost: float, ratios: Sequence[float], threshold: float) -> bool:
    """Depth pruning: alpha u / c >= C2, with alpha the mean of the last ratios between levels."""
    return sum(ratios) / len(ratios) * utility >= threshold * cost


# --- the shape of a tree


@dataclass(slots=True)
class Round:
    """What one tree came to, and what became of it."""

    batch: int
    context: int
    num_rows: int  # accepted tokens that the round began with
    widths: list[int] = field(default_factory=list)  # n_i
    num_tokens: int = 0  # m and the root
    confidence: list[float] = field(default_factory=list)  # sum over the verified, per sequence
    accepted: list[int] = field(default_factory=list)


class Shape:
    """Shapes draft trees by what their nodes cost: the `tree` of any drafter that asks for one."""

    def __init__(self, costs: CostTable, config: Config | None = None):
        self.costs, self.config = costs, config or Config()
        c = self.config
        self.top_k, self.depth = c.tree.top_k, c.depth if c.prunes_depth else c.tree.depth
        wanted = c.total_tokens if c.reranks else c.tree.total_tokens
        self.total_tokens = min(wanted, costs.max_tokens) if c.reranks else wanted
        self.num_expanded = self.depth * self.top_k
        self.begin()

    def begin(self) -> None:
        """Forget every earlier call of `decode`."""
        c = self.config
        self.rounds: list[Round] = []
        self._num_verified = self.total_tokens - 1
        self._ratios = deque([1.0], c.num_ratios)
        self._decays = deque([USUAL_DECAY] * 4, 64)  # of the best confidence, level by level
        self._tokens = c.expected_weight * c.expected_speedup
        self._steps = c.expected_weight  # in units of an autoregressive step

    @property
    def running_speedup(self) -> float:
        """Tokens of a sequence over the time that they took, in autoregressive steps."""
        return self._tokens / self._steps

    @property
    def thresholds(self) -> tuple[float, float, float]:
        """C1, C2 and C3 in force.

        Time per token falls with another node for as long as its gain over its cost is above the
        speedup reached: that is why the running speedup serves as all three.
        """
        chosen = self.config.thresholds or (self.running_speedup,) * 3
        return tuple(self.config.strictness * one for one in chosen)

    def start_round(self, batch: int, context: int, num_rows: int) -> None:
        """A round of `batch` sequences, the longest with `context` tokens in the cache."""
        self.now = Round(batch, context, num_rows)
        self._step = self.costs.cost("target", batch, context, 1)
        self._pool, self._best = None, 0.0
        if not self.config.keeps_ratios:
            self._ratios = deque([1.0], self.config.num_ratios)

    def choose(self, level: int, scores: Tensor) -> Tensor | None:
        """The best candidates of each sequence, as many as pay; None if no further level does."""
        best = scores.topk(min(self.top_k, scores.shape[1]), 1)
        utilities = self._utilities(best.values.exp(), scores)
        costs = self._level_costs(len(utilities))
        width = self._width(utilities, costs)
        utility, cost = utilities[width - 1], costs[width - 1]
        if level:
            self._ratios.append(utility / self._last_utility if self._last_utility else 0.0)
        self._last_utility = utility
        # a net gain is that of the next level already
        ratios = (1.0,) if self.config.utility == "net_gain" else self._ratios
        if self.config.prunes_depth and not pays_to_descend(
            utility, cost, ratios, self.thresholds[1]
        ):
            return None
        self.now.widths.append(width)
        return best.indices[:, :width]

    def _width(self, utilities: np.ndarray, costs: np.ndarray) -> int:
        if not self.config.prunes_breadth:
            return min(self.config.tree.top_k, len(utilities))
        return best_size(utilities, costs, self.thresholds[0])

    def _utilities(self, confidence: Tensor, scores: Tensor) -> np.ndarray:
        """(K,) of expanding the 1, ..., K best candidates of a level."""
        if self.config.utility == "layer_sum":
            return path_sums(confidence)
        if self.config.utility == "net_gain":
            return net_gain(confidence, self._decay(confidence), self._price())
        m = self._num_verified
        # the best so far, these candidates too, against children as sure as the candidates are
        pool = scores.new_zeros(len(scores), m) if self._pool is None else self._pool
        self._pool = torch.cat([pool, scores.exp()], 1).topk(m, 1).values
        return pool_gain(confidence, pool)

    def _decay(self, confidence: Tensor) -> float:
        """Mean factor between the best confidences of a level and of the next, this one's noted."""
        best = float(confidence[:, 0].mean())
        if self._best:
            self._decays.append(best / self._best)
        self._best = best
        return sum(self._decays) / len(self._decays)

    def _price(self) -> float:
        """What verifying one more node costs, in tokens: its share of the last round's pass."""
        curve = self.costs.curve("target", self.now.batch, self.now.context)
        size = min(max(self._num_verified, 1) + 1, len(curve))
        slope = (curve[size - 1] - curve[0]) / max(1, size - 1)
        return float(self.thresholds[2] * slope / self._step)

    def _level_costs(self, most: int) -> np.ndarray:
        """(K,) of drafting below 1, ..., K nodes, in autoregressive steps."""
        context = self.now.context + sum(self.now.widths)
        curve = self.costs.curve("level", self.now.batch, context)
        if len(curve) < most:  # as dear as the widest level that was timed
            curve = np.pad(curve, (0, most - len(curve)), "edge")
        return curve[:most] / self.costs.cost("target", self.now.batch, context, 1)

    def prune(self, growth: Growth) -> DraftTree:
        """Dynamic reranking: of all candidates the best, as many as pay for their verification."""
        tokens, parents, scores = growth.pool()
        m = self.num_kept(scores[:, 1:]) if self.config.reranks else self.total_tokens - 1
        tree, kept = keep_best(tokens, parents, scores, m + 1)
        self.now.num_tokens = tree.tokens.shape[1]
        self.now.confidence = scores.gather(1, kept)[:, 1:].exp().double().sum(1).tolist()
        self._num_verified = self.now.num_tokens - 1
        return tree

    def num_kept(self, scores: Tensor) -> int:
        """m, of candidates with these scores (B, n).

        A tree of m drafted nodes is a pass over m + 1 tokens, the root being one of them.
        """
        curve = self.costs.curve("target", self.now.batch, self.now.context)[1:] / self._step
        most = min(scores.shape[1], len(curve), self.total_tokens - 1)
        ranked = scores.topk(most, 1).values.exp()
        return best_size(path_sums(ranked), curve[:most], self.thresholds[2])

    def learn(self, accepted: Tensor) -> None:
        """Close the round with the drafted tokens accepted (B,)."""
        self.now.accepted = accepted.tolist()
        self.rounds.append(self.now)
        now = self.now
        spent = self.costs.round(now.batch, now.context, now.num_rows, now.widths, now.num_tokens)
        self._tokens += 1 + sum(now.accepted) / len(now.accepted)
        self._steps += spent / self._step


# --- drafting


class Drafter:
    """Any drafter of trees, with its trees shaped by their cost."""

    def __init__(self, drafter: decoding.Drafter, costs: CostTable, config: Config | None = None):
        self.drafter, self.shape = drafter, Shape(costs, config)
        take_shape(drafter, self.shape)

    @property
    def max_nodes(self) -> int:
        return self.shape.total_tokens

    def begin(self, prompts: Tensor, lengths: Tensor, roots: Tensor, scores: Scores) -> None:
        self.lengths, self.num_rows = lengths, 1
        self.shape.begin()
        self.drafter.begin(prompts, lengths, roots, scores)

    def propose(self) -> DraftTree:
        self.shape.start_round(len(self.lengths), int(self.lengths.max()), self.num_rows)
        return self.drafter.propose()

    def observe(self, verdict: Verdict, scores: Scores) -> None:
        self.shape.learn(verdict.num_accepted)
        self.lengths = self.lengths + verdict.num_accepted + 1
        self.num_rows = verdict.tokens.shape[1]
        self.drafter.observe(verdict, scores)

    def select(self, rows: Tensor) -> None:
        self.lengths = self.lengths[rows]
        self.drafter.select(rows)


# --- what the notebook and the tables ask for


def with_running_speedup(
    traces: Sequence[replay.Trace], costs: CostTable, config: Config, batch: int, turns: int = 2
) -> Config:
    """The config, its running speedup started where replays of `traces` say that it settles.

    Dinkelbach's iteration: the speedup that a threshold reaches is the next threshold.
    """
    plain = replay.tokens_per_second(
        replay.replay(traces, None, costs, method="Autoregressive", batch=batch)
    )
    for _ in range(turns):
        config = replace(config, expected_speedup=_speedup(traces, costs, config, batch, plain))
    return config


def tuned(traces: Sequence[replay.Trace], costs: CostTable, config: Config, batch: int) -> Config:
    """The config with whichever of FACTORS on the running speedup replays of `traces` like best.

    The paper's thresholds are retuned for every model; here replays do that.
    """
    settled = [
        with_running_speedup(traces, costs, replace(config, strictness=x), batch) for x in FACTORS
    ]
    return max(settled, key=lambda one: one.expected_speedup)


def _speedup(
    traces: Sequence[replay.Trace], costs: CostTable, config: Config, batch: int, plain: float
) -> float:
    fixed = replace(config, thresholds=(config.expected_speedup,) * 3)
    records = replay.replay(traces, shaped(costs, fixed), costs, method="CAST", batch=batch)
    return replay.tokens_per_second(records) / plain


def shaped(costs: CostTable, config: Config) -> Callable[[decoding.Drafter], Drafter]:
    """Makes a CAST drafter of any drafter of trees, recorded ones too."""
    return lambda drafter: Drafter(drafter, costs, config)


def costs_here(
    target: Target,
    checkpoint: Path | str = eagle3.CHECKPOINT,
    top_k: int = 10,
    grid: Grid = QUICK,
) -> CostTable:
    """The cost table of this machine from the cache, measured there first: a few minutes, once."""
    header = cost_table.header_of(target, checkpoints.digest(checkpoint)[:12], top_k)
    named = hashlib.sha256(json.dumps([header, asdict(grid)]).encode()).hexdigest()[:16]

    def measure() -> CostTable:
        drafter = eagle3.Drafter.load(checkpoint, target)
        return cost_table.profile(target, drafter, header, grid)

    return cost_table.obtain(assets.cache_dir() / "costs" / f"{named}.json", header, measure)


def load(
    target: Target,
    checkpoint: Path | str = eagle3.CHECKPOINT,
    costs: CostTable | None = None,
    config: Config | None = None,
) -> Drafter:
    """CAST on an EAGLE-3 head."""
    config = config or Config()
    costs = costs or costs_here(target, checkpoint, config.tree.top_k)
    return Drafter(eagle3.Drafter.load(checkpoint, target), costs, config)


DRAFTERS = {"CAST": load}
