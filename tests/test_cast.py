"""CAST: trees shaped by their cost are the argmax the paper scans for, and change no word."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import test_losslessness_of_decoding as exact
import torch
from test_eagle3 import make_head
from tree_drafters import Foretelling, Knowing, table_of

from specrepro import cast, eagle3, losslessness, target_model
from specrepro.cast import Config, best_size
from specrepro.cast_rows import TimedShape
from specrepro.cost_table import CostTable, Grid
from specrepro.decoding import Autoregressive, Generation, decode, decode_autoregressively
from specrepro.draft_tree import PADDING, DraftTree, Growth
from specrepro.eagle3 import TreeConfig
from specrepro.target_model import Target

PROMPTS = [[10, 20, 30, 40], [50, 60, 70], [15, 25, 35, 45, 55, 65], [80]]
NUM_NEW = 32
small_target = exact.small_target  # of five tokens, for the chi-square


@pytest.fixture(scope="module")
def target(tiny_target_folder) -> Target:
    return target_model.load(str(tiny_target_folder()), dtype="float32", device="cpu")


def grown(config: Config, costs: CostTable, batch: int = 1, seed: int = 0) -> list[DraftTree]:
    """A few trees of a drafter that knows nothing, with their rounds in `config`'s shape."""
    return [tree for tree, _ in drafted(config, costs, batch, seed)]


def drafted(
    config: Config, costs: CostTable, batch: int = 1, seed: int = 0, num_rounds: int = 4
) -> Iterator[tuple[DraftTree, cast.Round]]:
    words = torch.randint(5, 90, (batch, 60), generator=torch.Generator().manual_seed(seed))
    drafter = cast.Drafter(Foretelling(words.tolist(), 100, seed=seed), costs, config)
    drafter.begin(None, torch.full((batch,), 20), words[:, 0], None)
    for _ in range(num_rounds):
        tree = drafter.propose()
        verdict = drafter.drafter.verify(tree)
        yield tree, drafter.shape.now
        drafter.observe(verdict, None)


# --- Algorithm 1


def scan(utility: np.ndarray, cost: np.ndarray, threshold: float) -> int:
    """Algorithm 1 as transcribed: one pass upward from the first node, by ratios."""
    last = 0
    for k in range(1, len(utility)):
        if (utility[k] - utility[last]) / (cost[k] - cost[last]) >= threshold:
            last = k
    return last + 1


def marginal(utility: np.ndarray, cost: np.ndarray, threshold: float) -> int:
    """The paper's idea in words: add nodes while the next one's gain over its cost is enough."""
    k = 0
    while (
        k + 1 < len(utility)
        and (utility[k + 1] - utility[k]) / (cost[k + 1] - cost[k]) >= threshold
    ):
        k += 1
    return k + 1


def curves(seed: int, num: int = 30, is_concave: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Utilities of ranked confidences, and costs that rise: evenly or faster where concave."""
    draws = np.random.default_rng(seed)
    gains, steps = draws.random(num), draws.random(num) * 0.2 + 1e-3
    order = slice(None) if not is_concave else slice(None, None, -1)
    gains = np.sort(gains)[order] if is_concave else gains
    return gains.cumsum(), (np.sort(steps) if is_concave else steps).cumsum() + 1


@pytest.mark.parametrize("is_concave", [True, False])
def test_the_scan_finds_the_argmax_whatever_the_curves(is_concave):
    sizes = []
    for seed in range(200):
        utility, cost = curves(seed, is_concave=is_concave)
        threshold = 10 ** np.random.default_rng(seed).uniform(-1, 2)
        sizes.append(best_size(utility, cost, threshold))
        assert sizes[-1] == scan(utility, cost, threshold)
    assert len(set(sizes)) > 10, "the same size was best nearly everywhere"


def test_marginal_gains_end_where_the_argmax_is_while_costs_are_convex():
    pairs = [
        (best_size(*curves(seed), threshold), marginal(*curves(seed), threshold))
        for seed in range(200)
        for threshold in (1.0, 4.0, 10.0)
    ]
    assert all(ours == theirs for ours, theirs in pairs)
    assert len({ours for ours, _ in pairs}) > 10


def test_marginal_gains_stop_at_a_step_that_the_argmax_takes():
    """A pass costs the same up to 8 tokens and then up to 16: the ninth alone never pays."""
    cost = 1 + 0.3 * (np.arange(16) // 8)
    utility = np.full(16, 0.2).cumsum()
    sloped = cost + 1e-9 * np.arange(16)  # ratios need costs that differ
    assert marginal(utility, sloped, 2.5) == 8
    assert best_size(utility, cost, 2.5) == scan(utility, sloped, 2.5) == 16
    assert best_size(utility, cost, 6.0) == 8, "eight more nodes gain 1.6 and cost 0.3"


def test_a_plateau_is_used_in_full_and_an_inversion_is_taken():
    assert best_size(np.array([0.5, 0.6, 0.61]), np.array([1.0, 1.0, 1.0]), 4.0) == 3
    # 40 rows may cost more than 48: there the ratio is negative, and the scan stays where it was
    utility, cost = np.array([0.5, 0.6, 0.7]), np.array([1.0, 1.3, 0.9])
    assert (best_size(utility, cost, 4.0), scan(utility, cost, 4.0)) == (3, 1)


def test_a_threshold_without_bounds_leaves_the_least_and_none_takes_all():
    utility, cost = curves(0)
    assert best_size(utility, cost, math.inf) == 1
    assert best_size(utility, cost, 0.0) == len(utility)
    assert best_size(utility, np.zeros(len(utility)), 1e6) == len(utility), "what is free pays"


@pytest.mark.parametrize("seed", range(20))
def test_a_higher_threshold_or_a_steeper_cost_never_takes_more(seed):
    utility, cost = curves(seed)
    sizes = [best_size(utility, cost, threshold) for threshold in (0, 0.5, 1, 2, 4, 8, 16, 64)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]
    steeper = [best_size(utility, 1 + (cost - 1) * slope, 4.0) for slope in (0.25, 1, 4, 16)]
    assert steeper == sorted(steeper, reverse=True) and steeper[0] > steeper[-1]


# --- utilities and depth


def test_path_sums_are_running_sums_averaged_over_the_batch():
    confidence = torch.tensor([[0.5, 0.25, 0.125], [1.0, 0.5, 0.0]])
    assert cast.path_sums(confidence).tolist() == [0.75, 1.125, 1.1875]


def gain_by_hand(confidence: list[float], pool: list[float], k: int) -> float:
    """The best len(pool) of the pool and the first k candidates, less the pool."""
    return sum(sorted(pool + confidence[:k], reverse=True)[: len(pool)]) - sum(pool)


@pytest.mark.parametrize("num_pool", [1, 3, 8, 20])
def test_pool_gain_is_what_the_verified_set_gains(num_pool):
    draws = torch.Generator().manual_seed(num_pool)
    confidence, pool = (
        torch.rand(2, n, generator=draws).sort(1, descending=True).values for n in (8, num_pool)
    )
    found = cast.pool_gain(confidence, pool)
    for k in range(1, 9):
        rows = zip(confidence.tolist(), pool.tolist(), strict=True)
        expected = np.mean([gain_by_hand(*row, k) for row in rows])
        assert found[k - 1] == pytest.approx(expected, abs=1e-6)
    assert 0 < found[-1] < confidence.sum(1).mean() or num_pool == 20


def test_depth_follows_the_mean_of_the_last_ratios_which_begin_with_one():
    """alpha u / c >= C2 by hand: confidences and costs chosen so that the third level fails."""
    halves = [torch.tensor([[-math.log(2) * level] * 2]) for level in range(1, 6)]
    costs = table_of(lambda b, c, n: 1.0, lambda b, c, n: 0.1, width=2)
    config = Config(TreeConfig(4, 2, 8), num_ratios=2, thresholds=(0, 3.0, 0), depth=4)
    shape = cast.Shape(costs, config)
    shape.start_round(1, 10, 1)
    # u is 1, 0.5, 0.25; ratios {1}, {1, 0.5}, {0.5, 0.5}; u / c is 10, 5, 2.5
    chosen = [shape.choose(level, scores) for level, scores in enumerate(halves[:3])]
    assert [places is None for places in chosen] == [False, False, True]
    assert 0.75 * 5 >= 3.0 > 0.5 * 2.5, "the second level passes by its mean, the third does not"
    shape.start_round(1, 10, 1)
    assert list(shape._ratios) == [1.0], "every tree begins anew"
    kept = cast.Shape(costs, replace(config, keeps_ratios=True))
    kept.start_round(1, 10, 1)
    [kept.choose(level, scores) for level, scores in enumerate(halves[:3])]
    kept.start_round(1, 10, 1)
    assert list(kept._ratios) == [0.5, 0.5]


# --- the shape of trees


class Theorem(cast.Shape):
    """Thresholds of Theorem 4.1, which change with the level: what the K-th node still gains."""

    def choose(self, level: int, scores: torch.Tensor) -> torch.Tensor | None:
        kth = scores.topk(self.top_k, 1).values.exp()[:, -1].double().mean().item()
        slope = np.diff(self._level_costs(self.top_k))[0]
        self.first = kth / slope * self.closeness
        return super().choose(level, scores)

    def prune(self, growth: Growth) -> DraftTree:
        ranked = growth.pool()[2][:, 1:].exp().sort(1, descending=True).values
        last = ranked[:, self.wanted - 2].double().mean().item()
        slope = np.diff(self.costs.curve("target", self.now.batch, self.now.context))[0]
        self.third = last / slope * self._step * self.closeness
        return super().prune(growth)

    @property
    def thresholds(self) -> tuple[float, float, float]:
        return getattr(self, "first", 0.0), -math.inf, getattr(self, "third", 0.0)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("closeness", [1 - 1e-6, 1 + 1e-4])
def test_theorem_4_1_affine_costs_give_eagle_2s_tree(batch, closeness):
    """Node for node; a threshold just above the K-th node's worth, or ">", loses that node."""
    fixed, costs = TreeConfig(3, 4, 12), table_of(width=4)
    words = torch.randint(5, 90, (batch, 40), generator=torch.Generator().manual_seed(1))
    trees = []
    theorem = Theorem(costs, Config(fixed, depth=3))
    theorem.closeness, theorem.wanted = closeness, fixed.total_tokens
    theorem.start_round(batch, 10, 1)
    for shape in (fixed, theorem):
        drafter = Foretelling(words.tolist(), 100, shape)
        drafter.begin(None, None, words[:, 0], None)
        trees.append(drafter.propose())
    theirs, ours = trees
    is_same = ours.tokens.shape == theirs.tokens.shape and bool(
        (ours.tokens == theirs.tokens).all()
    )
    assert is_same == (closeness < 1)
    if closeness < 1:
        assert torch.equal(ours.parents, theirs.parents)


WITHOUT = {"prunes_breadth": False, "prunes_depth": False, "reranks": False}


def test_without_its_parts_the_tree_is_eagle_2s():
    fixed, costs = TreeConfig(3, 5, 20), table_of()
    words = torch.randint(5, 90, (2, 40), generator=torch.Generator().manual_seed(3))
    plain = Foretelling(words.tolist(), 100, fixed)
    shaped = cast.Drafter(Foretelling(words.tolist(), 100), costs, Config(fixed, **WITHOUT))
    for drafter in (plain, shaped):
        drafter.begin(None, torch.tensor([9, 9]), words[:, 0], None)
    for _ in range(3):
        expected, found = plain.propose(), shaped.propose()
        assert torch.equal(found.tokens, expected.tokens)
        assert torch.equal(found.parents, expected.parents)
        verdict = plain.verify(expected)
        for drafter in (plain, shaped):
            drafter.observe(verdict, None)


def test_each_part_alone_moves_its_own_size_and_no_other():
    costs = table_of(lambda b, c, n: 10 + n, lambda b, c, n: 2 + n)
    fixed = Config(TreeConfig(3, 5, 20), thresholds=(1.0, 1.0, 1.0), **WITHOUT)
    for part, untouched in (
        ("prunes_breadth", ("depth", "tokens")),
        ("prunes_depth", ("width", "tokens")),
        ("reranks", ("width", "depth")),
    ):
        sizes = {"width": set(), "depth": set(), "tokens": set()}
        for _, now in drafted(replace(fixed, **{part: True}), costs):
            sizes["width"] |= set(now.widths)
            sizes["depth"].add(len(now.widths))
            sizes["tokens"].add(now.num_tokens)
        plain = {"width": {5}, "depth": {3}, "tokens": {20}}
        assert all(sizes[name] == plain[name] for name in untouched), part
        assert sizes != plain, f"{part} changed nothing"


@pytest.mark.parametrize("utility", cast.UTILITIES)
def test_limits_of_the_thresholds(utility):
    config = Config(TreeConfig(3, 5, 20), depth=4, utility=utility)
    least = replace(config, thresholds=(math.inf,) * 3)
    for tree, now in drafted(least, table_of()):
        assert now.widths == [] and tree.tokens.shape[1] == 2, "one drafted node"
    most = replace(config, thresholds=(0.0,) * 3, total_tokens=60)
    sizes = [(now.widths, now.num_tokens) for _, now in drafted(most, table_of(width=5))]
    if utility == "layer_sum":  # where a node beyond the verified set is still worth something
        assert sizes == [([5] * 4, 60)] * len(sizes)
    free = table_of(lambda b, c, n: 10 + n, lambda b, c, n: 0.0)
    for _, now in drafted(replace(config, thresholds=(9.0,) * 3), free):
        assert now.widths == [5] * 4, "drafting that costs nothing is never pruned"


def sizes_at(config: Config, costs: CostTable, batch: int = 1) -> np.ndarray:
    """Mean width, depth and tree size."""
    rounds = [now for seed in range(6) for _, now in drafted(config, costs, batch, seed)]
    widths = [sum(now.widths) / max(1, len(now.widths)) for now in rounds]
    depths, tokens = [len(now.widths) for now in rounds], [now.num_tokens for now in rounds]
    return np.array([widths, depths, tokens], float).mean(1)


def test_trees_shrink_with_the_thresholds_and_with_larger_batches():
    config, costs = Config(TreeConfig(3, 8, 20), thresholds=cast.PAPER_THRESHOLDS), table_of()
    by_strictness = [sizes_at(replace(config, strictness=x), costs) for x in (0.1, 0.5, 1, 4)]
    for before, after in itertools.pairwise(by_strictness):
        assert (after[1:] <= before[1:]).all()
    assert (by_strictness[-1] < by_strictness[0]).all()
    # of the same confidences: a sequence's copies make a batch of any size
    large = table_of(lambda b, c, n: 10 + 0.2 * b * n + 0.01 * (b * n) ** 2)
    sizes = []
    for batch in (1, 2, 4, 8):
        shape = cast.Shape(large, replace(config, strictness=0.3))
        words = torch.randint(5, 90, (1, 60)).expand(batch, -1)
        torch.manual_seed(0)
        drafter = Foretelling(words.tolist(), 100, shape)
        drafter.trust = drafter.trust[:1].expand(batch, -1)
        drafter.begin(None, None, words[:, 0], None)
        shape.start_round(batch, 20, 1)
        sizes.append(drafter.propose().tokens.shape[1])
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]


def test_costs_doubled_throughout_decide_alike():
    doubled = table_of(
        lambda b, c, n: 2 * (10 + 0.2 * b * n), lambda b, c, n: 2 * (1 + 0.02 * b * n)
    )
    doubled.points.loc[doubled.points["part"].isin(["extend", "rest"]), "value"] *= 2
    doubled = CostTable(doubled.header, doubled.points)
    for thresholds in (None, (2.0, 1.0, 0.5)):
        config = Config(TreeConfig(3, 5, 20), thresholds=thresholds)
        once, twice = (list(drafted(config, costs)) for costs in (table_of(), doubled))
        for (tree, now), (other, then) in zip(once, twice, strict=True):
            assert torch.equal(tree.tokens, other.tokens) and now.widths == then.widths
    dearer = table_of(lambda b, c, n: 10 + 2 * b * n)  # but not where n = 1 costs what it did
    assert any(
        a.tokens.shape != b.tokens.shape
        for a, b in zip(grown(config, table_of()), grown(config, dearer), strict=True)
    )


@pytest.mark.parametrize("utility", cast.UTILITIES)
@pytest.mark.parametrize("batch", [1, 3])
def test_trees_are_closed_under_parents_and_repeat_no_path(utility, batch):
    config = Config(TreeConfig(3, 6, 20), thresholds=(1.0, 0.5, 0.4), utility=utility)
    sizes = set()
    for tree, now in drafted(config, table_of(), batch, num_rounds=6):
        tree.validate(100)  # parents come before children, siblings differ: every path is unique
        assert (tree.parents != PADDING).all(), "one size for the whole batch"
        assert tree.tokens.shape[1] == now.num_tokens
        sizes.add((len(now.widths), *now.widths, now.num_tokens))
    assert len(sizes) > 1, "every tree had the same shape"


def test_a_rounds_confidence_is_the_sum_over_the_verified_nodes():
    """u_k as it is compared with what is accepted, from the drafter's own distributions."""
    costs, words = table_of(), list(range(5, 60))
    drafter = cast.Drafter(Foretelling([words], 100), costs, Config(TreeConfig(3, 4, 20)))
    drafter.begin(None, torch.tensor([4]), torch.tensor([5]), None)
    tree, source = drafter.propose(), drafter.drafter
    confidence, places, total = [1.0], [0], 0.0
    for token, parent in zip(
        tree.tokens[0].tolist()[1:], tree.parents[0].tolist()[1:], strict=True
    ):
        before, place = int(tree.tokens[0, parent]), places[parent]
        probs = source.habits[before].clone()
        if place >= 0:
            trust = source.trust[0, place]
            probs = probs * (1 - trust)
            probs[words[place + 1]] += trust
        confidence.append(confidence[parent] * probs[token].item())
        places.append(place + 1 if place >= 0 and token == words[place + 1] else -1)
        total += confidence[-1]
    assert drafter.shape.now.confidence == pytest.approx([total], rel=1e-4)
    assert len(confidence) > 3


def test_the_running_speedup_is_tokens_over_steps():
    costs = table_of(lambda b, c, n: 10.0 if n == 1 else 15.0, lambda b, c, n: 2.0)
    config = Config(TreeConfig(2, 4, 8), expected_speedup=2.0, expected_weight=3.0)
    drafter = cast.Drafter(Foretelling([list(range(5, 60))], 100), costs, config)
    drafter.begin(None, torch.tensor([4]), torch.tensor([5]), None)
    assert drafter.shape.thresholds == (2.0, 2.0, 2.0)
    tokens, steps = 6.0, 3.0
    for _ in range(5):
        tree = drafter.propose()
        verdict = drafter.drafter.verify(tree)
        depth = len(drafter.shape.now.widths)
        drafter.observe(verdict, None)
        tokens += 1 + verdict.num_accepted.item()
        steps += (1.5 + 2.0 * depth + 15.0 + 0.25) / 10.0
        assert drafter.shape.running_speedup == pytest.approx(tokens / steps)
    assert drafter.shape.running_speedup != pytest.approx(2.0, abs=0.05)
    drafter.begin(None, torch.tensor([4]), torch.tensor([5]), None)
    assert drafter.shape.thresholds == (2.0, 2.0, 2.0), "no call of decode depends on another"


def test_a_tree_fills_the_pass_up_to_a_step_of_its_cost():
    """Free up to 8 tokens and twice as dear behind: 7 drafted nodes and the root."""
    costs = table_of(lambda b, c, n: 10.0 if n <= 8 else 20.0, lambda b, c, n: 0.0)
    config = Config(TreeConfig(2, 6, 20), thresholds=(1.0, 1.0, 9.0))
    assert [tree.tokens.shape[1] for tree in grown(config, costs)] == [8] * 4


def test_levels_are_charged_at_the_context_that_their_ancestors_lengthen():
    """Drafting is free up to 64 tokens of context; the first level of 4 nodes goes beyond."""
    costs = table_of(
        lambda b, c, n: 10.0, lambda b, c, n: 0.0 if c <= 64 else 1000.0, num_buckets=3, width=4
    )
    config = Config(TreeConfig(4, 4, 20), depth=4, thresholds=(1.0, 1.0, 1.0))
    depths = {}
    for length in (58, 61):
        drafter = cast.Drafter(Foretelling([list(range(5, 60))], 100), costs, config)
        drafter.begin(None, torch.tensor([length]), torch.tensor([5]), None)
        drafter.propose()
        depths[length] = len(drafter.shape.now.widths)
    assert depths == {58: 2, 61: 1}


@pytest.mark.parametrize("thresholds", [None, cast.PAPER_THRESHOLDS])
@pytest.mark.parametrize("utility", cast.UTILITIES)
def test_both_kinds_of_thresholds_work_at_every_batch_size(thresholds, utility):
    """Trees of one size for the batch, within their bounds, smaller where a pass is dearer."""
    costs = table_of(batches=(1, 2, 4, 8, 16, 32))
    config = Config(TreeConfig(3, 5, 20), depth=4, thresholds=thresholds, utility=utility)
    sizes = []
    for batch in costs.batches:
        rounds = list(drafted(config, costs, batch, num_rounds=6))
        for tree, now in rounds:
            assert (tree.parents != PADDING).all() and 2 <= now.num_tokens <= costs.max_tokens
            assert len(now.widths) <= 4 and all(1 <= width <= 5 for width in now.widths)
        sizes.append(np.mean([now.num_tokens for _, now in rounds]))
    assert sizes[-1] < sizes[0] / 2


@pytest.mark.parametrize("batch", [1, 8, 32])
def test_deciding_takes_less_than_a_millisecond_a_round(batch):
    """In processor time, ten levels of ten; the least of many rounds, whatever else runs."""
    scores = -torch.rand(batch, 910, generator=torch.Generator().manual_seed(0))
    shape = TimedShape(table_of(batches=(batch,), num_tokens=129), Config(thresholds=(0.0,) * 3))
    for _ in range(60):
        shape.start_round(batch, 20, 1)
        chosen = [shape.choose(level, scores[:, :100]) for level in range(9)]
        assert all(places.shape == (batch, 10) for places in chosen)
        assert shape.num_kept(scores) == 128
        shape.learn(torch.ones(batch))
    assert 1e-5 < min(shape.spent) < 1e-3, f"{1e3 * min(shape.spent):.2f} ms"


def test_a_net_gain_counts_children_above_their_price():
    confidence = torch.tensor([[0.8, 0.5, 0.1], [0.4, 0.2, 0.0]])
    # children at 0.4, 0.25, 0.05 and 0.2, 0.1, 0: less 0.1 each, where that is anything
    assert cast.net_gain(confidence, 0.5, 0.1) == pytest.approx([0.2, 0.275, 0.275])
    assert cast.net_gain(confidence, 0.5, 1.0).tolist() == [0, 0, 0]
    # a fourth of a step for every node: a level that layer sums would draft is left out
    dear = table_of(lambda b, c, n: 10 + 5.0 * n, lambda b, c, n: 0.1)
    config = Config(TreeConfig(3, 5, 20), thresholds=(1.0, 1.0, 1.0))
    depths = {
        utility: max(len(now.widths) for _, now in drafted(replace(config, utility=utility), dear))
        for utility in ("layer_sum", "net_gain")
    }
    assert depths["layer_sum"] > depths["net_gain"]


# --- lossless


POLICIES = {
    "running speedup": Config(TreeConfig(3, 6, 20)),
    "by hand": Config(TreeConfig(3, 6, 20), thresholds=cast.PAPER_THRESHOLDS),
    "everything": Config(TreeConfig(3, 6, 20), thresholds=(0.0, 0.0, 0.0)),
    "next to nothing": Config(TreeConfig(3, 6, 20), thresholds=(99.0, 99.0, 99.0)),
    "verified set": Config(TreeConfig(3, 6, 20), thresholds=(1.0, 0.3, 0.7), utility="pool_gain"),
    "net of verification": Config(TreeConfig(3, 6, 20), utility="net_gain"),
    "breadth alone": Config(TreeConfig(3, 6, 20), prunes_depth=False, reranks=False),
}


def said(target: Target, temperature: float, seed: int = 5) -> list[Generation]:
    options = {"max_new_tokens": NUM_NEW, "temperature": temperature, "seed": seed}
    return decode_autoregressively(target, PROMPTS, **options)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", POLICIES)
def test_output_is_the_targets_own_whatever_the_shape_of_the_tree(target, name, temperature):
    """Greedy and of the same seed at a temperature, together and alone, though trees differ."""
    words = said(target, temperature)
    options = {"max_new_tokens": NUM_NEW, "temperature": temperature}
    source = [one.tokens for one in words]
    drafter = cast.Drafter(Foretelling(source, target.vocab_size), table_of(), POLICIES[name])
    together = decode(target, drafter, PROMPTS, seed=5, **options)
    assert [one.tokens for one in together] == source
    assert min(sum(one.accepted) for one in together) > 3, "little was accepted, so little verified"
    shapes = {(tuple(now.widths), now.num_tokens) for now in drafter.shape.rounds}
    alone = []
    for row, prompt in enumerate(PROMPTS):
        lone = cast.Drafter(
            Foretelling([source[row]], target.vocab_size), table_of(), POLICIES[name]
        )
        run = decode(target, lone, prompt, seed=5 + row, **options)
        assert run.tokens == source[row]
        alone += [(tuple(now.widths), now.num_tokens) for now in lone.shape.rounds]
    assert shapes != set(alone) or name in ("everything", "next to nothing")


@pytest.mark.parametrize("seed", range(4))
def test_random_thresholds_change_no_word(target, seed):
    draws = np.random.default_rng(seed)
    words = said(target, 0.0)
    config = Config(
        TreeConfig(2, 4, 12),
        thresholds=tuple(10 ** draws.uniform(-2, 1, 3)),
        num_ratios=int(draws.integers(1, 5)),
        keeps_ratios=bool(draws.integers(2)),
        utility=cast.UTILITIES[draws.integers(2)],
    )
    source = Foretelling([one.tokens for one in words], target.vocab_size)
    found = decode(target, cast.Drafter(source, table_of(), config), PROMPTS, NUM_NEW)
    assert [one.tokens for one in found] == [one.tokens for one in words]


def test_half_precision_parts_at_near_ties_alone(tiny_target_folder):
    target = target_model.load(str(tiny_target_folder()), dtype="bfloat16", device="cpu")
    words = decode_autoregressively(target, PROMPTS, max_new_tokens=NUM_NEW)
    answers = {tuple(p): one.tokens for p, one in zip(PROMPTS, words, strict=True)}
    drafter = cast.Drafter(Knowing(answers, target.vocab_size), table_of(), POLICIES["everything"])
    questions = [(f"{row}", prompt) for row, prompt in enumerate(PROMPTS)]
    found = losslessness.losslessness(
        target, {"CAST": drafter}, questions, prompts="chat", max_new_tokens=NUM_NEW, batch=4
    )
    near = found[found["quantity"] == "near_tie"].iloc[0]
    logged = found[found["quantity"] == "divergence"]
    assert near["value"] == 0 and near["num_prompts"] == len(PROMPTS)
    assert len(logged) == near["num_divergences"], "every place where it parted is listed"
    assert sum(map(sum, (now.accepted for now in drafter.shape.rounds))) > 10


@pytest.mark.parametrize("threshold", [0.0, 0.6, math.inf])
def test_whole_sequences_follow_the_target(small_target, threshold):
    """Joint chi-square of three tokens against the exact distribution, at three thresholds."""
    config = Config(TreeConfig(1, 2, 6), depth=1, total_tokens=6, thresholds=(threshold,) * 3)
    source = Foretelling([], exact.VOCAB_SIZE, sharpness=1.0)
    drafter = cast.Drafter(source, table_of(batches=(1, exact.NUM_RUNS)), config)
    p = exact.p_value(small_target, drafter, {"temperature": 1.0}, seed=77_000)
    assert p > 1e-3, f"p = {p:.1e}: the sequences are not the target's"
    assert {now.num_tokens for now in drafter.shape.rounds} != {1}


# --- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"utility": "sum"}, "unknown utility 'sum'; choose layer_sum, pool_gain, net_gain"),
        ({"strictness": -1.0}, "strictness not negative"),
        ({"thresholds": (4.0, math.nan, 1.0)}, "must be numbers"),
        ({"num_ratios": 0}, "num_ratios >= 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Config(**settings)


def test_a_drafter_without_trees_is_refused():
    with pytest.raises(ValueError, match="Autoregressive drafts no trees"):
        cast.Drafter(Autoregressive(), table_of())


def test_without_a_table_one_is_measured_once_for_this_machine(target, monkeypatch, tmp_path):
    monkeypatch.setenv("SPECREPRO_CACHE", str(tmp_path))
    grid = Grid((1,), 32, 1, (1, 8), (1, 10), warm_up=1, repeats=1)
    head = eagle3.save_head(make_head(target), tmp_path / "head")
    tables = [cast.costs_here(target, head, grid=grid) for _ in range(2)]
    assert tables[0].points.equals(tables[1].points), "it was timed again"
    assert len(list((tmp_path / "costs").iterdir())) == 1
    drafter = cast.DRAFTERS["CAST"](target, head, tables[0])
    words = said(target, 0.0)
    run = decode(target, drafter, PROMPTS[0], NUM_NEW)
    assert run.tokens == words[0].tokens and max(run.drafted) <= 7
