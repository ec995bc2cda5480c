"""The target scores trees as the unmodified transformers model scores each path by itself."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from specrepro import target_model
from specrepro.draft_tree import PADDING, DraftTree
from specrepro.target_model import KVCache, Target, choose_dtype, pad, tap_layers
from specrepro.tree_verify import verify_greedy

VOCAB_SIZE = 50
SMALL = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
    "max_position_embeddings": 1024, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WINDOW = {"sliding_window": 4}  # shorter than the prompts, and than the paths of the trees
CASES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},  # wider than the hidden size divided by the heads
    "mistral": {},
    "gemma": {"num_key_value_heads": 1},
    "llama multi-head": {"num_key_value_heads": 4},
    "mistral windowed": WINDOW,
    "qwen2 windowed": WINDOW | {"use_sliding_window": True, "max_window_layers": 2},
    # windows in every other layer, caps low enough to bend the scores
    "gemma2": WINDOW
    | {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 5},
    "gemma3_text": WINDOW | {"sliding_window_pattern": 2, "query_pre_attn_scalar": 5},
    "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5},
    "cohere": {"logit_scale": 0.25},
    "gpt_neox": {"num_key_value_heads": None},
}
PROMPT_LENGTHS = (9, 5, 12, 1, 7)


def plain_model(case: str, **changes: object) -> nn.Module:
    """The transformers model with random weights, attending in its own way."""
    family = case.split()[0]
    options = {k: v for k, v in (SMALL | CASES[case] | changes).items() if v is not None}
    config = AutoConfig.for_model(family, **options)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn_like(weight)
            weight.copy_(0.3 * noise if weight.dim() > 1 else weight + 0.1 * noise)
    return model


def wrapped(model: nn.Module) -> Target:
    return Target(copy.deepcopy(model), None, "tiny")


def random_prompts(lengths: tuple[int, ...]) -> list[list[int]]:
    return [torch.randint(3, VOCAB_SIZE, (length,)).tolist() for length in lengths]


def random_trees(batch: int, num_nodes: int) -> DraftTree:
    """Deep in places, bushy in others; every other row ends in padding."""
    parents = [[-1] + [_random_parent(node) for node in range(1, num_nodes)] for _ in range(batch)]
    tokens = [torch.randperm(VOCAB_SIZE - 3)[:num_nodes] + 3 for _ in range(batch)]
    tree = DraftTree(torch.stack(tokens), torch.tensor(parents))
    tree.parents[1::2, num_nodes - 2 :] = PADDING
    return tree


def _random_parent(node: int) -> int:
    return node - 1 if random.random() < 0.7 else random.randrange(node)


def leaf_paths(tree: DraftTree, row: int) -> list[list[int]]:
    """The node ids from the root to each leaf of one tree."""
    parents = tree.parents[row, : tree.num_nodes[row]].tolist()
    paths = [[0]]
    for node, parent in enumerate(parents[1:], 1):
        paths.append([*paths[parent], node])
    return [path for node, path in enumerate(paths) if node not in parents]


def plain_logits(model: nn.Module, tokens: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0]


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch", [2, 5])  # few rows and many go through different products
@pytest.mark.parametrize("case", CASES)
def test_a_node_scores_as_the_model_scores_its_path_alone(case: str, batch: int) -> None:
    model = plain_model(case)
    prompts, tree = random_prompts(PROMPT_LENGTHS[:batch]), random_trees(batch, 13)
    target = wrapped(model)
    cache, prefilled = target.prefill(prompts, capacity=40)
    scores, longest = target.verify(cache, tree), 0
    for row, prompt in enumerate(prompts):
        assert_near(prefilled.logits[row, 0], plain_logits(model, prompt)[-1])
        for path in leaf_paths(tree, row):
            alone = plain_logits(model, prompt + tree.tokens[row, path].tolist())
            assert_near(scores.logits[row, path], alone[len(prompt) :])
            longest = max(longest, len(path))
    assert longest > 5, "no path was longer than the window"


@pytest.mark.parametrize("case", ["llama", "mistral windowed", "gemma2"])
def test_a_batch_is_prefilled_as_each_prompt_alone(case: str) -> None:
    target, prompts = wrapped(plain_model(case)), random_prompts(PROMPT_LENGTHS)
    cache, scores = target.prefill(prompts, capacity=16)
    assert cache.lengths.tolist() == list(PROMPT_LENGTHS)
    for row, prompt in enumerate(prompts):
        n = len(prompt)
        cache_alone, alone = target.prefill([prompt], capacity=16)
        assert_near(scores.logits[row], alone.logits[0])
        assert_near(scores.taps[row, :n], alone.taps[0])
        assert_near(scores.hidden[row, :n], alone.hidden[0])
        assert_near(cache.slots[:, :, row, :n], cache_alone.slots[:, :, 0, :n])


@pytest.mark.parametrize("case", ["llama", "gemma"])
@pytest.mark.parametrize("operation", ["prefill", "verify", "features"])
def test_taps_are_the_hidden_states_that_eagle3_names(
    case: str, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = wrapped(plain_model(case, num_hidden_layers=8))
    cache, _ = target.prefill(random_prompts((5, 3)), capacity=20)
    states = record_hidden_states(target, monkeypatch)
    if operation == "prefill":
        scores = target.prefill(random_prompts((5, 3)), capacity=20)[1]
        taps, hidden = scores.taps, scores.hidden
    elif operation == "verify":
        scores = target.verify(cache, random_trees(2, 7))
        taps, hidden = scores.taps, scores.hidden
    else:
        taps, hidden = target.features(torch.randint(3, VOCAB_SIZE, (2, 6)))
    assert torch.equal(taps, torch.cat([states[i] for i in (2, 8 // 2, 8 - 3)], -1))
    assert torch.equal(hidden, states[-1])
    for off_by_one in [(1, 3, 4), (3, 5, 6), (3, 4, 5), (2, 3, 5), (2, 4, 6)]:
        assert not torch.equal(taps, torch.cat([states[i] for i in off_by_one], -1))


def record_hidden_states(target: Target, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Let transformers collect the hidden states of the very pass that the target makes."""
    states, forward = [], target.decoder.forward

    def recording(**inputs: object) -> object:
        output = forward(**inputs, output_hidden_states=True)
        states[:] = output.hidden_states
        return output

    monkeypatch.setattr(target.decoder, "forward", recording)
    return states


@pytest.mark.parametrize(
    ("num_layers", "taps"),
    [(30, (2, 15, 27)), (32, (2, 16, 29)), (5, (2, 2, 2)), (2, (1, 1, 0)), (1, (0, 0, 0))],
)
def test_tap_layers_stay_inside_shallow_models(num_layers: int, taps: tuple) -> None:
    assert tap_layers(num_layers) == taps


def test_features_are_those_of_prefill() -> None:
    target, prompts = wrapped(plain_model("llama")), random_prompts((9, 9, 9, 9))
    taps, hidden = target.features(torch.tensor(prompts))
    scores = target.prefill(prompts, capacity=9)[1]
    assert torch.equal(taps, scores.taps) and torch.equal(hidden, scores.hidden)
    assert not taps.is_inference(), "training could not save these for its backward pass"


@pytest.mark.parametrize(("case", "batch"), [("llama", 2), ("mistral windowed", 5)])
def test_cache_after_hundreds_of_rounds_is_that_of_a_fresh_prefill(case: str, batch: int) -> None:
    target = wrapped(plain_model(case, num_hidden_layers=3))
    committed, num_rounds = random_prompts(PROMPT_LENGTHS[:batch]), 320
    cache, _ = target.prefill(committed, capacity=1024)
    for _ in range(num_rounds):
        commit_some_path(target, cache, committed)
    fresh, _ = target.prefill(committed, capacity=1024)
    num_accepted = [
        len(c) - n - num_rounds for c, n in zip(committed, PROMPT_LENGTHS, strict=False)
    ]
    assert len(set(num_accepted)) > 1 and min(num_accepted) > 100, "accepted too evenly or little"
    assert cache.lengths.tolist() == fresh.lengths.tolist() == list(map(len, committed))
    for row, length in enumerate(cache.lengths.tolist()):
        assert_near(cache.slots[:, :, row, :length], fresh.slots[:, :, row, :length])


def commit_some_path(target: Target, cache: KVCache, committed: list[list[int]]) -> None:
    """One round over random trees whose verdict is a random path, as long as it may be."""
    tree = random_trees(len(committed), 5)
    target.verify(cache, tree)
    leaves = [random.choice(leaf_paths(tree, row)) for row in range(len(committed))]
    paths = [path[: random.randint(1, len(path))] for path in leaves]
    choice = torch.zeros_like(tree.tokens)  # no tree holds token 0, so a walk ends there
    for row, path in enumerate(paths):
        choice[row, path[:-1]] = tree.tokens[row, path[1:]]
    target.keep(cache, verify_greedy(tree, choice))
    for row, path in enumerate(paths):
        committed[row] += tree.tokens[row, path].tolist()


@pytest.mark.parametrize("batch", [1, 5])
def test_a_tree_may_fill_the_cache_to_its_last_slot(batch: int) -> None:
    model = plain_model("llama")
    target, prompts = wrapped(model), random_prompts((6,) * batch)
    drafts = torch.randint(3, VOCAB_SIZE, (batch, 4))
    tree, everything = DraftTree.chain(drafts), torch.cat([torch.tensor(prompts), drafts], 1)
    cache, _ = target.prefill(prompts, capacity=10)
    scores = target.verify(cache, tree)
    target.keep(cache, verify_greedy(tree, drafts.roll(-1, 1)))
    assert cache.lengths.tolist() == [cache.capacity] * batch
    for row, tokens in enumerate(everything.tolist()):
        assert_near(scores.logits[row], plain_logits(model, tokens)[6:])
    full, _ = target.prefill(everything.tolist(), capacity=10)
    assert_near(cache.slots, full.slots)
    with pytest.raises(ValueError, match="lengths run from 10 to 10; with 1 nodes .* 10 slots"):
        target.verify(cache, DraftTree.root_only(drafts[:, 0]))


def test_selecting_rows_keeps_each_with_its_length() -> None:
    for batch in (1, 2, 3, 8, 33):
        slots = torch.randn(2, 2, batch, 4, 1, 3)
        before, lengths = slots.clone(), torch.randint(1, 5, (batch,))
        rows = torch.randperm(batch)[: random.randint(1, batch)]
        selected = KVCache(slots, lengths).select(rows)
        assert torch.equal(selected.slots, before[:, :, rows])
        assert torch.equal(selected.lengths, lengths[rows])
        assert selected.slots.data_ptr() == slots.data_ptr(), "the cache was copied"
        assert selected.capacity == 4


def test_padding_puts_shorter_sequences_to_the_left() -> None:
    tokens, lengths = pad([[5, 6, 7], [8]])
    assert (tokens.tolist(), lengths.tolist()) == ([[5, 6, 7], [8, 0, 0]], [3, 1])


@pytest.mark.parametrize(
    ("in_generation_config", "in_config", "stop_ids"),
    [(7, 2, [7]), ([7, 9], 2, [7, 9]), (None, 2, [2]), (None, [2, 4], [2, 4]), (None, None, [])],
)
def test_stop_ids_are_those_that_generate_would_stop_at(
    in_generation_config: int | list | None, in_config: int | list | None, stop_ids: list[int]
) -> None:
    model = plain_model("llama")
    model.generation_config.eos_token_id = in_generation_config
    model.config.eos_token_id = in_config
    target = wrapped(model)
    assert target.stop_ids.tolist() == stop_ids and target.stop_ids.dtype == torch.long


def test_a_loaded_folder_scores_as_transformers_loads_it(
    tiny_target_folder: Callable[..., Path],
) -> None:
    folder, prompt = str(tiny_target_folder("qwen3")), [5, 6, 7]
    target = target_model.load(folder, dtype="float32", device="cpu")
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert_near(target.prefill([prompt], 4)[1].logits[0, 0], plain_logits(model, prompt)[-1])
    assert (target.name, target.dtype, target.max_context) == (folder, torch.float32, 512)
    assert target.tokenizer is None and target.hidden_size == 64
    assert not any(weight.requires_grad for weight in target.model.parameters())


def test_a_folder_with_a_tokenizer_brings_it_along(tiny_chat_folder: Path) -> None:
    assert target_model.load(str(tiny_chat_folder)).tokenizer.decode([5 + ord("a") - 32]) == "a"


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_the_dtype_asked_for_is_the_one_loaded(
    name: str, tiny_target_folder: Callable[..., Path]
) -> None:
    target = target_model.load(str(tiny_target_folder()), dtype=name)
    assert target.dtype == getattr(torch, name) == target.new_cache(1, 1).slots.dtype


def test_auto_never_takes_float16() -> None:
    assert choose_dtype("auto") in (torch.bfloat16, torch.float32)
    assert choose_dtype("auto", "cuda") == choose_dtype(torch.bfloat16) == torch.bfloat16


def refusal(name: str | Path, **options: str) -> str:
    """The one line that `load` refuses with."""
    with pytest.raises(ValueError) as error:
        target_model.load(str(name), **options)
    message = str(error.value)
    assert "\n" not in message, "more than one line"
    return message


def test_an_unknown_dtype_is_refused_with_the_known_ones(
    tiny_target_folder: Callable[..., Path],
) -> None:
    message = refusal(tiny_target_folder(), dtype="int3")
    assert "'int3'" in message and "auto, bfloat16, float16, float32" in message


def test_an_unknown_name_is_refused_with_what_a_name_may_be() -> None:
    message = refusal("nobody/no-such-model")
    assert "'nobody/no-such-model'" in message
    assert all(way in message for way in ("'smollm2'", "config.json", "Hub id"))


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    assert repr(str(tmp_path)) in refusal(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 3}))
    assert repr(str(tmp_path)) in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert repr(str(tmp_path)) in refusal(tmp_path)


T5 = {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
MAMBA = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 20, "state_size": 4}
BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
BART = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 20}


@pytest.mark.parametrize(
    ("family", "options"), [("t5", T5), ("mamba", MAMBA), ("bert", BERT), ("bart", BART)]
)
def test_what_is_not_a_causal_decoder_is_refused(
    family: str, options: dict, tmp_path: Path
) -> None:
    AutoModel.from_config(AutoConfig.for_model(family, **options)).save_pretrained(tmp_path)
    message = refusal(tmp_path)
    assert f"is a {family} model" in message and repr(str(tmp_path)) in message
    assert "choose a causal language model" in message


HYBRID = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("falcon_h1", HYBRID | {"mamba_d_ssm": 64}),
        ("granitemoehybrid", HYBRID | {"layer_types": ["mamba", "attention"] * 2}),
        ("minimax", {"layer_types": ["full_attention", "linear_attention"] * 2}),
    ],
)
def test_recurrent_layers_are_refused_even_beside_attention(family: str, options: dict) -> None:
    config = AutoConfig.for_model(family, **SMALL | options)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=f"is a {family} model, not a decoder of attention layers"):
        Target(model, None, "tiny")


def test_a_model_that_says_it_keeps_a_state_is_refused() -> None:
    model = plain_model("llama")
    model._is_stateful = True
    with pytest.raises(ValueError, match="not a decoder of attention layers"):
        wrapped(model)


def test_a_window_that_attention_is_not_told_of_is_refused() -> None:
    options = SMALL | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 4}
    config = AutoConfig.for_model("qwen2_moe", **options, num_experts=2, moe_intermediate_size=16)
    target = Target(AutoModelForCausalLM.from_config(config).float(), None, "tiny")
    with pytest.raises(ValueError, match="Qwen2MoeAttention attends in a way of its own"):
        target.prefill([[5, 6]], capacity=4)


def test_a_model_that_scales_its_logits_otherwise_is_refused(
    tiny_target_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Target.final_logits
    monkeypatch.setattr(Target, "final_logits", lambda self, x: 2 * honest(self, x))
    message = refusal(tiny_target_folder(), dtype="float32")
    assert "scores 100% otherwise here than in transformers (float32)" in message


def test_a_tree_pass_that_scores_otherwise_is_refused(
    tiny_target_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DraftTree, "depths", lambda tree: torch.zeros_like(tree.tokens))
    assert "otherwise here than in transformers" in refusal(tiny_target_folder(), dtype="float32")


def test_longrope_ends_where_its_frequencies_change() -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [9.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16}
    model = plain_model("llama", rope_parameters=rope | factors)
    target = wrapped(model)
    assert target.max_context == 16
    prompt = random_prompts((14,))[0]
    cache, _ = target.prefill([prompt], 20)
    tree = DraftTree.chain(torch.tensor([[5, 6, 7, 8]]))  # reaches behind the end
    found = target.verify(cache, tree).logits[0]
    assert_near(found[:2], plain_logits(model, [*prompt, 5, 6])[-2:])


def test_attention_sinks_are_refused_rather_than_forgotten() -> None:
    config = AutoConfig.for_model("gpt_oss", **SMALL, num_local_experts=2, num_experts_per_tok=1)
    target = Target(AutoModelForCausalLM.from_config(config).float(), None, "tiny")
    with pytest.raises(ValueError, match="GptOssAttention attends in a way of its own; choose"):
        target.prefill([[5, 6]], capacity=4)


@pytest.mark.parametrize("damage", ["cut", "garbled", "gone"])
def test_damaged_weights_are_refused_with_the_remedy(damage: str, tmp_path: Path) -> None:
    plain_model("llama").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1000] if damage == "cut" else b"\xff" * 1000)
    if damage == "gone":
        weights.unlink()
    message = refusal(tmp_path)
    assert f"cannot read the weights of target {str(tmp_path)!r}" in message
    assert "download or save the model again" in message


@pytest.mark.parametrize(
    "lost", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"]
)
def test_a_weight_that_is_not_there_is_named_rather_than_drawn_at_random(
    lost: str, tmp_path: Path
) -> None:
    save_without(plain_model("llama"), tmp_path, lost)
    message = refusal(tmp_path)
    assert message.startswith(f"the weights of target {str(tmp_path)!r} lack {lost};")
    assert "download or save the model again" in message


def test_of_many_lost_weights_the_first_are_named_and_the_rest_counted(tmp_path: Path) -> None:
    model = plain_model("llama")
    lost = sorted(name for name in model.state_dict() if "layers.2" in name)
    save_without(model, tmp_path, *lost)
    message = refusal(tmp_path)
    assert f"lack {', '.join(lost[:8])} and {len(lost) - 8} more;" in message


def test_a_tied_head_is_not_missed(tmp_path: Path) -> None:
    model = plain_model("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    target = target_model.load(str(tmp_path), dtype="float32")
    logits = target.prefill([[5, 6, 7]], capacity=3)[1].logits[0, 0]
    assert_near(logits, plain_logits(model, [5, 6, 7])[-1])


def save_without(model: nn.Module, folder: Path, *lost: str) -> None:
    """Save a model folder whose weights file lacks some of the weights."""
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    for name in lost:
        del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("case", ["llama", "gemma2", "granite", "cohere"])
def test_final_logits_of_part_of_the_vocabulary_are_part_of_the_logits(case: str) -> None:
    model = plain_model(case)
    target, words = wrapped(model), torch.tensor([3, 11, 40])
    _, hidden = target.features(torch.tensor([[5, 6, 7]]))
    part = target.final_logits(hidden @ target.head.weight[words].T)
    assert_near(part[0], plain_logits(model, [5, 6, 7])[:, words])
