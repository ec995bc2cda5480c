"""Checkpoints are written whole, loaded strictly, and pickles are converted, never loaded.

With SPECREPRO_SPECULATORS_PYTHON naming the Python of an environment that has the `speculators`
library (tests/speculators-requirements.txt), exported heads are also run by that library.
"""

from __future__ import annotations

import json
import os
import pickle
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import conftest
import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from specrepro import assets, checkpoints, commands, eagle3, target_model
from specrepro.eagle3 import DraftHead, HeadConfig, TreeConfig
from specrepro.target_model import Target

TENSORS = {
    "weight": torch.arange(6, dtype=torch.float16).view(2, 3),
    "d2t": torch.arange(2),
    "t2d": torch.tensor([True, False]),
}
CONFIG = {"hidden_size": 3, "model_type": "llama"}


def assert_holds(folder: Path, tensors: dict[str, Tensor]) -> None:
    loaded, config = checkpoints.load(folder)
    assert config == CONFIG and loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)


def pickled(folder: Path, content: object = TENSORS) -> Path:
    """A folder as the Hub has it: pytorch_model.bin with config.json beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(content, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder / "pytorch_model.bin"


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path):
    checkpoints.save(tmp_path / "head", TENSORS | {"transposed": TENSORS["weight"].T}, CONFIG)
    assert_holds(tmp_path / "head", TENSORS | {"transposed": TENSORS["weight"].T})


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    checkpoints.save(tmp_path, TENSORS, CONFIG)

    def fill_the_disk(tensors: dict[str, Tensor], path: str) -> None:
        Path(path).write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")  # no OSError

    monkeypatch.setattr(checkpoints, "save_file", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(tmp_path, {"weight": torch.zeros(1)}, {})
    assert_holds(tmp_path, TENSORS)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


def test_digest_changes_with_any_weight(tmp_path):
    checkpoints.save(tmp_path, TENSORS, CONFIG)
    before = checkpoints.digest(tmp_path)
    checkpoints.save(tmp_path, TENSORS, CONFIG | {"architectures": []})
    assert checkpoints.digest(tmp_path) == before, "the config is not a weight"
    changed = TENSORS["weight"].clone()
    changed[1, 2] += 1
    checkpoints.save(tmp_path, TENSORS | {"weight": changed}, CONFIG)
    assert checkpoints.digest(tmp_path) != before


@pytest.mark.parametrize("read", [checkpoints.load, checkpoints.digest])
def test_missing_weights_are_named_with_the_remedy(tmp_path, read):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"model\.safetensors is missing.*--from-scratch") as e:
            read(folder)
        assert str(folder) in str(e.value)


def test_missing_config_is_named(tmp_path):
    checkpoints.save(tmp_path, TENSORS, CONFIG)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config\.json"):
        checkpoints.load(tmp_path)


@pytest.mark.parametrize("num_bytes", [0, 4, 200])  # nothing, part of the header, part of the data
def test_a_torn_file_is_refused_by_name(tmp_path, num_bytes):
    checkpoints.save(tmp_path, TENSORS, CONFIG)
    path = tmp_path / "model.safetensors"
    assert path.stat().st_size > num_bytes
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(ValueError, match=f"{path} is not a readable safetensors file"):
        checkpoints.load(tmp_path)


def test_strict_loading_lists_every_fault():
    module = nn.Linear(3, 2)
    tensors = {"weight": torch.zeros(2, 4), "extra": torch.zeros(1), "another": torch.zeros(1)}
    with pytest.raises(ValueError) as refused:
        checkpoints.load_strictly(module, tensors, "here")
    message = str(refused.value)
    assert "missing: bias" in message and "unknown: another, extra" in message
    assert "weight is (2, 4), not (2, 3)" in message
    assert message.startswith("checkpoint here does not fit Linear: ")


def test_a_config_that_is_torn_or_names_unknown_sizes_is_told_by_its_folder(tmp_path):
    folder = checkpoints.save(tmp_path / "head", {"weight": torch.zeros(1)}, {"a": 1})
    (folder / "config.json").write_text('{"a": ')
    with pytest.raises(ValueError, match="config.json is not readable JSON .*train it again"):
        checkpoints.load(folder)
    tree = {"specrepro_tree": {"depth": 3, "breadth": 2}}
    with pytest.raises(ValueError, match=f"{folder} names breadth; known sizes are depth, top_k"):
        checkpoints.tree_of(tree, TreeConfig(), folder)
    assert checkpoints.tree_of({}, TreeConfig(top_k=3), folder) == TreeConfig(top_k=3)


def test_strict_loading_of_what_fits_loads_it():
    module = nn.Linear(3, 2)
    tensors = {"weight": torch.ones(2, 3), "bias": torch.ones(2, dtype=torch.float16)}
    checkpoints.load_strictly(module, tensors, "here")
    assert torch.equal(module.weight, torch.ones(2, 3)) and module.bias.dtype == torch.float32
    with pytest.raises(ValueError, match="missing: bias"):
        checkpoints.load_strictly(module, {"weight": tensors["weight"]}, "here")
    checkpoints.load_strictly(module, {"weight": tensors["weight"]}, "here", optional=["bias"])


# --- pickles


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_a_pickle_is_refused_and_the_command_it_is_told_converts_it(tmp_path, monkeypatch):
    folder = pickled(tmp_path / "a head").parent
    with pytest.raises(ValueError, match="a pickle file, which is never loaded here") as refused:
        checkpoints.load(folder)
    command = shlex.split(str(refused.value).partition("convert it once: ")[2])
    assert command[:3] == ["python", "-m", "specrepro.checkpoints"]
    monkeypatch.setattr(sys, "argv", ["checkpoints", *command[3:]])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(command[2], run_name="__main__")
    assert ended.value.code == 0
    assert_holds(folder, TENSORS)


@pytest.mark.parametrize("name", ["weights.pt", "weights.pth", "weights.pkl"])
def test_no_kind_of_pickle_is_loaded(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=f"holds {name}, a pickle file"):
        checkpoints.load(tmp_path)


def status_of(*arguments: str) -> int:
    """What the command ends with, told on stderr under its own name."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr(sys, "argv", [checkpoints.__file__])
        commands.run(checkpoints.main, arguments)
    return left.value.code


def test_conversion_keeps_values_in_another_folder_and_splits_shared_memory(tmp_path):
    whole = torch.arange(8.0)
    source = pickled(tmp_path / "in", {"whole": whole, "part": whole[2:5], "again": whole})
    checkpoints.main(["convert", str(source), str(tmp_path / "out")])
    assert_holds(tmp_path / "out", {"whole": whole, "part": whole[2:5], "again": whole})


class Payload:
    """What a hostile pickle does when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", ["torch", "plain"])
def test_conversion_runs_no_code(tmp_path, protocol, capsys):
    touched = tmp_path / "touched"
    source = pickled(tmp_path, {"weight": Payload(touched)})
    if protocol == "plain":
        source.write_bytes(pickle.dumps(Payload(touched), protocol=2))
    assert status_of("convert", str(source), str(tmp_path / "out")) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"specrepro.checkpoints: {source} does not hold tensors alone")
    assert said.count("\n") == 1, "one line"
    assert not touched.exists() and not (tmp_path / "out").exists()
    torch.load(pickled(tmp_path, Payload(touched)), weights_only=False)
    assert touched.exists(), "the payload does nothing even where it is loaded"


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"state_dict": TENSORS}])
def test_conversion_wants_a_state_dict(tmp_path, content):
    with pytest.raises(ValueError, match="from names to tensors"):
        checkpoints.convert(pickled(tmp_path, content), tmp_path / "out")


def test_conversion_wants_a_whole_file_and_its_config(tmp_path):
    source = pickled(tmp_path)
    source.write_bytes(source.read_bytes()[:100])
    with pytest.raises(ValueError, match="not whole"):
        checkpoints.convert(source, tmp_path / "out")
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"no config\.json beside it"):
        checkpoints.convert(source, tmp_path / "out")


# --- released EAGLE-3 heads


RELEASED = {  # config.json of the released head of Llama-3.1-8B
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
    "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "num_hidden_layers": 1, "hidden_act": "silu", "rms_norm_eps": 1e-5, "vocab_size": 128256,
    "max_position_embeddings": 2048, "draft_vocab_size": 32000, "bos_token_id": 128000,
    "eos_token_id": 128001, "pad_token_id": 0, "tie_word_embeddings": False, "use_cache": True,
    "torch_dtype": "float16", "initializer_range": 0.02, "transformers_version": "4.28.1",
}  # fmt: skip


def head_of(config: dict[str, object]) -> DraftHead:
    with torch.device("meta"):
        return DraftHead(eagle3.read_config(HeadConfig, config, "released"))


def num_millions(head: nn.Module) -> float:
    return round(sum(weight.numel() for weight in head.parameters()) / 1e6, 1)


def test_the_released_8b_config_is_a_head_of_424_7_million_parameters():
    head = head_of(RELEASED)
    assert num_millions(head) == 424.7
    assert (head.config.rope_theta, head.config.head_dim) == (10000.0, 128)
    layer = {f"self_attn.{name}_proj" for name in "qkvo"}
    layer |= {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    layer |= {"input_layernorm", "hidden_norm", "post_attention_layernorm"}
    names = {"d2t", "t2d", "fc.weight", "norm.weight", "lm_head.weight"}
    assert head.state_dict().keys() == names | {f"midlayer.{name}.weight" for name in layer}


def test_what_a_released_13b_config_leaves_out_is_as_in_llama():
    sizes = {"hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40}
    config = RELEASED | sizes | {"vocab_size": 32000, "num_hidden_layers": 40}
    del config["num_key_value_heads"]
    head = head_of(config)
    assert num_millions(head) == 638.3 and head.config.num_key_value_heads == 40
    assert not hasattr(head, "d2t"), "the whole vocabulary needs no mapping"


def test_a_head_narrower_than_its_target_has_an_embedding_of_its_own():
    head = head_of(RELEASED | {"target_hidden_size": 8192})
    assert head.fc.weight.shape == (4096, 3 * 8192)
    assert head.embed_tokens.weight.shape == (128256, 4096)
    assert not hasattr(head_of(RELEASED | {"target_hidden_size": 4096}), "embed_tokens")


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ({"rope_scaling": {"factor": 8.0}}, r"rope_scaling is .*8.0.* and only None is known"),
        ({"norm_before_residual": True}, "norm_before_residual is True, and only False is known"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"num_experts": 8, "fc_bias": True}, "unknown: fc_bias, num_experts"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 5, 17]}}, r"\[1, 5, 17\]"),
    ],
)
def test_a_config_that_asks_for_another_computation_is_refused(field, said):
    with pytest.raises(ValueError, match=f"config.json of checkpoint released: .*{said}"):
        head_of(RELEASED | field)


def test_fields_that_change_nothing_are_let_pass():
    named = {"rope_scaling": None, "attention_bias": False, "sliding_window": None}
    taps = {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": [1, 15, 28]}
    assert head_of(RELEASED | named | {"eagle_config": taps})


def test_positions_turn_as_slowly_as_the_config_says_and_by_10000_where_it_says_nothing():
    positions = torch.arange(0, 4000, 100)
    for said, theta in (({}, 10000.0), ({"rope_theta": 5e5}, 5e5)):
        layer = head_of(RELEASED | said).layer
        D = layer.config.head_dim
        angles = positions[:, None] * theta ** -(torch.arange(D // 2, dtype=torch.double) * 2 / D)
        torch.testing.assert_close(
            layer.rotary(positions)[0].double(), angles.cos(), rtol=0, atol=1e-3
        )


@pytest.mark.parametrize("num_layers", [30, 32, 36, 37, 61, 80])
def test_both_ways_to_count_the_taps_are_known_and_no_other(num_layers):
    entered = [2, num_layers // 2, num_layers - 3]
    assert tuple(entered) == target_model.tap_layers(num_layers)
    assert checkpoints.are_fused_taps(entered)
    assert checkpoints.are_fused_taps([layer - 1 for layer in entered])
    for place in range(3):
        other = list(entered)
        other[place] += 4
        assert not checkpoints.are_fused_taps(other)
    assert not checkpoints.are_fused_taps(entered[:2])


def small_head(target: Target, draft_vocab_size: int = 40) -> DraftHead:
    """Random weights, norms included, over every other token from 10 on."""
    head = DraftHead(eagle3.head_config(target, draft_vocab_size))
    for weight in head.parameters():
        is_norm = weight.dim() == 1
        drawn = torch.randn_like(weight)
        weight.data = 1 + 0.1 * drawn if is_norm else drawn / weight.shape[1] ** 0.5
    if hasattr(head, "d2t"):
        head.set_vocabulary(10 + 2 * torch.arange(draft_vocab_size))
    return head


@pytest.mark.parametrize("change", ["ids in place of offsets", "another mask"])
def test_mappings_that_do_not_agree_are_refused(chat_target, tmp_path, change):
    eagle3.save_head(small_head(chat_target), tmp_path)
    tensors, config = checkpoints.load(tmp_path)
    if change == "another mask":
        tensors["t2d"] = tensors["t2d"].roll(1)
    else:
        tensors["d2t"] = tensors["d2t"] + torch.arange(40)
    checkpoints.save(tmp_path, tensors, config)
    with pytest.raises(ValueError, match="d2t must hold offsets"):
        eagle3.load_head(tmp_path)


# --- exported to speculators


@pytest.fixture(scope="module")
def deep_target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    """Eight layers, so that speculators finds three different ones to tap."""
    config = conftest._tiny_config("llama", conftest.END)
    config.num_hidden_layers = 8
    folder = tmp_path_factory.mktemp("deep")
    model = AutoModelForCausalLM.from_config(config).float().eval()
    conftest._draw_decisive_weights(model)
    model.save_pretrained(folder)
    return target_model.load(str(folder), dtype="float32", device="cpu")


def test_an_exported_head_is_the_same_head_under_other_names(deep_target, tmp_path):
    eagle3.save_head(small_head(deep_target), tmp_path / "head")
    arguments = [str(tmp_path / "head"), str(tmp_path / "out"), "--target", deep_target.name]
    assert status_of("export", *arguments, "--name", "a/b") == 0
    (head, _), (out, about) = (checkpoints.load(tmp_path / name) for name in ("head", "out"))
    embedding = out.pop("embed_tokens.weight")
    assert torch.equal(embedding, deep_target.model.get_input_embeddings().weight)
    assert out.keys() == {name.replace("midlayer.", "layers.0.") for name in head}
    assert all(
        torch.equal(t, out[name.replace("midlayer.", "layers.0.")]) for name, t in head.items()
    )
    assert about["speculators_model_type"] == "eagle3" and about["draft_vocab_size"] == 40
    assert about["speculators_config"]["verifier"] == {
        "name_or_path": "a/b", "architectures": ["LlamaForCausalLM"],
    }  # fmt: skip
    layer = about["transformer_layer_config"]
    assert layer["rope_theta"] == layer["rope_parameters"]["rope_theta"] == 10000.0
    assert (layer["num_hidden_layers"], layer["head_dim"]) == (1, 16)
    assert layer["max_position_embeddings"] == deep_target.max_context == 512, "the target's"


def test_what_cannot_be_exported_is_told_in_one_line(deep_target, tmp_path, capsys):
    def said(source: Path, folder: str = "out", target: str = deep_target.name) -> str:
        arguments = [str(source), str(tmp_path / folder), "--target", target]
        assert status_of("export", *arguments) == 1
        return capsys.readouterr().err

    eagle3.save_head(small_head(deep_target), tmp_path / "head")
    assert "is the checkpoint itself" in said(tmp_path / "head", folder="head")
    assert "no word embedding of 100 x 64" in said(tmp_path / "head", target=str(tmp_path))
    checkpoints.save(tmp_path / "other", TENSORS, CONFIG)
    assert "is not an EAGLE-3 head" in said(tmp_path / "other")
    final = DraftHead(eagle3.head_config(deep_target, 40, "final"))
    final.set_vocabulary(torch.arange(40))
    eagle3.save_head(final, tmp_path / "final")
    assert "reads other states" in said(tmp_path / "final")


def speculators_python() -> str:
    name = "SPECREPRO_SPECULATORS_PYTHON"
    if name not in os.environ:
        pytest.skip(f"{name} names no Python that has the speculators library")
    return os.environ[name]


def assert_speculators_says_the_same(head: Path, target: Target, target_folder: str) -> None:
    """Logits of three unrolled steps on random features, ours and theirs in float32."""
    python, folder = speculators_python(), head.parent
    checkpoints.export(head, folder / "exported", Path(target_folder))
    n, steps = 128, 3  # their attention takes whole blocks of 128
    tokens, taps = torch.randint(5, 100, (1, n)), torch.randn(1, n, 3 * target.hidden_size)
    ours, _ = eagle3.load_head(head)
    embedding = target.model.get_input_embeddings().weight
    with torch.no_grad():
        rows, features = torch.arange(n)[None], ours.fuse(taps)
        chain = eagle3.unroll(ours, embedding, tokens, features, rows, steps)
        expected = torch.stack([ours.logits(features)[0] for features in chain])
    given = {"taps": taps[0], "tokens": eagle3.shift_left(tokens, 1)[0]}
    checkpoints.save_tensors(folder / "inputs", given | {"steps": torch.tensor(steps)})
    script = str(Path(__file__).with_name("speculators_logits.py"))
    command = [
        python,
        script,
        str(folder / "exported"),
        *map(str, (folder / "inputs", folder / "outputs")),
    ]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = checkpoints.load_tensors(folder / "outputs")["logits"]
    differences = [(found[s] - expected[s])[: n - 1 - s].abs().max().item() for s in range(steps)]
    print(ran.stdout.strip().splitlines()[-1], "differ by at most", max(differences))
    assert max(differences) < 1e-4 and expected.std() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("draft_vocab_size", [40, 100])
def test_speculators_computes_the_logits_of_an_exported_head(
    deep_target, tmp_path, draft_vocab_size
):
    eagle3.save_head(small_head(deep_target, draft_vocab_size), tmp_path / "head")
    assert_speculators_says_the_same(tmp_path / "head", deep_target, deep_target.name)


@pytest.mark.slow
def test_speculators_computes_the_logits_of_the_committed_head(tmp_path):
    speculators_python()
    target = target_model.load(dtype="float32")
    head, tree = eagle3.load_head(eagle3.CHECKPOINT)
    eagle3.save_head(head, tmp_path / "head", tree)
    assert_speculators_says_the_same(tmp_path / "head", target, str(assets.embedded_target()))
