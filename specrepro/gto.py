"""GTO, group tree optimization: the draft head trained on the reward of whole draft trees.

arXiv:2509.22134.

Reproduced: the draft tree reward (equations 1 to 5), debiased by the head that training began from,
groups of adjacent positions and their advantage (6 to 10), the clipped surrogate on the accepted
path beside the token loss (11 to 13); the ablations of Tables 3 to 7 and Figure 2 by `gto_lab`.
Nothing changes in drafting: head, tree and verification are EAGLE-3's.
Not reproduced here: the paper's targets and GPUs at any tier below `paper`; GRIFFIN and HASS as the
head to begin from (Table 2). Training runs the target, so its layers cannot be spread over devices.
What the paper leaves open is read like this:
- a tree keeps its best nodes, 60 by default, not its best leaves;
- the target's probabilities are those at temperature 1 (`greedy` takes its own choice as 1);
- the accepted path is the greedily accepted one, without the bonus token, and a position where
  nothing is accepted stays in its group;
- groups are drawn at random among the runs of supervised positions of a sequence;
- the clip is 0.2, and the spread of a group is that of its members, not an estimate of a wider one.
Departs from the paper:
- a group whose rewards differ by less than `min_spread` has no advantage: divided by its spread,
  rounding would count as much as a tree;
- the learning rate falls along a cosine, not a line; the five epochs are asked for by `--epochs`.
The surrogate is no ascent of the reward: advantages sum to zero over positions, not over the trees
of one position, so what is favoured at some is disfavoured at others, and an accepted path that is
lost costs more than one that is favoured gains: alone, with as many positions favoured as not, it
lets less be accepted (`tests/test_gto.py`). What it adds to the token loss, `gto_arms` and
`gto_lab` measure.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from specrepro import commands, corpus, eagle3, recipes
from specrepro.draft_layer import check_fits
from specrepro.draft_training import LoopConfig
from specrepro.draft_tree import DraftTree
from specrepro.eagle3 import DraftHead, TrainingConfig, TreeConfig
from specrepro.forest import Judgement, judge
from specrepro.target_model import Target
from specrepro.tree_verify import verify_greedy

CHECKPOINT = recipes.COMMITTED / "gto"
REWARDS = ("log-sum-exp", "log-mean-exp", "max", "mean", "expected")
STATISTICS = (  # of one step's trees, logged beside the token loss's
    "surrogate", "reward", "reward_gap", "accepted", "ratio", "ratio_deviation", "clipped",
    "silent_groups", "groups",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class TuningConfig:
    """Reward, groups and surrogate."""

    num_groups: int = 16  # K, of each sequence (B.3)
    group_size: int = 8  # m, adjacent positions (B.3)
    reward: str = "log-sum-exp"  # over the branches of a tree (eq. 5); Table 3 has max and mean
    eta: float = 1.0  # smoothness of the maximum
    greedy: bool = False  # the target's own choice counts 1 and all else 0; not stated
    debias: bool = True  # by the reward of the first head's tree (eq. 7)
    clip: float = 0.2  # epsilon of eq. 13; not stated
    weight: float = 0.5  # omega; 0 trains on the token loss alone, and drafts no trees
    min_spread: float = 1e-3  # of the rewards of a group that is learnt from
    floor: float = 1e-6  # delta of eq. 10; not stated

    def __post_init__(self) -> None:
        if self.reward not in REWARDS:
            raise ValueError(f"unknown reward {self.reward!r}; choose one of {', '.join(REWARDS)}")
        if self.num_groups < 1 or self.group_size < 1 or self.eta <= 0 or self.weight < 0:
            raise ValueError(
                "tuning needs num_groups and group_size >= 1, eta > 0 and weight >= 0, not"
                f" {self.num_groups}, {self.group_size}, {self.eta} and {self.weight}"
            )


# --- the equations


def path_probs(tree: DraftTree, probs: Tensor) -> Tensor:
    """(B, N) probability of the path to each node, given each node's own `probs` (B, N)."""
    own = probs.clone()
    own[:, 0] = 1  # the root is emitted already
    return own[:, None].where(tree.ancestor_mask(), 1).prod(-1)


def branch_lengths(tree: DraftTree, probs: Tensor) -> Tensor:
    """(B, N) L = sum_j prod_{k <= j} T(x_k | ...) of the branch that ends in each node (eq. 1).

    How many of its tokens the target accepts on average; the root is none of them.
    """
    reached = path_probs(tree, probs)
    reached[:, 0] = 0
    return (tree.ancestor_mask() * reached[:, None]).sum(-1)


def is_leaf(tree: DraftTree) -> Tensor:
    """(B, N) bool: nodes without children."""
    node_ids = torch.arange(tree.parents.shape[1], device=tree.parents.device)
    return tree.is_node & ~(tree.parents[:, None] == node_ids[:, None]).any(-1)


def tree_reward(
    tree: DraftTree, probs: Tensor, kind: str = "log-sum-exp", eta: float = 1.0
) -> Tensor:
    """(B,) r = 1/eta log sum_i exp(eta L_i) over the branches of each tree (eq. 5), or another.

    `log-mean-exp` takes the credit for the mere number of branches out; `max` and `mean` are Table
    3's; `expected` is the number of tokens that sampling from the target would accept.
    """
    if kind == "expected":
        return (path_probs(tree, probs) * tree.is_node)[:, 1:].sum(-1)
    lengths, leaves = branch_lengths(tree, probs), is_leaf(tree)
    if kind == "mean":
        return (lengths * leaves).sum(-1) / leaves.sum(-1)
    lengths = lengths.masked_fill(~leaves, -torch.inf)
    if kind == "max":
        return lengths.amax(-1)
    reward = (eta * lengths).logsumexp(-1) / eta
    return reward - leaves.sum(-1).log() / eta if kind == "log-mean-exp" else reward


def advantages(gains: Tensor, min_spread: float = 1e-3, floor: float = 1e-6) -> Tensor:
    """(..., m) of `gains` (..., m): A = (R - mean) / (std + delta) in each group (eq. 10).

    Zero throughout a group of less than `min_spread`, hence in a group of one.
    """
    spread = gains.std(-1, correction=0, keepdim=True)
    standard = (gains - gains.mean(-1, keepdim=True)) / (spread + floor)
    return standard.where(spread >= min_spread, 0)


def path_ratios(log_ratios: Tensor, lengths: Tensor) -> Tensor:
    """s = (M(S) / M_0(S)) ** (1 / max(l, 1)) of paths S of `lengths` l (eq. 11)."""
    return (log_ratios / lengths.clamp_min(1)).exp()


def surrogate(ratios: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """-min(s A, clip(s, 1 - eps, 1 + eps) A) of each position (eq. 13)."""
    clipped = ratios.clamp(1 - clip, 1 + clip)
    return -torch.minimum(ratios * advantage, clipped * advantage)


def is_clipped(ratios: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """Bool: positions that eq. 13 takes no gradient from any more."""
    return ((advantage > 0) & (ratios > 1 + clip)) | ((advantage < 0) & (ratios < 1 - clip))


def draw_groups(is_start: Tensor, size: int, most: int, seed: int) -> tuple[Tensor, Tensor]:
    """First rows (b, K) of groups of `size` adjacent rows, ascending, and which are real (b, K).

    At most `most` of each sequence, drawn from the runs that a random first row cuts it into; all
    rows of a group are among `is_start` (b, n). Groups that are not real come last.
    """
    b, n = is_start.shape
    rng = torch.Generator().manual_seed(seed)
    offset = int(torch.randint(size, (1,), generator=rng))
    if n < offset + size + 1:
        return is_start.new_zeros(b, 0, dtype=torch.long), is_start[:, :0]
    is_whole = is_start[:, offset:].unfold(1, size, size).all(-1)
    luck = torch.rand(is_whole.shape, generator=rng).to(is_start.device)
    chosen = luck.masked_fill(~is_whole, -1).topk(min(most, is_whole.shape[1]), 1).indices
    is_real = is_whole.gather(1, chosen)
    starts, order = (offset + chosen * size).masked_fill(~is_real, n).sort(1)
    starts, is_real = starts.clamp_max(n - size - 1), is_real.gather(1, order)
    is_needed = is_real.any(0)
    return starts[:, is_needed], is_real[:, is_needed]


# --- trees of a group, drafted by the code that decodes


class GroupDrafter(eagle3.Drafter):
    """EAGLE-3's drafter at many rows of each sequence at once, over one copy of its prefix.

    The keys of a sequence's rows are computed once; every tree sees those up to its own row, and
    behind them its own nodes alone.
    """

    AT_ONCE = 32  # trees of each sequence; attention reads the nodes of all of them

    @torch.no_grad()
    def trees(self, tokens: Tensor, states: Tensor, rows: Tensor) -> DraftTree:
        """(b P, N) the trees that decoding would draft behind `rows` (b, P) of sequences (b, n).

        A row's tree is rooted at the token after it, the last one emitted.
        """
        (b, n), most = tokens.shape, min(rows.shape[1], self.AT_ONCE)
        self.num_rows = n
        self._allocate(b, n + most * self.tree.num_expanded)
        places = torch.arange(n, device=tokens.device).expand(b, -1)
        causal = places[:, None] <= places[:, :, None]
        following = eagle3.shift_left(tokens, 1)
        features = self._layer(following, self.head.fuse(states), places, places, causal)
        grown = []
        for part in rows.split(most, 1):
            self.roots, self.lengths = following.gather(1, part).flatten(), (part + 1).flatten()
            tree = self._grow(features.take_along_dim(part[:, :, None], 1).flatten(0, 1))
            grown.append([one.unflatten(0, (b, -1)) for one in (tree.tokens, tree.parents)])
        return DraftTree(*(torch.cat(one, 1).flatten(0, 1) for one in zip(*grown, strict=True)))

    def _expand(self, tokens: Tensor, features: Tensor, ancestors: Tensor, level: int) -> Tensor:
        """One more level of every tree: the frontier's features (b P, f, H)."""
        b, (_, f, _) = self.cache.shape[1], ancestors.shape
        positions = (self.lengths + level).view(b, -1, 1).expand(-1, -1, f)
        mask, slots = self._view(ancestors)
        out = self._layer(
            tokens.view(b, -1), features.reshape(b, -1, features.shape[-1]),
            positions.flatten(1), slots.expand(b, -1), mask,
        )  # fmt: skip
        return out.reshape(len(tokens), f, -1)

    def _view(self, ancestors: Tensor) -> tuple[Tensor, Tensor]:
        """What the frontiers of a sequence's trees see (b, P f, slots), and their slots (P f,).

        Slots behind the n rows belong to one tree after the other.
        """
        b, n, most = self.cache.shape[1], self.num_rows, self.tree.num_expanded
        f, num_expanded = ancestors.shape[1:]
        lengths = self.lengths.view(b, -1, 1)
        P, device = lengths.shape[1], lengths.device
        trees = torch.arange(P, device=device)
        own = ancestors.new_zeros(b, P, f, P, most)
        by_tree = ancestors.view(b, P, f, num_expanded).transpose(0, 1)
        own[:, trees, :, trees, :num_expanded] = by_tree
        is_prefix = (torch.arange(n, device=device) < lengths)[:, :, None].expand(-1, -1, f, -1)
        mask = torch.cat([is_prefix, own.flatten(3)], -1).flatten(1, 2)
        last = torch.arange(num_expanded - f, num_expanded, device=device)
        return mask, (n + trees[:, None] * most + last).flatten()


# --- the loss


@dataclass(slots=True)
class Rollout:
    """The trees of one batch as the surrogate takes them; nothing here has a gradient."""

    rows: Tensor  # (b, P) that the trees stand behind, group after group
    is_row: Tensor  # (b, P) bool: of a real group
    path: Tensor  # (b, P, L) tokens that the target accepts of each tree, 0 behind them
    lengths: Tensor  # (b, P) how many these are
    rewards: Tensor  # (b, P) R(T)
    baselines: Tensor  # (b, P) R(T_0) of the first head's trees; 0 without debiasing

    @property
    def gains(self) -> Tensor:
        """R of eq. 7."""
        return self.rewards - self.baselines


def path_log_probs(
    head: DraftHead, target: Target, batch: corpus.Batch, rollout: Rollout
) -> Tensor:
    """(b, P, L) log M of each token of the paths: the head unrolled on its own features.

    Behind a path's end there is some number of no meaning.
    """
    num_steps = rollout.path.shape[-1]
    draft_ids = torch.zeros(target.vocab_size, dtype=torch.long, device=rollout.path.device)
    draft_ids[head.draft_token_ids()] = torch.arange(
        head.config.draft_vocab_size, device=draft_ids.device
    )
    chain = eagle3.unroll(
        head, eagle3.embedding_of(head, target), batch.tokens, head.fuse(head.read(batch)),
        rollout.rows, num_steps, rollout.path,
    )  # fmt: skip
    log_probs = [
        head.logits(features).float().log_softmax(-1)
        .gather(-1, draft_ids[rollout.path[..., step, None]])
        for step, features in enumerate(chain)
    ]  # fmt: skip
    return torch.cat(log_probs, -1)


class GroupTreeLoss:
    """L = L_token + omega L_GTO: training-time test beside the surrogate of whole trees.

    `reference` is M_0, the head as it is now unless another is given; it never changes.
    """

    def __init__(
        self,
        head: DraftHead,
        target: Target,
        tree: TreeConfig,
        training: TrainingConfig,
        tuning: TuningConfig,
        reference: DraftHead | None = None,
    ):
        _require_whole(target)
        self.head, self.target, self.tree, self.config = head, target, tree, tuning
        self.token_loss = eagle3.TrainingTimeTest(head, target, training)
        self.reference = copy.deepcopy(reference or head).requires_grad_(False)
        self.reference_drafter = self._drafter(self.reference) if tuning.debias else None

    def __call__(self, batch: corpus.Batch) -> tuple[Tensor, dict[str, float]]:
        """The loss, the token loss's metrics, and `STATISTICS` (NaN where there is no group)."""
        loss, metrics = self.token_loss(batch)
        if not self.config.weight:
            return loss, metrics
        rollout = self.sample(batch)
        if rollout is None:
            return loss, metrics | dict.fromkeys(STATISTICS, math.nan)
        ratios = self.ratios(batch, rollout)
        advantage = self.advantage(rollout)
        terms = surrogate(ratios, advantage, self.config.clip)
        tree_loss = (terms * rollout.is_row).sum() / rollout.is_row.sum()
        statistics = self._statistics(rollout, ratios.detach(), advantage)
        statistics["surrogate"] = tree_loss.item()
        return loss + self.config.weight * tree_loss, metrics | statistics

    @torch.no_grad()
    def sample(self, batch: corpus.Batch) -> Rollout | None:
        """Draft and judge the trees of some groups; None where no sequence is long enough."""
        is_start = eagle3.supervised_rows(batch.is_answer, step=0)
        # of the batch's own seed: a resumed run draws the groups of one that was never stopped
        m, seed = self.config.group_size, int(batch.tokens.sum())
        starts, is_real = draw_groups(is_start, m, self.config.num_groups, seed)
        if not starts.shape[1]:
            return None
        rows = (starts[:, :, None] + torch.arange(m, device=starts.device)).flatten(1)
        is_row = is_real.repeat_interleave(m, 1)
        # decoding knows nothing of autocast
        with torch.autocast(self.target.device.type, enabled=False):
            trees = self._trees(batch, rows)
            judged = judge(self.target, batch.tokens, rows, is_row, trees)
        rewards = [self._reward(*pair).view_as(rows) for pair in zip(trees, judged, strict=True)]
        verdict = verify_greedy(trees[0], judged[0].choices)
        baselines = rewards[1] if self.config.debias else torch.zeros_like(rewards[0])
        lengths = verdict.num_accepted.view_as(rows)
        steps = torch.arange(max(1, int(lengths.max())), device=rows.device)
        path = verdict.tokens[:, : len(steps)].unflatten(0, rows.shape)
        path = path.where(steps < lengths[..., None], 0)
        return Rollout(rows, is_row, path, lengths, rewards[0], baselines)

    def advantage(self, rollout: Rollout) -> Tensor:
        """(b, P) A of each position within its group, 0 outside the real ones."""
        gains = rollout.gains.unflatten(1, (-1, self.config.group_size))
        found = advantages(gains, self.config.min_spread, self.config.floor).flatten(1)
        return found * rollout.is_row

    def ratios(self, batch: corpus.Batch, rollout: Rollout) -> Tensor:
        """(b, P) s of each position's accepted path."""
        log_probs = path_log_probs(self.head, self.target, batch, rollout)
        with torch.no_grad():
            before = path_log_probs(self.reference, self.target, batch, rollout)
        steps = torch.arange(rollout.path.shape[-1], device=before.device)
        is_step = steps < rollout.lengths[..., None]
        log_ratios = (log_probs - before).where(is_step, 0).sum(-1)
        return path_ratios(log_ratios, rollout.lengths)

    def _trees(self, batch: corpus.Batch, rows: Tensor) -> list[DraftTree]:
        """What the head drafts as it is now, and, to debias, what the first head drafts."""
        drafters = [self._drafter(self.head)]
        drafters += [self.reference_drafter] if self.config.debias else []
        states = self.head.read(batch)
        return [drafter.trees(batch.tokens, states, rows) for drafter in drafters]

    def _drafter(self, head: DraftHead) -> GroupDrafter:
        """A copy of the head as it would draft: in the target's own precision."""
        return GroupDrafter(copy.deepcopy(head), self.target, self.tree)

    def _reward(self, tree: DraftTree, judged: Judgement) -> Tensor:
        probs = judged.indicator(tree) if self.config.greedy else judged.probs
        return tree_reward(tree, probs, self.config.reward, self.config.eta)

    def _statistics(self, rollout: Rollout, ratios: Tensor, advantage: Tensor) -> dict[str, float]:
        """Means over the positions of real groups; of ratios, where something was accepted."""
        is_row, m = rollout.is_row, self.config.group_size
        has_path = is_row & (rollout.lengths > 0)
        is_silent = (advantage == 0).unflatten(1, (-1, m)).all(-1)[is_row[:, ::m]]
        own = ratios[has_path]
        clipped = is_clipped(own, advantage[has_path], self.config.clip)
        gap = rollout.gains[is_row].mean().item() if self.config.debias else math.nan
        return {
            "reward": rollout.rewards[is_row].mean().item(),
            "reward_gap": gap,
            "accepted": rollout.lengths[is_row].float().mean().item(),
            "ratio": own.mean().item(),
            "ratio_deviation": (own - own.mean()).square().mean().sqrt().item(),
            "clipped": clipped.float().mean().item(),
            "silent_groups": is_silent.float().mean().item(),
            "groups": float(len(is_silent)),
        }


def _require_whole(target: Target) -> None:
    if any(isinstance(weight, DTensor) for weight in target.model.parameters()):
        raise ValueError(
            f"the layers of {target.name} are spread over devices, and GTO's training runs them on"
            " every process by itself; leave --shard-target out"
        )


# --- the recipe


@dataclass(frozen=True, slots=True)
class Gto:
    """Tune a trained EAGLE-3 head on the reward of its draft trees."""

    start: str = ""  # checkpoint of the head to begin from; empty is the committed EAGLE-3's
    tree: TreeConfig = field(default_factory=TreeConfig)  # in training and in decoding (B.1)
    training: TrainingConfig = field(default_factory=TrainingConfig)  # of the token loss
    tuning: TuningConfig = field(default_factory=TuningConfig)

    name: ClassVar[str] = "gto"
    LOOP: ClassVar[LoopConfig] = LoopConfig(learning_rate=5e-6, warmup_steps=1000)  # B.3

    @classmethod
    def of(cls, settings: dict[str, Any]) -> Gto:
        """From a section of the overrides."""
        kinds = {"tree": TreeConfig, "training": TrainingConfig, "tuning": TuningConfig}
        parts = {name: kind(**settings.get(name, {})) for name, kind in kinds.items()}
        return cls(**settings | parts)

    def new_module(self, target: Target, answers: Sequence[corpus.Answer]) -> DraftHead:
        """The head that was trained before."""
        head, _ = eagle3.load_head(self.start or eagle3.CHECKPOINT)
        check_fits(head.config, target)
        return head.to(target.device)

    def loss(self, head: DraftHead, target: Target) -> GroupTreeLoss:
        """Token loss and surrogate; the head as it is now stays the reference."""
        return GroupTreeLoss(head, target, self.tree, self.training, self.tuning)

    def drafter(self, head: DraftHead, target: Target) -> eagle3.Drafter:
        """EAGLE-3's, with the tree it was tuned for."""
        return eagle3.Drafter(head, target, self.tree)

    def save(self, head: DraftHead, folder: Path) -> Path:
        """EAGLE-3's released layout; config.json also names the tree."""
        return eagle3.save_head(head, folder, self.tree)


def drafters(
    checkpoint: Path | str = CHECKPOINT, **tree: int
) -> dict[str, Callable[[Target], eagle3.Drafter]]:
    """Loaders of the tuned head's drafters; `tree` overrides the checkpoint's sizes where not 0."""
    found = eagle3.drafters(checkpoint, **tree)
    return {"GTO": found["EAGLE-3"], "GTO chain": found["EAGLE-3 chain"]}


DRAFTERS = drafters()


if __name__ == "__main__":
    commands.run(recipes.main, Gto)
