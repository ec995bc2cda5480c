"""Passes through `torch.compile` are those of the model as it is, whatever the sizes.

`aot_eager` traces and functionalises as `inductor` does, and leaves the arithmetic as it was.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from scripted_drafters import Scripted
from test_target_model import (
    PROMPT_LENGTHS,
    VOCAB_SIZE,
    plain_model,
    random_prompts,
    random_trees,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from tree_cases import language_patched_once_a_launch  # noqa: F401

from specrepro import kernel_launch, target_model, tree_verify
from specrepro.decoding import decode, decode_autoregressively
from specrepro.draft_tree import DraftTree
from specrepro.target_model import KVCache, Scores, Target

SIZES = [(2, 13, 40), (3, 9, 64), (5, 6, 50), (2, 2, 33)]  # sequences, nodes, capacity
SINGLES = [(1, 1, 40), (1, 7, 40), (2, 1, 40), (1, 12, 50), (1, 1, 30), (5, 1, 60)]


@dataclass(slots=True)
class Pair:
    """One model as it is and compiled, and how often it was: a graph that breaks is an error."""

    plain: Target
    compiled: Target
    counter: CompileCounterWithBackend


def pair(case: str, num_layers: int, backend: str = "aot_eager", **changes: object) -> Pair:
    torch._dynamo.reset()  # or what two models differ in would be taken for a size that varies
    model = plain_model(case, num_hidden_layers=num_layers, **changes)
    counter = CompileCounterWithBackend(backend)
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(torch, "compile", partial(torch.compile, backend=counter, fullgraph=True))
        compiled = Target(copy.deepcopy(model), None, "tiny", compile=True)
    return Pair(Target(model, None, "tiny"), compiled, counter)


@pytest.fixture(scope="module")
def llama() -> Iterator[Pair]:
    """With a head size that the kernels have; what was compiled serves the tests after."""
    torch.manual_seed(0)
    yield pair("llama", 1, head_dim=64)
    torch._dynamo.reset()


@dataclass(slots=True)
class Verified:
    scores: Scores
    slots: list[Tensor]  # of each sequence, (layers, 2, prefix and tree, Hkv, D)


def tree_of(batch: int, nodes: int) -> DraftTree:
    if nodes > 3:
        return random_trees(batch, nodes)
    return DraftTree.chain(torch.randint(3, VOCAB_SIZE, (batch, nodes)))


@torch.inference_mode()
def verified(target: Target, batch: int, nodes: int, capacity: int) -> Verified:
    """A pass over trees of this size: the same for every target."""
    torch.manual_seed(nodes)
    random.seed(nodes)
    cache, _ = target.prefill(random_prompts(PROMPT_LENGTHS[:batch]), capacity)
    if batch > 2:  # a sequence has ended, so the cache is no longer dense
        cache, batch = cache.select(torch.arange(batch - 1)), batch - 1
    tree = tree_of(batch, nodes)
    scores, used = target.verify(cache, tree), cache.lengths + tree.num_nodes
    return Verified(scores, [cache.slots[:, :, row, :n] for row, n in enumerate(used.tolist())])


def assert_same_pass(found: Verified, expected: Verified) -> None:
    near = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    near(found.scores.logits, expected.scores.logits)
    near(found.scores.taps, expected.scores.taps)
    near(found.scores.hidden, expected.scores.hidden)
    near(found.slots, expected.slots)


def test_layers_with_windows_and_caps_are_traced_too() -> None:
    gemma = pair("gemma2", 2)
    for size in SIZES[:2]:
        assert_same_pass(verified(gemma.compiled, *size), verified(gemma.plain, *size))
    assert gemma.counter.frame_count == 1


def test_one_graph_serves_trees_and_batches_of_every_size_but_one(llama: Pair) -> None:
    for size in SIZES:
        assert_same_pass(verified(llama.compiled, *size), verified(llama.plain, *size))
    assert llama.counter.frame_count == 1
    for size in SINGLES:
        assert_same_pass(verified(llama.compiled, *size), verified(llama.plain, *size))
    assert llama.counter.frame_count == 4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_compiled_target_decodes_the_same_tokens(temperature: float, llama: Pair) -> None:
    prompts, options = random_prompts((9, 5, 7)), {"max_new_tokens": 12, "seed": 1}
    options |= {"temperature": temperature, "ignore_stop": True}
    words = [run.tokens for run in decode_autoregressively(llama.plain, prompts, **options)]
    drafter = Scripted(words, 6, 0.8, is_bushy=True, vocab_size=VOCAB_SIZE)
    runs = decode(llama.compiled, drafter, prompts, **options)
    assert [run.tokens for run in runs] == words
    assert max(max(run.accepted) for run in runs) > 1, "no walk went deep"
    assert llama.counter.frame_count <= 4


def test_a_compiled_pass_goes_through_the_kernels(
    llama: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches, attend = [], kernel_launch.attend
    monkeypatch.setattr(
        kernel_launch, "attend", lambda *args, **kw: launches.append(args) or attend(*args, **kw)
    )
    num_graphs = llama.counter.frame_count
    for size in SIZES[:2]:
        expected = verified(llama.plain, *size)
        assert not launches, "on a CPU torch is the default"
        with tree_verify.using("triton"):
            assert_same_pass(verified(llama.compiled, *size), expected)
        assert len(launches) == 1, "once a layer"
        launches.clear()
    assert llama.counter.frame_count == num_graphs + 1


def test_the_node_says_truly_what_it_reads_writes_and_returns() -> None:
    cache = KVCache(torch.zeros(2, 2, 2, 20, 2, 8), torch.tensor([9, 4]))
    tree_pass = target_model._Pass.over_tree(cache, random_trees(2, 6), {None})
    q, k, v = (torch.randn(2, 6, heads, 8) for heads in (4, 2, 2))
    arguments = (q, k, v, *tree_pass.tensors(None), 1, None, None, None)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(target_model._graph_node, arguments, test_utils=checks)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_compiling_is_asked_for_when_a_target_is_loaded(
    is_compiled: bool, tiny_target_folder
) -> None:
    target = target_model.load(str(tiny_target_folder()), compile=is_compiled)
    assert isinstance(target.tree_decoder, torch._dynamo.OptimizedModule) == is_compiled
    assert target.decoder is target.model.get_decoder()


def test_a_model_taken_over_twice_is_tapped_once(tmp_path: Path) -> None:
    model, tokens = plain_model("llama", num_hidden_layers=2), torch.tensor([[5, 6, 7]])
    first, _ = Target(model, None, "tiny").features(tokens)
    again, _ = Target(model, None, "tiny").features(tokens)
    assert torch.equal(first, again) and again.shape == (1, 3, 3 * 32)


@pytest.mark.slow
@torch.inference_mode()
def test_generated_code_writes_each_layers_keys_and_values_to_their_own_slots() -> None:
    # pytorch/pytorch 198068: a view that a node of the graph writes to loses its offset
    torch._dynamo.reset()

    def two_layers(q: Tensor, k: Tensor, v: Tensor, *given: Tensor | None) -> Tensor:
        first, second = (partial(target_model._graph_node, layer=n) for n in (0, 1))
        options = {"scale": None, "window": None, "softcap": None}
        out = first(q, k, v, *given, **options)
        return second(out + 1, 2 * k, v, *given, **options)

    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(two_layers, backend=counter, fullgraph=True)
    for batch, nodes, capacity in ((2, 9, 30), (3, 6, 41)):
        q, k, v = (torch.randn(batch, nodes, heads, 8) for heads in (4, 2, 2))
        slots = torch.randn(2, 2, batch, 2, capacity, 8).transpose(3, 4)
        found, expected, tree, outs = slots.clone(), slots, tree_of(batch, nodes), []
        for attend, memory in ((compiled, found), (two_layers, expected)):
            cache = KVCache(memory, torch.arange(3, 3 + batch))
            tree_pass = target_model._Pass.over_tree(cache, tree, {None})
            target_model._let_sizes_vary(tree_pass, tree.depths())
            for x in (q, k, v):
                torch._dynamo.maybe_mark_dynamic(x, [0, 1])
            outs.append(attend(q, k, v, *tree_pass.tensors(None)))
        torch.testing.assert_close(outs[0], outs[1])
        torch.testing.assert_close(found, expected)
    assert counter.frame_count == 1
