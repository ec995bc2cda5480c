"""GTO: rewards of whole trees, groups and advantage, the surrogate, and what never changes."""

from __future__ import annotations

import copy
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from drafter_cases import (
    OTHER_PROMPTS,
    PROMPT,
    assert_ragged_batch_decodes_as_each_alone,
    assert_says_what_the_target_says,
    make_batch,
    trained,
    two_conversations,
)
from test_eagle3 import assert_same_gradients, begun, gradients_of, make_head
from torch import Tensor, nn
from tree_cases import random_parents

from specrepro import checkpoints, corpus, draft_training, eagle3, gto, recipes, target_model
from specrepro.decoding import decode_autoregressively
from specrepro.draft_training import LoopConfig
from specrepro.draft_tree import DraftTree
from specrepro.eagle3 import DraftHead, TrainingConfig, TreeConfig
from specrepro.forest import judge
from specrepro.gto import GroupDrafter, GroupTreeLoss, Gto, TuningConfig
from specrepro.recipes import Recipe
from specrepro.target_model import Target
from specrepro.tree_verify import verify_greedy

TREE, TRAINING = TreeConfig(2, 3, 8), TrainingConfig(steps=3)
TUNING = TuningConfig(num_groups=3, group_size=4)


@pytest.fixture(scope="module")
def target(tiny_target_folder) -> Target:
    return target_model.load(str(tiny_target_folder()), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def batch(target: Target) -> corpus.Batch:
    """Two prompts with the target's answers, of 40 and 12 tokens."""
    answered = []
    for prompt, length in ((PROMPT, 40), (OTHER_PROMPTS[1], 12)):
        answer = decode_autoregressively(target, prompt, max_new_tokens=length).tokens
        answered.append((prompt, prompt + answer))
    tokens, lengths = target_model.pad([whole for _, whole in answered])
    starts = torch.tensor([len(prompt) for prompt, _ in answered])
    places = torch.arange(tokens.shape[1])
    is_answer = (places >= starts[:, None]) & (places < lengths[:, None])
    return make_batch(target, tokens, is_answer)


@pytest.fixture(scope="module")
def taught(target: Target, batch: corpus.Batch, tmp_path_factory) -> DraftHead:
    """A head that knows half of these answers; not to be changed."""
    head = make_head(target, 85)
    test = eagle3.TrainingTimeTest(head, target, TRAINING)
    config = LoopConfig(learning_rate=3e-3, warmup_steps=5, total_steps=40)
    folder = tmp_path_factory.mktemp("taught")
    return draft_training.train(head, lambda step: batch, test, config, folder)


@pytest.fixture(scope="module")
def tuned(target: Target, batch: corpus.Batch, taught: DraftHead, tmp_path_factory) -> DraftHead:
    """The same after some steps of GTO; not to be changed."""
    head = copy.deepcopy(taught)
    config = LoopConfig(learning_rate=3e-3, warmup_steps=2, total_steps=40)
    loss = loss_of(head, target)
    return draft_training.train(
        head, lambda step: batch, loss, config, tmp_path_factory.mktemp("tuned")
    )


def loss_of(
    head: DraftHead, target: Target, reference: DraftHead | None = None, **tuning: object
) -> GroupTreeLoss:
    return GroupTreeLoss(head, target, TREE, TRAINING, replace(TUNING, **tuning), reference)


def moved(head: nn.Module, by: float = 0.02) -> DraftHead:
    """Another head near this one."""
    other, rng = copy.deepcopy(head), torch.Generator().manual_seed(1)
    for weight in other.parameters():
        noise = torch.randn(weight.shape, generator=rng)
        weight.data += by * weight.data.std() * noise if weight.dim() > 1 else 0
    return other


def bits_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


# --- the reward


def random_trees(num_trees: int, num_nodes: int, seed: int) -> tuple[DraftTree, Tensor]:
    """Trees whose last one is shorter, and probabilities of their nodes."""
    parents = random_parents(num_trees, num_nodes, seed, padding=min(2, num_nodes - 1))
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.stack([torch.randperm(99, generator=rng)[:num_nodes] for _ in range(num_trees)])
    return DraftTree(tokens, parents), torch.rand(parents.shape, generator=rng)


def branches_of(tree: DraftTree, row: int) -> list[list[int]]:
    """The nodes from below the root to each leaf."""
    parents = tree.parents[row].tolist()
    nodes = [node for node, parent in enumerate(parents) if parent >= -1]
    found = []
    for leaf in (node for node in nodes if node not in parents):
        path = [leaf]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        found.append(path[1:])
    return found


def reward_reference(tree: DraftTree, probs: Tensor, row: int, kind: str, eta: float) -> float:
    """Equations 1 to 5, branch by branch."""
    branches = branches_of(tree, row)
    p = probs[row].tolist()
    reach = {node: math.prod(p[k] for k in path[: j + 1])
             for path in branches for j, node in enumerate(path)}  # fmt: skip
    lengths = [sum(reach[node] for node in path) for path in branches]
    smooth = math.log(sum(math.exp(eta * length) for length in lengths)) / eta
    return {
        "log-sum-exp": smooth,
        "log-mean-exp": smooth - math.log(len(lengths)) / eta,
        "max": max(lengths),
        "mean": sum(lengths) / len(lengths),
        "expected": sum(reach.values()),
    }[kind]


@pytest.mark.parametrize("kind", gto.REWARDS)
@pytest.mark.parametrize("num_nodes", [2, 3, 12])
def test_reward_is_the_enumeration_of_branches(kind, num_nodes):
    tree, probs = random_trees(6, num_nodes, seed=num_nodes)
    for eta in (0.5, 1.0, 3.0):
        found = gto.tree_reward(tree, probs, kind, eta)
        expected = [reward_reference(tree, probs, row, kind, eta) for row in range(6)]
        torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_reward_lies_between_the_longest_branch_and_its_slack():
    tree, probs = random_trees(20, 15, seed=1)
    longest, num_leaves = gto.tree_reward(tree, probs, "max"), gto.is_leaf(tree).sum(-1)
    for eta in (0.3, 1.0, 10.0):
        reward = gto.tree_reward(tree, probs, eta=eta)
        assert (reward >= longest - 1e-5).all()
        assert (reward <= longest + num_leaves.log() / eta + 1e-5).all()


@pytest.mark.parametrize("kind", gto.REWARDS)
def test_reward_rises_with_the_probability_of_any_leaf(kind):
    tree, probs = random_trees(1, 10, seed=2)
    before = gto.tree_reward(tree, probs, kind)
    for leaf in gto.is_leaf(tree)[0].nonzero()[:, 0].tolist():
        better = probs.clone()
        better[0, leaf] = 1
        after = gto.tree_reward(tree, better, kind)
        assert after >= before if kind == "max" else after > before


def test_equal_branches_are_credited_with_their_number():
    """Three branches of two tokens, each with L = 0.5 + 0.25: r = L + log(3) / eta."""
    tree = DraftTree(torch.arange(7)[None], torch.tensor([[-1, 0, 0, 0, 1, 2, 3]]))
    reward = gto.tree_reward(tree, torch.full((1, 7), 0.5), eta=2.0)
    torch.testing.assert_close(reward, torch.tensor([0.75 + math.log(3) / 2]))


def test_the_roots_own_probability_says_nothing():
    tree, probs = random_trees(4, 9, seed=3)
    other = probs.clone()
    other[:, 0] = 1e-6
    for kind in gto.REWARDS:
        assert torch.equal(gto.tree_reward(tree, probs, kind), gto.tree_reward(tree, other, kind))


def test_greedily_the_longest_branch_is_what_the_target_accepts(target, batch, taught):
    loss = loss_of(taught, target, reward="max", greedy=True)
    rollout = loss.sample(batch)
    assert torch.equal(rollout.rewards, rollout.lengths.float())
    assert rollout.lengths.max() > 1 and rollout.lengths.min() == 0


# --- groups and advantage


def test_groups_are_adjacent_never_overlap_and_never_leave_what_is_supervised():
    is_start = torch.zeros(3, 40, dtype=torch.bool)
    is_start[0, 5:38] = is_start[1, 20:31] = True
    num_drawn = 0
    for seed, size, most in itertools.product(range(5), (1, 3, 8), (1, 2, 16)):
        starts, is_real = gto.draw_groups(is_start, size, most, seed)
        assert starts.shape == is_real.shape and starts.shape[1] <= most
        assert not is_real[2].any(), "a group where nothing is supervised"
        for row, start, real in zip(is_start, starts.tolist(), is_real.tolist(), strict=True):
            members = [s + i for s, r in zip(start, real, strict=True) if r for i in range(size)]
            assert len(set(members)) == len(members) and row[members].all()
            assert members == sorted(members)
            assert real == sorted(real, reverse=True), "real groups come first"
            last = max(members, default=0)
            assert all(s + size > last for s, r in zip(start, real, strict=True) if not r)
            num_drawn += sum(real)
    assert num_drawn > 100


def test_groups_are_drawn_anew_by_each_seed_and_alike_by_the_same():
    is_start = torch.ones(1, 200, dtype=torch.bool)
    is_start[:, -2:] = False
    drawn = [gto.draw_groups(is_start, 4, 3, seed)[0].tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_sequences_shorter_than_a_group_have_none():
    starts, is_real = gto.draw_groups(torch.ones(2, 5, dtype=torch.bool), 8, 4, seed=0)
    assert starts.shape == is_real.shape == (2, 0)


def test_advantage_is_standardised_within_each_group():
    gains = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0)) * 3 + 7
    found = gto.advantages(gains)
    torch.testing.assert_close(found.mean(-1), torch.zeros(5, 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.std(-1, correction=0), torch.ones(5, 3), rtol=0, atol=1e-5)
    assert torch.equal(found.argsort(-1), gains.argsort(-1)), "more gain, more advantage"


def test_rounding_is_no_advantage():
    """Rewards of equal trees that differ by 1e-6 would otherwise be blown up to order one."""
    noise = 1e-6 * torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    assert not gto.advantages(noise).any()
    assert gto.advantages(noise, min_spread=0.0).abs().max() > 0.1, "the guard is what does it"
    assert not gto.advantages(torch.tensor([[3.0], [5.0]])).any(), "a group of one"


# --- the surrogate


@pytest.mark.parametrize(
    ("ratio", "advantage", "gradient"),
    [
        (1.0, 2.0, -2.0), (1.0, -2.0, 2.0), (1.1, 1.0, -1.0), (0.9, -1.0, 1.0),
        (1.3, 1.0, 0.0), (0.7, -1.0, 0.0),  # clipped
        (1.3, -1.0, 1.0), (0.7, 1.0, -1.0),  # the opposite corners are not
    ],
)  # fmt: skip
def test_gradient_of_the_surrogate_by_region(ratio, advantage, gradient):
    s = torch.tensor([ratio], requires_grad=True)
    A = torch.tensor([advantage])
    gto.surrogate(s, A, 0.2).sum().backward()
    torch.testing.assert_close(s.grad, torch.tensor([gradient]))
    assert gto.is_clipped(s.detach(), A, 0.2).item() == (gradient == 0)


def test_ratio_is_the_geometric_mean_over_the_paths_tokens():
    ratios = gto.path_ratios(torch.tensor([math.log(8), math.log(8), 0.0]), torch.tensor([3, 1, 0]))
    torch.testing.assert_close(ratios, torch.tensor([2.0, 8.0, 1.0]))


def by_hand(rollout: gto.Rollout) -> Tensor:
    """Advantages of either sign."""
    signs = torch.randn(rollout.rows.shape, generator=torch.Generator().manual_seed(5))
    return signs * rollout.is_row


def value_of(loss: GroupTreeLoss, batch: corpus.Batch, rollout: gto.Rollout) -> Tensor:
    return gto.surrogate(loss.ratios(batch, rollout), by_hand(rollout), 0.2).sum()


def test_at_the_first_head_it_is_the_policy_gradient(target, batch, taught):
    """sum_i of -A_i / l_i grad log M(S_i)."""
    head = copy.deepcopy(taught)
    loss = loss_of(head, target)
    rollout = loss.sample(batch)
    assert rollout.lengths.unique().numel() > 2, "paths of one length tell nothing of 1 / l"
    found = gradients_of(value_of(loss, batch, rollout), head)
    log_probs = gto.path_log_probs(head, target, batch, rollout)
    is_step = torch.arange(log_probs.shape[-1]) < rollout.lengths[..., None]
    paths = log_probs.where(is_step, 0).sum(-1) / rollout.lengths.clamp_min(1)
    assert_same_gradients(gradients_of(-(by_hand(rollout) * paths).sum(), head), found)


def test_gradient_is_that_of_finite_differences(target, batch, taught):
    head = copy.deepcopy(taught)
    loss = loss_of(head, target, reference=taught)
    rollout = loss.sample(batch)
    gradients = gradients_of(value_of(loss, batch, rollout), head)
    size = sum(g.square().sum() for g in gradients.values()).sqrt()
    values, step = [], 1e-3
    for sign in (1, -1):
        for name, weight in head.named_parameters():
            start = dict(taught.named_parameters())[name].data
            weight.data = start + sign * step * gradients[name] / size
        values.append(value_of(loss, batch, rollout).item())
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(size.item(), rel=0.02)


def test_what_is_favoured_is_accepted_more_and_by_itself_it_does_not_pay(target, batch, taught):
    """Steps on the surrogate alone, with one position favoured and the next one not.

    It does what it is for: accepted paths of favoured positions last, those of the others do not.
    But a group's advantages sum to zero, and an accepted path lost costs more than one that is
    made more probable gains: acceptance falls on the whole, unless the token loss holds it up.
    """
    loss = loss_of(moved(taught, 0.1), target, taught, num_groups=16, debias=False)
    first, optimizer = loss.sample(batch), torch.optim.Adam(loss.head.parameters(), 1e-3)
    advantage = torch.tensor([1.0, -1.0]).repeat(2, first.rows.shape[1] // 2)
    for _ in range(10):
        ratios = loss.ratios(batch, loss.sample(batch))
        (gto.surrogate(ratios, advantage, 0.2) * first.is_row).sum().backward()
        optimizer.step(), optimizer.zero_grad()
    gained = (loss.sample(batch).lengths - first.lengths)[first.is_row].float()
    is_favoured = advantage[first.is_row] > 0
    assert gained[is_favoured].mean() > 0 > -0.3 > gained[~is_favoured].mean()
    assert gained.mean() < -0.1


def test_at_the_start_there_is_no_signal_but_the_token_losss(target, batch, taught):
    """M = M_0: equal trees, so no gain; the gradient is that of omega = 0, bit for bit."""
    head = copy.deepcopy(taught)
    both, alone = loss_of(head, target), loss_of(head, target, weight=0.0)
    rollout = both.sample(batch)
    assert rollout.is_row.sum() >= 16 and rollout.lengths.max() > 1
    assert not rollout.gains.any() and not both.advantage(rollout).any()
    assert (both.ratios(batch, rollout) == 1).all()
    total, metrics = both(batch)
    assert (metrics["silent_groups"], metrics["surrogate"], metrics["ratio"]) == (1, 0, 1)
    with_trees = gradients_of(total, head)
    for name, gradient in gradients_of(alone(batch)[0], head).items():
        assert torch.equal(gradient, with_trees[name]), name


def test_groups_of_one_are_the_token_loss_alone(target, batch, taught):
    head = moved(taught)
    both = loss_of(head, target, taught, group_size=1, num_groups=8)
    assert both.sample(batch).gains.any(), "trees that differ from the first head's"
    alone = gradients_of(loss_of(head, target, weight=0.0)(batch)[0], head)
    for name, gradient in gradients_of(both(batch)[0], head).items():
        assert torch.equal(gradient, alone[name]), name


def test_surrogate_of_one_group_is_its_own_mean_whatever_the_others(target, batch, taught):
    """The loss is a mean over the positions of real groups; padding groups weigh nothing."""
    head = moved(taught)
    loss = loss_of(head, target, reference=taught, min_spread=0.0, weight=1.0)
    rollout = loss.sample(batch)
    assert not rollout.is_row.all(), "the shorter answer has fewer groups"
    A = gto.advantages(rollout.gains.view(2, -1, 4), min_spread=0.0)[rollout.is_row.view(2, -1, 4)]
    terms = gto.surrogate(loss.ratios(batch, rollout)[rollout.is_row], A, 0.2)
    total, metrics = loss(batch)
    surrogate = total - loss.token_loss(batch)[0]
    torch.testing.assert_close(surrogate, terms.mean(), rtol=1e-3, atol=1e-6)
    assert metrics["surrogate"] == pytest.approx(terms.mean().item(), abs=1e-6)
    assert metrics["groups"] == rollout.is_row.sum() / 4


# --- trees


@pytest.fixture
def node_scores(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Cumulative log probabilities of the nodes of every tree that is drafted."""
    seen, keep_best = [], eagle3.keep_best

    def spy(tokens: Tensor, parents: Tensor, scores: Tensor, num_nodes: int):
        tree, kept = keep_best(tokens, parents, scores, num_nodes)
        seen.append(scores.gather(1, kept))
        return tree, kept

    monkeypatch.setattr(eagle3, "keep_best", spy)
    return seen


@pytest.mark.parametrize("tree", [TREE, TreeConfig(0, 4, 4), TreeConfig(3, 2, 99)], ids=str)
@pytest.mark.parametrize("at_once", [3, 32])  # a first part of three rows, or all
def test_trees_of_a_group_are_those_of_decoding_node_for_node(
    target, batch, taught, tree, at_once, monkeypatch
):
    monkeypatch.setattr(GroupDrafter, "AT_ONCE", at_once)
    rows = torch.tensor([[7, 8, 9, 30], [9, 10, 11, 20]])
    drafter = GroupDrafter(copy.deepcopy(taught), target, tree)
    found = drafter.trees(batch.tokens, taught.read(batch), rows)
    engine = eagle3.Drafter(copy.deepcopy(taught), target, tree)
    asked = [(row, at) for row in range(2) for at in rows[row].tolist()]
    for place, (row, at) in enumerate(asked):
        prefix = batch.tokens[row, : at + 2].tolist()
        alone = begun(engine, target, prefix).propose()
        assert torch.equal(found.tokens[place], alone.tokens[0]), (row, at)
        assert torch.equal(found.parents[place], alone.parents[0]), (row, at)
    assert len({tuple(tokens) for tokens in found.tokens[:, 1:].tolist()}) > 4


def test_log_probability_of_a_path_is_the_score_that_its_tree_was_grown_by(
    target, batch, taught, node_scores
):
    loss = loss_of(taught, target, debias=False)
    rollout = loss.sample(batch)
    (scores,) = node_scores
    trees = GroupDrafter(copy.deepcopy(taught), target, TREE).trees(
        batch.tokens, taught.read(batch), rollout.rows
    )
    (judged,) = judge(target, batch.tokens, rollout.rows, rollout.is_row, [trees])
    verdict = verify_greedy(trees, judged.choices)
    last = verdict.path.gather(1, verdict.num_accepted[:, None])
    log_probs = gto.path_log_probs(taught, target, batch, rollout)
    is_step = torch.arange(log_probs.shape[-1]) < rollout.lengths[..., None]
    found = log_probs.where(is_step, 0).sum(-1).flatten()
    torch.testing.assert_close(found, scores.gather(1, last)[:, 0], rtol=1e-4, atol=1e-4)
    assert (rollout.lengths > 1).sum() > 3


def test_reference_trees_are_the_first_heads_and_only_to_debias(target, batch, taught, node_scores):
    head = moved(taught, by=0.5)
    debiased = loss_of(head, target, reference=taught).sample(batch)
    assert len(node_scores) == 2, "a tree of each head"
    plain = loss_of(head, target, reference=taught, debias=False).sample(batch)
    assert len(node_scores) == 3
    first = loss_of(copy.deepcopy(taught), target, debias=False).sample(batch)
    assert not plain.baselines.any()
    torch.testing.assert_close(debiased.rewards, plain.rewards, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(debiased.baselines, first.rewards, rtol=1e-5, atol=1e-5)
    assert (debiased.gains.abs() > 1e-3).any()


def test_without_a_group_there_is_the_token_loss_alone(target, taught):
    batch = two_conversations(target)
    loss, metrics = loss_of(taught, target, group_size=16)(batch)
    torch.testing.assert_close(loss, eagle3.TrainingTimeTest(taught, target, TRAINING)(batch)[0])
    assert all(math.isnan(metrics[name]) for name in gto.STATISTICS)


def test_without_weight_no_tree_is_drafted(target, batch, taught, node_scores):
    _, metrics = loss_of(taught, target, weight=0.0)(batch)
    assert not node_scores and not metrics.keys() & set(gto.STATISTICS)


# --- training


def test_the_first_head_and_the_target_never_change(target, batch, taught, tmp_path):
    head = copy.deepcopy(taught)
    loss = loss_of(head, target)
    before = bits_of(target.model), bits_of(loss.reference), bits_of(head)
    config = LoopConfig(learning_rate=1e-3, warmup_steps=1, total_steps=4)
    draft_training.train(head, lambda step: batch, loss, config, tmp_path)
    for then, now in zip(before[:2], (target.model, loss.reference), strict=True):
        assert all(torch.equal(then[name], tensor) for name, tensor in now.state_dict().items())
        assert all(weight.grad is None for weight in now.parameters())
    changed = [name for name, old in before[2].items() if not torch.equal(old, bits_of(head)[name])]
    assert len(changed) == len(list(head.parameters())), "every part of the head learns"


@pytest.fixture
def recipe(chat_target: Target, tmp_path: Path) -> Recipe:
    """A few steps from a head that was saved before."""
    folder = eagle3.save_head(make_head(chat_target), tmp_path / "start", TREE)
    tuning = TuningConfig(num_groups=2, group_size=3)
    method = Gto(str(folder), TREE, TrainingConfig(steps=2), tuning)
    loop = LoopConfig(learning_rate=1e-3, warmup_steps=2, save_seconds=0.0)
    return Recipe(method, loop, batch_tokens=120, epochs=3)


@pytest.mark.usefixtures("training_prompts")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_head_is_tuned_from_features_and_drafts(
    tiny_chat_folder, features, tmp_path, recipe, dtype
):
    target = target_model.load(str(tiny_chat_folder), dtype=dtype, device="cpu")
    out, card, log = trained(recipe, target, features, tmp_path)
    drafter = gto.drafters(out)["GTO"](target)
    assert drafter.tree == TREE and card["recipe"]["method"]["tuning"]["group_size"] == 3
    assert_says_what_the_target_says(target, drafter)
    statistics = [line for line in log if "reward_gap" in line]
    assert {*gto.STATISTICS} <= statistics[0].keys()
    assert statistics[0]["silent_groups"] == 1 and statistics[-1]["silent_groups"] < 1


class Killed(Exception):
    """The process ends here."""


@pytest.mark.usefixtures("training_prompts")
def test_stopped_and_resumed_it_is_measured_against_the_same_first_head(
    chat_target, features, tmp_path, recipe, monkeypatch
):
    def make(name: str, resume: bool = False) -> str:
        folders = tmp_path / name, tmp_path / f"{name}_out"
        out = recipes.make_checkpoint(recipe, chat_target, features, *folders, resume=resume)
        return checkpoints.digest(out)

    whole, call, seen = make("whole"), GroupTreeLoss.__call__, []

    def until_the_fourth(self, batch):
        if len(seen) == 4:
            raise Killed
        seen.append(batch)
        return call(self, batch)

    monkeypatch.setattr(GroupTreeLoss, "__call__", until_the_fourth)
    with pytest.raises(Killed):
        make("cut")
    monkeypatch.setattr(GroupTreeLoss, "__call__", call)
    assert make("cut", resume=True) == whole
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("whole", "cut")]
    assert logs[0] == logs[1] and len(logs[0].splitlines()) > 6


def test_overrides_are_for_the_embedded_target_and_the_papers_rate_for_others(
    chat_target, monkeypatch
):
    papers = Recipe.of(Gto, chat_target)
    assert papers.method == Gto() and papers.loop.learning_rate == 5e-6
    assert (papers.method.tuning.group_size, papers.method.tuning.num_groups) == (8, 16)
    assert papers.method.tree == TreeConfig(7, 10, 60)
    monkeypatch.setattr(chat_target, "name", "smollm2")
    own = Recipe.of(Gto, chat_target)
    assert own.method.tree == Recipe.of(eagle3.Eagle3, chat_target).method.tree
    assert own.method.tuning.group_size == 8 and own.loop.learning_rate > 5e-6
    assert json.loads(json.dumps(own.method.start)) == ""


# --- drafting


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_tuned_head_is_lossless_alone_and_in_a_ragged_batch(
    target, tuned, monkeypatch, temperature
):
    drafter = eagle3.Drafter(copy.deepcopy(tuned), target, TreeConfig(3, 6, 16))
    assert_ragged_batch_decodes_as_each_alone(target, drafter, monkeypatch, temperature)


def test_drafters_take_a_checkpoints_own_tree_or_another(target, tuned, tmp_path):
    Gto(tree=TREE).save(tuned, tmp_path)
    loaders = gto.drafters(tmp_path)
    assert gto.DRAFTERS.keys() == loaders.keys()
    assert loaders["GTO"](target).tree == TREE
    assert gto.drafters(tmp_path, depth=4)["GTO"](target).tree == replace(TREE, depth=4)
    assert loaders["GTO chain"](target).tree.top_k == 1


# --- refusals


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"reward": "best"}, "unknown reward 'best'; choose one of log-sum-exp"),
        ({"group_size": 0}, "group_size >= 1"),
        ({"eta": 0.0}, "eta > 0"),
        ({"weight": -0.5}, "weight >= 0"),
    ],
)
def test_impossible_settings_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        TuningConfig(**setting)


def test_a_head_of_another_target_is_refused(target, tmp_path):
    head = DraftHead(replace(eagle3.head_config(target, 40), vocab_size=77))
    head.set_vocabulary(torch.arange(40))
    eagle3.save_head(head, tmp_path)
    with pytest.raises(ValueError, match="a target with vocabulary 77"):
        Gto(str(tmp_path)).new_module(target, [])
