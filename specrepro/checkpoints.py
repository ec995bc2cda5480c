"""Checkpoints in and out: safetensors with a config.json beside it, written whole or not at all.

Pickle files are refused, with the conversion named: loading one runs whatever code it holds. The
conversion, `python -m specrepro.checkpoints convert`, reads tensors and nothing else.

The layout of released EAGLE-3 heads is held to strictly: no tensor too many or too few, no field of
config.json that asks for another computation. `export` writes the same head as the `speculators`
library reads it.
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
from dataclasses import fields, replace
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from specrepro import commands

Tree = TypeVar("Tree")  # a dataclass of sizes
PICKLES = {".bin", ".pt", ".pth", ".pkl"}
WEIGHTS, CONFIG = "model.safetensors", "config.json"
PLAIN = {  # what would change a released head's computation, at the one value that is known here
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "rope_scaling": None,
    "use_sliding_window": False, "norm_before_residual": False, "norm_before_fc": False,
    "fc_norm": False, "norm_output": False,
}  # fmt: skip
# what says nothing of it; some heads of one layer repeat the target's num_hidden_layers
INERT = set(
    "architectures model_type num_hidden_layers tie_word_embeddings max_position_embeddings"
    " bos_token_id eos_token_id pad_token_id unk_token_id decoder_start_token_id torch_dtype dtype"
    " transformers_version use_cache initializer_range attention_dropout pretraining_tp"
    " sliding_window max_window_layers specrepro_tree".split()
)
SPECULATORS = "0.9.0"  # the version whose layout `export` writes


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
        try:
            save_file(owned, temporary)
        except SafetensorError as error:  # no OSError, though the disk is what fails
            raise OSError(f"cannot write {path}: {error}") from None


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(path) as temporary:
        Path(temporary).write_text(text)


def cut_torn_line(path: Path) -> None:
    """Take off what an interruption left behind a file's last whole line."""
    if not path.is_file() or not path.stat().st_size:
        return
    with path.open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read() != b"\n":  # else the rest need not be read
            file.truncate(path.read_bytes().rfind(b"\n") + 1)


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
        raise ValueError(f"checkpoint {folder} has no {CONFIG}; fetch or train it again")
    return load_tensors(weights), _read_config(config_path)


def _read_config(path: Path) -> dict[str, object]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(
            f"{path} is not readable JSON ({error}); fetch or train it again"
        ) from None


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
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    folder: Path | str,
    optional: Iterable[str] = (),
) -> None:
    """Load every tensor into `module` and none besides; a ValueError lists what does not fit.

    `folder` is the checkpoint's, for that error.
    """
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
            f"checkpoint {folder} does not fit {type(module).__name__}: {'; '.join(faults)};"
            " name another folder, or the target that it was made for"
        )
    known = {name: tensors[name] for name in own.keys() & tensors.keys()}
    module.load_state_dict(known, strict=False)


def tree_of(config: Mapping[str, object], default: Tree, folder: Path | str) -> Tree:
    """The default, with the sizes that a checkpoint's config.json names for its drafts."""
    own, known = config.get("specrepro_tree") or {}, [field.name for field in fields(default)]
    if unknown := sorted(own.keys() - set(known)):
        raise ValueError(
            f"specrepro_tree in {CONFIG} of checkpoint {folder} names {', '.join(unknown)};"
            f" known sizes are {', '.join(known)}"
        )
    return replace(default, **own)


# --- released heads


def require_plain(config: Mapping[str, object], read: Iterable[str], folder: Path | str) -> None:
    """Raise a ValueError for a field of config.json that is unknown or asks for what is not done.

    `read` names the fields that the caller goes by.
    """
    unknown = sorted(config.keys() - PLAIN.keys() - INERT - {*read, "eagle_config"})
    faults = [f"unknown: {', '.join(unknown)}"] if unknown else []
    faults += [
        f"{name} is {config[name]!r}, and only {value!r} is known here"
        for name, value in PLAIN.items()
        if config.get(name, value) != value
    ]
    taps = (config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    if taps is not None and not are_fused_taps(taps):
        faults.append(f"eagle_config names the layers {taps}, and only EAGLE-3's own are read here")
    if faults:
        raise ValueError(f"{CONFIG} of checkpoint {folder}: {'; '.join(faults)}")


def are_fused_taps(layers: Sequence[int]) -> bool:
    """Whether these are EAGLE-3's three taps of some target.

    They are counted by the layers that they enter, 2, N // 2 and N - 3, or that they leave, each
    one less.
    """
    if len(layers) != 3 or layers[0] not in (1, 2):
        return False
    entered = [layer + 2 - layers[0] for layer in layers]
    return entered[1] == (entered[2] + 3) // 2


def require_one_vocabulary(d2t: Tensor, t2d: Tensor, folder: Path | str) -> None:
    """Raise a ValueError unless draft token i is target token i + d2t[i], and t2d marks these."""
    token_ids = torch.arange(len(d2t)) + d2t
    if not torch.equal(token_ids, t2d.nonzero()[:, 0]):
        raise ValueError(
            f"d2t and t2d of checkpoint {folder} name different target tokens: d2t must hold"
            f" offsets, target id less draft id, of the {int(t2d.sum())} tokens that t2d marks,"
            " in ascending order"
        )


def export(source: Path, folder: Path, target: Path, name: str = "", num_drafted: int = 5) -> Path:
    """Rewrite an EAGLE-3 checkpoint as the `speculators` library reads it.

    The word embedding goes in with the head, read from the folder `target`: the library would look
    for a missing one by its NaNs, which memory that nothing was read into need not hold. `name` is
    what config.json calls the target, such as its Hub id; `num_drafted` is the length of the chains
    it names.
    """
    if folder.resolve() == source.resolve():
        raise ValueError(f"{folder} is the checkpoint itself; name another folder to export to")
    tensors, config = load(source)
    if "midlayer.hidden_norm.weight" not in tensors:
        raise ValueError(
            f"checkpoint {source} is not an EAGLE-3 head, so there is nothing to export"
        )
    if "embed_tokens.weight" in tensors or "features" in config:
        raise ValueError(
            f"checkpoint {source} is narrower than its target or reads other states of it;"
            " speculators has no such head"
        )
    renamed = {key.replace("midlayer.", "layers.0."): t for key, t in tensors.items()}
    renamed["embed_tokens.weight"] = _embedding(target, config["vocab_size"], config["hidden_size"])
    about = _config_of(target)
    verifier = {"name_or_path": name or str(target)}
    verifier["architectures"] = about.get("architectures", [])
    if "max_position_embeddings" in about:  # else a reader takes a default of its own
        config |= {"max_position_embeddings": about["max_position_embeddings"]}
    return save(folder, renamed, _speculators_config(config, verifier, num_drafted))


def _embedding(target: Path, vocab_size: int, hidden_size: int) -> Tensor:
    """(V, H) the word embedding among a target's weights; ValueError where none fits the head."""
    for path in sorted(target.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found = [name for name in file.keys() if name.endswith("embed_tokens.weight")]
            for weight in map(file.get_tensor, found):
                if weight.shape == (vocab_size, hidden_size):
                    return weight
    raise ValueError(
        f"no word embedding of {vocab_size} x {hidden_size} in the safetensors of {target};"
        " name the folder of the target that the head was made for"
    )


def _speculators_config(
    config: Mapping[str, object], verifier: dict[str, object], num_drafted: int
) -> dict[str, object]:
    vocab_size = config["vocab_size"]
    proposal = {"proposal_type": "greedy", "speculative_tokens": num_drafted}
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": SPECULATORS,
        "draft_vocab_size": config.get("draft_vocab_size", vocab_size),
        "norm_before_residual": False,
        "transformer_layer_config": _layer_config(config),
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": verifier,
        },
    }


def _layer_config(config: Mapping[str, object]) -> dict[str, object]:
    """transformers' config of the one layer; its own default of a field is not always ours."""
    elsewhere = {"draft_vocab_size", "eagle_config", "specrepro_tree"}
    kept = {name: value for name, value in config.items() if name not in elsewhere}
    theta = config.get("rope_theta", 10000.0)
    rope = {"rope_theta": theta, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    eps = {"rms_norm_eps": config.get("rms_norm_eps", 1e-5)}
    fixed = {"model_type": "llama", "num_hidden_layers": 1, "tie_word_embeddings": False}
    return kept | rope | eps | fixed


def _config_of(target: Path) -> dict[str, object]:
    """What a target's own config.json says; nothing where there is none."""
    path = target / CONFIG
    return json.loads(path.read_text()) if path.is_file() else {}


# --- pickles


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
    """`python -m specrepro.checkpoints convert` and `export`."""
    options = vars(_parser().parse_args(arguments))
    print(options.pop("run")(**options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m specrepro.checkpoints")
    choices = parser.add_subparsers(required=True, metavar="convert|export")
    for run, about, source in (
        (convert, "rewrite a pickled checkpoint as safetensors", "pytorch_model.bin"),
        (export, "rewrite an EAGLE-3 head as speculators reads it", "folder of the checkpoint"),
    ):
        command = choices.add_parser(run.__name__, help=about)
        command.set_defaults(run=run)
        command.add_argument("source", type=Path, help=source)
        command.add_argument("folder", type=Path, help=f"where {WEIGHTS} and {CONFIG} go")
    command.add_argument("--target", type=Path, required=True, help="folder of the head's target")
    command.add_argument("--name", default="", help="of the target, such as its Hub id")
    command.add_argument("--num-drafted", type=int, default=5, help="length of the drafted chains")
    return parser


if __name__ == "__main__":
    commands.run(main)
