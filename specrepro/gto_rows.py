"""What GTO's figures are of beside speed: greedy paths in trees (Figure 2), rewards and ratios,
and what heads tuned alike have accepted at every position of answers that none was trained on.

A tree's greedy path goes from each node to the drafter's own first choice. It is pruned where it
ends above the deepest level. How far a pruned path would have gone on being accepted nobody asks,
so `greedy_tau` is of what the tree holds of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from specrepro import corpus, eagle3, rows
from specrepro.decoding import Drafter, decode, most_probable
from specrepro.draft_tree import DraftTree
from specrepro.forest import judge
from specrepro.gto import REWARDS, GroupDrafter, GroupTreeLoss, is_clipped, tree_reward
from specrepro.target_model import Scores, Target
from specrepro.tree_verify import Verdict, verify_greedy

PATH_COUNTS = ["rounds", "pruned", "accepting", "on_greedy_path", "greedy_tokens", "tokens"]
TREE_VALUES = ("accepted", *REWARDS)  # of a tree: tokens that the target accepts, and rewards
Question = tuple[str, Sequence[int]]  # a prompt's id and its token ids


def greedy_path(tree: DraftTree) -> list[int]:
    """Nodes from below the root along the first child of each, of a tree of one sequence.

    Trees keep a node's children in the order of their probability, so the first is the drafter's
    own choice.
    """
    parents, path = tree.parents[0].tolist(), [0]
    while path[-1] in parents:
        path.append(parents.index(path[-1]))
    return path[1:]


class PathWatch:
    """A drafter that counts how its trees' greedy paths fare, one sequence at a time."""

    def __init__(self, drafter: Drafter, levels: int):
        self.drafter, self.levels = drafter, levels
        self.max_nodes = drafter.max_nodes

    def begin(self, prompts: Tensor, lengths: Tensor, roots: Tensor, scores: Scores) -> None:
        self.counts = dict.fromkeys(PATH_COUNTS, 0)
        self.drafter.begin(prompts, lengths, roots, scores)

    def propose(self) -> DraftTree:
        self.tree = self.drafter.propose()
        return self.tree

    def observe(self, verdict: Verdict, scores: Scores) -> None:
        greedy = greedy_path(self.tree)
        num_accepted = int(verdict.num_accepted[0])
        accepted = verdict.path[0, 1 : num_accepted + 1].tolist()
        pairs = zip(greedy, accepted, strict=False)
        shared = next((n for n, (one, other) in enumerate(pairs) if one != other), None)
        shared = min(len(greedy), num_accepted) if shared is None else shared
        found = (
            1, len(greedy) < self.levels, num_accepted > 0, shared == num_accepted > 0,
            shared + 1, num_accepted + 1,
        )  # fmt: skip
        for name, value in zip(PATH_COUNTS, found, strict=True):
            self.counts[name] += value
        self.drafter.observe(verdict, scores)

    def select(self, rows: Tensor) -> None:
        self.drafter.select(rows)


def path_rows(
    target: Target,
    drafters: Mapping[str, Drafter],
    questions: Sequence[Question],
    *,
    prompts: str,
    max_new_tokens: int,
) -> pd.DataFrame:
    """Rows of quantity "paths" and "path_gain" of each method, greedily decoding one prompt set.

    `pruned` is the share of rounds whose greedy path was cut, `on_greedy_path` that of the accepted
    paths that are part of it; where nothing was accepted there is none. `greedy_tau` and `tau`
    count a round's tokens, the bonus token included, along the greedy path alone and in the whole
    tree; "path_gain" is by how much the second is above.
    """
    found = []
    for method, drafter in drafters.items():
        watch = PathWatch(drafter, drafter.tree.depth + 1)
        counts = []
        for _, prompt_ids in questions:
            decode(target, watch, list(prompt_ids), max_new_tokens)
            counts.append([watch.counts[name] for name in PATH_COUNTS])
        named = {"method": method, "prompts": prompts, "temperature": 0.0, "batch": 1}
        named |= {"num_prompts": len(questions)}
        found += [named | row for row in _path_values(np.array(counts, float))]
    return pd.DataFrame(found)


def _path_values(counts: np.ndarray) -> list[dict[str, object]]:
    """Of counts (prompts, PATH_COUNTS); a share's interval, widened for few prompts, ends at 1."""
    totals, draws = counts.sum(0), rows.bootstrap(counts)
    ratios = {
        "pruned": lambda c: c[..., 1] / c[..., 0],
        "on_greedy_path": lambda c: c[..., 3] / c[..., 2],
        "greedy_tau": lambda c: c[..., 4] / c[..., 0],
        "tau": lambda c: c[..., 5] / c[..., 0],
    }
    values = {"quantity": "paths"}
    for name, ratio in ratios.items():
        values |= _with_interval(name, ratio, totals, draws)
    for share in ("pruned_high", "on_greedy_path_high"):
        values[share] = min(values[share], 1.0)
    gain = _with_interval("value", lambda c: (c[..., 5] - c[..., 4]) / c[..., 0], totals, draws)
    return [values, {"quantity": "path_gain"} | gain]


def _with_interval(
    name: str, ratio: Callable[[np.ndarray], np.ndarray], totals: np.ndarray, draws: np.ndarray
) -> dict[str, float]:
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = rows.interval(ratio(draws))
        return {name: float(ratio(totals)), f"{name}_low": low, f"{name}_high": high}


# --- rewards


@dataclass(frozen=True, slots=True)
class Answered:
    """A prompt and what the target answered."""

    prompt_ids: Sequence[int]
    tokens: Sequence[int]

    def batch(self, target: Target) -> corpus.Batch:
        """As training would see it."""
        tokens = torch.tensor([[*self.prompt_ids, *self.tokens]], device=target.device)
        taps, hidden = target.features(tokens)
        is_answer = torch.arange(tokens.shape[1], device=target.device)[None] >= len(
            self.prompt_ids
        )
        choices = most_probable(target.logits(hidden))
        return corpus.Batch(tokens, is_answer, choices, taps, hidden)


def reward_rows(
    loss: GroupTreeLoss, answered: Sequence[Answered], *, prompts: str, bins: int = 24
) -> pd.DataFrame:
    """Rows of quantity "reward", "reward_gap" and "ratio" on answers that were not trained on.

    `reward` is of the trees of the tuned head (GTO) and of the first (EAGLE-3), `reward_gap` their
    difference; of ratios s, the shares (`value`) of positions in bins from `level` on, and, as
    metric "clipped", of those that the surrogate takes no gradient from.
    """
    sums, ratios, clipped = [], [], []
    for one in answered:
        batch = one.batch(loss.target)
        rollout = loss.sample(batch)
        if rollout is None:
            continue
        is_row = rollout.is_row
        parts = (rollout.rewards[is_row], rollout.baselines[is_row])
        sums.append([float(is_row.sum()), *(float(part.sum()) for part in parts)])
        with torch.no_grad():
            s, advantage = loss.ratios(batch, rollout), loss.advantage(rollout)
        has_path = is_row & (rollout.lengths > 0)
        ratios.append(s[has_path].cpu())
        clipped.append(is_clipped(s, advantage, loss.config.clip)[has_path].cpu())
    if not sums:
        return pd.DataFrame()
    named = {"prompts": prompts, "temperature": 0.0, "num_prompts": len(sums)}
    found = _reward_values(np.array(sums)) + _ratio_values(torch.cat(ratios), bins)
    share = torch.cat(clipped).float().mean().item()
    found.append({"quantity": "ratio", "metric": "clipped", "method": "GTO", "value": share})
    return pd.DataFrame([named | row for row in found])


def _reward_values(sums: np.ndarray) -> list[dict[str, object]]:
    """Of sums (prompts, 3): positions, rewards of the tuned head and of the first."""
    totals, draws = sums.sum(0), rows.bootstrap(sums)
    cases = (
        ("reward", "GTO", lambda c: c[..., 1] / c[..., 0]),
        ("reward", "EAGLE-3", lambda c: c[..., 2] / c[..., 0]),
        ("reward_gap", "GTO", lambda c: (c[..., 1] - c[..., 2]) / c[..., 0]),
    )
    return [
        {"quantity": quantity, "method": method} | _with_interval("value", ratio, totals, draws)
        for quantity, method, ratio in cases
    ]


def _ratio_values(ratios: Tensor, bins: int) -> list[dict[str, object]]:
    """Shares of ratios in equal bins from 0.4 to 1.6; those beyond are in the outermost."""
    low, high = 0.4, 1.6
    width = (high - low) / bins
    places = ((ratios - low) / width).floor().clamp(0, bins - 1).long()
    shares = torch.bincount(places, minlength=bins) / max(1, len(ratios))
    named = {"quantity": "ratio", "metric": "share", "method": "GTO"}
    return [
        named | {"level": round(low + width * place, 4), "value": share}
        for place, share in enumerate(shares.tolist())
    ]


# --- heads beside each other, at every position


def tree_values(target: Target, drafter: GroupDrafter, batch: corpus.Batch) -> np.ndarray:
    """(1 + TREE_VALUES,) positions of one answer, and sums of what is said of the trees there.

    A tree stands at every position, as decoding would draft it had it come there. Unlike rounds,
    positions are the same for every head, so heads are told apart by far fewer answers.
    """
    positions = eagle3.supervised_rows(batch.is_answer, step=0)[0].nonzero().T
    trees = drafter.trees(batch.tokens, drafter.head.read(batch), positions)
    is_row = torch.ones_like(positions, dtype=torch.bool)
    (judged,) = judge(target, batch.tokens, positions, is_row, [trees])
    sums = [verify_greedy(trees, judged.choices).num_accepted.sum()]
    sums += [tree_reward(trees, judged.probs, kind).sum() for kind in REWARDS]
    return np.array([positions.shape[1], *map(float, sums)])


Seeds = Sequence[np.ndarray]  # of each, what `tree_values` says of the same answers


def held_out_levels(heads: Mapping[str, Seeds]) -> pd.DataFrame:
    """Rows of quantity "held_out": each of TREE_VALUES at a position, by method, seeds pooled."""
    found = [
        _at_positions("held_out", {"method": method}, np.sum(seeds, 0))
        for method, seeds in heads.items()
    ]
    return pd.DataFrame(sum(found, []))


def held_out_gains(heads: Mapping[str, Seeds], pairs: Sequence[tuple[str, str]]) -> pd.DataFrame:
    """Rows of quantity "held_out_gain": `method` less `versus` in each of TREE_VALUES a position.

    Seeds are pooled answer by answer, and intervals are over answers.
    """
    found = []
    for method, versus in pairs:
        named = {"method": method, "versus": versus, "num_seeds": len(heads[method])}
        both = (np.sum(heads[one], 0) for one in (method, versus))
        found += _at_positions("held_out_gain", named, *both)
    return pd.DataFrame(found)


def _at_positions(quantity: str, named: Mapping[str, object], *sums: np.ndarray) -> list[dict]:
    """Mean of each of TREE_VALUES at a position, of one head or of one less another."""
    units = np.concatenate(sums, 1)
    totals, draws = units.sum(0), rows.bootstrap(units)
    named = {"quantity": quantity, "prompts": "all", "num_prompts": len(units)} | dict(named)

    def mean(place: int) -> Callable[[np.ndarray], np.ndarray]:
        def of(c: np.ndarray) -> np.ndarray:
            parts = [part[..., place] / part[..., 0] for part in np.split(c, len(sums), -1)]
            return parts[0] - sum(parts[1:])

        return of

    return [
        named | {"metric": metric} | _with_interval("value", mean(place), totals, draws)
        for place, metric in enumerate(TREE_VALUES, 1)
    ]
