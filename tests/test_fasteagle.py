"""FastEagle: one pass drafts all depths, each depth is taught, and the target's words come out."""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import test_losslessness_of_decoding as exact
import torch
import torch.nn.functional as F
from drafter_cases import (
    PROMPT,
    RECIPE,
    answer_to_prompt,
    assert_ragged_batch_decodes_as_each_alone,
    assert_says_what_the_target_says,
    conversation,
    learn_by_heart,
    trained,
    two_conversations,
)
from scipy.stats import chisquare
from test_eagle3 import dense_attention, make_head, norm, turned
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from tree_drafters import table_of

from specrepro import cascade, cast, checkpoints, corpus, eagle3, fasteagle, recipes, target_model
from specrepro.backbone import Backbone, BestFirst
from specrepro.cascade import Cascade, CascadeConfig
from specrepro.compiled_drafting import compiled
from specrepro.decoding import decode, decode_autoregressively
from specrepro.draft_layer import sizes_of
from specrepro.draft_tree import ROOT, DraftTree, Shape
from specrepro.eagle3 import TreeConfig, shift_left
from specrepro.fasteagle import (
    Drafter,
    FastEagle,
    LayerwiseLoss,
    SampledDrafter,
    TrainingConfig,
)
from specrepro.target_model import Scores, Target
from specrepro.tree_verify import Verdict

N, K = 4, 3
SMALL = FastEagle(num_layers=N, top_k=K)
EMBEDDED = CascadeConfig(576, 1536, 9, 3, 64, 49152, draft_vocab_size=8192)
WIRINGS = ("cascade", "shared", "parallel")
small_target = exact.small_target  # of five tokens, for the chi-square


@pytest.fixture(scope="module")
def target(tiny_chat_folder: Path) -> Target:
    return target_model.load(str(tiny_chat_folder), dtype="float32", device="cpu")


def make_cascade(
    target: Target, wiring: str = "cascade", draft_vocab_size: int = 40, norms_word: bool = True
) -> Cascade:
    """Random weights large enough that every part matters, and 40 random words of 100."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = CascadeConfig(
            **sizes_of(target), num_hidden_layers=N, wiring=wiring,
            draft_vocab_size=draft_vocab_size, norms_word=norms_word,
        )  # fmt: skip
        made = Cascade(config)
        for weight in made.parameters():
            # norms differ from 1, or a cascade that forgets one passes
            weight.data = torch.randn_like(weight) * (
                1.5 / weight.shape[-1] ** 0.5 if weight.dim() > 1 else 0.3
            ) + (weight.dim() == 1)
        if config.is_reduced:
            ids = torch.randperm(target.vocab_size)[:draft_vocab_size]
            made.token_map.copy_(ids.sort().values)
    return made


def embedding_of(target: Target) -> Tensor:
    return target.model.get_input_embeddings().weight


def states_reference(made: Cascade, target: Target, tokens: Tensor, taps: Tensor) -> list[Tensor]:
    """What the head reads (b, n, H) at every depth: section 2's formulas, written out."""
    b, n = tokens.shape
    words = F.pad(tokens, (0, 1))[:, 1:]
    fused = taps @ made.fc.weight.T
    read = embedding_of(target)[words]
    read = norm(made.word_norm, read) if made.config.norms_word else read
    first = torch.cat([fused, read], -1) @ made.mix.weight.T
    x, found, causal = first, [], torch.ones(n, n, dtype=torch.bool).tril()
    for depth in range(made.config.num_hidden_layers):
        layer = made.layers[0 if made.config.wiring == "shared" else depth]
        x = first if made.config.wiring == "parallel" else x
        z, attention = norm(layer.input_layernorm, x), layer.self_attn
        q, k, v = (
            (z @ projection.weight.T).view(b, n, -1, made.config.head_dim)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        places = torch.arange(n)
        attended = dense_attention(turned(q, places), turned(k, places), v, causal)
        y = x + attended.flatten(2) @ attention.o_proj.weight.T
        z = norm(layer.post_attention_layernorm, y)
        gated = F.silu(z @ layer.mlp.gate_proj.weight.T) * (z @ layer.mlp.up_proj.weight.T)
        x = y + gated @ layer.mlp.down_proj.weight.T
        found.append(norm(made.norms[depth], x))
    return found


def states_of(made: Cascade, target: Target, batch: corpus.Batch) -> list[Tensor]:
    """The same by the trainer's own pass."""
    return made(batch.taps, F.embedding(shift_left(batch.tokens, 1), embedding_of(target)))


# --- the cascade


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("norms_word", [True, False])
def test_one_pass_gives_the_states_of_every_depth(target, wiring, norms_word):
    made, batch = make_cascade(target, wiring, 40, norms_word), two_conversations(target)
    expected = states_reference(made, target, batch.tokens, batch.taps)
    found = states_of(made, target, batch)
    assert len(found) == N
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert (found[0] - found[-1]).abs().mean() > 0.1, "all depths say the same"


@pytest.mark.parametrize("num_layers", [1, 3, 7])
def test_parameters_are_layers_two_linear_layers_and_norms(num_layers):
    with torch.device("meta"):
        made = Cascade(replace(EMBEDDED, num_hidden_layers=num_layers))
    layer = 2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536 + 2 * 576
    expected = num_layers * (layer + 576) + (3 + 2) * 576 * 576 + 576
    assert sum(p.numel() for p in made.parameters()) == expected
    assert made.state_dict()["token_map"].shape == (8192,)


def test_layers_that_share_weights_are_one_layer_with_a_norm_for_each_depth():
    with torch.device("meta"):
        made = Cascade(replace(EMBEDDED, wiring="shared"))
    assert (len(made.layers), len(made.norms)) == (1, 7)


def test_three_layers_fit_a_committed_file_and_four_do_not():
    sizes = []
    for num_layers in (3, 4):
        with torch.device("meta"):
            made = Cascade(replace(EMBEDDED, num_hidden_layers=num_layers))
        sizes.append(sum(p.numel() for p in made.parameters()) * 2 + 8 * 8192)
    assert sizes[0] < 30_000_000 < sizes[1]


@pytest.mark.parametrize("draft_vocab_size", [0, 40])
def test_the_head_is_the_targets_own_rows(target, draft_vocab_size):
    made, states = make_cascade(target, draft_vocab_size=draft_vocab_size), torch.randn(7, 64)
    ids = made.draft_token_ids()
    assert len(ids) == (draft_vocab_size or 100)
    found = cascade.frozen_head(target, ids)(states)
    torch.testing.assert_close(found, target.logits(states)[:, ids], rtol=1e-4, atol=1e-4)


def test_a_capped_target_caps_the_reduced_head_too(target, monkeypatch):
    monkeypatch.setattr(target.config, "final_logit_softcapping", 2.0, raising=False)
    ids, states = torch.tensor([3, 50, 70]), torch.randn(5, 64)
    found = cascade.frozen_head(target, ids)(states)
    assert found.abs().max() < 2
    torch.testing.assert_close(found, target.logits(states)[:, ids], rtol=1e-4, atol=1e-4)


# --- layer-wise supervision


def loss_reference(
    made: Cascade, target: Target, batch: corpus.Batch, config: TrainingConfig
) -> Tensor:
    """Depth by depth and row by row."""
    ids, (b, n) = made.draft_token_ids(), batch.tokens.shape
    found = states_reference(made, target, batch.tokens, batch.taps)
    decays = [config.decay**depth for depth in range(N)]
    weights = [x / sum(decays) for x in decays] if config.supervision == "every" else [0, 0, 0, 1]
    total = torch.zeros(())
    for depth, states in enumerate(found, 1):
        losses = []
        for row, i in itertools.product(range(b), range(n - 1 - depth)):
            words = range(i + 1, i + 2 + depth)
            if not batch.is_answer[row, list(words)].all():
                continue
            if batch.choices[row, i + depth] not in ids:
                continue
            wanted, state = batch.hidden[row, i + depth], states[row, i]
            p = target.logits(wanted)[ids].softmax(-1)
            apart = (state - wanted).abs()
            smooth = torch.where(apart < 1, apart**2 / 2, apart - 0.5).mean()
            entropy = -(p * target.logits(state)[ids].log_softmax(-1)).sum()
            losses.append(entropy + config.feature_weight * smooth)
        total = total + weights[depth - 1] * torch.stack(losses).mean()
    return total


CONFIGS = [
    TrainingConfig(),
    TrainingConfig(decay=1.0, feature_weight=0.5),
    TrainingConfig(supervision="last"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(("wiring", "size"), [("cascade", 40), ("shared", 0), ("parallel", 40)])
def test_loss_and_gradients_are_the_sum_written_out(target, config, wiring, size):
    made, batch = make_cascade(target, wiring, size), two_conversations(target)
    loss, _ = LayerwiseLoss(made, target, config)(batch)
    expected = loss_reference(made, target, batch, config)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    names, weights = zip(*made.named_parameters(), strict=True)
    ours, theirs = (torch.autograd.grad(x, weights, allow_unused=True) for x in (loss, expected))
    for name, one, other in zip(names, ours, theirs, strict=True):
        one, other = (torch.zeros(1) if x is None else x for x in (one, other))
        if config.supervision == "every":
            assert one.abs().max() > 1e-7, f"{name} has no gradient, so nothing is compared"
        torch.testing.assert_close(one, other.expand_as(one), rtol=5e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("depth", range(1, N + 1))
def test_the_first_layer_is_taught_by_every_depth(target, monkeypatch, depth):
    made, batch = make_cascade(target), two_conversations(target)
    loss = LayerwiseLoss(made, target, TrainingConfig())
    monkeypatch.setattr(loss, "weights", [float(d == depth) for d in range(1, N + 1)])
    first, last = made.layers[0].mlp.up_proj.weight, made.layers[-1].mlp.up_proj.weight
    gradients = torch.autograd.grad(loss(batch)[0], (first, last))
    assert gradients[0].abs().max() > 1e-6
    assert gradients[1].any() == (depth == N), "a layer is taught by its own depth and deeper ones"


def test_nothing_of_the_target_is_trained(target):
    made, batch = make_cascade(target), two_conversations(target)
    LayerwiseLoss(made, target, TrainingConfig())(batch)[0].backward()
    assert all(p.grad is not None for p in made.parameters())
    assert all(p.grad is None and not p.requires_grad for p in target.model.parameters())


def test_weights_fall_by_depth_and_sum_to_one():
    found = fasteagle.depth_weights(3, TrainingConfig())
    assert found == pytest.approx([1 / 2.44, 0.8 / 2.44, 0.64 / 2.44])
    assert fasteagle.depth_weights(4, TrainingConfig(decay=1.0)) == [0.25] * 4
    assert fasteagle.depth_weights(3, TrainingConfig(supervision="last")) == [0, 0, 1]


def test_rows_are_those_whose_words_are_the_answers_up_to_the_one_foretold():
    is_answer = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 0, 0, 1]]).bool()
    rows = [fasteagle.supervised_rows(is_answer, depth)[0].nonzero()[:, 0] for depth in (1, 2, 3)]
    assert [found.tolist() for found in rows] == [[2, 3, 4], [2, 3], [2]]


def test_a_state_depends_on_no_token_after_the_known_one(target):
    made, batch, row = make_cascade(target), two_conversations(target), 8
    later = batch.tokens.clone()
    later[:, row + 2 :] = (later[:, row + 2 :] + 40) % 90 + 5
    taps, words = batch.taps, F.embedding(shift_left(later, 1), embedding_of(target))
    before = states_of(made, target, batch)
    for one, other in zip(before, made(taps, words), strict=True):
        assert torch.equal(one[:, : row + 1], other[:, : row + 1])
        assert (one[:, row + 1] - other[:, row + 1]).abs().max() > 0.01


@pytest.fixture(scope="module")
def memorised(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Cascade:
    """A cascade that knows the answer to PROMPT by heart; not to be changed."""
    return learnt(target, tmp_path_factory.mktemp("memorised"), TrainingConfig())


def learnt(target: Target, folder: Path, config: TrainingConfig, steps: int = 400) -> Cascade:
    method = replace(SMALL, training=config)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = method.new_module(target, [])
    loop = {"learning_rate": 3e-3, "total_steps": steps}
    return learn_by_heart(made, method.loss(made, target), target, folder, **loop)


def answered(target: Target) -> corpus.Batch:
    return conversation(target, PROMPT, answer_to_prompt(target).tokens)


def test_layer_i_foretells_the_ith_word_after_the_known_one(target, memorised):
    """An index too early or too late shows as the words of a neighbouring diagonal."""
    batch = answered(target)
    for depth, states in enumerate(states_of(memorised, target, batch), 1):
        rows = fasteagle.supervised_rows(batch.is_answer, depth)
        said = target.logits(states).argmax(-1)
        hits = {
            ahead: (said == shift_left(batch.tokens, ahead))[rows].float().mean().item()
            for ahead in (depth, depth + 1, depth + 2)
        }
        assert hits[depth + 1] > 0.95, f"depth {depth}: {hits}"
        assert max(hits[depth], hits[depth + 2]) < 0.5, f"depth {depth}: {hits}"


def test_without_supervision_of_its_own_the_first_depth_says_nothing(target, memorised, tmp_path):
    deepest = learnt(target, tmp_path, TrainingConfig(supervision="last"))
    measured = [
        LayerwiseLoss(made, target, TrainingConfig())(answered(target))[1]
        for made in (memorised, deepest)
    ]
    assert measured[0]["agreement_1"] > 0.95 and measured[1][f"agreement_{N}"] > 0.8
    assert measured[1]["agreement_1"] < 0.3


def test_metrics_follow_their_definition(target, memorised):
    made = copy.deepcopy(memorised)
    for weight in made.layers[1].parameters():
        weight.data += 0.05 * torch.randn_like(weight)  # right now and then
    batch = answered(target)
    _, metrics = LayerwiseLoss(made, target, TrainingConfig())(batch)
    starts, chain = fasteagle.supervised_rows(batch.is_answer, 1), 1.0
    agrees = torch.ones_like(batch.tokens).bool()
    for depth, states in enumerate(states_of(made, target, batch), 1):
        rows = fasteagle.supervised_rows(batch.is_answer, depth)
        is_right = target.logits(states).argmax(-1) == shift_left(batch.choices, depth)
        share = is_right[rows].float().mean().item()
        assert metrics[f"agreement_{depth}"] == pytest.approx(share)
        agrees &= is_right & rows
        chain += agrees[starts].float().mean().item()
    assert metrics["simulated_tau"] == pytest.approx(chain)
    assert metrics["agreement_2"] < 1, "nothing was wrong, so nothing was told apart"


# --- drafting


def drafter_of(made: Cascade, target: Target, tree: Shape | None = None, kind=Drafter) -> Drafter:
    return kind(copy.deepcopy(made), target, tree)


def begun(drafter: Drafter, target: Target, tokens: list[int]) -> Drafter:
    """A drafter whose target has read all of `tokens` but the last, which is the root."""
    prefix = torch.tensor([tokens[:-1]])
    scores = Scores(None, target.features(prefix)[0], None)
    drafter.begin(prefix, torch.tensor([len(tokens) - 1]), torch.tensor(tokens[-1:]), scores)
    return drafter


def distributions(made: Cascade, target: Target, tokens: list[int]) -> Tensor:
    """(N, words spoken) log probabilities of the words after the root tokens[-1]."""
    taps = target.features(torch.tensor([tokens[:-1]]))[0]
    words = F.embedding(torch.tensor([tokens[1:]]), embedding_of(target))
    states = torch.stack([found[0, -1] for found in made(taps, words)])
    return target.logits(states)[:, made.draft_token_ids()].log_softmax(-1)


@pytest.mark.parametrize(("levels", "k"), [(4, 3), (4, 1), (2, 5), (1, 4)])
def test_a_backbone_is_the_best_words_of_each_depth_below_the_best_before(target, levels, k):
    made = make_cascade(target)
    drafter = begun(drafter_of(made, target, Backbone(levels, k)), target, PROMPT)
    tree = drafter.propose()
    tree.validate(target.vocab_size)
    assert tree.tokens.shape[1] == levels * k + 1 == drafter.max_nodes
    best = distributions(made, target, PROMPT).topk(k).indices[:levels]
    assert tree.tokens[0].tolist() == [PROMPT[-1], *made.draft_token_ids()[best].flatten().tolist()]
    above = [0, *(1 + level * k for level in range(levels - 1))]
    assert tree.parents[0].tolist() == [ROOT, *(node for node in above for _ in range(k))]
    assert tree.depths().max() == levels
    assert tree.ancestor_mask()[0].sum(1).tolist() == (tree.depths()[0] + 1).tolist()


def test_with_one_word_a_depth_the_backbone_is_a_chain(target):
    tree = begun(drafter_of(make_cascade(target), target, Backbone(N, 1)), target, PROMPT).propose()
    assert torch.equal(tree.parents, DraftTree.chain(tree.tokens).parents)


@pytest.mark.parametrize("num_nodes", [1, 5, 12, 39])
def test_best_first_takes_the_most_probable_nodes_of_the_whole_tree(target, num_nodes):
    made, k = make_cascade(target), 3
    drafter = drafter_of(made, target, BestFirst(3, k, 1 + num_nodes))
    tree = begun(drafter, target, PROMPT).propose()
    tree.validate(target.vocab_size)
    best = distributions(made, target, PROMPT).topk(k)
    ids, masses = made.draft_token_ids()[best.indices].tolist(), best.values.tolist()
    every = {
        tuple(ids[d][r] for d, r in enumerate(ranks)): sum(
            masses[d][r] for d, r in enumerate(ranks)
        )
        for length in (1, 2, 3)
        for ranks in itertools.product(range(k), repeat=length)
    }
    wanted = sorted(every, key=every.get, reverse=True)[:num_nodes]
    assert set(words_below_the_root(tree)) == set(wanted)


def words_below_the_root(tree: DraftTree) -> list[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = [()]
    pairs = zip(tree.tokens[0, 1:].tolist(), tree.parents[0, 1:].tolist(), strict=True)
    for token, parent in pairs:
        paths.append((*paths[parent], token))
    return paths[1:]


class Watched(Drafter):
    """Remembers the states that each round drafts from."""

    def _extend(self) -> Tensor:
        self.states = super()._extend()
        return self.states


def random_path(parents: list[int], rng: random.Random) -> list[int]:
    """Nodes from the root down, side branches as likely as the backbone."""
    path = [0]
    while rng.random() < 0.8:
        children = [node for node, parent in enumerate(parents) if parent == path[-1]]
        if not children:
            break
        path.append(rng.choice(children))
    return path


def commit(
    drafter: Drafter, target: Target, tree: DraftTree, path: list[int], text: list[int], bonus: int
) -> list[int]:
    """The text when the target has accepted `path` and added `bonus`, as the drafter is told."""
    words = tree.tokens[0, path[1:]].tolist()
    taps = target.features(torch.tensor([text + words]))[0]
    seen = taps.new_zeros(1, tree.tokens.shape[1], taps.shape[-1])
    seen[0, path] = taps[0, -len(path) :]
    emitted, length = torch.tensor([[*words, bonus]]), torch.tensor([len(words)])
    verdict = Verdict(torch.tensor([path]), length, emitted, torch.tensor([bonus]))
    drafter.observe(verdict, Scores(None, seen, None))
    return [*text, *words, bonus]


@pytest.mark.parametrize("wiring", WIRINGS)
def test_going_on_from_committed_tokens_is_one_pass_over_the_whole_text(target, wiring):
    made, text, rng = make_cascade(target, wiring), PROMPT, random.Random(1)
    drafter = begun(drafter_of(made, target, Backbone(N, K), Watched), target, text)
    left_the_backbone = []
    for _ in range(12):
        tree = drafter.propose()
        assert int(drafter.lengths) == len(text) - 1, "a row for each token the target has read"
        fresh = begun(drafter_of(made, target, Backbone(N, K)), target, text).propose()
        assert torch.equal(tree.tokens, fresh.tokens)
        taps = target.features(torch.tensor([text[:-1]]))[0]
        words = F.embedding(torch.tensor([text[1:]]), embedding_of(target))
        whole = torch.stack([found[0, -1] for found in made(taps, words)])
        torch.testing.assert_close(drafter.states[0], whole, rtol=1e-3, atol=1e-4)
        parents = tree.parents[0].tolist()
        path = random_path(parents, rng)
        left_the_backbone.append(path[-1] not in parents and 1 < len(path) <= N)
        text = commit(drafter, target, tree, path, text, rng.randrange(5, 90))
    assert any(left_the_backbone) and not all(left_the_backbone)


@pytest.mark.parametrize("tree", [Backbone(N, K), Backbone(N, 1), Backbone(2, 6)], ids=str)
def test_one_memorised_conversation_is_drafted_to_the_cap(target, memorised, tree):
    """Training and decoding agree on everything: anything misaligned keeps tau near 1."""
    answer = decode_autoregressively(target, PROMPT, max_new_tokens=40).tokens
    run = decode(target, drafter_of(memorised, target, tree), PROMPT, max_new_tokens=40)
    assert run.tokens == answer
    assert max(run.accepted) == tree.num_levels, "a round accepts at most one word a level"
    assert run.num_passes <= math.ceil(39 / (tree.num_levels + 1)) + 1, f"tau is {run.tau:.2f}"
    untrained = drafter_of(make_cascade(target), target, tree)
    assert decode(target, untrained, PROMPT, max_new_tokens=40).tau < 2


def test_a_round_is_one_pass_of_the_cascade_and_one_of_the_target(target, memorised, monkeypatch):
    drafter, calls = drafter_of(memorised, target, Backbone(N, K)), Counter()

    def count(owner: object, name: str, what: str) -> None:
        original = getattr(owner, name)

        def counted(*arguments: object) -> object:
            calls[what] += 1
            return original(*arguments)

        monkeypatch.setattr(owner, name, counted)

    count(drafter, "_take_in", "cascade")
    count(drafter, "frozen_head", "head")
    count(target, "verify", "target")
    for layer in drafter.fused:
        count(layer, "project", "layer")
    run = decode(target, drafter, PROMPT, max_new_tokens=60)
    rounds = run.num_passes
    assert calls == {"cascade": rounds, "head": rounds, "layer": N * rounds, "target": rounds}
    assert int(drafter.lengths) == len(PROMPT) + sum(n + 1 for n in run.accepted[:-1])
    assert drafter.cache.shape[0] == 2 * N and len(set(run.accepted)) > 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_batch_of_ragged_prompts_is_lossless_and_decodes_as_each_alone(
    target, memorised, monkeypatch, temperature
):
    drafter = drafter_of(memorised, target, Backbone(N, 6))
    assert_ragged_batch_decodes_as_each_alone(target, drafter, monkeypatch, temperature)


SHAPES: list[Shape] = [
    Backbone(N, 8), Backbone(N, 1), BestFirst(N, 5, 20), TreeConfig(N - 1, 4, 12),
]  # fmt: skip


@pytest.mark.parametrize("tree", SHAPES, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_output_is_the_targets_own(target, memorised, tree, temperature):
    asked = [PROMPT, [30, 31, 32], [50, 9, 8, 7, 6, 5, 44, 43, 42, 41]]
    options = {"temperature": temperature, "seed": [5, 6, 7], "max_new_tokens": 50}
    runs = decode(target, drafter_of(memorised, target, tree), asked, **options)
    plain = decode_autoregressively(target, asked, **options)
    assert [run.tokens for run in runs] == [run.tokens for run in plain]
    # what was learnt by heart is greedy: a chain of it may meet no draw of 150
    is_sure = temperature == 0 or tree.top_k > 1
    assert not is_sure or max(max(run.accepted) for run in runs) > 0, "nothing was accepted"
    assert all(1 <= run.tau <= N + 1 for run in runs)


@pytest.mark.parametrize("strictness", [0.0, 1.0, 50.0])
def test_cast_cuts_the_tree_over_the_same_distributions(target, memorised, strictness):
    """An extension: its depth reaches beyond the layers there are, and they end it."""
    config = cast.Config(TreeConfig(9, 4, 30), strictness=strictness, total_tokens=30)
    drafter = cast.Drafter(drafter_of(memorised, target), table_of(width=4), config)
    run = decode(target, drafter, PROMPT, max_new_tokens=40)
    assert run.tokens == decode_autoregressively(target, PROMPT, max_new_tokens=40).tokens
    assert max(run.accepted) <= N
    sizes = {0.0: 29, 50.0: 1}
    assert strictness not in sizes or set(run.drafted) == {sizes[strictness]}


def test_a_tree_deeper_than_the_cascade_is_refused(target):
    for tree in (Backbone(N + 1, 2), TreeConfig(N, 3, 8)):
        with pytest.raises(ValueError, match="5 levels needs as many layers, .* has 4; choose"):
            Drafter(make_cascade(target), target, tree)


@pytest.mark.parametrize("method", ["FastEagle", "EAGLE-3"])
def test_compiled_drafting_drafts_the_same_by_a_few_graphs(target, memorised, monkeypatch, method):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter, fullgraph=True))
    ours, tree = method == "FastEagle", TreeConfig(2, 3, 8)
    runs = []
    for change in (lambda one: one, compiled):
        drafter = (
            drafter_of(memorised, target)
            if ours
            else eagle3.Drafter(make_head(target), target, tree)
        )
        runs.append(decode(target, change(drafter), PROMPT, max_new_tokens=40))
    plain, fast = runs
    assert (plain.tokens, plain.accepted, plain.drafted) == (
        fast.tokens,
        fast.accepted,
        fast.drafted,
    )
    # one row or more; and EAGLE-3's levels besides
    assert 2 <= counter.frame_count <= (4 if ours else 8) < plain.num_passes
    torch._dynamo.reset()


# --- siblings that are drawn


def sharp_cascade(target: Target, num_layers: int = 2) -> Cascade:
    """Random, and sure of what it says, which is not what the target says."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made = FastEagle(num_layers=num_layers).new_module(target, [])
    for one in made.norms:
        one.weight.data *= 3
    return made


@pytest.mark.parametrize("options", exact.SAMPLINGS[:2], ids=str)
@pytest.mark.parametrize("kind", [Drafter, SampledDrafter])
def test_whole_sequences_follow_the_target(small_target, kind, options):
    drafter = kind(sharp_cascade(small_target), small_target, Backbone(2, 3))
    p = exact.p_value(small_target, drafter, options, seed=500_000)
    assert p > 1e-3, f"p = {p:.1e}: the sequences are not the target's"


def test_the_same_test_refuses_drawn_siblings_verified_as_if_drawn_evenly(
    small_target, monkeypatch
):
    monkeypatch.setattr(SampledDrafter, "_offered", lambda self, tree, like: torch.ones_like(like))
    drafter = SampledDrafter(sharp_cascade(small_target), small_target, Backbone(2, 3))
    p = exact.p_value(small_target, drafter, {"temperature": 1.0}, seed=500_000)
    assert p < 1e-9, f"p = {p:.1e}"


def test_siblings_are_drawn_without_replacement(small_target):
    made = sharp_cascade(small_target)
    made.norms[0].weight.data /= 6  # or some pairs would never be drawn
    drafter = SampledDrafter(made, small_target, Backbone(2, 2))
    begun(drafter, small_target, [1, 3, 2])
    states = drafter._extend()[:, :1].expand(20_000, -1, -1)
    log_probs, words = drafter._children(states)
    q = drafter.log_probs[0, 0].exp().double()
    torch.testing.assert_close(log_probs, drafter.log_probs.gather(-1, words))
    pairs = list(itertools.permutations(range(5), 2))
    expected = torch.stack([q[a] * q[b] / (1 - q[a]) for a, b in pairs])
    found = torch.tensor([((words[:, 0] == torch.tensor(pair)).all(-1)).sum() for pair in pairs])
    assert found.sum() == 20_000 and (expected * 20_000).min() > 5
    wanted = expected * 20_000 / expected.sum()
    assert chisquare(found.double().numpy(), wanted.numpy()).pvalue > 1e-3


def test_the_backbone_goes_on_from_the_likeliest_of_the_drawn(target):
    drafter = drafter_of(make_cascade(target), target, Backbone(N, K), SampledDrafter)
    is_first = []
    for _ in range(20):
        drafter.pending = begun(drafter, target, PROMPT).pending
        drafter.draws.manual_seed(len(is_first))
        tree = drafter.propose()
        tree.validate(target.vocab_size)
        ids, parents = drafter.token_ids.tolist(), tree.parents[0].tolist()
        for level in range(N - 1):
            siblings = range(1 + level * K, 1 + (level + 1) * K)
            masses = [drafter.log_probs[0, level, ids.index(tree.tokens[0, n])] for n in siblings]
            best = siblings[masses.index(max(masses))]
            assert set(parents[1 + (level + 1) * K :][:K]) == {best}
            is_first.append(best == siblings[0])
    assert any(is_first) and not all(is_first)


def test_each_draw_is_taken_once():
    tree = DraftTree(torch.arange(7)[None], torch.tensor([[ROOT, 0, 0, 0, 2, 2, 2]]))
    times = torch.rand(1, 7, 5)
    uniforms, final = fasteagle.uniforms_of(tree, times, top_k=3)
    for node, (parent, rank) in enumerate([(0, 0), (0, 1), (0, 2), (2, 0), (2, 1), (2, 2)], 1):
        expected = math.exp(-times[0, parent, rank])
        assert uniforms[0, node].item() == pytest.approx(expected, rel=1e-6)
    assert final.item() == pytest.approx(math.exp(-times[0, 0, 3]), rel=1e-6)
    # the root's own is never asked for
    assert uniforms[0, 1:].unique().numel() == 6 and final.item() not in uniforms
    with pytest.raises(ValueError, match="5 siblings and a last draw need 6 draws a place.* 5;"):
        fasteagle.uniforms_of(tree, times, top_k=5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drawn_siblings_repeat_with_their_seed(target, memorised, temperature):
    options = {"temperature": temperature, "seed": 4, "max_new_tokens": 40}
    tree = Backbone(N, K)
    runs = [
        decode(target, drafter_of(memorised, target, tree, SampledDrafter), PROMPT, **options)
        for _ in range(2)
    ]
    assert runs[0].tokens == runs[1].tokens and max(runs[0].accepted) > 0
    if not temperature:
        assert runs[0].tokens == decode_autoregressively(target, PROMPT, max_new_tokens=40).tokens


def test_drawn_siblings_are_not_verified_where_some_were_left_out(target):
    drafter = drafter_of(make_cascade(target), target, BestFirst(N, 3, 6), SampledDrafter)
    with pytest.raises(ValueError, match="not on BestFirst; draft with Drafter instead"):
        decode(target, drafter, PROMPT, max_new_tokens=8, temperature=1.0)


# --- where training starts


def test_an_untrained_cascade_has_the_targets_norm_and_frequent_words(target):
    answers = [corpus.Answer("a", 3, 0.0, 0, [50, 60, 60, 70])]
    made = replace(SMALL, draft_vocab_size=3).new_module(target, answers)
    assert made.draft_token_ids().tolist() == [50, 60, 70]
    for one in made.norms:
        torch.testing.assert_close(one.weight, target.decoder.norm.weight, rtol=1e-4, atol=1e-5)
    assert all(p.requires_grad for p in made.norms.parameters())
    fixed = replace(SMALL, training=TrainingConfig(learns_norms=False)).new_module(target, [])
    assert not any(p.requires_grad for p in fixed.norms.parameters())
    assert not hasattr(fixed, "token_map")


def test_gemmas_norm_is_read_with_the_one_it_adds(tiny_target_folder):
    gemma = target_model.load(str(tiny_target_folder("gemma")), dtype="float32", device="cpu")
    made = SMALL.new_module(gemma, [])
    expected = 1 + gemma.decoder.norm.weight
    torch.testing.assert_close(made.norms[2].weight, expected, rtol=1e-4, atol=1e-5)


def test_started_from_eagle3_a_layer_does_what_its_layer_did_but_for_the_word(target):
    """With the word's share taken from both they compute the same features."""
    head, made = make_head(target), make_cascade(target)
    cascade.start_from_eagle3(made, head)
    head.midlayer.input_layernorm.weight.data.zero_()
    made.mix.weight.data[:, target.hidden_size :] = 0
    batch = two_conversations(target)
    rows = torch.arange(batch.tokens.shape[1]).expand_as(batch.tokens)
    embedding, features = embedding_of(target), head.fuse(batch.taps)
    expected = next(eagle3.unroll(head, embedding, batch.tokens, features, rows, 1))
    rotary = made.layers[0].rotary(rows[0])
    words = F.embedding(batch.tokens, embedding)
    found = made.layers[0](made.first_input(batch.taps, words), rotary)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    for layer in made.layers[1:]:
        for name, weight in layer.state_dict().items():
            assert torch.equal(weight, made.layers[0].state_dict()[name])


def test_the_recipe_starts_from_the_eagle3_head_that_it_names(target, tmp_path):
    head = make_head(target)
    eagle3.save_head(head, tmp_path)
    made = replace(SMALL, training=TrainingConfig(init=str(tmp_path))).new_module(target, [])
    assert torch.equal(made.fc.weight, head.fc.weight.bfloat16().float())
    assert not torch.equal(SMALL.new_module(target, []).fc.weight, made.fc.weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate_size": 96}, "intermediate_size 96 is no start for layers with 128"),
        ({"features": "final"}, r"fc is \(64, 64\) does not read the fused features"),
    ],
)
def test_an_eagle3_head_of_other_sizes_is_no_start(target, changes, message):
    config = replace(eagle3.head_config(target, 40), **changes)
    with pytest.raises(ValueError, match=message):
        cascade.start_from_eagle3(make_cascade(target), make_head(target, config=config))


# --- checkpoints and the recipe


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_from_features_leaves_a_checkpoint_that_drafts(
    tiny_chat_folder, features, tmp_path, dtype
):
    target = target_model.load(str(tiny_chat_folder), dtype=dtype, device="cpu")
    method = replace(SMALL, draft_vocab_size=40)
    out, card, log = trained(replace(RECIPE, method=method, epochs=3), target, features, tmp_path)
    assert card["recipe"]["method"]["training"]["decay"] == 0.8
    assert {"agreement_1", f"agreement_{N}", "simulated_tau"} <= log[0].keys()
    drafter = Drafter.load(out, target)
    assert drafter.tree == Backbone(N, K)
    assert_says_what_the_target_says(target, drafter)


@pytest.mark.parametrize("wiring", WIRINGS)
def test_what_is_saved_drafts_the_same_and_keeps_its_tree(target, tmp_path, wiring):
    made = make_cascade(target, wiring)
    fasteagle.save_cascade(made, tmp_path, Backbone(3, 2))
    loaded, tree = fasteagle.load_cascade(tmp_path)
    assert (loaded.config, tree) == (made.config, Backbone(3, 2))
    found, expected = (
        begun(drafter, target, PROMPT).propose()
        for drafter in (
            Drafter.load(tmp_path, target),
            drafter_of(made.bfloat16().float(), target, Backbone(3, 2)),
        )
    )
    assert torch.equal(found.tokens, expected.tokens)


def test_loaders_name_each_way_to_draft_and_take_another_width(target, tmp_path):
    fasteagle.save_cascade(make_cascade(target), tmp_path, Backbone(N, 2))
    loaders = fasteagle.drafters(tmp_path, top_k=5, num_levels=3)
    assert fasteagle.DRAFTERS.keys() == loaders.keys()
    trees = {name: load(target).tree for name, load in loaders.items()}
    assert trees["FastEagle"] == trees["FastEagle sampled"] == Backbone(3, 5)
    assert trees["FastEagle chain"] == Backbone(3, 1)
    assert trees["FastEagle best-first"] == BestFirst(3, 5, 16)
    assert isinstance(loaders["FastEagle sampled"](target), SampledDrafter)
    assert fasteagle.drafters(tmp_path)["FastEagle"](target).tree == Backbone(N, 2)


def test_another_papers_checkpoint_is_refused(target, tmp_path):
    eagle3.save_head(make_head(target), tmp_path)
    with pytest.raises(ValueError, match="holds no FastEagle cascade: mix.weight is missing"):
        fasteagle.load_cascade(tmp_path)


def test_misnamed_keys_are_listed_and_nothing_is_left_random(target, tmp_path):
    fasteagle.save_cascade(make_cascade(target), tmp_path, Backbone(N, 2))
    tensors, config = checkpoints.load(tmp_path)
    tensors["norm.1.weight"] = tensors.pop("norms.1.weight")
    checkpoints.save(tmp_path, tensors, config)
    with pytest.raises(ValueError, match="missing: norms.1.weight; unknown: norm.1.weight"):
        fasteagle.load_cascade(tmp_path)


def test_a_cascade_of_another_target_is_refused(target):
    config = replace(make_cascade(target).config, vocab_size=32000)
    with pytest.raises(ValueError, match="vocabulary 32000, but .* has 100"):
        Drafter(Cascade(config), target)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(EMBEDDED, wiring="tree"), "unknown wiring 'tree'; choose cascade, shared"),
        (lambda: replace(EMBEDDED, num_hidden_layers=0), "num_hidden_layers is 0; at least 1"),
        (lambda: Backbone(0, 3), "num_levels >= 1 and top_k >= 1"),
        (lambda: TrainingConfig(supervision="first"), "unknown supervision 'first'; choose every"),
        (lambda: TrainingConfig(decay=0.0), "decay > 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_overrides_of_the_embedded_target_are_settings_of_the_method(target, monkeypatch):
    papers = recipes.Recipe.of(FastEagle, target)
    assert papers.method == FastEagle() == FastEagle(7, 0, 8, "cascade", True, TrainingConfig())
    monkeypatch.setattr(target, "name", "smollm2")
    own = recipes.Recipe.of(FastEagle, target)
    eagle = recipes.Recipe.of(eagle3.Eagle3, target)
    assert own.method.training == TrainingConfig() and own.loop == eagle.loop
    assert (own.batch_tokens, own.epochs) == (eagle.batch_tokens, eagle.epochs)
    assert own.method.draft_vocab_size == eagle.method.draft_vocab_size
    assert own.method.tree.total_tokens == eagle.method.tree.total_tokens
    assert own.method.num_layers == eagle.method.tree.depth + 1, "as deep as the tree beside it"
    with pytest.raises(TypeError, match="num_layer"):
        FastEagle.of({"num_layer": 3})
