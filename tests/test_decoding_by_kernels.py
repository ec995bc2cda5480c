"""Whole decodes through the Triton kernels, in the interpreter: attention, walks and cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy
import pytest
import torch
from scripted_drafters import Scripted, drafters
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM
from tree_cases import language_patched_once_a_launch  # noqa: F401

from specrepro import decoding, eagle3, kernel_launch, target_model, tree_verify
from specrepro.decoding import decode, decode_autoregressively
from specrepro.draft_tree import DraftTree
from specrepro.target_model import Target

PROMPTS = [[10, 20, 30, 40, 50], [60, 70, 80]]


def tiny_model() -> nn.Module:
    """Two grouped-query layers of a head size that the kernels have."""
    options = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 64}
    options |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = AutoConfig.for_model("llama", vocab_size=100, eos_token_id=None, **options)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight.data, std=2 / weight.shape[-1] ** 0.5)
    return model


@pytest.fixture(scope="module")
def target() -> Target:
    return Target(tiny_model(), None, "tiny")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the launchers that were called."""
    called: set[str] = set()

    def noted(name: str) -> Callable:
        launch = getattr(kernel_launch, name)

        def note(*arguments: object, **options: object) -> object:
            called.add(name)
            return launch(*arguments, **options)

        return note

    for name in ("attend", "walk_greedily", "walk_coupled", "keep"):
        monkeypatch.setattr(kernel_launch, name, noted(name))
    return called


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_decode_through_the_kernels_says_what_torch_says(target, launches, temperature) -> None:
    options = {"max_new_tokens": 8, "temperature": temperature, "seed": 3}
    words = [run.tokens for run in decode_autoregressively(target, PROMPTS, **options)]
    assert not launches, "on a CPU torch is the default"
    with tree_verify.using("triton"):
        runs = decode(target, Scripted(words, 6, 0.8, is_bushy=True), PROMPTS, **options)
    assert [run.tokens for run in runs] == words
    assert max(runs[0].accepted + runs[1].accepted) > 1, "no walk went deep"
    assert launches == {"attend", "keep", "walk_coupled" if temperature else "walk_greedily"}


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["alone", "batch"])
@pytest.mark.parametrize("name", drafters([]))
def test_every_kind_of_drafter_is_verified_by_the_kernels(target, launches, name, prompts) -> None:
    plain = decode_autoregressively(target, prompts, max_new_tokens=5)
    words = [run.tokens for run in plain]
    with tree_verify.using("triton"):
        runs = decode(target, drafters(words)[name], prompts, max_new_tokens=5)
    assert [run.tokens for run in runs] == words
    assert launches == {"attend", "keep", "walk_greedily"}


@pytest.fixture
def verdicts(monkeypatch: pytest.MonkeyPatch) -> list[list]:
    """Path, tokens and bonus of each verdict in turn, padding left out."""
    seen: list[list] = []
    judge = decoding.judge

    def noted(*arguments: object) -> tree_verify.Verdict:
        verdict = judge(*arguments)
        for path, tokens in zip(verdict.path.tolist(), verdict.tokens.tolist(), strict=True):
            seen.append([[x for x in row if x != tree_verify.NO_NODE] for row in (path, tokens)])
        seen.append(verdict.bonus.tolist())
        return verdict

    monkeypatch.setattr(decoding, "judge", noted)
    return seen


@pytest.mark.slow
def test_the_embedded_target_decodes_through_the_kernels_tree_by_tree(verdicts) -> None:
    embedded = target_model.load(dtype="float32", device="cpu")
    prompt = embedded.tokenizer.encode("The capital of France is")
    options = {"max_new_tokens": 9, "ignore_stop": True}
    words = decode_autoregressively(embedded, prompt, **options).tokens
    by_backend = {}
    for backend in ("torch", "triton"):
        verdicts.clear()
        drafter = Scripted([words], 7, 0.8, is_bushy=True, vocab_size=embedded.vocab_size)
        with tree_verify.using(backend):
            run = decode(embedded, drafter, prompt, **options)
        assert run.tokens == words and max(run.accepted) > 1
        by_backend[backend] = list(verdicts)
    assert by_backend["triton"] == by_backend["torch"] and len(by_backend["torch"]) > 3


def test_a_tree_is_checked_and_packed_once_a_pass_and_not_once_a_layer(
    target, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: Counter[str] = Counter()

    def count(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def counting(*arguments: object, **options: object) -> object:
            counts[name] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, counting)

    for owner, name in (
        (DraftTree, "packed_ancestors"),
        (DraftTree, "validate"),
        (target_model, "attention_mask"),
        (kernel_launch, "attend"),
    ):
        count(owner, name)
    tree = DraftTree(torch.tensor([[5, 6, 7], [8, 9, 9]]), torch.tensor([[-1, 0, 0], [-1, 0, 1]]))
    cache, _ = target.prefill(PROMPTS, capacity=20)
    with tree_verify.using("triton"):
        by_kernels = target.verify(cache, tree)
    assert counts == {"attend": 2, "packed_ancestors": 1, "validate": 1}
    counts.clear()
    torch.testing.assert_close(target.verify(cache, tree).logits, by_kernels.logits)
    assert counts == {"attention_mask": 1}


class ReadsBack(TorchDispatchMode):
    """Counts what would have a GPU's host wait for it: values, and sizes that depend on values."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        super().__init__()
        self.count, as_list = 0, torch.Tensor.tolist

        def counting(tensor: torch.Tensor) -> list:
            self.count += tensor.shape != (2, 6)  # the layout of a cache is on the host anyway
            return as_list(tensor)

        monkeypatch.setattr(torch.Tensor, "tolist", counting)

    def __torch_dispatch__(self, op, types, arguments=(), options=None) -> object:  # noqa: ANN001
        name = op.__name__.split(".")[0]
        indices = arguments[1] if name.strip("_").startswith("index") else ()
        by_mask = isinstance(indices, (list, tuple)) and any(
            index is not None and index.dtype == torch.bool for index in indices
        )
        self.count += by_mask or name in ("item", "is_nonzero", "nonzero", "masked_select")
        return op(*arguments, **(options or {}))


@pytest.mark.parametrize(("temperature", "most"), [(0.0, 7), (1.0, 10)])
def test_a_round_waits_for_the_device_a_few_times_however_many_sequences_it_has(
    target, monkeypatch: pytest.MonkeyPatch, temperature, most
) -> None:
    head = eagle3.DraftHead(eagle3.head_config(target, target.vocab_size))
    drafter = eagle3.Drafter(head, target, eagle3.TreeConfig(depth=2, top_k=3, total_tokens=8))
    options = {"max_new_tokens": 20, "temperature": temperature}
    for num_prompts in (1, 3):  # a CPU asks more for 4 and more
        before = []
        with tree_verify.using("triton"), ReadsBack(monkeypatch) as reads:
            decode(
                target,
                drafter,
                [PROMPTS[0]] * num_prompts,
                on_round=lambda _: before.append(reads.count),  # noqa: B023
                **options,
            )
        assert len(before) > 5 and max(numpy.diff(before[:5])) <= most


def test_a_tree_too_large_for_the_cache_is_refused_before_the_kernels_run(target, launches) -> None:
    cache, _ = target.prefill(PROMPTS, capacity=7)
    tree = DraftTree.chain(torch.full((2, 3), 5))
    with tree_verify.using("triton"), pytest.raises(ValueError, match="from 3 to 5; with 3 nodes"):
        target.verify(cache, tree)
    assert not launches


def test_another_backend_holds_inside_the_block_alone() -> None:
    tensor = torch.zeros(1)
    with tree_verify.using("triton"):
        assert tree_verify.takes_kernels(tensor)
        with tree_verify.using("torch"):
            assert not tree_verify.takes_kernels(tensor)
        assert tree_verify.takes_kernels(tensor)
    assert not tree_verify.takes_kernels(tensor)
    with pytest.raises(ValueError, match="unknown backend 'cuda'"), tree_verify.using("cuda"):
        pass
