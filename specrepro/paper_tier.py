"""The papers' own targets: which head, tree, precision and prompt format each was measured with.

`paper_tier.yaml` holds the settings. A target goes by its Hub id, or by a folder whose last part is
that of the id, so that a copy on this machine counts as the model. Heads are fetched from the Hub,
and a pickled one is converted. What a run would fetch and take is told without the network, from
sizes in the settings; times are estimates.

Not covered: a target on more than one device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from specrepro import assets, checkpoints, prompts

SETTINGS = Path(__file__).parent / "paper_tier.yaml"
PICKLED = "pytorch_model.bin"
GB = 1e9
BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
# for the estimates alone: an A100's memory bandwidth, how much slower than that passes may be, what
# caches and passes take, and what the five prompt sets take, most of it CNN/DM
BANDWIDTH, SLOWEST = 2.0e12, 4
CACHES_BYTES, PROMPTS_BYTES = 4 * GB, 3 * GB


@dataclass(frozen=True, slots=True)
class PaperTarget:
    """A target of the papers, and how they measured it."""

    target: str  # Hub id
    model: str  # in the papers' tables
    head: str  # Hub id of a released head
    head_from: str
    dtype: str
    total_tokens: int
    parameters: int
    speedup: tuple[float, float]  # mean reported at temperature 1 and 0, to estimate a run's time
    exact: bool  # whether float32 is audited too
    head_parameters: int | None = None  # None where its sizes are not known
    depth: int = 7
    top_k: int = 10
    system: str | None = None  # message that every prompt begins with
    template: str | None = None  # where the tokenizer has none

    def tree(self, **sizes: int) -> dict[str, int]:
        """Sizes of the draft tree: those given, and the paper's where 0."""
        return {name: size or getattr(self, name) for name, size in sizes.items()}

    def prepare(self, tokenizer: object) -> None:
        """Have `prompts.encode` put every prompt as the released evaluation does.

        With its system message, and its template where the tokenizer has none.
        """
        tokenizer.system_message = self.system
        if self.template and not getattr(tokenizer, "chat_template", None):
            tokenizer.chat_template = self.template


@cache
def published() -> tuple[PaperTarget, ...]:
    """Every target with settings; the first is the one that most of EAGLE-3's claims are of."""
    found = yaml.safe_load(SETTINGS.read_text())["targets"]
    return tuple(PaperTarget(**one | {"speedup": tuple(one["speedup"])}) for one in found)


def find(target: str) -> PaperTarget | None:
    """The settings of a target, by its Hub id or the name of its folder; None for any other."""
    name = Path(target).name.lower()
    return next((one for one in published() if Path(one.target).name.lower() == name), None)


def prepare(target: str, tokenizer: object | None) -> None:
    """Prepare the tokenizer of one of these targets; any other stays as it is.

    A head drafts badly under another format than it was trained with, so training and evaluation,
    of every paper, take the same.
    """
    one = find(target)
    if one is not None and tokenizer is not None:
        one.prepare(tokenizer)


def obtain_head(head: str) -> Path:
    """The checkpoint folder of a head: a folder as it is, a Hub id fetched and converted once.

    Raises AssetError where the Hub cannot be reached, and ValueError for what is no checkpoint.
    """
    if Path(head).is_dir():
        return Path(head)
    converted = assets.cache_dir() / "heads" / head.replace("/", "--")
    parts = (checkpoints.WEIGHTS, checkpoints.CONFIG)
    if all((converted / name).is_file() for name in parts):
        return converted
    fetched = _fetch(head)
    if (fetched / checkpoints.WEIGHTS).is_file() or not (fetched / PICKLED).is_file():
        return fetched
    return checkpoints.convert(fetched / PICKLED, converted)


def _fetch(head: str) -> Path:
    import httpx
    import huggingface_hub

    files = [checkpoints.CONFIG, checkpoints.WEIGHTS, PICKLED]
    try:
        return Path(huggingface_hub.snapshot_download(head, allow_patterns=files))
    except (OSError, ValueError, httpx.HTTPError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise assets.AssetError(
            f"cannot fetch the draft head {head} from the Hub ({reason});"
            " name a folder with -p checkpoint FOLDER, or train one with --from-scratch"
        ) from error


# --- what a run would take


@dataclass(frozen=True, slots=True)
class Plan:
    """A run on one of these targets; nothing here reaches for the network."""

    one: PaperTarget
    num_prompts: int
    max_new_tokens: int
    repeats: int
    target: str = ""  # folders or other names that stand in for the Hub's
    checkpoint: str = ""
    prompts_dir: str = ""
    from_scratch: bool = False
    sets: tuple[str, ...] = tuple(prompts.PROMPT_SETS)

    def lines(self) -> dict[str, str]:
        """What the run would use, fetch and take, by name."""
        one = self.one
        others = [other.target for other in published() if other != one]
        return {
            "target": f"{self.target or one.target} ({one.model} in the tables), {one.dtype}",
            "others": ", ".join(others),
            "head": self._head(),
            "tree": f"depth {one.depth}, top-k {one.top_k}, {one.total_tokens} nodes",
            "prompts": self.prompts_dir or _prompt_sources(self.sets),
            "fetches": self._fetches(),
            "disk": f"{self._num_bytes_on_disk() / GB:.0f} GB, an estimate",
            "memory": self._memory(),
            "time": self._time(),
        }

    def _head(self) -> str:
        if self.from_scratch:
            return "trained here, for which there is no estimate"
        return self.checkpoint or f"{self.one.head}, released by {self.one.head_from}"

    def _is_fetched(self) -> tuple[bool, bool, bool]:
        """Whether target, head and prompt sets are to come from the Hub."""
        has_head = self.from_scratch or Path(self.checkpoint or "?").is_dir()
        return not Path(self.target or "?").is_dir(), not has_head, not self.prompts_dir

    def _fetches(self) -> str:
        head = _num_bytes_of_head(self.one)
        parts = (
            f"target {2 * self.one.parameters / GB:.1f} GB",
            f"head {head / GB:.2f} GB" if head else "head of a size not known here",
            f"prompt sets about {self._num_bytes_of_prompts() / GB:g} GB",
        )
        wanted = [
            part for part, is_fetched in zip(parts, self._is_fetched(), strict=True) if is_fetched
        ]
        return ", ".join(wanted) or "nothing"

    def _num_bytes_on_disk(self) -> float:
        """The target as it is released, in 16 bits; the head twice, since it is converted."""
        sizes = (
            2 * self.one.parameters,
            2 * _num_bytes_of_head(self.one),
            self._num_bytes_of_prompts(),
        )
        return sum(
            size for size, is_fetched in zip(sizes, self._is_fetched(), strict=True) if is_fetched
        )

    def _num_bytes_of_prompts(self) -> float:
        return PROMPTS_BYTES if "summarisation" in self.sets else 0.1 * GB

    def _memory(self) -> str:
        """On one device: weights in the run's precision, and in float32 where that is audited."""
        one = self.one
        a_parameter = BYTES[one.dtype] + (BYTES["float32"] if one.exact else 0)
        needed = a_parameter * one.parameters + _num_bytes_of_head(one) + CACHES_BYTES
        audit = "with" if one.exact else "without"
        return f"{needed / GB:.0f} GB on one device, {audit} the float32 audit, an estimate"

    def _time(self) -> str:
        """From the bytes that a pass reads, for both arms at both temperatures."""
        seconds_of_a_pass = BYTES[self.one.dtype] * self.one.parameters / BANDWIDTH
        num_prompts = self.num_prompts * len(self.sets)
        num_tokens = num_prompts * self.repeats * self.max_new_tokens
        passes = num_tokens * sum(1 + 1 / speedup for speedup in self.one.speedup)
        fastest = passes * seconds_of_a_pass / 3600
        return (
            f"{fastest:.1f} to {SLOWEST * fastest:.1f} hours for the main comparison: an estimate"
            f" from memory bandwidth ({BANDWIDTH / 1e12:g} TB/s, an A100's), nothing measured"
        )


def _prompt_sources(names: Sequence[str]) -> str:
    sets = [prompts.HUB_SETS[name] for name in names]
    return ", ".join(f"{one.dataset} at {one.revision[:12]}" for one in sets)


def _num_bytes_of_head(one: PaperTarget) -> int:
    return 2 * (one.head_parameters or 0)
