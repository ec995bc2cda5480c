"""The command line: run a paper's notebook with papermill and print its verdict.

papermill ignores a misspelt parameter and makes no output folder, so both are seen to here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import papermill
from papermill.exceptions import PapermillExecutionError

from specrepro import assets, claims, experiment, prompts
from specrepro.experiment import PAPERS, ROOT, TIERS


class WrongCall(ValueError):
    """A parameter that the notebook does not have, or of another type."""


def main(arguments: Sequence[str] | None = None) -> int:
    """0 at the verdict, 1 if the run failed, 2 for a wrong call, 130 if interrupted."""
    options = _parse(arguments)
    if options.paper == "list":
        print("\n".join(f"{name:10} {about}" for name, about in PAPERS.items()))
        return 0
    if options.paper == "readme":
        experiment.write_readme_tables()
        return 0
    names = list(PAPERS) if options.paper == "all" else [options.paper]
    return max(reproduce(name, options) for name in names)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    known = [*PAPERS, "list", "all", "readme"]
    tiers = "; ".join(f"{name}: {tier.about}" for name, tier in TIERS.items())
    parser = argparse.ArgumentParser(
        prog="./reproduce.sh",
        description="Rerun a paper, redraw its figures and print the verdict.",
        epilog=f"tiers: {tiers}.",
    )
    parser.add_argument("paper", help=f"one of {', '.join(known)} (readme redoes its tables)")
    parser.add_argument("--tier", default="laptop", help=f"one of {', '.join(TIERS)}")
    parser.add_argument(
        "-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
        help="set a parameter of the notebook",
    )  # fmt: skip
    for flag, about in {
        "--resume": "go on with an interrupted run; refuse where a setting changed",
        "--fresh": "measure again what is on record already",
        "--dry-run": "say what would be fetched, taken and written",
        "--from-scratch": "train here instead of using the committed checkpoint",
    }.items():
        parser.add_argument(flag, action="store_true", help=about)
    options = parser.parse_args(arguments)
    if options.paper not in known:
        parser.error(f"unknown paper {options.paper!r}; choose one of {', '.join(known)}")
    if options.tier not in TIERS:
        parser.error(f"unknown tier {options.tier!r}; choose one of {', '.join(TIERS)}")
    return options


def reproduce(paper: str, options: argparse.Namespace) -> int:
    """One paper, every foreseeable failure being one line that names the value and the remedy."""
    notebook = ROOT / "notebooks" / f"{paper}.ipynb"
    try:
        parameters = notebook_parameters(notebook, options)
        folder = Path(str(parameters.get("figures_dir", "figures"))) / paper
        if options.dry_run:
            print(plan(paper, options.tier, parameters, folder))
            return 0
        experiment.require_writable(folder)
        if options.fresh:
            experiment.set_aside(experiment.records_folder(folder, options.tier))
        return execute(notebook, folder, parameters)
    except WrongCall as error:
        return _say(str(error), 2)
    except (ValueError, OSError, assets.AssetError) as error:
        return _say(str(error), 1)


def _say(what: str, status: int) -> int:
    print(f"reproduce.sh: {what}", file=sys.stderr)
    return status


def notebook_parameters(notebook: Path, options: argparse.Namespace) -> dict[str, object]:
    """The notebook's parameters as the command line sets them."""
    known = papermill.inspect_notebook(str(notebook))
    given: dict[str, object] = {"tier": options.tier}
    given |= {"resume": options.resume, "from_scratch": options.from_scratch}
    for name, value in options.p:
        if name not in known:
            raise WrongCall(
                f"unknown parameter {name!r} of {notebook.stem}; choose one of {', '.join(known)}"
            )
        given[name] = _typed(name, value, known[name]["inferred_type_name"])
    return given


def _typed(name: str, value: str, kind: str) -> object:
    truths = {"true": True, "false": False, "1": True, "0": False}
    kinds = {"int": int, "float": float, "bool": lambda text: truths[text.lower()]}
    try:
        return kinds.get(kind, str)(value)
    except (ValueError, KeyError):
        raise WrongCall(f"parameter {name} takes {kind}, not {value!r}") from None


def execute(notebook: Path, folder: Path, parameters: dict[str, object]) -> int:
    """Run the notebook into `folder`/executed.ipynb, its output on this terminal as it comes."""
    executed = folder / "executed.ipynb"
    try:
        papermill.execute_notebook(
            str(notebook), str(executed), parameters, cwd=str(Path.cwd()), progress_bar=False,
            stdout_file=sys.stderr, stderr_file=sys.stderr,
        )  # fmt: skip
    except PapermillExecutionError as error:
        if error.ename == "KeyboardInterrupt":
            return _interrupted()
        message = (str(error.evalue).strip().splitlines() or ["no message"])[0]
        return _say(f"{error.ename}: {message} (see {executed})", 1)
    except KeyboardInterrupt:
        return _interrupted()
    found = json.loads((folder / "verdict.json").read_text())["claims"]
    print(claims.as_table([claims.Verdict(**verdict) for verdict in found]))
    return 0


def _interrupted() -> int:
    return _say("interrupted; nothing measured is lost, go on with --resume", 130)


def plan(paper: str, tier: str, parameters: dict[str, object], folder: Path) -> str:
    """What a run would measure, fetch, take and write."""
    chosen, target = TIERS[tier], str(parameters.get("target", "smollm2"))
    num_prompts = parameters.get("num_prompts") or chosen.num_prompts
    is_embedded = target == "smollm2"
    archives = [
        f"{name} ({'here' if assets.is_here(name) else 'to be fetched'})"
        for name in assets.ARCHIVES
        if is_embedded or name != "smollm2"
    ]
    features = " and 10 GB for features" if parameters.get("from_scratch") else ""
    lines = {
        "paper": PAPERS[paper],
        "tier": f"{tier}, {chosen.about}",
        "target": target,
        "measures": f"{num_prompts} prompts of each of {len(prompts.PROMPT_SETS)} sets at"
        f" temperature 0 and 1, {chosen.max_new_tokens} new tokens, {chosen.repeats} repeats",
        "time": f"{chosen.time} on two CPU cores" if is_embedded else "as the target takes",
        "memory": "under 6 GB"
        if is_embedded
        else "the target's weights, twice in float32, and 4 GB",
        "disk": f"1 GB{features} in the cache",
        "archives": ", ".join(archives),
        "writes": f"{folder}: results.csv, verdict.json, manifest.json, fig_*.png, executed.ipynb",
    }
    return "\n".join(f"{name:9} {value}" for name, value in lines.items())


if __name__ == "__main__":
    sys.exit(main())
