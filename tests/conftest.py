"""What every test stands on: kernels that run without a GPU, fixed seeds, and tiny real targets.

A tiny target is a transformers model folder with random weights, large enough in scale that its
greedy choices are decisive and depend on everything before them. Padding and the end token are
never the greedy choice, so a generation runs to the length asked for; a test about ending passes
a token that the target does emit as `eos_token_id`, and gets the same weights.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy
import pytest
import torch
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

# `pytest -m gpu` runs the kernels compiled; anything else runs on the CPU, whatever there is beside
# (processes of xdist have no arguments of their own, and inherit what was decided)
if "PYTEST_XDIST_WORKER" not in os.environ and not any("gpu" in one for one in sys.argv[1:]):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# @triton.jit reads this once, so it comes before any specrepro import
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tokenizers import Tokenizer, decoders, models  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from specrepro import corpus, prompts, recipes, target_model  # noqa: E402
from specrepro.target_model import Target  # noqa: E402

TARGET_FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma")
PADDING, BEGIN, END, UNKNOWN = 0, 1, 2, 3
VOCABULARY = ["<pad>", "<s>", "</s>", "<unk>", "\n", *map(chr, range(32, 127))]
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)

TargetFolder = Callable[..., Path]
SMOKE = "::test_the_notebook_reaches_its_verdict_at_the_smoke_tier["


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests, and so the files that hold them, first: processes side by side end together."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


class _Scheduling(LoadScopeScheduling):
    """A file is one process's, which sets up once; a paper's notebook goes by itself: minutes."""

    def _split_scope(self, nodeid: str) -> str:
        return nodeid if SMOKE in nodeid else nodeid.split("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> _Scheduling:
    return _Scheduling(config, log)


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> None:
    """Tiny tensors lose more to hand-over than they gain, and one thread sums in one order."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Let no test depend on which tests ran before it."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_target_folder(tmp_path_factory: pytest.TempPathFactory) -> TargetFolder:
    """`tiny_target_folder(family)` is a folder transformers loads, written once per session."""

    @cache
    def folder(family: str = "llama", eos_token_id: int = END) -> Path:
        path = tmp_path_factory.mktemp(f"tiny_{family}")
        _tiny_model(family, eos_token_id).save_pretrained(path)
        return path

    return folder


@pytest.fixture(scope="session")
def tiny_chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer of one token per printable character and a chat template."""
    path = tmp_path_factory.mktemp("tiny_chat")
    _tiny_model("llama", END).save_pretrained(path)
    _character_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def chat_target(tiny_chat_folder: Path) -> Target:
    """The tiny Llama with a tokenizer, in float32."""
    return target_model.load(str(tiny_chat_folder), dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def quick_target() -> Target:
    """One small layer behind the same tokenizer and template: a round takes two milliseconds."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "eos_token_id": None}
    config = AutoConfig.for_model("llama", vocab_size=len(VOCABULARY), **sizes)
    config.max_position_embeddings = 512
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).float()
        _draw_decisive_weights(model)
    return Target(model, _character_tokenizer(), "quick")


@pytest.fixture
def training_prompts(monkeypatch: pytest.MonkeyPatch) -> list[prompts.Prompt]:
    """A dozen prompts in place of ShareGPT's, and two that choose among states."""
    questions = [
        prompts.Prompt(f"q{n}", "training", ({"role": "user", "content": "word " * (1 + n % 3)},))
        for n in range(12)
    ]
    monkeypatch.setattr(prompts, "training_prompts", lambda: iter(questions))
    monkeypatch.setattr(
        recipes,
        "held_out_questions",
        lambda target: [[40, 71, 70, 85, 13, 20, 66, 9], [30, 31, 32]],
    )
    return questions


@pytest.fixture
def features(chat_target: Target, training_prompts: list[prompts.Prompt], tmp_path: Path) -> Path:
    """A corpus of the tiny chat target's."""
    folder = tmp_path / "corpus"
    corpus.generate(chat_target, training_prompts, folder, max_new_tokens=12, batch_size=6)
    return folder


def _tiny_model(family: str, eos_token_id: int) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(TARGET_FAMILIES.index(family))
        model = AutoModelForCausalLM.from_config(_tiny_config(family, eos_token_id)).float().eval()
        _draw_decisive_weights(model)
    model.generation_config.update(
        do_sample=False, bos_token_id=BEGIN, eos_token_id=eos_token_id, pad_token_id=PADDING
    )
    return model


def _tiny_config(family: str, eos_token_id: int) -> AutoConfig:
    return AutoConfig.for_model(
        family,
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        pad_token_id=PADDING,
        bos_token_id=BEGIN,
        eos_token_id=eos_token_id,
        dtype="float32",
    )


@torch.no_grad()
def _draw_decisive_weights(model: torch.nn.Module) -> None:
    """Draw logits with a deviation of about 2: clear winners, yet sampling stays open."""
    hidden_size = model.config.hidden_size
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.normal_(std=2 / hidden_size**0.5)
        else:
            # biases and norms differ from 0 and 1, or a target that forgets them passes
            weight.add_(0.1 * torch.randn_like(weight))
    model.get_output_embeddings().weight[[PADDING, END]] = 0


def _character_tokenizer() -> PreTrainedTokenizerFast:
    ids = {token: index for index, token in enumerate(VOCABULARY)}
    backend = Tokenizer(models.BPE(vocab=ids, merges=[], unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
