"""EAGLE and EAGLE-2: a head that foretells features, drafted by a table or by its own scores."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from drafter_cases import (
    PROMPT,
    RECIPE,
    assert_says_what_the_target_says,
    learn_by_heart,
    trained,
    two_conversations,
)
from test_eagle3 import norm, turned
from torch import Tensor

from specrepro import (
    checkpoints,
    corpus,
    draft_layer,
    eagle2,
    eagle3,
    recipes,
    target_model,
)
from specrepro.decoding import decode, decode_autoregressively
from specrepro.draft_tree import ROOT, DraftTree
from specrepro.eagle2 import (
    Drafter,
    DraftHead,
    Eagle2,
    FeatureLoss,
    HeadConfig,
    StaticTree,
    TrainingConfig,
)
from specrepro.eagle3 import TreeConfig
from specrepro.target_model import Scores, Target

VICUNA_7B = HeadConfig(4096, 11008, 32, 32, 128, 32000)
RELEASED_TREE = [  # as eagle/model/choices.py lists it
    [0], [1], [2], [3], [0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [2, 0], [2, 1], [3, 0],
    [0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 2, 0], [0, 2, 1], [1, 0, 0],
    [0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 2], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1],
]  # fmt: skip


@pytest.fixture(scope="module")
def target(tiny_target_folder) -> Target:
    return target_model.load(str(tiny_target_folder()), dtype="float32", device="cpu")


def make_head(target: Target, seed: int = 0) -> DraftHead:
    """Random weights large enough that every part of the head matters to the result."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = DraftHead(HeadConfig(**draft_layer.sizes_of(target)))
        for weight in head.parameters():
            # norm and bias differ from 1 and 0, or a head that forgets them passes
            weight.data = torch.randn_like(weight) * (
                1.5 / weight.shape[-1] ** 0.5 if weight.dim() > 1 else 0.3
            ) + (weight.dim() == 1)
    return head


def features_reference(head: DraftHead, target: Target, tokens: Tensor, states: Tensor) -> Tensor:
    """EAGLE's head over one sequence (n), written out: row i foretells the feature of token i+1."""
    n, layer, attention = len(tokens), head.layers[0], head.layers[0].self_attn
    embedding = target.model.get_input_embeddings().weight
    words = F.pad(tokens, (0, 1))[1:]
    x = torch.cat([embedding[words], states], -1) @ head.fc.weight.T + head.fc.bias
    q, k, v = (
        (x @ projection.weight.T).view(1, n, -1, head.config.head_dim)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    q, k = turned(q, torch.arange(n)), turned(k, torch.arange(n))
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (k, v))
    scores = torch.einsum("bmhd,bnhd->bhmn", q, k) / head.config.head_dim**0.5
    future = torch.ones(n, n, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    attended = torch.einsum("bhmn,bnhd->bmhd", weights, v)[0].flatten(1)
    y = x + attended @ attention.o_proj.weight.T
    z = norm(layer.post_attention_layernorm, y)
    gated = F.silu(z @ layer.mlp.gate_proj.weight.T) * (z @ layer.mlp.up_proj.weight.T)
    return y + gated @ layer.mlp.down_proj.weight.T


# --- the head and its loss


def test_head_has_the_released_keys_and_shapes():
    with torch.device("meta"):
        state = DraftHead(VICUNA_7B).state_dict()
    attention, mlp = "layers.0.self_attn.", "layers.0.mlp."
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "fc.weight": (4096, 2 * 4096),
        "fc.bias": (4096,),
        **{f"{attention}{name}_proj.weight": (4096, 4096) for name in "qkvo"},
        "layers.0.post_attention_layernorm.weight": (4096,),
        mlp + "gate_proj.weight": (11008, 4096),
        mlp + "up_proj.weight": (11008, 4096),
        mlp + "down_proj.weight": (4096, 11008),
    }
    # the paper's 0.24 billion for a 7B target
    assert round(sum(t.numel() for t in state.values()) / 1e9, 2) == 0.24


def loss_reference(
    head: DraftHead, target: Target, batch: corpus.Batch, noise: Tensor, config: TrainingConfig
) -> Tensor:
    """Row by row and coordinate by coordinate."""
    regressions, classifications = [], []
    for tokens, hidden, is_answer, moved in zip(
        batch.tokens, batch.hidden, batch.is_answer, noise, strict=True
    ):
        foretold = features_reference(head, target, tokens, hidden + moved)
        for i in range(len(tokens) - 2):
            if not (is_answer[i + 1] and is_answer[i + 2]):
                continue
            apart = [abs(a - b) for a, b in zip(foretold[i], hidden[i + 1], strict=True)]
            smooth = [0.5 * d**2 if d < 1 else d - 0.5 for d in apart]
            regressions.append(sum(smooth) / len(smooth))
            p = (target.head.weight @ hidden[i + 1]).softmax(-1)
            log_q = (target.head.weight @ foretold[i]).log_softmax(-1)
            classifications.append(-(p * log_q).sum())
    parts = (sum(part) / len(part) for part in (regressions, classifications))
    return sum(
        w * part for w, part in zip((config.regression, config.classification), parts, strict=True)
    )


@pytest.mark.parametrize(
    "config", [TrainingConfig(), TrainingConfig(0.5, 0.0, 0.0), TrainingConfig(0.0, 2.0, 1.0)]
)
def test_loss_and_gradients_are_a_plain_double_loop(target, monkeypatch, config):
    monkeypatch.setattr(eagle2._CrossEntropy, "CHUNK", 4)
    head, batch = make_head(target), two_conversations(target)
    noise = eagle2.uniform_noise(batch.hidden, config.noise, int(batch.tokens.sum()))
    loss, metrics = FeatureLoss(head, target, config)(batch)
    expected = loss_reference(head, target, batch, noise, config)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    parameters = dict(head.named_parameters())
    for name, ours, theirs in zip(
        parameters,
        torch.autograd.grad(loss, list(parameters.values())),
        torch.autograd.grad(expected, list(parameters.values())),
        strict=True,
    ):
        assert ours.abs().max() > 1e-6, f"{name} has no gradient, so nothing is compared"
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-5, msg=name)
    parts = config.regression * metrics["regression"]
    parts += config.classification * metrics["classification"]
    assert loss.item() == pytest.approx(parts, rel=1e-5) and 0 <= metrics["agreement"] <= 1


def test_a_capped_target_caps_both_distributions(target, monkeypatch):
    """As a Gemma-2 would: the whole of the loss then is that of the capped logits."""
    head, batch = make_head(target), two_conversations(target)
    config = TrainingConfig(regression=0.0, classification=1.0, noise=0.0)
    monkeypatch.setattr(target.config, "final_logit_softcapping", 2.0, raising=False)
    loss, metrics = FeatureLoss(head, target, config)(batch)
    rows, is_row = eagle3.rows_of_mask(eagle3.supervised_rows(batch.is_answer, 0))
    foretold = torch.stack(
        [
            features_reference(head, target, *pair)
            for pair in zip(batch.tokens, batch.hidden, strict=True)
        ]
    )
    logits = [2 * torch.tanh(x @ target.head.weight.T / 2) for x in (foretold, batch.hidden)]
    log_q, p = logits[0].log_softmax(-1), eagle3.shift_left(logits[1], 1).softmax(-1)
    each = -(p * log_q).sum(-1)[eagle3.supervised_rows(batch.is_answer, 0)]
    torch.testing.assert_close(loss, each.mean(), rtol=1e-4, atol=1e-5)


def test_noise_is_uniform_and_the_batchs_own():
    features = torch.zeros(40, 500)
    noise = eagle2.uniform_noise(features, 0.1, seed=3)
    assert noise.abs().max() <= 0.1 and noise.abs().max() > 0.0999
    assert noise.mean().abs() < 2e-3 and noise.std().item() == pytest.approx(
        0.2 / 12**0.5, rel=0.02
    )
    assert torch.equal(noise, eagle2.uniform_noise(features, 0.1, seed=3))
    assert not torch.equal(noise, eagle2.uniform_noise(features, 0.1, seed=4))
    assert not eagle2.uniform_noise(features, 0.0, seed=3).any()


# --- drafting


def drafter_of(head: DraftHead, target: Target, tree: TreeConfig | StaticTree) -> Drafter:
    return Drafter(copy.deepcopy(head), target, tree)


def begun(drafter: Drafter, target: Target, tokens: list[int]) -> Drafter:
    """A drafter whose target has read all of `tokens` but the last, which is the root."""
    prefix = torch.tensor([tokens[:-1]])
    scores = Scores(None, None, target.features(prefix)[1])
    drafter.begin(prefix, torch.tensor([len(tokens) - 1]), torch.tensor(tokens[-1:]), scores)
    return drafter


def children_reference(
    head: DraftHead, target: Target, tokens: list[int], path: list[int], number: int
) -> list[int]:
    """The best `number` tokens after `path` below the root tokens[-1], each path from scratch."""
    states = target.features(torch.tensor([tokens[:-1]]))[1][0]
    for step in range(len(path) + 1):
        words = torch.tensor([*tokens, *path[:step]])
        foretold = features_reference(
            head, target, words[: len(states) + 1], F.pad(states, (0, 0, 0, 1))
        )
        states = torch.cat([states, foretold[len(states) - 1][None]])
    return (target.head.weight @ states[-1]).topk(number).indices.tolist()


def paths_of(tree: DraftTree) -> dict[tuple[int, ...], int]:
    """The ranks from below the root to each node but the root, and its token."""
    paths: list[tuple[int, ...]] = []
    parents = tree.parents[0].tolist()
    for node, parent in enumerate(parents):
        rank = parents[:node].count(parent)
        paths.append((*paths[parent], rank) if parent != ROOT else ())
    return dict(zip(paths, tree.tokens[0].tolist(), strict=True))


def test_the_table_is_the_released_one():
    assert sorted(eagle2.RELEASED_TREE) == sorted("".join(map(str, p)) for p in RELEASED_TREE)
    for size in range(1, 26):
        table = eagle2.RELEASED_TREE[:size]
        assert all(len(p) == 1 or p[:-1] in table for p in table), "a parent comes later"
        assert all(p[-1] == "0" or f"{p[:-1]}{int(p[-1]) - 1}" in table for p in table)


@pytest.mark.parametrize(
    ("depth", "total_tokens", "nodes"),
    [(4, 26, 26), (9, 60, 26), (2, 10, 10), (0, 60, 5), (4, 2, 2)],
)
def test_a_static_tree_is_the_table_filled_by_the_head(target, depth, total_tokens, nodes):
    head, tree = make_head(target), StaticTree(depth, total_tokens)
    drafter = begun(drafter_of(head, target, tree), target, PROMPT)
    found = drafter.propose()
    found.validate(target.vocab_size)
    assert (found.tokens.shape[1], drafter.max_nodes) == (nodes, nodes)
    words = paths_of(found)
    wanted = [p for p in eagle2.RELEASED_TREE if len(p) <= depth + 1][: total_tokens - 1]
    assert words.keys() == {(), *(tuple(map(int, path)) for path in wanted)}
    for path, token in words.items():
        if path:
            above = [words[path[:n]] for n in range(1, len(path))]
            assert token == children_reference(head, target, PROMPT, above, 4)[path[-1]], path


def test_the_shape_stays_and_the_words_change(target):
    head = make_head(target)
    trees = [
        begun(drafter_of(head, target, StaticTree()), target, tokens).propose()
        for tokens in (PROMPT, [30, 31, 32])
    ]
    assert torch.equal(trees[0].parents, trees[1].parents)
    assert not torch.equal(trees[0].tokens, trees[1].tokens)


@pytest.fixture(scope="module")
def memorised(target: Target, tmp_path_factory: pytest.TempPathFactory) -> DraftHead:
    """A head that knows the answer to PROMPT by heart; not to be changed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = Eagle2().new_module(target, [])
    loss = FeatureLoss(head, target, TrainingConfig(noise=0.02))
    folder, loop = tmp_path_factory.mktemp("memorised"), {"learning_rate": 3e-3, "total_steps": 400}
    return learn_by_heart(head, loss, target, folder, **loop)


def test_one_memorised_conversation_is_drafted_to_the_cap(target, memorised):
    answer = decode_autoregressively(target, PROMPT, max_new_tokens=40).tokens
    for tree in (eagle3.chain_like(TreeConfig(4)), TreeConfig(4, 4, 69), StaticTree()):
        run = decode(target, drafter_of(memorised, target, tree), PROMPT, max_new_tokens=40)
        assert run.tokens == answer
        assert run.num_passes == math.ceil(39 / 6), f"levels + 1 is 6 but tau is {run.tau:.2f}"
        untrained = drafter_of(make_head(target), target, tree)
        assert decode(target, untrained, PROMPT, max_new_tokens=40).tau < 2


class Watched(Drafter):
    """Remembers each round's last feature, and how many rows stood in the cache."""

    def begin(self, *arguments: object) -> None:
        super().begin(*arguments)
        self.rounds: list[tuple[Tensor, int]] = []

    def _extend(self) -> Tensor:
        last = super()._extend()
        self.rounds.append((last[0], int(self.lengths)))
        return last


def test_incremental_drafting_is_one_full_pass_over_target_features(target, memorised):
    watched = Watched(copy.deepcopy(memorised), target, TreeConfig(3, 4, 12))
    run = decode(target, watched, PROMPT, max_new_tokens=60)
    tokens = torch.tensor(PROMPT + run.tokens)
    features = features_reference(memorised, target, tokens, target.features(tokens[None])[1][0])
    committed = len(PROMPT)
    for num_accepted, (last, length) in zip(run.accepted, watched.rounds, strict=True):
        assert length == committed, "a row for each token the target has read, and no drafted one"
        torch.testing.assert_close(last, features[length - 1], rtol=1e-3, atol=1e-3)
        committed += num_accepted + 1
    assert max(run.accepted) > 2 and len(run.accepted) > 8


@pytest.mark.parametrize(
    "tree",
    [TreeConfig(3, 6, 16), StaticTree(), StaticTree(2, 10)],
    ids=["grown", "fixed", "small"],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_output_is_the_targets_own(target, memorised, tree, temperature):
    asked = [PROMPT, [30, 31, 32], [50, 9, 8, 7, 6, 5, 44, 43, 42, 41]]
    options = {"temperature": temperature, "seed": [5, 6, 7], "max_new_tokens": 60}
    runs = decode(target, drafter_of(memorised, target, tree), asked, **options)
    plain = decode_autoregressively(target, asked, **options)
    assert [run.tokens for run in runs] == [run.tokens for run in plain]
    assert sum(max(run.accepted) > 0 for run in runs) > 1, "nothing was accepted"


# --- checkpoints and the recipe


def test_what_is_saved_drafts_the_same_and_keeps_its_tree(target, tmp_path):
    head = make_head(target).bfloat16().float()
    method = Eagle2(TreeConfig(2, 5, 11))
    method.save(head, tmp_path)
    tensors, config = checkpoints.load(tmp_path)
    assert tensors.keys() == head.state_dict().keys() and config["bias"] is True
    loaded = Drafter.load(tmp_path, target)
    assert loaded.tree == TreeConfig(2, 5, 11) and loaded.head.config == head.config
    found, expected = (
        begun(d, target, PROMPT).propose() for d in (loaded, method.drafter(head, target))
    )
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.parents, expected.parents)


def test_released_files_load_with_their_embedding_and_without_a_bias(target, tmp_path):
    config = replace(HeadConfig(**draft_layer.sizes_of(target)), bias=False)
    tensors = DraftHead(config).state_dict() | {"embed_tokens.weight": torch.ones(100, 64)}
    known = {k: v for k, v in draft_layer.sizes_of(target).items() if k != "head_dim"}
    checkpoints.save(tmp_path, tensors, known | {"bias": False, "num_hidden_layers": 1})
    head, tree = eagle2.load_head(tmp_path)
    assert tree == TreeConfig(5, 10, 60) and head.config.head_dim == 16
    assert torch.equal(head.fc.weight, tensors["fc.weight"]) and head.fc.bias is None


def test_another_papers_checkpoint_is_refused_by_name(target, tmp_path):
    eagle3.save_head(eagle3.DraftHead(eagle3.head_config(target, 40)), tmp_path / "eagle3")
    with pytest.raises(ValueError, match=r"eagle3 is not an EAGLE head: .* named layers\.0\.\*"):
        eagle2.load_head(tmp_path / "eagle3")
    Eagle2().save(make_head(target), tmp_path / "eagle2")
    with pytest.raises(ValueError, match=r"eagle2 is not an EAGLE-3 head: .* named midlayer\.\*"):
        eagle3.load_head(tmp_path / "eagle2")


def test_head_of_another_target_is_refused(target):
    config = replace(HeadConfig(**draft_layer.sizes_of(target)), vocab_size=151936)
    with pytest.raises(ValueError, match="vocabulary 151936, but .* has 100"):
        Drafter(DraftHead(config), target)


def test_loaders_draft_a_table_a_tree_and_a_chain_of_one_head(target, tmp_path):
    Eagle2(TreeConfig(2, 5, 11)).save(make_head(target), tmp_path)
    loaders = eagle2.drafters(tmp_path, total_tokens=8)
    assert loaders["EAGLE-2"](target).tree == TreeConfig(2, 5, 8)
    assert loaders["EAGLE chain"](target).tree == TreeConfig(4, 1, 6)
    static = loaders["EAGLE"](target).tree
    assert (type(static), static.depth, static.total_tokens) == (StaticTree, 2, 8)
    assert eagle2.DRAFTERS.keys() == loaders.keys()


def test_training_from_features_leaves_a_checkpoint_that_drafts(chat_target, features, tmp_path):
    recipe = replace(RECIPE, method=Eagle2(TreeConfig(2, 3, 8)), epochs=3)
    out, _, _ = trained(recipe, chat_target, features, tmp_path)
    drafter = Drafter.load(out, chat_target)
    assert drafter.tree == TreeConfig(2, 3, 8)
    assert_says_what_the_target_says(chat_target, drafter)


def test_overrides_of_the_embedded_target_are_settings_of_the_method(target, monkeypatch):
    papers = recipes.Recipe.of(Eagle2, target)
    assert papers.method == Eagle2() and papers.method.training.classification == 0.1
    monkeypatch.setattr(target, "name", "smollm2")
    own = recipes.Recipe.of(Eagle2, target)
    assert own.method.tree.total_tokens < 60 and own.method.training == TrainingConfig()
