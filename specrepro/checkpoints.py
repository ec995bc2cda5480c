"""Checkpoints in and out: safetensors with a config.json beside it, written whole or not at all.

Pickle files are refused, with the conversion named: loading one runs whatever code it holds. The
conversion, `python -m specrepro.checkpoints convert`, reads tensors and nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import shlex
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
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
        handle, self._temporary = tempfile.mkstemp(
            dir=self._path.parent, prefix=f".{self._path.name}."
        )
        os.close(handle)
        return self._temporary

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if kind is None:
            os.chmod(self._temporary, 0o644)
            os.replace(self._temporary, self._path)
        else:
            os.unlink(self._temporary)


def load(folder: Path | str) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Tensors and config of a checkpoint folder; a ValueError says what is missing or corrupt."""
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
        raise ValueError(
            f"{path} is not a readable safetensors file ({error}); fetch or train it again"
        ) from None


def _missing(folder: Path) -> str:
    pickles = (
        sorted(p.name for p in folder.glob("*") if p.suffix in PICKLES) if folder.is_dir() else []
    )
    if pickles:
        paths = shlex.join([str(folder / pickles[0]), str(folder)])
        return (
            f"checkpoint {folder} holds {pickles[0]}, a pickle file, which is never loaded here;"
            f" convert it once: python -m specrepro.checkpoints convert {paths}"
        )
    return (
        f"no checkpoint at {folder}: {WEIGHTS} is missing;"
        " train it with --from-scratch or name another folder"
    )


def load_strictly(
    module: nn.Module, tensors: Mapping[str, Tensor], optional: Iterable[str] = ()
) -> None:
    """Load every tensor into `module` and none besides; a ValueError lists what does not fit."""
    own = module.state_dict()
    missing = own.keys() - tensors.keys() - set(optional)
    unknown = tensors.keys() - own.keys() - set(optional)
    misshapen = [
        f"{name} is {tuple(tensors[name].shape)}, not {tuple(own[name].shape)}"
        for name in sorted(own.keys() & tensors.keys())
        if own[name].shape != tensors[name].shape
    ]
    found = {"missing": missing, "unknown": unknown, "of another shape": misshapen}
    faults = [f"{what}: {', '.join(sorted(names))}" for what, names in found.items() if names]
    if faults:
        raise ValueError(
            f"the checkpoint does not fit {type(module).__name__}: {'; '.join(faults)}"
        )
    known = {name: tensors[name] for name in own.keys() & tensors.keys()}
    module.load_state_dict(known, strict=False)


def convert(source: Path, folder: Path) -> Path:
    """Rewrite a pickled state dict and the config.json beside it as a checkpoint folder.

    Nothing but tensors is unpickled; a ValueError says where there is anything else.
    """
    config_path = source.parent / CONFIG
    if not config_path.is_file():
        raise ValueError(f"{source} has no {CONFIG} beside it; put the checkpoint's own there")
    tensors = _unpickle_tensors(source)
    # tensors that share memory are written apart
    owned = {name: tensor.clone() for name, tensor in tensors.items()}
    return save(folder, owned, json.loads(config_path.read_text()))


def _unpickle_tensors(source: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(source, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{source} does not hold tensors alone, or is not whole ({reason})"
        ) from None
    if not isinstance(found, dict) or not all(
        isinstance(value, Tensor) for value in found.values()
    ):
        raise ValueError(f"{source} is not a state dict: a mapping from names to tensors is needed")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m specrepro.checkpoints convert <pytorch_model.bin> <folder>`."""
    parser = argparse.ArgumentParser(prog="python -m specrepro.checkpoints")
    commands = parser.add_subparsers(required=True, metavar="convert")
    command = commands.add_parser("convert", help="rewrite a pickled checkpoint as safetensors")
    command.add_argument(
        "source", type=Path, help="a pytorch_model.bin with its config.json beside it"
    )
    command.add_argument("folder", type=Path, help="where model.safetensors and config.json go")
    options = parser.parse_args(arguments)
    try:
        print(convert(options.source, options.folder))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
