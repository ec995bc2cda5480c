"""The command line: run a paper's notebook with papermill and print its verdict.

papermill ignores a misspelt parameter, makes no output folder, and dies of Ctrl-C in the middle of
what it does, so all three are seen to here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path

INTERRUPTED = "interrupted; nothing measured is lost, go on with --resume"

try:  # these take seconds
    import papermill
    from nbclient.exceptions import DeadKernelError
    from nbformat import NotebookNode
    from papermill.clientwrap import PapermillNotebookClient
    from papermill.engines import Engine, NotebookExecutionManager, papermill_engines
    from papermill.exceptions import PapermillExecutionError

    from specrepro import assets, claims, experiment, pages, paper_tier, prompts, tts
    from specrepro.experiment import PAPERS, ROOT, TIERS
except KeyboardInterrupt:
    print(f"reproduce.sh: {INTERRUPTED}", file=sys.stderr)
    sys.exit(130)

ENGINE = "specrepro"
# tqdm's, for want of a widget that no terminal shows
WARNINGS = ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), "ignore:IProgress not found"]))
TRUTHS = {"true": True, "false": False, "1": True, "0": False}
FLAGS = {"tier": "--tier", "resume": "--resume", "from_scratch": "--from-scratch"}


class WrongCall(ValueError):
    """A parameter that the notebook does not have, or of another type."""


def main(arguments: Sequence[str] | None = None) -> int:
    """0 at the verdict, 1 if the run failed, 2 for a wrong call, 130 if interrupted."""
    options = _parse(arguments)
    names = list(PAPERS) if options.paper == "all" else [options.paper]
    try:
        return max(_run(name, options) for name in names)
    except KeyboardInterrupt:
        return _say(INTERRUPTED, 130)
    except (ValueError, OSError) as error:
        return _say(str(error), 1)


def _run(name: str, options: argparse.Namespace) -> int:
    if name == "list":
        print("\n".join(f"{paper:10} {about}" for paper, about in PAPERS.items()))
        return 0
    if name == "readme":
        pages.write()
        return 0
    return reproduce(name, options)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    known = [*PAPERS, "list", "all", "readme"]
    tiers = "; ".join(f"{name}: {tier.about}" for name, tier in TIERS.items())
    parser = argparse.ArgumentParser(
        prog="./reproduce.sh",
        description="Rerun a paper, redraw its figures and print the verdict.",
        epilog=f"tiers: {tiers}.",
        allow_abbrev=False,
    )
    parser.add_argument("paper", help=f"one of {', '.join(known)} (readme redoes its tables)")
    parser.add_argument("--tier", default="laptop", help=f"one of {', '.join(TIERS)}")
    parser.add_argument(
        "-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
        help="set a parameter of the notebook",
    )  # fmt: skip
    records = parser.add_mutually_exclusive_group()
    for group, flag, about in (
        (records, "--resume", "go on with an interrupted run; refuse where a setting changed"),
        (records, "--fresh", "measure again what is on record already"),
        (parser, "--dry-run", "say what would be fetched, taken and written"),
        (parser, "--from-scratch", "train here instead of using the committed checkpoint"),
    ):
        group.add_argument(flag, action="store_true", help=about)
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
    except WrongCall as error:
        return _say(str(error), 2)
    folder = Path(str(parameters.get("figures_dir", "figures"))) / paper
    if options.dry_run:
        print(plan(paper, options.tier, parameters, folder))
        return 0
    try:
        experiment.require_writable(folder)
        if options.fresh:
            experiment.set_aside(experiment.records_folder(folder, options.tier))
        return execute(notebook, folder, parameters)
    except (ValueError, OSError, assets.AssetError) as error:
        return _say(experiment.no_room(str(error), folder) or str(error), 1)


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
        if name in FLAGS:
            raise WrongCall(f"parameter {name} is set with {FLAGS[name]}, not with -p")
        given[name] = _typed(name, value, known[name]["inferred_type_name"])
    if options.tier == "paper" and "target" in known:
        model = experiment.reported_model(notebook.stem)
        target = next(one.target for one in paper_tier.published() if one.model == model)
        given.setdefault("target", target)
    return given


def _typed(name: str, value: str, kind: str) -> object:
    takes, read = {
        "int": ("a whole number of at least 0", _count),
        "float": ("a number", float),
        "bool": ("true or false", lambda text: TRUTHS[text.lower()]),
    }.get(kind, (kind, str))
    try:
        return read(value)
    except (ValueError, KeyError):
        raise WrongCall(f"parameter {name} takes {takes}, not {value!r}") from None


def _count(text: str) -> int:
    if int(text) < 0:
        raise ValueError(text)
    return int(text)


def execute(notebook: Path, folder: Path, parameters: dict[str, object]) -> int:
    """Run the notebook into `folder`/executed.ipynb, its output on this terminal as it comes.

    Raises KeyboardInterrupt where it was interrupted, and OSError where the notebook could not be
    written.
    """
    executed = folder / "executed.ipynb"
    try:
        papermill.execute_notebook(
            _unfilled(notebook), _unfilled(executed), parameters, engine_name=ENGINE,
            cwd=str(Path.cwd()), progress_bar=False, autosave_cell_every=0,
        )  # fmt: skip
    except PapermillExecutionError as error:
        message = (str(error.evalue).strip().splitlines() or ["no message"])[0]
        failure = f"{error.ename}: {message} (see {executed})"
        return _say(experiment.no_room(message, folder) or failure, 1)
    except DeadKernelError:
        what = f"the process of {notebook.name} died, most likely for want of memory"
        return _say(f"{what}; free some and go on with --resume", 1)
    found = json.loads((folder / "verdict.json").read_text())["claims"]
    print(claims.as_table([claims.Verdict(**verdict) for verdict in found]))
    return 0


def _unfilled(path: Path) -> str:
    """A path in which papermill finds no parameter to fill in."""
    return str(path).replace("{", "{{").replace("}", "}}")


class _Client(PapermillNotebookClient):
    """Hands Ctrl-C on to the notebook's process, and stops when that has stopped in good order.

    The process has a session of its own, so what is typed at the terminal does not reach it. A
    second Ctrl-C kills it.
    """

    num_interrupts, is_in_cell, is_in_line = 0, False, False

    def execute(self) -> NotebookNode:
        """Every cell in turn; raises KeyboardInterrupt after the cell that was interrupted."""
        before = signal.getsignal(signal.SIGINT)
        if before is not signal.SIG_IGN:  # as it is for what a script starts in the background
            signal.signal(signal.SIGINT, self._interrupt)
        try:
            super().execute(env=os.environ | {"PYTHONWARNINGS": WARNINGS})
        except RuntimeError:  # it died of the Ctrl-C too, in a cell or before it had a session
            if not self.num_interrupts:
                raise
        finally:
            signal.signal(signal.SIGINT, before)
            if self.is_in_line:  # a progress bar was cut short
                print(file=sys.stderr)
        if self.num_interrupts:
            raise KeyboardInterrupt
        return self.nb

    def execute_cell(self, cell: NotebookNode, index: int) -> NotebookNode:
        if self.num_interrupts:
            raise KeyboardInterrupt
        self.is_in_cell = True
        try:
            return super().execute_cell(cell, index)
        finally:
            self.is_in_cell = False

    def log_output_message(self, output: NotebookNode) -> None:
        super().log_output_message(output)
        if output.output_type == "stream":
            self.is_in_line = not output.text.endswith("\n")

    def _interrupt(self, *_: object) -> None:
        self.num_interrupts += 1
        if self.is_in_cell:
            signum = signal.SIGINT if self.num_interrupts == 1 else signal.SIGKILL
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.km.provisioner.pgid, signum)


class _Engine(Engine):
    """papermill's engine with our client, its streams on this terminal."""

    @classmethod
    def execute_managed_notebook(
        cls, manager: NotebookExecutionManager, kernel_name: str, **_: object
    ) -> None:
        _Client(
            manager, kernel_name=kernel_name, stdout_file=sys.stderr, stderr_file=sys.stderr,
            timeout=None, startup_timeout=600, iopub_timeout=60,
            # below, the kernel may tell of a Ctrl-C that met it between two cells
            extra_arguments=["--log-level=CRITICAL"],
        ).execute()  # fmt: skip


papermill_engines.register(ENGINE, _Engine)


def plan(paper: str, tier: str, parameters: dict[str, object], folder: Path) -> str:
    """What a run would measure, fetch, take and write."""
    chosen, target = TIERS[tier], str(parameters.get("target", "smollm2"))
    lab = import_module(f"specrepro.{paper}_lab")
    own = lab.decodes(tier) if hasattr(lab, "decodes") else {}
    default = tts.SIZES[tier] if paper == "tts" else chosen
    num_prompts, max_new_tokens = (
        parameters.get(name) or own.get(name) or getattr(default, name)
        for name in ("num_prompts", "max_new_tokens")
    )
    is_embedded = target == "smollm2"
    archives = [
        f"{name} ({'here' if assets.is_here(name) else 'to be fetched'})"
        for name in assets.ARCHIVES
        if is_embedded or name != "smollm2"
    ]
    is_trained_at_full = tier == "full" and paper not in ("cast", "tts")  # with EAGLE-3's head
    trains = (parameters.get("from_scratch") or is_trained_at_full) and not chosen.num_answers
    features = ", and in runs/ features of the corpus" + " (40 GB)" * is_embedded if trains else ""
    more = ", and hours to train the head" if trains and chosen.time != "hours" else ""
    lines = {
        "paper": PAPERS[paper],
        "tier": f"{tier}, {chosen.about}",
        "target": target,
        "measures": tts.measures(tier, num_prompts, max_new_tokens)
        if paper == "tts"
        else f"{num_prompts} prompts of each of {len(own.get('sets', prompts.PROMPT_SETS))} sets at"
        f" temperature 0{own.get('sampled', ' and 1')}, {max_new_tokens} new tokens,"
        f" {chosen.repeats} repeats",
        "time": f"{chosen.time} on two CPU cores{more}" if is_embedded else "as the target takes",
        "memory": "under 6 GB"
        if is_embedded
        else "the target's weights, twice in float32, and 4 GB",
        "disk": f"1 GB in the cache{features}",
        "archives": ", ".join(archives),
        "writes": f"{folder}: results.csv, verdict.json, manifest.json, fig_*.png, executed.ipynb",
    }
    if tier == "paper" and (published := paper_tier.find(target)):
        named = ("target", "checkpoint", "prompts_dir", "from_scratch")
        given = {name: parameters[name] for name in named if name in parameters}
        sizes = num_prompts, max_new_tokens, chosen.repeats
        if paper == "tts":  # four answers to a question at either temperature
            sizes = 4 * num_prompts, max_new_tokens, 1
            given["sets"] = tuple(tts.reasoning.FROM_HUB.values())
            published = replace(published, depth=tts.TREE_DEPTH)
        lines |= paper_tier.Plan(published, *sizes, **given).lines()
        del lines["archives"]
    return "\n".join(f"{name:9} {value}" for name, value in lines.items())


if __name__ == "__main__":
    sys.exit(main())
