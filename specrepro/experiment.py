"""Experiments: a paper rerun at a tier, from prompts to rows, figures and a verdict; and the command line for it.

A `Run` is what a notebook holds: the target, the questions, the rows measured so far. Its stages are cached: records
are appended prompt by prompt and a second run of the same configuration measures nothing twice. A run whose
configuration changed starts afresh, or, asked to resume, refuses and shows the difference.

`python -m specrepro.experiment <paper>` executes `notebooks/<paper>.ipynb` with papermill; `--dry-run` says what that
would fetch, take and write.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

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
    prompts,
    rows,
    target_model,
)

ROOT = Path(__file__).resolve().parent.parent
PAPERS = {
    "eagle3": "EAGLE-3: a draft head on fused target features, trained by testing itself (arXiv:2503.01840)",
}
COMMITTED = "committed full rows"
Loaders = Mapping[str, Callable[[target_model.Target], decoding.Drafter]]


@dataclass(frozen=True, slots=True)
class Tier:
    """How much a run measures; one dial for every paper."""

    num_prompts: int  # per prompt set
    max_new_tokens: int
    repeats: int
    audited_prompts: int  # decoded again for losslessness
    audited_tokens: int
    minutes: str  # on two CPU cores with the embedded target
    about: str


TIERS = {
    "smoke": Tier(1, 16, 1, 1, 12, "3", "a handful of prompts, to see that everything runs"),
    "laptop": Tier(6, 128, 1, 6, 64, "15", "the committed checkpoint, enough prompts for intervals"),
    "full": Tier(40, 128, 3, 40, 128, "hours", "everything from scratch; makes the committed checkpoint and rows"),
    "paper": Tier(80, 512, 3, 40, 128, "hours on GPUs", "the paper's targets, prompts and settings"),
}


class Run:
    """One paper at one tier on one target: what its notebook asks questions of."""

    def __init__(
        self, paper: str, *, tier: str = "laptop", target: str = "smollm2", dtype: str = "auto", num_prompts: int = 0,
        max_new_tokens: int = 0, seed: int = 0, figures_dir: str | Path = "figures", resume: bool = False,
    ):  # fmt: skip
        self.paper, self.tier_name, self.tier = paper, tier, tier_named(tier)
        self.target_name, self.dtype, self.seed = target, dtype, seed
        self.num_prompts = num_prompts or self.tier.num_prompts
        self.max_new_tokens = max_new_tokens or self.tier.max_new_tokens
        self.folder = Path(figures_dir) / paper
        self.records_path = self.folder / "records" / f"{tier}.jsonl"
        self._began = time.perf_counter()
        self._rows: list[pd.DataFrame] = []
        require_writable(self.folder)
        self._settle(resume)

    @property
    def identity(self) -> dict[str, object]:
        """What the records depend on."""
        return {
            "paper": self.paper, "tier": self.tier_name, "target": self.target_name, "dtype": self.dtype,
            "max_new_tokens": self.max_new_tokens, "repeats": self.tier.repeats, "seed": self.seed,
        }  # fmt: skip

    def _settle(self, resume: bool) -> None:
        """Go on with records of the same configuration; set others aside, or refuse where asked to resume."""
        path = self.records_path.with_suffix(".json")
        if path.is_file() and (before := json.loads(path.read_text())) != self.identity:
            changed = [key for key in self.identity if before.get(key) != self.identity[key]]
            differences = ", ".join(f"{key} was {before.get(key)!r} and is {self.identity[key]!r}" for key in changed)
            if resume:
                raise ValueError(f"cannot resume {self.records_path}: {differences}; restore the setting or drop --resume")
            self.set_aside()
        checkpoints.write_text(path, json.dumps(self.identity, indent=2) + "\n")

    def set_aside(self) -> None:
        """Keep the records there are under another name and start with none."""
        if self.records_path.exists():
            stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
            self.records_path.rename(self.records_path.with_suffix(f".{stamp}.jsonl"))

    @cached_property
    def target(self) -> target_model.Target:
        return target_model.load(self.target_name, dtype=self.dtype)

    @cached_property
    def environment(self) -> dict[str, object]:
        return rows.environment(self.target)

    def questions(self, name: str, num_prompts: int = 0) -> list[tuple[str, list[int]]]:
        """The first prompts of a set as (id, token ids)."""
        chosen = prompts.load(name, num_prompts or self.num_prompts, self.seed)
        room = min(self.target.max_context - self.max_new_tokens, 2048)
        return [(prompt.id, prompts.encode(self.target.tokenizer, prompt, room)) for prompt in chosen]

    def compare(
        self, methods: measure.Methods, sets: Sequence[str] = tuple(prompts.PROMPT_SETS),
        temperatures: Sequence[float] = (0.0, 1.0), batch: int = 1, num_prompts: int = 0, path: Path | None = None,
    ) -> list[measure.Record]:  # fmt: skip
        """Decode the prompt sets by every method and the baseline; what is on record is not decoded again."""
        records = []
        for name in sets:
            for temperature in temperatures:
                records += measure.compare(
                    self.target, methods, self.questions(name, num_prompts), prompts=name, path=path or self.records_path,
                    temperature=temperature, max_new_tokens=self.max_new_tokens, batch=batch,
                    repeats=self.tier.repeats, seed=self.seed,
                )  # fmt: skip
        return records

    def keep(self, *tables: pd.DataFrame) -> pd.DataFrame:
        """Add rows to the run's, stamped with where they come from; returns all rows so far."""
        for table in tables:
            self._rows.append(rows.stamp(table, self.environment, self.tier_name, paper=self.paper))
        return self.rows

    @property
    def rows(self) -> pd.DataFrame:
        filled = [table for table in self._rows if len(table)]
        return pd.concat(filled, ignore_index=True) if filled else pd.DataFrame(columns=rows.COLUMNS)

    def committed(self, quantity: str) -> pd.DataFrame:
        """The rows of one quantity that the `full` tier left in the repository, marked as such; empty where none are."""
        path = ROOT / "figures" / self.paper / "results.csv"
        if not path.is_file():
            return pd.DataFrame(columns=rows.COLUMNS)
        found = pd.read_csv(path)
        return found[(found["quantity"] == quantity) & (found["tier"] == "full")].assign(source=COMMITTED)

    def measured_or_committed(
        self, quantity: str, tiers: Sequence[str], measure_it: Callable[..., pd.DataFrame], *arguments: object
    ) -> None:
        """Measure a long series at the tiers named; elsewhere take the committed rows, or measure where there are none."""
        found = pd.DataFrame() if self.tier_name in tiers else self.committed(quantity)
        if len(found):
            self._rows.append(found)
        else:
            self.keep(measure_it(*arguments))

    def audit(self, loaders: Loaders, sets: Sequence[str] = ("chat", "humaneval")) -> pd.DataFrame:
        """Is every method lossless, at batch 1 and 4? In the run's dtype only near ties may part; float32 is exact.

        The float32 check decodes fewer tokens, and always runs, since it is the one that carries the claim.
        """
        self._audit(self.target, loaders, sets, self.tier.audited_tokens)
        if self.dtype != "float32":
            exact = target_model.load(self.target_name, dtype="float32")
            self._audit(exact, loaders, sets, self.tier.audited_tokens // 2)
        return self.rows[self.rows["quantity"].isin(["losslessness", "near_tie"])]

    def _audit(self, target: target_model.Target, loaders: Loaders, sets: Sequence[str], max_new_tokens: int) -> None:
        num_prompts = max(1, self.tier.audited_prompts // len(sets))
        drafters = {name: load(target) for name, load in loaders.items()}
        for name in sets:
            for batch in (1, 4):
                table = losslessness.losslessness(
                    target, drafters, self.questions(name, num_prompts), prompts=name, max_new_tokens=max_new_tokens,
                    batch=batch, seed=self.seed,
                )  # fmt: skip
                self.keep(table)

    def sweep(self, settings: dict[str, tuple[decoding.Drafter, dict[str, object]]], prompts_name: str = "chat") -> pd.DataFrame:
        """One drafter under several settings: rows of quantity "sweep" that carry each setting's columns."""
        records = self.compare({name: drafter for name, (drafter, _) in settings.items()}, (prompts_name,), (0.0,))
        found = rows.rows_of(records, self.environment, self.tier_name, paper=self.paper)
        found = found[found["method"].isin(settings)]
        columns = pd.DataFrame([settings[name][1] for name in found["method"]], index=found.index)
        return pd.concat([found.drop(columns=["quantity", "method"]), columns], axis=1).assign(quantity="sweep")

    def save(self, figure: Figure, name: str) -> Figure:
        """Write figures/<paper>/<name>.png and hand the figure back for the notebook to show."""
        figures.save(figure, self.folder, name)
        return figure

    def finish(self) -> list[claims.Verdict]:
        """Write rows, manifest and verdict; return the verdicts."""
        everything = self.rows
        verdicts = claims.judge(claims.load(self.paper), everything, self.tier_name)
        write_rows(self.folder / "results.csv", everything[everything["source"] != COMMITTED], self.tier_name)
        claims.write_verdict(self.folder / "verdict.json", self.paper, self.tier_name, verdicts)
        manifest = self.identity | self.environment | {
            "num_prompts": self.num_prompts, "seconds": round(time.perf_counter() - self._began, 1),
            "figures": sorted(path.name for path in self.folder.glob("fig_*.png")),
        }  # fmt: skip
        checkpoints.write_text(self.folder / "manifest.json", json.dumps(manifest, indent=2) + "\n")
        return verdicts


def write_rows(path: Path, table: pd.DataFrame, tier: str) -> None:
    """Replace the rows of this tier in a results file and leave those of other tiers."""
    others = pd.DataFrame()
    if path.is_file():
        before = pd.read_csv(path)
        others = before[before["tier"] != tier]
    merged = pd.concat([others, table], ignore_index=True) if len(others) else table
    checkpoints.write_text(path, merged.to_csv(index=False))


def tier_named(name: str) -> Tier:
    if name not in TIERS:
        raise ValueError(f"unknown tier {name!r}; choose one of {', '.join(TIERS)}")
    return TIERS[name]


def require_writable(folder: Path) -> None:
    """Raise one clear error before anything is measured where results could not be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise OSError(f"cannot write to {folder} ({error.strerror}); choose another with -p figures_dir FOLDER") from None
    if shutil.disk_usage(folder).free < 50e6:
        raise OSError(f"less than 50 MB are free at {folder}; make room or choose another with -p figures_dir FOLDER")


# --- the command line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a paper's notebook; 0 when it reached its verdict, 2 for a wrong call, 1 for a failed run, 130 when interrupted."""
    options = _parse(arguments)
    if options.paper == "list":
        print("\n".join(f"{name:10} {about}" for name, about in PAPERS.items()))
        return 0
    names = list(PAPERS) if options.paper == "all" else [options.paper]
    return max(_reproduce(name, options) for name in names)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="./reproduce.sh", description="Rerun a paper, redraw its figures and print the verdict.",
        epilog="papers: " + "; ".join(PAPERS) + ". tiers: " + "; ".join(f"{k} ({t.about})" for k, t in TIERS.items()),
    )  # fmt: skip
    parser.add_argument("paper", help="a paper, or list, or all")
    parser.add_argument("--tier", default="laptop", help="how much to measure: " + ", ".join(TIERS))
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="a parameter of the notebook")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run; refuse where a setting changed")
    parser.add_argument("--fresh", action="store_true", help="measure again what is on record already")
    parser.add_argument("--dry-run", action="store_true", help="say what would be fetched, taken and written")
    parser.add_argument("--from-scratch", action="store_true", help="make the corpus and train instead of using the committed ones")
    options = parser.parse_args(arguments)
    if options.paper not in (*PAPERS, "list", "all"):
        parser.error(f"unknown paper {options.paper!r}; choose one of {', '.join(PAPERS)}")
    if options.tier not in TIERS:
        parser.error(f"unknown tier {options.tier!r}; choose one of {', '.join(TIERS)}")
    return options


def _reproduce(paper: str, options: argparse.Namespace) -> int:
    notebook = ROOT / "notebooks" / f"{paper}.ipynb"
    try:
        parameters = _parameters(notebook, options)
        figures_dir = Path(str(parameters.get("figures_dir", "figures")))
        if options.dry_run:
            print(plan(paper, options.tier, parameters))
            return 0
        require_writable(figures_dir / paper)
        if options.fresh:
            Run(paper, tier=options.tier, figures_dir=figures_dir).set_aside()
        return _execute(notebook, figures_dir / paper, parameters)
    except _WrongCall as error:
        print(f"reproduce.sh: {error}", file=sys.stderr)
        return 2
    except (ValueError, OSError, assets.AssetError) as error:
        print(f"reproduce.sh: {error}", file=sys.stderr)
        return 1


class _WrongCall(ValueError):
    """A parameter that the notebook does not have, or of another type."""


def _parameters(notebook: Path, options: argparse.Namespace) -> dict[str, object]:
    """The notebook's parameters as the command line sets them; papermill itself would ignore a misspelt one."""
    import papermill

    known = papermill.inspect_notebook(str(notebook))
    given = {"tier": options.tier, "resume": options.resume, "from_scratch": options.from_scratch}
    for name, value in options.p:
        if name not in known:
            raise _WrongCall(f"unknown parameter {name!r} of {notebook.stem}; choose one of {', '.join(known)}")
        given[name] = _typed(name, value, known[name]["inferred_type_name"])
    return given


def _typed(name: str, value: str, kind: str) -> object:
    truths = {"true": True, "false": False, "1": True, "0": False}
    try:
        return {"int": int, "float": float, "bool": lambda v: truths[v.lower()]}.get(kind, str)(value)
    except (ValueError, KeyError):
        raise _WrongCall(f"parameter {name} takes {kind}, not {value!r}") from None


def _execute(notebook: Path, folder: Path, parameters: dict[str, object]) -> int:
    import papermill
    from papermill.exceptions import PapermillExecutionError

    try:
        papermill.execute_notebook(
            str(notebook), str(folder / "executed.ipynb"), parameters, cwd=str(Path.cwd()), progress_bar=False,
            log_output=False, stdout_file=sys.stderr, stderr_file=sys.stderr,
        )  # fmt: skip
    except PapermillExecutionError as error:
        last = str(error.evalue).strip().splitlines()
        print(f"reproduce.sh: {error.ename}: {last[0] if last else 'no message'}", file=sys.stderr)
        print(f"reproduce.sh: the executed notebook up to there is {folder / 'executed.ipynb'}", file=sys.stderr)
        return 130 if error.ename == "KeyboardInterrupt" else 1
    except KeyboardInterrupt:
        print("reproduce.sh: interrupted; nothing measured is lost, go on with --resume", file=sys.stderr)
        return 130
    print(claims_table(folder / "verdict.json"))
    return 0


def claims_table(path: Path) -> str:
    """The verdicts of a verdict.json, as the terminal shows them."""
    found = json.loads(path.read_text())["claims"]
    return claims.as_table([claims.Verdict(**verdict) for verdict in found])


def plan(paper: str, tier: str, parameters: dict[str, object]) -> str:
    """What a run would do, fetch, take and write, and what is missing for it."""
    chosen, target = tier_named(tier), parameters.get("target", "smollm2")
    is_cached = {name: (assets.cache_dir() / f"{a.package}-{a.version}").exists() for name, a in assets.ARCHIVES.items()}
    lines = [
        f"{PAPERS[paper]}",
        f"tier      {tier}: {chosen.about}",
        f"target    {target}",
        f"measures  {chosen.num_prompts} prompts of each of {len(prompts.PROMPT_SETS)} sets at temperature 0 and 1,"
        f" {chosen.max_new_tokens} new tokens, {chosen.repeats} repeats",
        f"time      {chosen.minutes} minutes on two CPU cores" if chosen.minutes.isdigit() else f"time      {chosen.minutes}",
        "memory    under 6 GB" if target == "smollm2" else "memory    the target's weights plus 4 GB",
        f"disk      1.0 GB in {assets.cache_dir()}" + (", 10 GB for features" if parameters.get("from_scratch") else ""),
        "archives  " + ", ".join(f"{name} ({'here' if here else 'to be fetched'})" for name, here in is_cached.items()),
        f"writes    {Path(str(parameters.get('figures_dir', 'figures'))) / paper}/: results.csv, verdict.json, manifest.json, fig_*.png",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
