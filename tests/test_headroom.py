"""What the target foretells of itself bounds every drafter, and is as lossless as any."""

from __future__ import annotations

import pytest
import torch

from specrepro import target_model
from specrepro.decoding import decode, decode_autoregressively
from specrepro.eagle3 import TreeConfig
from specrepro.headroom import SelfDrafter
from specrepro.target_model import Target

TREE = TreeConfig(depth=2, top_k=3, total_tokens=8)
PROMPTS = [[7, 11, 23, 5, 90], [9] * 12, [3, 1, 4, 1, 5, 9, 2, 6]]


@pytest.fixture(scope="module")
def target(tiny_target_folder) -> Target:
    return target_model.load(str(tiny_target_folder()), dtype="float32", device="cpu")


@pytest.mark.parametrize("tree", [TreeConfig(2, 1, 4), TreeConfig(2, 3, 22)])
def test_greedy_it_is_never_wrong(target, tree):
    """Where nothing is pruned every level is accepted: tau is their number and the bonus token."""
    for said in decode(target, SelfDrafter(target, tree), PROMPTS, 41, ignore_stop=True):
        assert set(said.accepted[:-1]) == {3}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_it_says_what_the_target_says_in_any_batch(target, temperature):
    options = {"max_new_tokens": 30, "temperature": temperature, "seed": 5, "ignore_stop": True}
    plain = decode_autoregressively(target, PROMPTS, **options)
    own = decode(target, SelfDrafter(target, TREE), PROMPTS, **options)
    assert [one.tokens for one in own] == [one.tokens for one in plain]


def test_sampled_it_accepts_as_many_as_its_confidences_add_up_to(target):
    """A node is on the drawn path with the probability of its path: none foretells better."""
    summed, accepted = [], []

    class Noted(SelfDrafter):
        def propose(self):
            tree = super().propose()
            summed.append(self.kept_scores.exp().sum().item())
            return tree

    class NotedTree(TreeConfig):
        def prune(self, growth):
            tree = super().prune(growth)
            best = growth.pool()[2][:, 1:].topk(self.total_tokens - 1, 1).values
            drafter.kept_scores = best
            return tree

    drafter = Noted(target, NotedTree(2, 3, 8))
    for seed in range(40):
        said = decode(target, drafter, PROMPTS[0], 25, temperature=1.0, seed=seed, ignore_stop=True)
        accepted += said.accepted
    summed, accepted = torch.tensor(summed), torch.tensor(accepted, dtype=torch.float)
    error = accepted.std() / len(accepted) ** 0.5
    assert abs(summed.mean() - accepted.mean()) < 4 * error + 0.05
