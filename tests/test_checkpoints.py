"""Checkpoints are written whole, loaded strictly, and pickles are converted, never loaded."""

from __future__ import annotations

import json
import os
import pickle
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from specrepro import checkpoints

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
        raise OSError(28, "No space left on device")

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
        checkpoints.load_strictly(module, tensors)
    message = str(refused.value)
    assert "missing: bias" in message and "unknown: another, extra" in message
    assert "weight is (2, 4), not (2, 3)" in message and "Linear" in message


def test_strict_loading_of_what_fits_loads_it():
    module = nn.Linear(3, 2)
    tensors = {"weight": torch.ones(2, 3), "bias": torch.ones(2, dtype=torch.float16)}
    checkpoints.load_strictly(module, tensors)
    assert torch.equal(module.weight, torch.ones(2, 3)) and module.bias.dtype == torch.float32
    with pytest.raises(ValueError, match="missing: bias"):
        checkpoints.load_strictly(module, {"weight": tensors["weight"]})
    checkpoints.load_strictly(module, {"weight": tensors["weight"]}, optional=["bias"])


# --- pickles


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_a_pickle_is_refused_and_the_command_it_is_told_converts_it(tmp_path, monkeypatch):
    folder = pickled(tmp_path / "a head").parent
    with pytest.raises(ValueError, match="a pickle file, which is never loaded here") as refused:
        checkpoints.load(folder)
    command = shlex.split(str(refused.value).partition("convert it once: ")[2])
    assert command[:3] == ["python", "-m", "specrepro.checkpoints"]
    monkeypatch.setattr(sys, "argv", ["checkpoints", *command[3:]])
    runpy.run_module(command[2], run_name="__main__")
    assert_holds(folder, TENSORS)


@pytest.mark.parametrize("name", ["weights.pt", "weights.pth", "weights.pkl"])
def test_no_kind_of_pickle_is_loaded(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=f"holds {name}, a pickle file"):
        checkpoints.load(tmp_path)


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
    with pytest.raises(SystemExit):
        checkpoints.main(["convert", str(source), str(tmp_path / "out")])
    assert "does not hold tensors alone" in capsys.readouterr().err
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
