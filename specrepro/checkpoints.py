"""Checkpoints in and out: safetensors with a config.json beside it, written whole or not at all.

Pickle files are refused, with the conversion named: loading one runs whatever code it holds.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

PICKLES = {".bin", ".pt", ".pth", ".pkl"}
WEIGHTS, CONFIG = "model.safetensors", "config.json"


def save(folder: Path | str, tensors: Mapping[str, Tensor], config: Mapping[str, object]) -> Path:
    """Write `folder`/model.safetensors and config.json, each replaced in one step."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / WEIGHTS, tensors)
    write_text(folder / CONFIG, json.dumps(dict(config), indent=2) + "\n")
    return folder


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file atomically; the disk being full leaves the old file as it was."""
    owned = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with _replacing(path) as temporary:
        save_file(owned, temporary)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(path) as temporary:
        Path(temporary).write_text(text)


class _replacing:
    """A temporary file beside `path` that takes its place on success and vanishes on failure."""

    def __init__(self, path: Path):
        self._path = path

    def __enter__(self) -> str:
        handle, self._temporary = tempfile.mkstemp(dir=self._path.parent, prefix=f".{self._path.name}.")
        os.close(handle)
        return self._temporary

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if kind is None:
            os.chmod(self._temporary, 0o644)
            os.replace(self._temporary, self._path)
        else:
            os.unlink(self._temporary)


def load(folder: Path | str) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Tensors and config of a checkpoint folder; a ValueError names what is missing, corrupt or refused."""
    folder = Path(folder)
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise ValueError(_missing(folder))
    config_path = folder / CONFIG
    if not config_path.is_file():
        raise ValueError(f"checkpoint {folder} has no {CONFIG}")
    return load_tensors(weights), json.loads(config_path.read_text())


def digest(folder: Path | str) -> str:
    """sha256 of a checkpoint's weights: what measurements with it depend on."""
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise ValueError(_missing(Path(folder)))
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of one safetensors file."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}); fetch or train it again") from None


def _missing(folder: Path) -> str:
    pickles = sorted(p.name for p in folder.glob("*") if p.suffix in PICKLES) if folder.is_dir() else []
    if pickles:
        return (
            f"checkpoint {folder} holds {pickles[0]}, a pickle file, which is never loaded here;"
            f" convert it once: python -m specrepro.checkpoints convert {folder / pickles[0]}"
        )
    return f"no checkpoint at {folder}: {WEIGHTS} is missing; train it with --from-scratch or name another folder"


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], optional: Iterable[str] = ()) -> None:
    """Load every tensor into `module` and none besides; a ValueError lists missing, unknown and misshapen names."""
    own = module.state_dict()
    missing = own.keys() - tensors.keys() - set(optional)
    unknown = tensors.keys() - own.keys() - set(optional)
    misshapen = [
        f"{name} is {tuple(tensors[name].shape)}, not {tuple(own[name].shape)}"
        for name in sorted(own.keys() & tensors.keys())
        if own[name].shape != tensors[name].shape
    ]
    faults = [
        f"{what}: {', '.join(sorted(names))}"
        for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", misshapen))
        if names
    ]
    if faults:
        raise ValueError(f"the checkpoint does not fit {type(module).__name__}: {'; '.join(faults)}")
    module.load_state_dict({name: tensors[name] for name in own.keys() & tensors.keys()}, strict=False)
