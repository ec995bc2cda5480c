"""Experiments: a paper rerun at a tier, from prompts to rows, figures and a verdict.

A `Run` is what a notebook holds: the target, the questions, the rows measured so far. Records are
appended prompt by prompt, and a second run of the same configuration measures nothing twice. A run
whose configuration changed starts afresh, or, asked to resume, refuses and shows the difference.

Rows of several tiers share one results.csv: a run replaces those of its own tier. What a reader
sees without running anything is a function of those rows (`pages`).
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from specrepro import (
    assets,
    checkpoints,
    claims,
    decoding,
    figures,
    losslessness,
    measure,
    paper_tier,
    prompts,
    provenance,
    rows,
)
from specrepro import target_model as targets

ROOT = Path(__file__).resolve().parent.parent
PAPERS = {
    "eagle3": "EAGLE-3: a draft head on fused features, trained by testing itself (2503.01840)",
    "cast": "CAST: the draft tree grown against the measured cost of inference (2510.26577)",
    "gto": "GTO: the draft head tuned on the reward of whole draft trees (2509.22134)",
    "fasteagle": "FastEagle: a cascade that drafts every position in one pass (2509.20416)",
    "adaeagle": "AdaEAGLE: predict how many tokens are worth drafting (2412.18910)",
    "tts": "SpecTTS-Bench: trained and training-free drafters at test-time scaling (2509.04474)",
}
REPORTED_MODEL = {
    "adaeagle": "Vicuna-7B",
    "tts": "Qwen3-8B",
}  # of a paper's tables, where it is not Llama-3.1-8B
COMMITTED = "committed full rows"
NO_ROOM = tuple(map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)))
Loaders = Mapping[str, Callable[[targets.Target], decoding.Drafter]]


@dataclass(frozen=True, slots=True)
class Tier:
    """How much a run measures; one dial for every paper."""

    about: str
    time: str
    num_prompts: int  # per prompt set
    max_new_tokens: int
    repeats: int
    audited_prompts: int  # decoded again for losslessness
    audited_tokens: int
    exact_tokens: int  # of the same prompts in float32, which is slow
    num_answers: int | None = None  # of the corpus that a drafter is trained on here; None is all


TIERS = {
    "smoke": Tier(
        "a prompt per set, to see that everything runs", "3 minutes", 1, 16, 1, 2, 12, 6, 48
    ),
    "laptop": Tier("the committed checkpoint, with intervals", "15 minutes", 4, 128, 1, 4, 48, 24),
    "full": Tier("trains from scratch; makes what is committed", "hours", 40, 128, 3, 40, 128, 128),
    "paper": Tier("the paper's targets and settings, on GPUs", "hours", 80, 512, 3, 40, 128, 128),
}


class Run:
    """One paper at one tier on one target: what its notebook asks questions of."""

    def __init__(
        self,
        paper: str,
        *,
        tier: str = "laptop",
        target: str = targets.EMBEDDED,
        dtype: str = "auto",
        num_prompts: int = 0,
        max_new_tokens: int = 0,
        seed: int = 0,
        figures_dir: str | Path = "figures",
        prompts_dir: str = "",
    ):
        if min(num_prompts, max_new_tokens) < 0:
            raise ValueError(
                f"num_prompts is {num_prompts} and max_new_tokens {max_new_tokens};"
                " give at least 1, or 0 for the tier's"
            )
        start_at_root()
        self.paper, self.tier_name, self.tier = paper, tier, tier_named(tier)
        self.published = paper_tier.find(target) if tier == "paper" else None
        if dtype == "auto" and self.published:
            dtype = self.published.dtype
        self.target_name, self.dtype, self.seed = target, dtype, seed
        self.prompts_dir = prompts_dir  # of tier paper: a folder for each set, in place of the Hub
        self.asked_prompts = num_prompts  # 0 where the tier, or a stage of it, chooses
        self.num_prompts = num_prompts or self.tier.num_prompts
        self.max_new_tokens = max_new_tokens or self.tier.max_new_tokens
        self.folder = Path(figures_dir) / paper
        self.records = records_folder(self.folder, tier)
        # of a drafter trained here: a sample of the corpus is no start for all of it
        self.work = Path("runs") / ("sample" if self.tier.num_answers else "whole") / paper
        if tier == "paper":  # where targets are many
            self.work = Path("runs") / Path(target).name / paper
        self.passed_over: set[str] = set()  # ids of prompts that leave no room for an answer
        self._began = time.perf_counter()
        self._tables: list[pd.DataFrame] = []
        require_writable(self.folder)

    def depends_on(self, resume: bool = False, **what: object) -> None:
        """Say what the records depend on besides the machine and the run's own settings:
        checkpoint, tree.

        Goes on with records of the same configuration and sets others aside; with `resume` it
        raises a ValueError that shows what changed.
        """
        self.identity = {
            "paper": self.paper,
            "tier": self.tier_name,
            "target": self.target_name,
            "dtype": self.dtype,
            "max_new_tokens": self.max_new_tokens,
            "repeats": self.tier.repeats,
            "seed": self.seed,
        } | provenance.machine()
        if self.prompts_dir:
            self.identity["prompts_dir"] = self.prompts_dir
        self.identity |= json.loads(json.dumps(what))
        path = self.records / "identity.json"
        before = json.loads(path.read_text()) if path.is_file() else self.identity
        if before != self.identity:
            if resume:
                changes = _differences(before, self.identity)
                raise ValueError(
                    f"cannot resume {self.records}: {changes}; restore the setting or drop --resume"
                )
            set_aside(self.records)
        checkpoints.write_text(path, json.dumps(self.identity, indent=2) + "\n")

    @cached_property
    def target(self) -> targets.Target:
        return targets.load(self.target_name, dtype=self.dtype)

    @cached_property
    def _exact_target(self) -> targets.Target:
        return targets.load(self.target_name, dtype="float32")

    @cached_property
    def environment(self) -> dict[str, object]:
        return rows.environment(self.target)

    def questions(self, name: str, num_prompts: int = 0) -> list[tuple[str, list[int]]]:
        """The first prompts of a set as (id, token ids): the papers' own sets at tier `paper`.

        There prompts that leave no room for the answer are passed over, as the manifest says.
        """
        asked = name, num_prompts or self.num_prompts, self.seed
        if self.tier_name == "paper":
            folder = Path(self.prompts_dir) / name if self.prompts_dir else None
            chosen = prompts.load_from_hub(*asked, source=folder, fits=self._fits)
        else:
            chosen = prompts.load(*asked)
        return [(one.id, prompts.encode(self.target.tokenizer, one, self._room)) for one in chosen]

    @property
    def _room(self) -> int:
        """Tokens that a prompt may have."""
        return self.target.max_context - self.max_new_tokens

    def _fits(self, prompt: prompts.Prompt) -> bool:
        is_short = len(prompts.encode(self.target.tokenizer, prompt)) <= self._room
        self.passed_over |= set() if is_short else {prompt.id}
        return is_short

    def head(self, named: str, from_scratch: bool = False) -> str:
        """Folder of the head to draft with; empty leaves the choice to the recipes.

        At tier `paper` a Hub id may be named, and the target's released head is the default.
        """
        if self.tier_name != "paper" or from_scratch:
            return named
        wanted = named or (self.published.head if self.published else "")
        if not wanted and self.target_name != targets.EMBEDDED:
            raise ValueError(
                f"no released head is known for target {self.target_name!r}: name one with"
                " -p checkpoint, train one with --from-scratch, or choose one of"
                f" {', '.join(one.target for one in paper_tier.published())}"
            )
        return str(paper_tier.obtain_head(wanted)) if wanted else ""

    def tree(self, **sizes: int) -> dict[str, int]:
        """Sizes of the draft tree, where 0 is the checkpoint's; at tier `paper` the paper's."""
        return self.published.tree(**sizes) if self.published else sizes

    @property
    def reported_model(self) -> str:
        """The name, in the paper's tables, of the target to draw beside this one."""
        return self.published.model if self.published else reported_model(self.paper)

    def compare(
        self,
        methods: measure.Methods,
        sets: Sequence[str] = tuple(prompts.PROMPT_SETS),
        temperatures: Sequence[float] = (0.0, 1.0),
        batch: int = 1,
        num_prompts: int = 0,
        file: str = "decoded",
    ) -> list[measure.Record]:
        """Decode the prompt sets by every method and the baseline, unless that is on record.

        `num_prompts` of each set, where 0 is the run's number. What is on record in another `file`
        is decoded again: the machine drifts, and a baseline is to take turns with its methods.
        """
        settings = [(name, temperature) for name in sets for temperature in temperatures]
        records = [
            measure.compare(
                self.target, methods, self.questions(name, num_prompts), prompts=name,
                path=self.records / f"{file}.jsonl", temperature=temperature,
                max_new_tokens=self.max_new_tokens, batch=batch, repeats=self.tier.repeats,
                seed=self.seed,
            )
            for name, temperature in settings
        ]  # fmt: skip
        return sum(records, [])

    def decode_rows(self, records: Sequence[measure.Record]) -> pd.DataFrame:
        """Rows of quantity "decode" from records, with intervals."""
        return rows.rows_of(records, self.environment, self.tier_name, paper=self.paper)

    def keep(self, *tables: pd.DataFrame) -> None:
        """Add rows to the run's, stamped with where they come from."""
        for table in tables:
            stamped = rows.stamp(table, self.environment, self.tier_name, paper=self.paper)
            self._tables.append(stamped)

    def stage(self, name: str, make: Callable[[], pd.DataFrame]) -> None:
        """Add rows that are measured once per configuration and kept beside the records."""
        self.keep(self.once(name, make))

    def once(self, name: str, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """Such rows, measured now or read from beside the records."""
        path = self.records / f"{name}.csv"
        if not path.is_file():
            made = rows.stamp(make(), self.environment, self.tier_name, paper=self.paper)
            checkpoints.write_text(path, made.to_csv(index=False))
        return pd.read_csv(path)

    def recall(self, stage: str, checkpoint: str) -> bool:
        """Add the rows of a stage that tier `full` (or `paper`) left in the repository, marked so.

        They are told by the column `stage`; False where there are none of this target and, as far
        as they say, of the `checkpoint` with this digest.
        """
        path = ROOT / "figures" / self.paper / "results.csv"
        found = pd.read_csv(path) if path.is_file() else pd.DataFrame()
        if "stage" not in found:
            return False
        tier = "paper" if self.tier_name == "paper" else "full"
        found = found[(found["stage"] == stage) & (found["tier"] == tier)]
        found = _committed(found, measure.target_name(self.target), checkpoint)
        self._tables.append(found)
        return len(found) > 0

    @property
    def rows(self) -> pd.DataFrame:
        """Every row so far."""
        filled = [table for table in self._tables if len(table)]
        if not filled:
            return pd.DataFrame(columns=rows.COLUMNS)
        return pd.concat(filled, ignore_index=True)

    def of(self, *quantities: str) -> pd.DataFrame:
        """The rows of some quantities, without the columns that none of them fills."""
        found = self.rows
        return found[found["quantity"].isin(quantities)].dropna(axis=1, how="all")

    def audit(
        self,
        loaders: Loaders,
        controls: Loaders | None = None,
        sets: Sequence[str] = ("chat", "humaneval"),
        num_prompts: int = 0,
    ) -> pd.DataFrame:
        """Is every method lossless, alone and in batches? Adds the rows of `audited`; shows all."""
        self.keep(self.audited(loaders, controls, sets, num_prompts))
        return self.of("losslessness", "near_tie")

    def audited(
        self,
        loaders: Loaders,
        controls: Loaders | None = None,
        sets: Sequence[str] = ("chat", "humaneval"),
        num_prompts: int = 0,
        samplings: Sequence[decoding.Sampling] = (losslessness.GREEDY, losslessness.SAMPLED),
    ) -> pd.DataFrame:
        """Rows of an audit, one sampling after the other.

        In the run's own dtype only near ties may part; float32 carries the claim of exactness,
        and is left out where the target does not fit its device in it.
        Where prompts are many, drafters that draft badly are asked too: `controls`, and one that is
        always wrong. Each case is measured once and kept, to resume from.
        `num_prompts` of each set, where 0 is the tier's share; fewer than four make a smaller
        batch, and one makes none.
        """
        if self.tier.audited_prompts >= 40:
            wrong = {"wrong drafts": lambda target: losslessness.WrongDrafts()}
            loaders = {**loaders, **(controls or {}), **wrong}
        num_prompts = num_prompts or max(1, self.tier.audited_prompts // len(sets))
        exact = ("float32",) if self.published is None or self.published.exact else ()
        own = measure.dtype_name(self.target)  # what "auto" came to
        tables = []
        batches = dict.fromkeys((1, min(4, num_prompts)))
        cases = itertools.product(samplings, dict.fromkeys((own, *exact)), sets, batches)
        for sampling, dtype, name, batch in cases:
            if sampling.is_greedy or dtype == "float32":  # rounding alone turns many a race
                audit = partial(self._audit, loaders, dtype, name, num_prompts, batch, sampling)
                asked = zlib.crc32(f"{sorted(loaders)}, {num_prompts}, {sampling}".encode())
                tables.append(self.once(f"audit_{dtype}_{name}_{batch}_{asked:08x}", audit))
        return pd.concat(tables) if tables else pd.DataFrame()

    def _audit(
        self,
        loaders: Loaders,
        dtype: str,
        name: str,
        num_prompts: int,
        batch: int,
        sampling: decoding.Sampling,
    ) -> pd.DataFrame:
        is_own = dtype == measure.dtype_name(self.target)
        target = self.target if is_own else self._exact_target
        return losslessness.losslessness(
            target, {method: load(target) for method, load in loaders.items()},
            self.questions(name, num_prompts), prompts=name,
            max_new_tokens=self.tier.audited_tokens if is_own else self.tier.exact_tokens,
            batch=batch, seed=self.seed, samplings=(sampling,),
        )  # fmt: skip

    def save(self, figure: Figure, name: str) -> Figure:
        """Write figures/<paper>/<name>.png and hand the figure back for the notebook to show."""
        figures.save(figure, self.folder, name)
        return figure

    def finish(self) -> list[claims.Verdict]:
        """Write rows, manifest and verdict; return the verdicts."""
        everything = self.rows
        verdicts = claims.judge(claims.load(self.paper), everything, self.tier_name)
        own = everything[everything["source"] != COMMITTED]
        replace_rows(self.folder / "results.csv", own, self.tier_name)
        claims.write_verdict(self.folder / "verdict.json", self.paper, self.tier_name, verdicts)
        manifest = self.identity | self.environment
        manifest |= {
            "num_prompts": self.num_prompts,
            "seconds": round(time.perf_counter() - self._began, 1),
            "figures": sorted(path.name for path in self.folder.glob("fig_*.png")),
        }
        if self.passed_over:
            manifest["prompts_passed_over"] = sorted(self.passed_over)
        checkpoints.write_text(self.folder / "manifest.json", json.dumps(manifest, indent=2) + "\n")
        return verdicts


def judge_again(paper: str) -> None:
    """Judge the claims as they are now on the rows that were kept, and write the verdict anew."""
    folder = ROOT / "figures" / paper
    path = folder / "verdict.json"
    if path.is_file():
        tier = json.loads(path.read_text())["tier"]
        claims.write_verdict(path, paper, tier, judged(paper, folder / "results.csv", tier))


def judged(paper: str, results: Path, tier: str) -> list[claims.Verdict]:
    """The verdicts of a tier on rows that were kept, what `Run.recall` adds to them among these."""
    everything = pd.read_csv(results, low_memory=False)
    found = everything[everything["tier"] == tier]
    if "stage" in everything and tier in ("smoke", "laptop"):
        told = json.loads(results.with_name("manifest.json").read_text())
        left = everything[(everything["tier"] == "full") & everything["stage"].notna()]
        recalled = _committed(left, told["target"], told["checkpoint"][:12])
        found = pd.concat([found, recalled], ignore_index=True)
    return claims.judge(claims.load(paper), found, tier)


def _committed(found: pd.DataFrame, target: str, checkpoint: str) -> pd.DataFrame:
    """Rows of a target and, as far as they say, of the checkpoint with this digest, marked so."""
    found = found[found["target"] == target]
    if "checkpoint" in found:
        found = found[found["checkpoint"].isna() | (found["checkpoint"] == checkpoint)]
    return found.assign(source=COMMITTED)


def reported_model(paper: str) -> str:
    """The model of a paper's tables that a smaller target is set beside."""
    return REPORTED_MODEL.get(paper, "Llama-3.1-8B")


def _differences(before: Mapping[str, object], now: Mapping[str, object]) -> str:
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    return ", ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in changed)


def records_folder(folder: Path, tier: str) -> Path:
    """Where a paper's records of one tier are, below figures/<paper>."""
    return folder / "records" / tier


def start_at_root() -> None:
    """Relative paths start at the repository, but a kernel of Jupyter's beside its notebook."""
    if Path.cwd() == ROOT / "notebooks":
        os.chdir(ROOT)


def set_aside(records: Path) -> None:
    """Keep the records there are under another name, so that a run starts with none."""
    if records.exists():
        records.rename(f"{records}-{datetime.now(UTC):%Y%m%dT%H%M%S}")


def replace_rows(path: Path, table: pd.DataFrame, tier: str) -> None:
    """Replace the rows of this tier in a results file and leave those of other tiers."""
    others = pd.read_csv(path) if path.is_file() else table.iloc[:0]
    others = others[others["tier"] != tier]
    merged = pd.concat([others, table], ignore_index=True) if len(others) else table
    checkpoints.write_text(path, merged.to_csv(index=False))


def sizes_of(
    plans: Mapping[str, Any], tier: str, num_prompts: int = 0, max_new_tokens: int = 0
) -> dict[str, int]:
    """Prompts of each set and their lengths: as asked for, else the plan's, else 0 (the tier's)."""
    plan = plans.get(tier)
    own = (plan.num_prompts, plan.max_new_tokens) if plan else (0, 0)
    return {"num_prompts": num_prompts or own[0], "max_new_tokens": max_new_tokens or own[1]}


def tier_named(name: str) -> Tier:
    if name not in TIERS:
        raise ValueError(f"unknown tier {name!r}; choose one of {', '.join(TIERS)}")
    return TIERS[name]


def require_writable(folder: Path) -> None:
    """Raise one clear error, before anything is measured, where results could not be written."""
    remedy = "choose another with -p figures_dir FOLDER"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise OSError(f"cannot write to {folder} ({error.strerror}); {remedy}") from None
    if shutil.disk_usage(folder).free < 50e6:
        raise OSError(f"less than 50 MB are free at {folder}; make room or {remedy}")


def no_room(message: str, folder: Path) -> str | None:
    """The one line for an error `message` of a full disk, a quota or a file size limit, else None.

    What comes from safetensors or out of a notebook has the system's words, not its number.
    """
    reason = next((words for words in NO_ROOM if words in message), None)
    if reason is None:
        return None
    remedies = {
        folder: "choose another with -p figures_dir FOLDER",
        assets.cache_dir(): "set SPECREPRO_CACHE to a larger disk",
    }
    full = next((place for place in remedies if _free_bytes(place) < 1e6), folder)
    return (
        f"cannot write to {full} ({reason}); make room there and go on with --resume,"
        f" or {remedies[full]}"
    )


def _free_bytes(folder: Path) -> int:
    """Of the disk that a folder is on, or would be."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return shutil.disk_usage(there).free
