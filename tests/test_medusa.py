"""Medusa-1: heads that see one state, a released tree, drafts that are the heads' best guesses."""

from __future__ import annotations

import copy
import hashlib
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
    RECIPE,
    answer_to_prompt,
    assert_ragged_batch_decodes_as_each_alone,
    assert_says_what_the_target_says,
    learn_by_heart,
    make_batch,
    trained,
    two_conversations,
)
from torch import Tensor

from specrepro import checkpoints, corpus, draft_training, medusa, target_model
from specrepro.decoding import decode, decode_autoregressively
from specrepro.draft_tree import ROOT, DraftTree
from specrepro.medusa import Drafter, Heads, HeadsConfig, HeadsLoss, Medusa
from specrepro.target_model import Scores, Target
from specrepro.tree_verify import Verdict

SMALL = Medusa(num_heads=3, draft_vocab_size=40, total_tokens=12)


@pytest.fixture(scope="module")
def target(tiny_chat_folder: Path) -> Target:
    return target_model.load(str(tiny_chat_folder), dtype="float32", device="cpu")


def make_heads(target: Target, num_heads: int = 3, num_layers: int = 1, seed: int = 0) -> Heads:
    """Random weights, and 40 random words of the target's 100."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sizes = HeadsConfig(target.hidden_size, target.vocab_size, 40, num_heads, num_layers)
        heads = Heads(sizes)
        for weight in heads.parameters():
            weight.data = torch.randn_like(weight) * 1.5 / weight.shape[-1] ** 0.5
        heads.token_map.copy_(torch.randperm(target.vocab_size)[:40].sort().values)
    return heads


def guesses_reference(heads: Heads, k: int, state: Tensor) -> Tensor:
    """Logits of head k (from 1) after one state, section 2.1.1 written out."""
    weights = heads.state_dict()
    for layer in range(heads.config.num_layers):
        block = f"{k - 1}.{layer}.linear"
        z = weights[f"{block}.weight"] @ state + weights[f"{block}.bias"]
        state = state + z * torch.sigmoid(z)
    return weights[f"{k - 1}.{heads.config.num_layers}.weight"] @ state


# --- the heads


def test_heads_have_the_released_keys_and_shapes():
    with torch.device("meta"):
        state = Heads(HeadsConfig(5120, 32000, 32000, num_heads=5)).state_dict()
    expected = {}
    for k in range(5):
        expected[f"{k}.0.linear.weight"] = (5120, 5120)
        expected[f"{k}.0.linear.bias"] = (5120,)
        expected[f"{k}.1.weight"] = (32000, 5120)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected


@pytest.mark.parametrize("num_layers", [1, 2])
def test_each_head_is_its_own_blocks_and_language_model_head(target, num_layers):
    heads = make_heads(target, num_layers=num_layers)
    state = torch.randn(target.hidden_size)
    for k, head in enumerate(heads, 1):
        expected = guesses_reference(heads, k, state)
        torch.testing.assert_close(head(state), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("draft_vocab_size", [0, 40])
def test_untrained_heads_say_what_the_target_says_next(target, draft_vocab_size):
    method = replace(SMALL, draft_vocab_size=draft_vocab_size)
    heads = method.new_module(target, [corpus.Answer("a", 3, 0.0, 0, [50, 60, 60, 70])])
    ids = heads.draft_token_ids()
    assert len(ids) == draft_vocab_size or torch.equal(ids, torch.arange(target.vocab_size))
    assert {50, 60, 70} <= set(ids.tolist())
    states = two_conversations(target).hidden
    for head in heads:
        torch.testing.assert_close(head(states), target.logits(states)[..., ids])


# --- the loss


def loss_reference(heads: Heads, batch: corpus.Batch, decay: float) -> Tensor:
    """Equation 1 row by row: head k at row i against the token i + 1 + k, a mean of each head."""
    ids, (b, n) = heads.draft_token_ids().tolist(), batch.tokens.shape
    total = torch.zeros(())
    for k, head in enumerate(heads, 1):
        losses = []
        for row, i in itertools.product(range(b), range(n - 1 - k)):
            label = int(batch.tokens[row, i + 1 + k])
            if batch.is_answer[row, i + 1 + k] and label in ids:
                log_q = head(batch.hidden[row, i]).log_softmax(-1)
                losses.append(-log_q[ids.index(label)])
        total = total + decay**k * torch.stack(losses).mean()
    return total


def test_loss_is_equation_1_written_out(target):
    heads, batch = make_heads(target), two_conversations(target)
    loss, _ = HeadsLoss(heads, 0.8)(batch)
    expected = loss_reference(heads, batch, 0.8)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    names, weights = zip(*heads.named_parameters(), strict=True)
    ours, theirs = (torch.autograd.grad(x, weights) for x in (loss, expected))
    for name, one, other in zip(names, ours, theirs, strict=True):
        assert one.abs().max() > 1e-6, f"{name} has no gradient, so nothing is compared"
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6, msg=name)


def test_reported_accuracy_follows_its_definition(target):
    heads, batch = make_heads(target), two_conversations(target)
    ids = heads.draft_token_ids()
    guessed = ids[heads[0](batch.hidden[0]).argmax(-1)]
    batch.tokens[0, 8:18] = guessed[6:16]  # the first head is right about half of what there is
    _, metrics = HeadsLoss(heads, 0.8)(batch)
    assert 0.3 < metrics["accuracy_1"] < 1
    for k, head in enumerate(heads, 1):
        labels = medusa.labels_ahead(batch.tokens, batch.is_answer, k + 1)
        is_row = torch.isin(labels, ids)
        is_right = ids[head(batch.hidden).argmax(-1)] == labels
        assert metrics[f"accuracy_{k}"] == pytest.approx(is_right[is_row].float().mean().item())


def test_nothing_is_learnt_from_an_answer_without_a_word_to_guess(target):
    heads, batch = make_heads(target), two_conversations(target)
    for nothing in (
        replace(batch, is_answer=torch.zeros_like(batch.is_answer)),
        replace(batch, tokens=torch.full_like(batch.tokens, _undrafted(heads))),
        corpus.Batch(*(getattr(batch, name)[:, :2] for name in batch.__slots__)),  # too short
    ):
        loss, metrics = HeadsLoss(heads, 0.8)(nothing)
        gradients = torch.autograd.grad(loss, list(heads.parameters()))
        assert loss == 0 and not any(g.any() for g in gradients) and not any(metrics.values())


def _undrafted(heads: Heads) -> int:
    return next(t for t in range(100) if t not in heads.draft_token_ids())


def test_a_guess_depends_on_no_token_that_comes_later(target):
    """And on the last one it may see."""
    heads, batch, row = make_heads(target), two_conversations(target), 8
    tokens = batch.tokens.clone()
    tokens[:, row + 1 :] = (tokens[:, row + 1 :] + 40) % 90 + 5
    after = make_batch(target, tokens, batch.is_answer)
    for head in heads:
        before_, after_ = head(batch.hidden), head(after.hidden)
        assert torch.equal(before_[:, : row + 1], after_[:, : row + 1])
        assert (before_[:, row + 1] - after_[:, row + 1]).abs().max() > 0.01


def test_loss_reads_the_states_whose_label_is_the_answers_and_no_other(target):
    heads, batch = make_heads(target), two_conversations(target)
    loss, read = HeadsLoss(heads, 0.8), []
    batch.tokens[1] = heads.draft_token_ids()[0]  # every label can be guessed
    before = loss(batch)[0]
    for place in range(20):
        hidden = batch.hidden.clone()
        hidden[1, place] += torch.randn(hidden.shape[-1])
        if loss(replace(batch, hidden=hidden))[0] != before:
            read.append(place)
    # the answer is 9..16, and the furthest head looks 4 places ahead, the nearest 2
    assert read == list(range(5, 15))


# --- the tree


def test_released_tree_is_a_tree_of_64_nodes_in_an_order_that_can_be_cut():
    paths = [tuple(map(int, path)) for path in medusa.RELEASED_TREE]
    assert len(set(paths)) == 63 and max(map(len, paths)) == 4
    listed = hashlib.sha256(repr(paths).encode()).hexdigest()[:16]
    assert listed == "ab601bfe44e6ae51", "not the release's medusa_choices.py, path by path"
    for place, path in enumerate(paths):
        assert len(path) == 1 or path[:-1] in paths[:place], path
        assert path[-1] == 0 or (*path[:-1], path[-1] - 1) in paths[:place], path


@pytest.mark.parametrize("num_heads, total_tokens", [(1, 2), (2, 30), (3, 64), (4, 64), (5, 9)])
def test_tree_is_the_beginning_of_the_released_one_that_the_heads_can_fill(num_heads, total_tokens):
    paths = medusa.tree_paths(num_heads, total_tokens)
    released = [tuple(map(int, path)) for path in medusa.RELEASED_TREE]
    skipped = [path for path in released if path not in paths]
    assert paths == [path for path in released if path in paths]
    assert all(len(path) > num_heads for path in skipped) or len(paths) == total_tokens - 1
    assert max(map(len, paths)) <= num_heads


@pytest.mark.parametrize("total_tokens", [0, 1, 65])
def test_a_tree_of_another_size_is_refused(target, total_tokens):
    with pytest.raises(ValueError, match=f"total_tokens is {total_tokens}.*choose 2 to 64"):
        Drafter(make_heads(target), target, total_tokens)


# --- drafting


def begun(drafter: Drafter, target: Target, tokens: list[int]) -> Drafter:
    """A drafter whose target has read all of `tokens` but the last, which is the root."""
    prefix = torch.tensor([tokens[:-1]])
    scores = Scores(None, None, target.features(prefix)[1])
    drafter.begin(prefix, torch.tensor([len(tokens) - 1]), torch.tensor(tokens[-1:]), scores)
    return drafter


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("total_tokens", [2, 8, 23, 64])
def test_nodes_are_the_best_guesses_of_each_head_one_by_one(target, total_tokens, num_layers):
    heads = make_heads(target, num_heads=4, num_layers=num_layers)
    drafter = begun(Drafter(copy.deepcopy(heads), target, total_tokens), target, PROMPT)
    tree = drafter.propose()
    tree.validate(target.vocab_size)
    assert tree.tokens.shape == (1, total_tokens) == (1, drafter.max_nodes)
    state = target.features(torch.tensor([PROMPT[:-1]]))[1][0, -1]
    ids, paths = heads.draft_token_ids(), {(): 0}
    assert (tree.tokens[0, 0], tree.parents[0, 0]) == (PROMPT[-1], ROOT)
    for node, path in enumerate(medusa.tree_paths(4, total_tokens), 1):
        ranked = guesses_reference(heads, len(path), state).argsort(descending=True)
        assert tree.tokens[0, node] == ids[ranked[path[-1]]], path
        assert tree.parents[0, node] == paths[path[:-1]]
        paths[path] = node


@pytest.fixture(scope="module")
def memorised(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Heads:
    """Heads that know the answer to PROMPT by heart; not to be changed."""
    heads = SMALL.new_module(target, [answer_to_prompt(target)])
    folder, loop = tmp_path_factory.mktemp("memorised"), {"learning_rate": 5e-3, "total_steps": 150}
    return learn_by_heart(heads, SMALL.loss(heads, target), target, folder, **loop)


def drafter_of(heads: Heads, target: Target, total_tokens: int, kind: type = Drafter) -> Drafter:
    return kind(copy.deepcopy(heads), target, total_tokens)


@pytest.mark.parametrize("total_tokens, levels", [(2, 1), (3, 2), (8, 3), (40, 3)])
def test_one_memorised_conversation_is_drafted_to_the_cap(target, memorised, total_tokens, levels):
    """Training and decoding agree on everything: anything misaligned keeps tau near 1."""
    answer = decode_autoregressively(target, PROMPT, max_new_tokens=40).tokens
    run = decode(target, drafter_of(memorised, target, total_tokens), PROMPT, max_new_tokens=40)
    assert run.tokens == answer
    assert run.num_passes == math.ceil(39 / (levels + 1)), f"tau is {run.tau:.2f}"
    untrained = drafter_of(make_heads(target), target, total_tokens)
    assert decode(target, untrained, PROMPT, max_new_tokens=40).tau < 2


class Watched(Drafter):
    """Remembers each round's tree and how many rows it was for."""

    def begin(self, *arguments: object) -> None:
        super().begin(*arguments)
        self.trees: list[DraftTree] = []
        self.committed = [1]

    def propose(self) -> DraftTree:
        self.trees.append(super().propose())
        return self.trees[-1]

    def observe(self, verdict: Verdict, scores: Scores) -> None:
        super().observe(verdict, scores)
        self.committed.append(self.committed[-1] + int(verdict.num_accepted[0]) + 1)


def test_every_round_drafts_what_a_fresh_start_from_its_text_would(target, memorised):
    watched = drafter_of(memorised, target, 12, Watched)
    run = decode(target, watched, PROMPT, max_new_tokens=60)
    for count, tree in zip(watched.committed, watched.trees, strict=False):
        fresh = begun(drafter_of(memorised, target, 12), target, PROMPT + run.tokens[:count])
        if count <= len(run.tokens):
            assert torch.equal(fresh.propose().tokens, tree.tokens), count
    assert len(set(run.accepted)) > 2, "every round accepted alike"


def test_drafts_of_a_batch_are_those_of_each_alone(target):
    heads, asked = make_heads(target), [PROMPT, *OTHER_PROMPTS]
    tokens, lengths = target_model.pad([prompt[:-1] for prompt in asked])
    roots = torch.tensor([prompt[-1] for prompt in asked])
    together = Drafter(copy.deepcopy(heads), target, 20)
    together.begin(tokens, lengths, roots, Scores(None, None, target.features(tokens)[1]))
    trees = together.propose()
    for row, prompt in enumerate(asked):
        alone = begun(Drafter(copy.deepcopy(heads), target, 20), target, prompt).propose()
        assert torch.equal(trees.tokens[row], alone.tokens[0])
        assert torch.equal(trees.parents[row], alone.parents[0])


def test_rows_go_on_from_the_state_of_the_last_node_each_accepted(target):
    drafter = Drafter(make_heads(target), target, 8)
    hidden, path = torch.randn(3, 8, target.hidden_size), [[0, 2, -1], [0, -1, -1], [0, 1, 7]]
    num_accepted, bonus = torch.tensor([1, 0, 2]), torch.tensor([11, 22, 33])
    drafter.observe(
        Verdict(torch.tensor(path), num_accepted, None, bonus), Scores(None, None, hidden)
    )
    drafter.select(torch.tensor([2, 0]))  # the second has ended
    assert torch.equal(drafter.states, torch.stack([hidden[2, 7], hidden[0, 2]]))
    assert drafter.propose().tokens[:, 0].tolist() == [33, 11]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_batch_of_ragged_prompts_is_lossless_and_decodes_as_each_alone(
    target, memorised, monkeypatch, temperature
):
    drafter = drafter_of(memorised, target, 24)
    assert_ragged_batch_decodes_as_each_alone(target, drafter, monkeypatch, temperature)


@pytest.mark.parametrize("family", ["qwen3", "gemma"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_output_of_other_targets_is_their_own(tiny_target_folder, tmp_path, family, temperature):
    other = target_model.load(str(tiny_target_folder(family)), dtype="float32", device="cpu")
    options = {"temperature": temperature, "seed": 3, "max_new_tokens": 60}
    plain = decode_autoregressively(other, PROMPT, **options)
    tokens = torch.tensor([PROMPT + plain.tokens])
    batch = make_batch(other, tokens, torch.ones_like(tokens).bool())
    heads = SMALL.new_module(other, [corpus.Answer("", len(PROMPT), 0.0, 0, plain.tokens)])
    loop = draft_training.LoopConfig(learning_rate=5e-3, warmup_steps=5, total_steps=40)
    loss = SMALL.loss(heads, other)
    draft_training.train(heads, lambda step: batch, loss, loop, tmp_path)
    run = decode(other, SMALL.drafter(heads, other), PROMPT, **options)
    assert run.tokens == plain.tokens and max(run.accepted) > 1


# --- checkpoints


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_from_features_leaves_a_checkpoint_that_drafts(
    tiny_chat_folder, features, tmp_path, dtype
):
    target = target_model.load(str(tiny_chat_folder), dtype=dtype, device="cpu")
    recipe = replace(RECIPE, method=SMALL, epochs=3)
    out, card, _ = trained(recipe, target, features, tmp_path)
    assert card["recipe"]["method"]["num_heads"] == 3
    drafter = Drafter.load(out, target)
    assert drafter.max_nodes == 12
    assert_says_what_the_target_says(target, drafter)


def test_what_is_saved_drafts_the_same_and_keeps_its_tree(target, tmp_path):
    heads = make_heads(target, num_heads=4, num_layers=2)
    medusa.save_heads(heads, tmp_path, total_tokens=15)
    loaded, total_tokens = medusa.load_heads(tmp_path)
    assert (loaded.config, total_tokens) == (heads.config, 15)
    assert torch.equal(loaded.token_map, heads.token_map)
    assert torch.equal(loaded[3][2].weight, heads[3][2].weight.bfloat16().float())
    expected = begun(Drafter(copy.deepcopy(loaded), target, 15), target, PROMPT).propose()
    found = begun(Drafter.load(tmp_path, target), target, PROMPT).propose()
    assert torch.equal(found.tokens, expected.tokens)
    loaders = medusa.drafters(tmp_path, total_tokens=7)
    assert loaders["Medusa"](target).max_nodes == 7
    assert medusa.drafters(tmp_path)["Medusa"](target).max_nodes == 15
    assert medusa.DRAFTERS.keys() == loaders.keys()


def test_official_pickle_loads_after_the_conversion(target, tmp_path):
    """The released config says two heads whatever the file holds, and neither size."""
    sizes = HeadsConfig(target.hidden_size, target.vocab_size, target.vocab_size, num_heads=5)
    released = Heads(sizes).half().state_dict()
    torch.save(released, tmp_path / "medusa_lm_head.pt")
    config = {"medusa_num_heads": 2, "medusa_num_layers": 1, "base_model_name_or_path": "vicuna"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoints.convert(tmp_path / "medusa_lm_head.pt", tmp_path)
    heads, total_tokens = medusa.load_heads(tmp_path)
    assert (heads.config, total_tokens) == (sizes, 64)
    assert torch.equal(heads[4][1].weight, released["4.1.weight"].float())
    assert Drafter.load(tmp_path, target).max_nodes == 64


def test_another_papers_checkpoint_is_refused(tmp_path):
    checkpoints.save(tmp_path, {"fc.weight": torch.ones(1)}, {"model_type": "llama"})
    with pytest.raises(ValueError, match="holds no Medusa heads: 0.1.weight is missing"):
        medusa.load_heads(tmp_path)


def test_misnamed_keys_are_listed_and_nothing_is_left_random(target, tmp_path):
    medusa.save_heads(make_heads(target), tmp_path, 12)
    tensors, config = checkpoints.load(tmp_path)
    tensors["2.1.wait"] = tensors.pop("2.1.weight")
    del tensors["token_map"]
    checkpoints.save(tmp_path, tensors, config)
    with pytest.raises(ValueError, match="missing: 2.1.weight, token_map; unknown: 2.1.wait"):
        medusa.load_heads(tmp_path)


@pytest.mark.parametrize(
    "sizes, named",
    [
        ({"hidden_size": 96}, "hidden size 96 and vocabulary 100, but .* has hidden size 64"),
        ({"vocab_size": 32000}, "vocabulary 32000, but .* and vocabulary 100"),
    ],
)
def test_heads_of_another_target_are_refused_with_both_sizes(target, sizes, named):
    config = replace(HeadsConfig(target.hidden_size, target.vocab_size, 40, 2), **sizes)
    with pytest.raises(ValueError, match=named):
        Drafter(Heads(config), target)


def test_settings_are_the_papers_and_a_section_overrides_them():
    assert Medusa() == Medusa(5, 1, 0, 0.8, 64)
    assert Medusa.of({"num_heads": 3, "total_tokens": 12}) == Medusa(3, total_tokens=12)
    with pytest.raises(TypeError, match="num_head"):
        Medusa.of({"num_head": 3})
