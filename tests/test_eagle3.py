"""EAGLE-3: the released head, training that sees what decoding will see, and EAGLE-2's tree."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from drafter_cases import (
    OTHER_PROMPTS,
    PROMPT,
    answer_to_prompt,
    assert_ragged_batch_decodes_as_each_alone,
    conversation,
    learn_by_heart,
    make_batch,
    two_conversations,
)
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from specrepro import checkpoints, corpus, eagle3, recipes, target_model
from specrepro.decoding import decode, decode_autoregressively
from specrepro.draft_tree import PADDING, ROOT, DraftTree
from specrepro.eagle3 import (
    Drafter,
    DraftHead,
    HeadConfig,
    TrainingConfig,
    TrainingTimeTest,
    TreeConfig,
)
from specrepro.target_model import Scores, Target

LLAMA_3_8B = HeadConfig(4096, 14336, 32, 8, 128, 128256)
DRAFT_VOCABULARY = 40


@pytest.fixture(scope="module")
def target(tiny_target_folder) -> Target:
    return target_model.load(str(tiny_target_folder()), dtype="float32", device="cpu")


def make_head(
    target: Target,
    draft_vocab_size: int = DRAFT_VOCABULARY,
    seed: int = 0,
    config: HeadConfig | None = None,
) -> DraftHead:
    """Random weights large enough that every part of the head matters to the result."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = DraftHead(config or eagle3.head_config(target, draft_vocab_size))
        for weight in head.parameters():
            # norms differ from 1, or a head that forgets one passes
            weight.data = torch.randn_like(weight) * (
                1.5 / weight.shape[-1] ** 0.5 if weight.dim() > 1 else 0.3
            ) + (weight.dim() == 1)
        if hasattr(head, "d2t"):
            token_ids = torch.randperm(target.vocab_size)[:draft_vocab_size]
            head.set_vocabulary(token_ids.sort().values)
    return head


def training_time_test(head: DraftHead, target: Target, **config: object) -> TrainingTimeTest:
    return TrainingTimeTest(head, target, TrainingConfig(**config))


def all_rows(batch: corpus.Batch) -> Tensor:
    return torch.arange(batch.tokens.shape[1]).expand_as(batch.tokens)


def unrolled(head: DraftHead, target: Target, batch: corpus.Batch, steps: int) -> list[Tensor]:
    """Features (b, n, H) of every row after each step, by the trainer's own code."""
    embedding, features = target.model.get_input_embeddings().weight, head.fuse(head.read(batch))
    return list(eagle3.unroll(head, embedding, batch.tokens, features, all_rows(batch), steps))


# --- what all of it should compute, written out


def norm(module: nn.Module, x: Tensor) -> Tensor:
    return module.weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def turned(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary embedding of x (b, n, heads, D) as a product of complex numbers."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * 10000.0 ** -(torch.arange(half) / half)
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones(()), angles)[:, None]
    return torch.cat([z.real, z.imag], -1)


def unrolled_reference(
    head: DraftHead, embedding: Tensor, tokens: Tensor, taps: Tensor, steps: int, variant: str = ""
) -> list[Tensor]:
    """Section 3.2 and Fig. 6 as one dense attention over every step's keys; or a wrong variant."""
    b, n = tokens.shape
    layer, attention = head.midlayer, head.midlayer.self_attn
    features, found, keys, values = taps @ head.fc.weight.T, [], [], []
    for step in range(steps):
        words = F.pad(tokens, (0, steps))[:, step + 1 : step + 1 + n]
        parts = [norm(layer.input_layernorm, embedding[words]), norm(layer.hidden_norm, features)]
        x = torch.cat(parts[::-1] if variant == "feature first" else parts, -1)
        shift = {"no shift": 0, "double shift": 2}.get(variant, 1) * step
        positions = torch.arange(n) + shift
        q, k, v = (
            (x @ projection.weight.T).view(b, n, -1, head.config.head_dim)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        keys.append(turned(k, positions))
        values.append(v)
        attended = dense_attention(
            turned(q, positions), torch.cat(keys, 1), torch.cat(values, 1),
            fig_6_mask(n, step, variant),
        )  # fmt: skip
        residual = parts[1] if variant == "normed residual" else features
        y = residual + attended.flatten(2) @ attention.o_proj.weight.T
        z = norm(layer.post_attention_layernorm, y)
        gated = F.silu(z @ layer.mlp.gate_proj.weight.T) * (z @ layer.mlp.up_proj.weight.T)
        features = y + gated @ layer.mlp.down_proj.weight.T
        found.append(features)
        if variant == "normed recurrence":
            features = norm(head.norm, features)
    return found


def fig_6_mask(n: int, step: int, variant: str = "") -> Tensor:
    """(n, (step + 1) * n) bool: [causal | diagonal | diagonal | ...]."""
    causal = torch.ones(n, n, dtype=torch.bool).tril(-step if variant == "shrinking block" else 0)
    return torch.cat([causal] + [torch.eye(n, dtype=torch.bool)] * step, -1)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """(b, m, Hq, D) from q (b, m, Hq, D), k and v (b, s, Hkv, D) and mask (..., m, s)."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bmhd,bshd->bhms", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("bhms,bshd->bmhd", weights, v)


def loss_reference(
    head: DraftHead, target: Target, batch: corpus.Batch, steps: int, decay: float = 0.8
) -> Tensor:
    """Row by row: decay ** j / (b n) times the soft cross-entropy of each row that counts."""
    embedding, ids = target.model.get_input_embeddings().weight, head.draft_token_ids()
    chain = unrolled_reference(head, embedding, batch.tokens, batch.taps, steps)
    b, n = batch.tokens.shape
    total = torch.zeros(())
    for j, row, i in itertools.product(range(steps), range(b), range(n)):
        if i + 2 + j >= n or not batch.is_answer[row, [i + 1 + j, i + 2 + j]].all():
            continue
        if batch.choices[row, i + 1 + j] not in ids:
            continue
        teacher = target.logits(batch.hidden[row, i + 1 + j])[ids].softmax(-1)
        log_q = (norm(head.norm, chain[j][row, i]) @ head.lm_head.weight.T).log_softmax(-1)
        total = total - decay**j * (teacher * log_q).sum() / (b * n)
    return total


def gradients_of(loss: Tensor, head: DraftHead) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(head.parameters()))
    return {name: g for (name, _), g in zip(head.named_parameters(), found, strict=True)}


def assert_same_gradients(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name, gradient in one.items():
        assert gradient.abs().max() > 1e-6, f"{name} has no gradient, so nothing is compared"
        torch.testing.assert_close(gradient, other[name], rtol=1e-3, atol=1e-6, msg=name)


# --- the head


def test_head_has_the_released_keys_and_shapes():
    with torch.device("meta"):
        state = DraftHead(LLAMA_3_8B).state_dict()
    layer, attention, mlp = "midlayer.", "midlayer.self_attn.", "midlayer.mlp."
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "d2t": (32000,),
        "t2d": (128256,),
        "fc.weight": (4096, 3 * 4096),
        layer + "input_layernorm.weight": (4096,),
        layer + "hidden_norm.weight": (4096,),
        layer + "post_attention_layernorm.weight": (4096,),
        attention + "q_proj.weight": (4096, 2 * 4096),
        attention + "k_proj.weight": (1024, 2 * 4096),
        attention + "v_proj.weight": (1024, 2 * 4096),
        attention + "o_proj.weight": (4096, 4096),
        mlp + "gate_proj.weight": (14336, 4096),
        mlp + "up_proj.weight": (14336, 4096),
        mlp + "down_proj.weight": (4096, 14336),
        "norm.weight": (4096,),
        "lm_head.weight": (32000, 4096),
    }
    assert (state["d2t"].dtype, state["t2d"].dtype) == (torch.int64, torch.bool)


def test_8b_head_has_424_7_million_parameters_and_no_embedding():
    with torch.device("meta"):
        head = DraftHead(LLAMA_3_8B)
    assert round(sum(p.numel() for p in head.parameters()) / 1e6, 1) == 424.7
    assert not any("embed" in name for name in head.state_dict())


def test_fusion_takes_the_targets_width_where_it_differs():
    with torch.device("meta"):
        head = DraftHead(replace(LLAMA_3_8B, target_hidden_size=5120))
    assert head.fc.weight.shape == (4096, 3 * 5120)


def test_offsets_and_mask_name_the_same_tokens(target):
    head, token_ids = make_head(target), torch.randperm(100)[:DRAFT_VOCABULARY].sort().values
    head.set_vocabulary(token_ids)  # over an earlier vocabulary
    assert head.t2d.sum() == DRAFT_VOCABULARY
    offsets = torch.arange(DRAFT_VOCABULARY) + head.d2t
    assert torch.equal(head.t2d.nonzero()[:, 0], offsets) and torch.equal(offsets, token_ids)
    assert torch.equal(head.draft_token_ids(), token_ids)


def test_vocabulary_is_the_most_frequent_tokens_and_then_unused_low_ids():
    answers = [corpus.Answer("", 1, 0.0, 0, tokens) for tokens in ([9, 9, 9, 4, 4], [7, 7, 7, 7])]
    assert corpus.most_frequent_tokens(answers, 10, 2).tolist() == [7, 9]
    assert corpus.most_frequent_tokens(answers, 10, 5).tolist() == [0, 1, 4, 7, 9]


def test_vocabulary_counts_answers_and_nothing_else(target):
    answers = [corpus.Answer("a", 3, 0.0, 0, [50, 50, 60]), corpus.Answer("b", 3, 0.0, 0, [50, 70])]
    head = eagle3.new_head(target, answers, eagle3.head_config(target, 3), "random")
    assert head.draft_token_ids().tolist() == [50, 60, 70]


def test_full_vocabulary_has_no_buffers(target):
    head = eagle3.new_head(target, [], eagle3.head_config(target, 32000), "random")
    assert not {"d2t", "t2d"} & head.state_dict().keys()
    assert head.config.draft_vocab_size == target.vocab_size
    assert head.draft_token_ids().tolist() == list(range(target.vocab_size))


def test_head_starts_from_the_target_where_asked(target):
    answers, config = [corpus.Answer("a", 3, 0.0, 0, [50, 60, 70])], eagle3.head_config(target, 3)
    head = eagle3.new_head(target, answers, config, "target")
    assert torch.equal(head.lm_head.weight, target.head.weight[[50, 60, 70]])
    assert torch.equal(head.norm.weight, target.decoder.norm.weight)
    random = eagle3.new_head(target, answers, config, "random")
    assert not torch.equal(random.lm_head.weight, target.head.weight[[50, 60, 70]])
    with pytest.raises(ValueError, match="unknown lm_head_init 'zeros'; choose random or target"):
        eagle3.new_head(target, answers, config, "zeros")


# --- training-time test


WRONG_FROM_STEP = {
    "feature first": 0,
    "normed residual": 0,
    "normed recurrence": 1,
    "shrinking block": 1,  # SpecForge pull request 244, EAGLE 09b1628
    "no shift": 1,  # the shift that SpecForge pull request 244 added
    "double shift": 1,  # EAGLE 4947382, reverted in f276fcd
}


def test_unrolling_is_fig_6_written_out(target):
    head, batch = make_head(target), two_conversations(target)
    embedding = target.model.get_input_embeddings().weight
    expected = unrolled_reference(head, embedding, batch.tokens, batch.taps, 4)
    for found, wanted in zip(unrolled(head, target, batch, 4), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", WRONG_FROM_STEP)
def test_unrolling_is_not_a_known_mistake(target, variant):
    head, batch = make_head(target), two_conversations(target)
    embedding = target.model.get_input_embeddings().weight
    wrong = unrolled_reference(head, embedding, batch.tokens, batch.taps, 3, variant)
    for step, (found, mistaken) in enumerate(
        zip(unrolled(head, target, batch, 3), wrong, strict=True)
    ):
        distance = (found - mistaken).abs().mean() / found.abs().mean()
        is_wrong = step >= WRONG_FROM_STEP[variant]
        assert distance > 0.01 if is_wrong else distance < 1e-5, f"step {step}: {distance:.2g}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("step", [0, 1, 3])
def test_diagonal_blocks_are_dense_attention_under_the_explicit_mask(dtype, step):
    b, n, rows = 2, 7, torch.tensor([[0, 3, 6], [5, 2, 1]])
    q = torch.randn(b, 3, 4, 8, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(b, step + 1, n, 2, 8, dtype=dtype, requires_grad=True) for _ in range(2))
    at = rows[:, :, None, None].expand(-1, -1, 2, 8)
    own = [[x[:, s].gather(1, at) for s in range(1, step + 1)] for x in (k, v)]
    found = eagle3.test_time_attention(q, k[:, 0], v[:, 0], *own, rows)
    mask = fig_6_mask(n, step)[rows][:, None]
    expected = dense_attention(q, k.flatten(1, 2), v.flatten(1, 2), mask)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    direction = torch.randn_like(found)
    for ours, theirs in zip(
        torch.autograd.grad((found * direction).sum(), (q, k, v)),
        torch.autograd.grad((expected * direction).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 4])
def test_loss_is_the_sum_of_its_steps_written_out(target, steps):
    """One step is plain soft cross-entropy."""
    head, batch = make_head(target), two_conversations(target)
    loss, _ = training_time_test(head, target, steps=steps)(batch)
    expected = loss_reference(head, target, batch, steps=steps)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert_same_gradients(gradients_of(loss, head), gradients_of(expected, head))


def test_without_weight_later_steps_leave_plain_training(target):
    head, batch = make_head(target), two_conversations(target)
    loss, _ = training_time_test(head, target, steps=4)(batch)
    first, _ = training_time_test(head, target, steps=4, step_decay=0.0)(batch)
    alone, _ = training_time_test(head, target, steps=1)(batch)
    torch.testing.assert_close(first, alone)
    assert loss > first + 0.1


CAPPED = {"gemma2": {"final_logit_softcapping": 3.0}, "granite": {"logits_scaling": 3.0}}


@pytest.mark.parametrize("family", CAPPED)
def test_teacher_is_what_the_target_makes_of_its_logits(family):
    """Soft-capped or scaled over the draft vocabulary as over the whole."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "head_dim": 16}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100}
    config = AutoConfig.for_model(family, **sizes, **CAPPED[family], dtype="float32")
    model = AutoModelForCausalLM.from_config(config)
    for weight in model.parameters():
        weight.data.normal_(std=0.5)
    capped = Target(model, None, family)
    head, batch = make_head(capped), two_conversations(capped)
    loss, _ = training_time_test(head, capped, steps=2)(batch)
    torch.testing.assert_close(loss, loss_reference(head, capped, batch, steps=2))
    uncapped = training_time_test(head, capped, steps=2)
    uncapped.final_logits = lambda logits: logits
    assert (uncapped(batch)[0] - loss).abs() > 0.01 * loss, "the cap did not matter here"


def test_gradient_is_the_slope_of_the_loss(target):
    head, batch = make_head(target), two_conversations(target)
    test = training_time_test(head, target, steps=3)
    for name, gradient in gradients_of(test(batch)[0], head).items():
        parameter = head.get_parameter(name).data
        move = 0.01 * gradient / gradient.norm()
        with torch.no_grad():
            parameter.add_(move)
            after = test(batch)[0]
            parameter.sub_(2 * move)
            before = test(batch)[0]
            parameter.add_(move)
        slope = ((after - before) / 0.02).item()
        assert slope == pytest.approx(gradient.norm().item(), rel=0.01), name


def decode_time_chain(head: DraftHead, target: Target, tokens: Tensor, row: int) -> list[Tensor]:
    """What the drafter computes when it decodes from `row` and drafts the data's own tokens."""
    drafter = Drafter(copy.deepcopy(head), target, TreeConfig(depth=8, top_k=1))
    prefix, root = tokens[None, : row + 1], tokens[row + 1 : row + 2]
    drafter.begin(prefix, torch.tensor([row + 1]), root, Scores(None, *target.features(prefix)))
    found, ancestors = [drafter._extend()], torch.zeros(1, 1, 0, dtype=torch.bool)
    for step, token in enumerate(tokens[row + 2 :]):
        ancestors = F.pad(ancestors, (0, 1), value=True)
        drafter._reserve(step + 1)
        feature = drafter._expand(token[None, None], found[-1][:, None], ancestors, step)
        found.append(feature[:, 0])
    return found


def test_each_step_of_each_row_is_a_decode_time_chain(target):
    """Position, mask and shift errors all end here."""
    head, batch = make_head(target), two_conversations(target)
    trained = unrolled(head, target, batch, steps=5)
    for row in (0, 7, 13):
        chain = decode_time_chain(head, target, batch.tokens[0], row)
        for step in range(5):
            torch.testing.assert_close(
                chain[step][0], trained[step][0, row], rtol=1e-4, atol=1e-4, msg=f"{row}, {step}"
            )


@pytest.mark.parametrize("step", [0, 1, 3])
def test_no_row_sees_a_token_it_is_to_predict(target, step):
    head, batch, row = make_head(target), two_conversations(target), 8
    tokens = batch.tokens.clone()
    tokens[:, row + 2 + step :] = (tokens[:, row + 2 + step :] + 40) % 90 + 5
    before = unrolled(head, target, batch, steps=5)
    after = unrolled(head, target, make_batch(target, tokens, batch.is_answer), steps=5)
    for j in range(step + 1):
        assert torch.equal(before[j][:, : row + 1], after[j][:, : row + 1])
    assert (before[step + 1][:, row] - after[step + 1][:, row]).abs().max() > 0.01


def test_supervised_rows_of_a_conversation_of_six_tokens():
    """Prompt x0 x1, answer x2 x3 x4 and its end, padding x5; decoding starts from row 1."""
    is_answer = torch.tensor([[0, 0, 1, 1, 1, 0]]).bool()

    def rows(step: int, reference_mask: bool) -> list[int]:
        mask = eagle3.supervised_rows(is_answer, step, reference_mask)
        return mask[0].nonzero()[:, 0].tolist()

    assert [rows(step, False) for step in range(4)] == [[1, 2], [0, 1], [0], []]
    # the released trainer's misses row 1 at step 0 and trains row 4 to predict past the end
    assert [rows(step, True) for step in range(4)] == [[2, 3, 4], [1, 2, 3], [0, 1, 2], [0, 1]]


def test_nothing_past_the_end_of_a_sequence_is_supervised():
    is_answer = torch.tensor([[0, 0, 1, 1, 1, 1]]).bool()
    for step in range(8):
        mask = eagle3.supervised_rows(is_answer, step)
        assert all(row + 2 + step <= 5 for row in mask[0].nonzero()[:, 0].tolist())


@pytest.mark.parametrize("reference_mask", [False, True])
def test_loss_reads_the_teacher_where_it_supervises_and_nowhere_else(target, reference_mask):
    head, batch = make_head(target, target.vocab_size), two_conversations(target)
    test = training_time_test(head, target, steps=2, reference_mask=reference_mask)
    before, read = test(batch)[0], []
    for place in range(20):
        hidden = batch.hidden.clone()
        hidden[1, place] += torch.randn(hidden.shape[-1])
        if test(replace(batch, hidden=hidden))[0] != before:
            read.append(place)
    # the answer is 9..16; the reference's rows read one further, past its end
    first, last = (10, 17) if reference_mask else (9, 15)
    assert read == list(range(first, last + 1))


def test_rows_whose_teacher_prefers_an_undrafted_token_are_left_out(target):
    head, batch = make_head(target), two_conversations(target)
    test = training_time_test(head, target, steps=2)
    place = next(i for i in range(6, 19) if batch.choices[0, i] in head.draft_token_ids())
    choices = batch.choices.clone()
    choices[0, place] = (~head.t2d).nonzero()[0, 0]
    without = replace(batch, choices=choices)
    loss, fewer = test(batch)[0], test(without)[0]
    torch.testing.assert_close(fewer, loss_reference(head, target, without, steps=2))
    assert fewer < loss - 1e-3
    choices[:] = choices[0, place]
    nothing = test(replace(batch, choices=choices))[0]
    assert nothing == 0 and not any(g.any() for g in gradients_of(nothing, head).values())


def test_reported_agreement_and_tau_follow_their_definition(target):
    head, batch = make_head(target), two_conversations(target)
    _, metrics = training_time_test(head, target, steps=3)(batch)
    agrees = torch.zeros(3, 2, 20)
    for step, features in enumerate(unrolled(head, target, batch, 3)):
        drafted = head.draft_token_ids()[head.logits(features).argmax(-1)]
        agrees[step] = drafted == eagle3.shift_left(batch.choices, step + 1)
        agrees[step] *= eagle3.supervised_rows(batch.is_answer, step)
    starts = eagle3.supervised_rows(batch.is_answer, 0)
    for step in range(3):
        expected = agrees[step][starts].mean().item()
        assert metrics[f"agreement_{step}"] == pytest.approx(expected)
    tau = 1 + agrees.cumprod(0)[:, starts].mean(1).sum().item()
    assert metrics["simulated_tau"] == pytest.approx(tau)


# --- the ablations of Table 2


def test_a_head_on_final_features_reads_the_final_state_and_no_tap(target, tmp_path):
    """Training, decoding and the checkpoint agree: step j of a row is the chain from it."""
    config = eagle3.head_config(target, DRAFT_VOCABULARY, "final")
    head, batch = make_head(target, config=config), two_conversations(target)
    assert head.fc.weight.shape == (64, 64)
    batch = replace(batch, taps=torch.full_like(batch.taps, torch.nan))
    embedding = target.model.get_input_embeddings().weight
    expected = unrolled_reference(head, embedding, batch.tokens, batch.hidden, 3)
    found = unrolled(head, target, batch, 3)
    for step in range(3):
        torch.testing.assert_close(found[step], expected[step], rtol=1e-4, atol=1e-4)
    eagle3.save_head(head, tmp_path)
    loaded, _ = eagle3.load_head(tmp_path)
    assert loaded.config == config
    chain = decode_time_chain(loaded, target, batch.tokens[0], row=7)
    trained = unrolled(loaded, target, batch, 3)
    for step in range(3):
        torch.testing.assert_close(chain[step][0], trained[step][0, 7], rtol=1e-4, atol=1e-4)


def test_the_command_line_sets_what_an_ablation_changes(monkeypatch, target):
    made = []
    monkeypatch.setattr(recipes, "load_target", lambda name: target)
    monkeypatch.setattr(recipes, "make_checkpoint", lambda recipe, *_, **__: made.append(recipe))
    recipes.main(eagle3.Eagle3, ["corpus", "out", "--set", "training.steps=1"])
    recipes.main(
        eagle3.Eagle3, ["corpus", "out", "--set", "features=final", "--set", "tree.top_k=3"]
    )
    assert made[0].method == eagle3.Eagle3(training=TrainingConfig(steps=1))
    assert made[1].method == eagle3.Eagle3(features="final", tree=TreeConfig(top_k=3))
    with pytest.raises(ValueError, match="no setting 'step'; choose steps, step_decay"):
        recipes.main(eagle3.Eagle3, ["corpus", "out", "--set", "training.step=1"])


@pytest.mark.parametrize("setting", ["training.reference_mask", "features", "=3", "tree.depth="])
def test_a_setting_without_a_value_is_no_default(setting, capsys):
    with pytest.raises(SystemExit):
        recipes.main(eagle3.Eagle3, ["corpus", "out", "--set", setting])
    assert f"{setting} is not NAME=VALUE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("training.reference_mask", "off-by-one", "is False, a bool, and cannot be 'off-by-one'"),
        ("training.steps", 0, "steps >= 1"),
        ("training.steps", "two", "is 5, a int, and cannot be 'two'"),
        ("tree.depth", None, "cannot be None"),
    ],
)
def test_a_setting_of_another_kind_is_refused(name, value, message):
    with pytest.raises(ValueError, match=message):
        recipes.with_setting(eagle3.Eagle3(), name, value)


def test_ablations_are_settings_of_the_method(target):
    answers = [corpus.Answer("a", 3, 0.0, 0, [50, 60, 70])]
    final = eagle3.Eagle3(draft_vocab_size=3, features="final")
    assert final.new_module(target, answers).config.features == "final"
    without_test = eagle3.Eagle3(training=TrainingConfig(steps=1))
    head, batch = make_head(target), two_conversations(target)
    loss, metrics = without_test.loss(head, target)(batch)
    torch.testing.assert_close(loss, loss_reference(head, target, batch, steps=1))
    assert {"agreement_0", "simulated_tau"} == metrics.keys()
    with pytest.raises(ValueError, match="unknown features 'taps'; choose final, or none for"):
        eagle3.Eagle3(features="taps").new_module(target, answers)


# --- drafting


@pytest.fixture(scope="module")
def memorised(target: Target, tmp_path_factory: pytest.TempPathFactory) -> DraftHead:
    """A head that knows the answer to PROMPT by heart; not to be changed."""
    answers = [answer_to_prompt(target)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = eagle3.head_config(target, DRAFT_VOCABULARY)
        head = eagle3.new_head(target, answers, config, "random")
    test, folder = training_time_test(head, target, steps=4), tmp_path_factory.mktemp("memorised")
    return learn_by_heart(head, test, target, folder, learning_rate=3e-3, total_steps=200)


def drafter_of(head: DraftHead, target: Target, kind: type = Drafter, **tree: int) -> Drafter:
    return kind(copy.deepcopy(head), target, TreeConfig(**tree))


def begun(drafter: Drafter, target: Target, tokens: list[int]) -> Drafter:
    """A drafter whose target has read all of `tokens` but the last, which is the root."""
    prefix = torch.tensor([tokens[:-1]])
    scores = Scores(None, target.features(prefix)[0], None)
    drafter.begin(prefix, torch.tensor([len(tokens) - 1]), torch.tensor(tokens[-1:]), scores)
    return drafter


def test_one_memorised_conversation_is_drafted_to_the_cap(target, memorised):
    """Training and decoding agree on everything: anything misaligned keeps tau near 1."""
    answer = decode_autoregressively(target, PROMPT, max_new_tokens=40).tokens
    batch = conversation(target, PROMPT, answer)
    _, metrics = training_time_test(memorised, target, steps=4)(batch)
    for step in range(4):  # of 39 rows to start from, the last `step` have nothing left to predict
        assert metrics[f"agreement_{step}"] > 0.97 * (39 - step) / 39
    for top_k, total_tokens in ((1, 5), (4, 53)):  # a chain, and a tree that nothing is pruned from
        tree = {"depth": 3, "top_k": top_k, "total_tokens": total_tokens}
        run = decode(target, drafter_of(memorised, target, **tree), PROMPT, max_new_tokens=40)
        assert run.tokens == answer
        assert run.num_passes == math.ceil(39 / 5), f"levels + 1 is 5 but tau is {run.tau:.2f}"
        untrained = drafter_of(make_head(target), target, **tree)
        assert decode(target, untrained, PROMPT, max_new_tokens=40).tau < 2


class FeatureFirst(eagle3.MixingLayer):
    """Concatenates in the other order."""

    def mixed_input(self, embeddings: Tensor, features: Tensor) -> Tensor:
        return super().mixed_input(embeddings, features).roll(features.shape[-1], -1)


class NormedRecurrence(Drafter):
    """Goes on from the feature that the output head reads, not from the layer's own."""

    def _expand(self, tokens: Tensor, features: Tensor, *rest: object) -> Tensor:
        return super()._expand(tokens, self.head.norm(features), *rest)


def test_known_mistakes_of_drafting_change_no_word_and_cost_tau(target, memorised):
    sizes = {"depth": 4, "top_k": 4, "total_tokens": 24}
    swapped, normed = (
        drafter_of(memorised, target, kind, **sizes) for kind in (Drafter, NormedRecurrence)
    )
    swapped.head.midlayer.__class__ = FeatureFirst
    honest, *mistaken = (
        decode(target, one, PROMPT, max_new_tokens=40)
        for one in (drafter_of(memorised, target, **sizes), swapped, normed)
    )
    for run in mistaken:
        assert run.tokens == honest.tokens and run.tau < honest.tau - 0.5, f"{run.tau:.2f}"


class Watched(Drafter):
    """Remembers each round's last feature and the cache before and after drafting."""

    def begin(self, *arguments: object) -> None:
        super().begin(*arguments)
        self.rounds: list[tuple[Tensor, int, Tensor, Tensor]] = []

    def propose(self) -> DraftTree:
        last = self._extend()
        length, before = int(self.lengths), self.cache.clone()
        tree = self._grow(last)
        self.rounds.append((last[0], length, before, self.cache.clone()))
        return tree


def test_incremental_drafting_is_one_full_pass_over_target_features(target, memorised):
    watched = drafter_of(memorised, target, Watched, depth=3, top_k=4, total_tokens=12)
    run = decode(target, watched, PROMPT, max_new_tokens=60)
    tokens = PROMPT + run.tokens
    full = begun(drafter_of(memorised, target), target, tokens)
    full._extend()
    whole = make_batch(target, torch.tensor([tokens]), torch.ones(1, len(tokens)).bool())
    features = unrolled(memorised, target, whole, steps=1)[0][0]
    committed = len(PROMPT)
    for num_accepted, (last, length, before, after) in zip(
        run.accepted, watched.rounds, strict=True
    ):
        assert length == committed, "a row for each token the target has read, and no drafted one"
        torch.testing.assert_close(last, features[length - 1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            before[:, :, :length], full.cache[:, :, :length], rtol=1e-4, atol=1e-4
        )
        if num_accepted:
            drafted, verified = after[:, :, length], full.cache[:, :, length]
            assert (drafted - verified).abs().max() > 1e-2, "keeping drafted rows would not show"
        committed += num_accepted + 1
    assert max(run.accepted) == 4 and len(run.accepted) > 8


def child_log_probs(
    head: DraftHead, target: Target, tokens: list[int], path: Sequence[int]
) -> Tensor:
    """Log probabilities over the draft vocabulary after `path`, from the root tokens[-1]."""
    taps = target.features(torch.tensor([tokens[:-1]]))[0]
    words = torch.tensor([[*tokens, *path]])
    embedding = target.model.get_input_embeddings().weight
    taps = F.pad(taps, (0, 0, 0, words.shape[1] - taps.shape[1]))
    chain = unrolled_reference(head, embedding, words, taps, len(path) + 1)
    return (norm(head.norm, chain[-1][0, len(tokens) - 2]) @ head.lm_head.weight.T).log_softmax(-1)


Node = tuple[float, tuple[int, ...]]  # score and tokens from below the root


def pool_reference(
    head: DraftHead, target: Target, tokens: list[int], tree: TreeConfig
) -> list[Node]:
    """EAGLE-2's expansion, one node at a time, in breadth-first order."""

    def children(score: float, path: tuple[int, ...]) -> Iterator[Node]:
        best = child_log_probs(head, target, tokens, path).topk(tree.top_k)
        for log_prob, place in zip(best.values.tolist(), best.indices, strict=True):
            yield score + log_prob, (*path, int(head.draft_token_ids()[place]))

    level = list(children(0.0, ()))
    pool = list(level)
    for _ in range(tree.depth):
        frontier = sorted(level, reverse=True)[: tree.top_k]
        level = [child for node in frontier for child in children(*node)]
        pool += level
    return pool


def paths_of(tokens: Sequence[int], parents: Sequence[int]) -> list[tuple[int, ...]]:
    """The tokens from below the root to each node but the root."""
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(tokens, parents, strict=True):
        paths.append((*paths[parent], token) if parent >= 0 else ())
    return paths[1:]


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor, Tensor]]:
    """tokens, parents and scores of every pool that is pruned."""
    seen, keep_best = [], eagle3.keep_best
    spy = lambda *pool: seen.append(pool[:3]) or keep_best(*pool)  # noqa: E731
    monkeypatch.setattr(eagle3, "keep_best", spy)
    return seen


SMALL_TREES = [TreeConfig(0, 4, 3), TreeConfig(1, 3, 9), TreeConfig(2, 3, 8), TreeConfig(3, 2, 99)]


@pytest.mark.parametrize("tree", SMALL_TREES, ids=str)
def test_tree_is_the_brute_force_expansion_and_its_best_nodes(target, pools, tree):
    for seed in range(3):
        head = make_head(target, seed=seed)
        found = begun(drafter_of(head, target, **asdict(tree)), target, PROMPT).propose()
        found.validate(target.vocab_size)
        expected = pool_reference(head, target, PROMPT, tree)
        tokens, parents, scores = (column[0].tolist() for column in pools[-1])
        assert paths_of(tokens, parents) == [path for _, path in expected]
        assert scores[1:] == pytest.approx([score for score, _ in expected], abs=1e-4)
        kept = sorted(expected, reverse=True)[: tree.total_tokens - 1]
        in_order = [path for score, path in expected if (score, path) in kept]
        assert paths_of(found.tokens[0].tolist(), found.parents[0].tolist()) == in_order


@pytest.mark.parametrize("temperature", [0.0, 0.5, 2.0])
def test_draft_scores_do_not_depend_on_the_sampling_temperature(target, pools, temperature):
    head, tree = make_head(target), TreeConfig(1, 3, 6)
    drafter = drafter_of(head, target, **asdict(tree))
    run = decode(target, drafter, PROMPT, max_new_tokens=3, temperature=temperature, seed=5)
    expected = pool_reference(head, target, PROMPT + run.tokens[:1], tree)
    assert pools[0][2][0, 1:].tolist() == pytest.approx([s for s, _ in expected], abs=1e-4)


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_one_child_per_node_is_a_chain(target, depth):
    head = make_head(target)
    drafter = begun(
        drafter_of(head, target, depth=depth, top_k=1, total_tokens=depth + 2), target, PROMPT
    )
    tree = drafter.propose()
    path: list[int] = []
    for _ in range(depth + 1):
        best = child_log_probs(head, target, PROMPT, path).argmax()
        path.append(int(head.draft_token_ids()[best]))
    assert tree.tokens[0].tolist() == [PROMPT[-1], *path]
    assert tree.parents[0].tolist() == [ROOT, *range(depth + 1)]
    assert PADDING not in tree.parents


def test_paper_sized_tree_is_well_formed(target):
    drafter = begun(drafter_of(make_head(target), target), target, PROMPT)
    tree = drafter.propose()
    tree.validate(target.vocab_size)
    assert (drafter.tree.depth, drafter.tree.top_k, drafter.max_nodes) == (7, 10, 60)
    assert tree.tokens.shape == (1, 60) and 1 < tree.depths().max() <= 8
    assert torch.isin(tree.tokens[0, 1:], drafter.token_ids).all()


@pytest.mark.parametrize("sizes", [{"depth": -1}, {"top_k": 0}, {"total_tokens": 1}])
def test_impossible_trees_are_refused(sizes):
    with pytest.raises(ValueError, match="depth >= 0, top_k >= 1 and total_tokens >= 2"):
        TreeConfig(**sizes)


def test_trees_of_a_ragged_batch_are_those_of_each_prompt_alone(target):
    head, tree, asked = make_head(target), TreeConfig(3, 4, 14), [PROMPT, *OTHER_PROMPTS]
    prefixes, lengths = target_model.pad([prompt[:-1] for prompt in asked])
    scores = Scores(None, target.features(prefixes)[0], None)
    together = drafter_of(head, target, **asdict(tree))
    together.begin(prefixes, lengths, torch.tensor([prompt[-1] for prompt in asked]), scores)
    found = together.propose()
    for row, prompt in enumerate(asked):
        alone = begun(drafter_of(head, target, **asdict(tree)), target, prompt).propose()
        assert torch.equal(found.tokens[row], alone.tokens[0])
        assert torch.equal(found.parents[row], alone.parents[0])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_batch_of_ragged_prompts_drafts_as_each_alone(target, memorised, monkeypatch, temperature):
    drafter = drafter_of(memorised, target, depth=3, top_k=6, total_tokens=16)
    assert_ragged_batch_decodes_as_each_alone(target, drafter, monkeypatch, temperature)


@pytest.mark.parametrize("batch", [1, 4])
def test_greedy_output_is_the_targets_own(target, memorised, batch):
    """150 tokens, so the draft cache grows on the way."""
    asked = [PROMPT, *OTHER_PROMPTS][:batch]
    drafter = drafter_of(memorised, target, depth=4, top_k=8, total_tokens=24)
    runs = decode(target, drafter, asked, max_new_tokens=150)
    plain = decode_autoregressively(target, asked, max_new_tokens=150)
    assert [run.tokens for run in runs] == [run.tokens for run in plain]
    assert all(len(run.tokens) == 150 and max(run.accepted) > 0 for run in runs)


# --- checkpoints


def released_config(target: Target) -> dict[str, object]:
    """config.json as the official checkpoints have it: no rope_theta, no head_dim."""
    c = target.config
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size, "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads, "num_hidden_layers": 1, "hidden_act": "silu",
        "rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "vocab_size": target.vocab_size,
        "draft_vocab_size": DRAFT_VOCABULARY, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 0, "tie_word_embeddings": False, "torch_dtype": "float16",
        "initializer_range": 0.02,
    }  # fmt: skip


def released_tensors(target: Target) -> dict[str, Tensor]:
    state = make_head(target).state_dict()
    return {name: t.half() if t.is_floating_point() else t for name, t in state.items()}


def released(target: Target, folder: Path, without: str = "", **extra: Tensor) -> Path:
    tensors = released_tensors(target) | extra
    tensors = {name: tensor for name, tensor in tensors.items() if name != without}
    return checkpoints.save(folder, tensors, released_config(target))


def test_projections_are_joined_for_drafting_and_the_head_stays_as_it_was(target):
    head = make_head(target)
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    drafter = Drafter(head, target, TreeConfig(1, 3, 9))
    assert head.state_dict().keys() == before.keys()
    assert all(torch.equal(head.state_dict()[name], tensor) for name, tensor in before.items())
    attention, mlp = head.midlayer.self_attn, head.midlayer.mlp
    parts = attention.q_proj, attention.k_proj, attention.v_proj
    assert torch.equal(drafter.qkv.weight, torch.cat([part.weight for part in parts]))
    assert torch.equal(
        drafter.gate_up.weight, torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
    )


def test_config_says_nothing_that_released_ones_do_not(target, tmp_path):
    """So that a checkpoint made before there were ablations is byte for byte what it was."""
    eagle3.save_head(make_head(target), tmp_path)
    sizes = {"hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"}
    sizes |= {"head_dim", "vocab_size", "draft_vocab_size", "rms_norm_eps", "rope_theta"}
    assert checkpoints.load(tmp_path)[1].keys() == eagle3.RELEASED_FIELDS.keys() | sizes


def test_official_layout_loads_strictly_with_its_own_defaults(target, tmp_path):
    head, tree = eagle3.load_head(released(target, tmp_path))
    assert (head.config.rope_theta, head.config.head_dim, tree) == (10000.0, 16, TreeConfig())
    for name, tensor in released_tensors(target).items():
        assert torch.equal(head.state_dict()[name], tensor.to(head.state_dict()[name].dtype))
    drafter = Drafter.load(tmp_path, target, TreeConfig(2, 4, 10))
    same = drafter_of(make_head(target), target, depth=2, top_k=4, total_tokens=10)
    expected = begun(same, target, PROMPT).propose()
    found = begun(drafter, target, PROMPT).propose()
    assert torch.equal(found.parents, expected.parents)
    assert torch.equal(found.tokens, expected.tokens), "d2t was read otherwise"


def test_official_pickle_loads_after_the_conversion(target, tmp_path):
    torch.save(released_tensors(target), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(released_config(target)))
    with pytest.raises(ValueError, match="python -m specrepro.checkpoints convert"):
        Drafter.load(tmp_path, target)
    checkpoints.convert(tmp_path / "pytorch_model.bin", tmp_path)
    head, _ = eagle3.load_head(tmp_path)
    assert torch.equal(head.fc.weight, released_tensors(target)["fc.weight"].float())


def test_misnamed_keys_are_listed_and_nothing_is_left_random(target, tmp_path):
    tensors = {"layers.0.hidden_norm.weight": torch.ones(64), "embed_tokens.weight": torch.ones(1)}
    folder = released(target, tmp_path, without="midlayer.hidden_norm.weight", **tensors)
    with pytest.raises(ValueError) as refused:
        eagle3.load_head(folder)
    assert "missing: midlayer.hidden_norm.weight" in str(refused.value)
    assert "unknown: embed_tokens.weight, layers.0.hidden_norm.weight" in str(refused.value)


def test_a_reduced_vocabulary_without_its_mapping_is_refused(target, tmp_path):
    with pytest.raises(ValueError, match="reduced vocabulary but has no d2t"):
        eagle3.load_head(released(target, tmp_path, without="d2t"))


def test_config_without_sizes_is_refused_by_name(target, tmp_path):
    folder = released(target, tmp_path)
    config = released_config(target)
    del config["hidden_size"], config["vocab_size"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="lacks hidden_size, vocab_size"):
        eagle3.load_head(folder)


@pytest.mark.parametrize(
    "sizes, named",
    [
        ({"hidden_size": 96}, "hidden size 96, but .* has 64"),
        ({"target_hidden_size": 32}, "hidden size 32, but .* has 64"),
        ({"vocab_size": 151936}, "vocabulary 151936, but .* has 100"),
    ],
)
def test_head_of_another_target_is_refused_with_both_sizes(target, sizes, named):
    config = replace(eagle3.head_config(target, DRAFT_VOCABULARY), **sizes)
    with pytest.raises(ValueError, match=named):
        Drafter(DraftHead(config), target)


def test_what_is_saved_drafts_the_same_and_keeps_its_tree(target, tmp_path):
    head, tree = make_head(target), TreeConfig(2, 5, 11)
    eagle3.save_head(head, tmp_path, tree)
    saved, config = checkpoints.load(tmp_path)
    assert saved.keys() == head.state_dict().keys()
    assert {t.dtype for t in saved.values()} == {torch.bfloat16, torch.int64, torch.bool}
    assert config["tie_word_embeddings"] is False and config["num_hidden_layers"] == 1
    loaded, own_tree = eagle3.load_head(tmp_path)
    assert own_tree == tree and loaded.config == head.config
    assert torch.equal(loaded.d2t, head.d2t)
    assert torch.equal(loaded.fc.weight, head.fc.weight.bfloat16().float())
    assert Drafter.load(tmp_path, target).tree == tree


def test_loaders_draft_a_tree_and_a_chain_of_the_same_head(target, tmp_path):
    eagle3.save_head(make_head(target), tmp_path, TreeConfig(2, 5, 11))
    loaders = eagle3.drafters(tmp_path, depth=3, total_tokens=0)
    assert loaders["EAGLE-3"](target).tree == TreeConfig(3, 5, 11)
    assert loaders["EAGLE-3 chain"](target).tree == TreeConfig(4, 1, 6), "deep enough for n-alpha"
    deeper = eagle3.drafters(tmp_path, depth=6)["EAGLE-3 chain"](target)
    assert deeper.tree == TreeConfig(6, 1, 8), "as deep as the trees beside it"
    assert eagle3.DRAFTERS.keys() == loaders.keys()
