"""A small language model as the drafter: distilled from the target, its cache never out of step."""

from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from drafter_cases import (
    OTHER_PROMPTS,
    PROMPT,
    RECIPE,
    assert_ragged_batch_decodes_as_each_alone,
    assert_says_what_the_target_says,
    learn_by_heart,
    trained,
    two_conversations,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from specrepro import checkpoints, corpus, draft_lm, draft_training, target_model
from specrepro.decoding import decode, decode_autoregressively
from specrepro.draft_lm import Distillation, Drafter, DraftLM
from specrepro.draft_tree import ROOT, DraftTree
from specrepro.target_model import Target
from specrepro.tree_verify import Verdict

SMALL = DraftLM(32, 64, num_hidden_layers=2, num_attention_heads=2, num_drafted=3)


@pytest.fixture(scope="module")
def target(tiny_chat_folder: Path) -> Target:
    return target_model.load(str(tiny_chat_folder), dtype="float32", device="cpu")


def make_model(target: Target, method: DraftLM = SMALL, seed: int = 0) -> LlamaForCausalLM:
    """Weights large enough that what is said depends on everything before it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = method.new_module(target, [])
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.data = torch.randn_like(weight) * 2 / weight.shape[-1] ** 0.5
    return model.eval()


# --- the model


@pytest.mark.parametrize("width", [5, 32, 64])
def test_narrowed_words_keep_the_closest_inner_products(target, width):
    """Eckart and Young: those of the largest singular values, exact at full width."""
    words = target.head.weight
    found = draft_lm.narrowed(words, width)
    u, s, vt = torch.linalg.svd(words, full_matrices=False)
    expected = (u[:, :width] * s[:width] ** 2) @ u[:, :width].T
    assert found.shape == (target.vocab_size, width)
    torch.testing.assert_close(found @ found.T, expected, rtol=1e-3, atol=1e-3)


def test_a_new_model_has_the_targets_words_once_for_input_and_output(target):
    model = SMALL.new_module(target, [])
    words = draft_lm.narrowed(target.head.weight, 32)
    torch.testing.assert_close(model.get_input_embeddings().weight.data, words)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (model.config.num_hidden_layers, model.config.intermediate_size) == (2, 64)


def test_a_model_wider_than_its_target_is_refused(target):
    with pytest.raises(ValueError, match="hidden_size is 768 but .* has 64"):
        DraftLM().new_module(target, [])


def test_expected_tau_is_what_independent_acceptance_gives():
    accepted = torch.rand(200_000, 4, generator=torch.Generator().manual_seed(0)) < 0.7
    tau = 1 + accepted.int().cumprod(1).sum(1).float().mean().item()
    assert draft_lm.expected_tau(0.7, 4) == pytest.approx(tau, abs=0.01)
    assert draft_lm.expected_tau(1.0, 4) == 5 and draft_lm.expected_tau(0.0, 4) == 1


# --- distillation


def loss_reference(model: LlamaForCausalLM, target: Target, batch: corpus.Batch) -> Tensor:
    """Row by row through transformers' own forward: KL, and the target's entropy beside it."""
    losses = []
    for row, i in batch.is_answer[:, 1:].nonzero().tolist():
        log_q = model(batch.tokens[row : row + 1, : i + 1]).logits[0, -1].log_softmax(-1)
        p = target.model(batch.tokens[row : row + 1, : i + 1], **_causal(i + 1)).logits[0, -1]
        p = p.softmax(-1)
        losses.append((p * (p.log() - log_q)).sum() - (p * p.log()).sum())
    return torch.stack(losses).mean()


def _causal(length: int) -> dict[str, object]:
    """What the target's own forward needs while our attention is in place."""
    tree = DraftTree.chain(torch.zeros(1, length, dtype=torch.long))
    return {"use_cache": False, "tree_pass": target_model._Pass(None, tree, {}, is_prefill=True)}


def test_loss_is_the_divergence_from_the_target_written_out(target):
    model, batch = make_model(target), two_conversations(target, is_padded=True)
    loss, metrics = Distillation(model, target, 3)(batch)
    expected = loss_reference(model, target, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    names, weights = zip(*model.named_parameters(), strict=True)
    ours, theirs = (torch.autograd.grad(x, weights) for x in (loss, expected))
    for name, one, other in zip(names, ours, theirs, strict=True):
        assert one.abs().max() > 1e-6, f"{name} has no gradient, so nothing is compared"
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5, msg=name)
    assert metrics["expected_tau"] == draft_lm.expected_tau(metrics["agreement"], 3)


def test_agreement_is_how_often_both_models_would_say_the_same(target, tiny_chat_folder):
    batch = two_conversations(target, is_padded=True)
    itself = AutoModelForCausalLM.from_pretrained(tiny_chat_folder)
    _, metrics = Distillation(itself, target, 3)(batch)
    assert metrics == {"agreement": 1.0, "expected_tau": 4.0}
    model = make_model(target)
    _, metrics = Distillation(model, target, 3)(batch)
    agrees = model(batch.tokens).logits.argmax(-1) == batch.choices
    agreement = agrees[:, :-1][batch.is_answer[:, 1:]].float().mean().item()
    assert metrics["agreement"] == pytest.approx(agreement)


def test_the_targets_logits_are_never_all_there_at_once(target, monkeypatch):
    asked, logits = [], target.logits
    spy = lambda states: asked.append(len(states)) or logits(states)  # noqa: E731
    model, batch = make_model(target), two_conversations(target, is_padded=True)
    whole = Distillation(model, target, 3)(batch)[0]
    monkeypatch.setattr(target, "logits", spy)
    monkeypatch.setattr(draft_training._SoftCrossEntropy, "CHUNK", 4)
    in_parts = Distillation(model, target, 3)(batch)[0]
    torch.testing.assert_close(in_parts, whole)
    assert asked == [4, 4, 4, 4, 4, 2], "22 rows have an answer's token next"


def test_nothing_is_learnt_where_there_is_no_answer(target):
    model, batch = make_model(target), two_conversations(target, is_padded=True)
    nothing = replace(batch, is_answer=torch.zeros_like(batch.is_answer))
    loss, metrics = Distillation(model, target, 3)(nothing)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert loss == 0 and not any(g.any() for g in gradients) and metrics["agreement"] == 0


def test_a_row_sees_no_token_that_it_is_to_predict(target):
    model, batch, row = make_model(target), two_conversations(target, is_padded=True), 8
    tokens = batch.tokens.clone()
    tokens[:, row + 1 :] = (tokens[:, row + 1 :] + 40) % 90 + 5
    before, after = (model.get_decoder()(x).last_hidden_state for x in (batch.tokens, tokens))
    torch.testing.assert_close(before[:, : row + 1], after[:, : row + 1])
    assert (before[:, row + 1] - after[:, row + 1]).abs().max() > 0.01


# --- drafting


def drafter_of(model: LlamaForCausalLM, target: Target, num_drafted: int = 3, kind=Drafter):
    return kind(copy.deepcopy(model), target, num_drafted)


def begun(drafter: Drafter, *texts: list[int]) -> Drafter:
    """A drafter whose target has read all of each text but the last token, which is the root."""
    tokens, lengths = target_model.pad([text[:-1] for text in texts])
    drafter.begin(tokens, lengths, torch.tensor([text[-1] for text in texts]), None)
    return drafter


@pytest.mark.parametrize("num_drafted", [1, 2, 5])
def test_drafts_are_the_models_own_greedy_continuation(target, num_drafted):
    """By transformers' own generate, without any of our cache."""
    model, asked = make_model(target), [PROMPT, *OTHER_PROMPTS]
    tree = begun(drafter_of(model, target, num_drafted), *asked).propose()
    tree.validate(target.vocab_size)
    assert tree.parents.tolist() == [[ROOT, *range(num_drafted)]] * 4
    options = {"max_new_tokens": num_drafted, "do_sample": False, "eos_token_id": None}
    for row, prompt in enumerate(asked):
        said = model.generate(torch.tensor([prompt]), pad_token_id=0, **options)[0]
        assert tree.tokens[row].tolist() == said[len(prompt) - 1 :].tolist()


@pytest.fixture(scope="module")
def memorised(target: Target, tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    """A model that knows the answer to PROMPT by heart; not to be changed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SMALL.new_module(target, [])
    folder, loop = tmp_path_factory.mktemp("memorised"), {"learning_rate": 5e-3, "total_steps": 250}
    return learn_by_heart(model, SMALL.loss(model, target), target, folder, **loop).eval()


@pytest.mark.parametrize("num_drafted", [1, 3, 4])
def test_one_memorised_conversation_is_drafted_to_the_cap(target, memorised, num_drafted):
    """Training and decoding agree on everything: anything misaligned keeps tau near 1."""
    answer = decode_autoregressively(target, PROMPT, max_new_tokens=40).tokens
    tokens = torch.tensor([PROMPT + answer])
    said = memorised(tokens[:, :-1]).logits.argmax(-1)[0, len(PROMPT) - 1 :]
    assert said.tolist() == answer, "not known by heart, so nothing is shown"
    drafter = drafter_of(memorised, target, num_drafted)
    run = decode(target, drafter, PROMPT, max_new_tokens=40)
    assert run.tokens == answer
    assert run.num_passes == math.ceil(39 / (num_drafted + 1)), f"tau is {run.tau:.2f}"
    untrained = drafter_of(make_model(target), target, num_drafted)
    assert decode(target, untrained, PROMPT, max_new_tokens=40).tau < 2


class Watched(Drafter):
    """Remembers each round's drafts, and its cache before and after drafting."""

    def begin(self, *arguments: object) -> None:
        super().begin(*arguments)
        self.rounds: list[tuple[Tensor, int, int, Tensor]] = []

    def propose(self) -> DraftTree:
        num_unread = int(self.pending[1])
        tree = super().propose()
        read = int(self.cache.lengths)
        self.rounds.append((tree.tokens[0], num_unread, read, self.cache.slots.clone()))
        return tree


def test_cache_after_every_round_is_that_of_a_fresh_prefill(target, memorised):
    """150 tokens, so the cache grows on the way."""
    watched = drafter_of(memorised, target, 3, Watched)
    run = decode(target, watched, PROMPT, max_new_tokens=150)
    text, committed = PROMPT + run.tokens, len(PROMPT) + 1
    fresh, _ = watched.model.prefill([text], len(text))
    for num_accepted, (tokens, _, read, slots) in zip(run.accepted, watched.rounds, strict=True):
        assert read == committed and tokens[0] == text[committed - 1]
        ours, theirs = slots[:, :, 0, :read], fresh.slots[:, :, 0, :read]
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        committed += num_accepted + 1
    # a chain accepted whole leaves its last token unread beside the new root
    seen = Counter(num_unread for _, num_unread, _, _ in watched.rounds)
    assert seen == {
        1: len(run.accepted) - run.accepted[:-1].count(3),
        2: run.accepted[:-1].count(3),
    }
    assert min(seen.values()) > 2 and len(set(run.accepted)) > 2


def test_drafts_of_a_batch_are_those_of_each_alone(target):
    model, asked = make_model(target), [PROMPT, *OTHER_PROMPTS]
    trees = begun(drafter_of(model, target, 4), *asked).propose()
    for row, prompt in enumerate(asked):
        alone = begun(drafter_of(model, target, 4), prompt).propose()
        assert torch.equal(trees.tokens[row], alone.tokens[0])


@torch.inference_mode()  # as in `decode`
def test_rows_that_accepted_differently_go_on_as_a_fresh_start_would(target):
    model, asked = make_model(target), [PROMPT, *OTHER_PROMPTS]
    drafter = begun(drafter_of(model, target, 3), *asked)
    drafted = drafter.propose().tokens
    num_accepted, bonus = torch.tensor([0, 3, 2, 3]), torch.tensor([11, 22, 33, 44])
    is_node = torch.arange(4) <= num_accepted[:, None]
    emitted = torch.cat([drafted[:, 1:], bonus[:, None]], 1)
    emitted = emitted.scatter(1, num_accepted[:, None], bonus[:, None]).masked_fill(~is_node, -1)
    path = torch.arange(4).expand(4, 4).masked_fill(~is_node, -1)
    drafter.observe(Verdict(path, num_accepted, emitted, bonus), None)
    rows = [3, 1, 0]  # the third has ended
    drafter.select(torch.tensor(rows))
    for row, found in zip(rows, drafter.propose().tokens, strict=True):
        text = asked[row] + drafted[row, 1 : 1 + num_accepted[row]].tolist() + [int(bonus[row])]
        expected = begun(drafter_of(model, target, 3), text).propose().tokens[0]
        assert torch.equal(found, expected), row


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_batch_of_ragged_prompts_is_lossless_and_decodes_as_each_alone(
    target, memorised, monkeypatch, temperature
):
    drafter = drafter_of(memorised, target, 2)
    runs = assert_ragged_batch_decodes_as_each_alone(target, drafter, monkeypatch, temperature)
    assert all(set(run.drafted) <= {2} for run in runs)


@pytest.mark.parametrize("family", ["qwen3", "gemma"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_target_that_drafts_for_itself_is_lossless(tiny_target_folder, family, temperature):
    """Every greedy draft is accepted, and of a sampled run what the draw happens to agree with."""
    other = target_model.load(str(tiny_target_folder(family)), dtype="float32", device="cpu")
    twin = target_model.load(str(tiny_target_folder(family)), dtype="float32", device="cpu")
    options = {"temperature": temperature, "seed": 3, "max_new_tokens": 61}
    plain = decode_autoregressively(other, PROMPT, **options)
    run = decode(other, Drafter(twin.model, other, 3), PROMPT, **options)
    assert run.tokens == plain.tokens and max(run.accepted) > 1
    assert temperature or run.accepted == [3] * 15


@pytest.mark.parametrize("num_drafted", [0, -1])
def test_a_chain_without_drafts_is_refused(target, num_drafted):
    with pytest.raises(ValueError, match=f"num_drafted is {num_drafted}"):
        Drafter(make_model(target), target, num_drafted)


# --- checkpoints


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_from_features_leaves_a_checkpoint_that_drafts(
    tiny_chat_folder, features, tmp_path, dtype
):
    target = target_model.load(str(tiny_chat_folder), dtype=dtype, device="cpu")
    recipe = replace(RECIPE, method=SMALL, epochs=3)
    out, card, _ = trained(recipe, target, features, tmp_path)
    assert card["recipe"]["method"]["hidden_size"] == 32
    drafter = Drafter.load(out, target)
    assert drafter.max_nodes == 4
    assert_says_what_the_target_says(target, drafter)


@pytest.mark.parametrize("is_tied", [True, False])
def test_what_is_saved_drafts_the_same_here_and_loads_into_transformers(target, tmp_path, is_tied):
    model = make_model(target)
    if not is_tied:
        model = LlamaForCausalLM(
            type(model.config)(**model.config.to_dict() | {"tie_word_embeddings": False})
        ).eval()
    draft_lm.save_model(model, tmp_path, num_drafted=5)
    saved, _ = checkpoints.load(tmp_path)
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    assert ("lm_head.weight" in saved) != is_tied
    loaded, num_drafted = draft_lm.load_model(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    tokens = torch.tensor([PROMPT])
    torch.testing.assert_close(loaded.eval()(tokens).logits, theirs(tokens).logits)
    expected = begun(Drafter(theirs, target, 5), PROMPT).propose()
    found = begun(Drafter.load(tmp_path, target), PROMPT).propose()
    assert num_drafted == 5 and torch.equal(found.tokens, expected.tokens)
    loaders = draft_lm.drafters(tmp_path, num_drafted=2)
    assert loaders["SpS"](target).num_drafted == 2
    assert draft_lm.drafters(tmp_path)["SpS"](target).num_drafted == 5
    assert draft_lm.DRAFTERS.keys() == loaders.keys()


def test_another_papers_checkpoint_is_refused(tmp_path):
    checkpoints.save(tmp_path, {"0.1.weight": torch.ones(1)}, {"model_type": "medusa"})
    named = "lacks hidden_size, num_hidden_layers, model.embed_tokens.weight"
    with pytest.raises(ValueError, match=f"holds no language model: it {named}"):
        draft_lm.load_model(tmp_path)


def test_misnamed_keys_are_listed_and_nothing_is_left_random(target, tmp_path):
    draft_lm.save_model(make_model(target), tmp_path, 3)
    tensors, config = checkpoints.load(tmp_path)
    tensors["norm.weight"] = tensors.pop("model.norm.weight")
    checkpoints.save(tmp_path, tensors, config)
    with pytest.raises(ValueError, match="missing: model.norm.weight; unknown: norm.weight"):
        draft_lm.load_model(tmp_path)


def test_a_model_of_another_vocabulary_is_refused_with_both_sizes(target, tmp_path):
    model = make_model(target)
    other = type(model.config)(**model.config.to_dict() | {"vocab_size": 120})
    draft_lm.save_model(LlamaForCausalLM(other), tmp_path, 3)
    with pytest.raises(ValueError, match="vocabulary of 120 tokens, but .* has 100"):
        Drafter.load(tmp_path, target)


def test_settings_are_those_of_the_68m_model_and_a_section_overrides_them():
    """Llama-68M's sizes; with one table for words in and out, as here, 43 millions are left."""
    with torch.device("meta"):
        words = torch.nn.Linear(4096, 32000)
        large = SimpleNamespace(
            vocab_size=32000, hidden_size=4096, max_context=2048, device="meta", head=words,
            name="7B",
        )  # fmt: skip
        model = DraftLM().new_module(large, [])
    table = model.get_input_embeddings().weight
    num_parameters = sum(p.numel() for p in model.parameters())
    assert [round(n / 1e6) for n in (num_parameters, num_parameters + table.numel())] == [43, 68]
    assert DraftLM.of({"hidden_size": 256, "num_drafted": 2}).num_drafted == 2
    with pytest.raises(TypeError, match="num_draft"):
        DraftLM.of({"num_draft": 3})
