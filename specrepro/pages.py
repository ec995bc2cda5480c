"""What a reader sees without running anything: README's table, and a page for each paper.

Functions of the committed rows and verdicts. README has one line a paper; figures/<paper>/README.md
has what was found, in words of its own, and below a mark what is written here: means, the claims
one by one, every prompt set and the figures.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from specrepro import checkpoints, claims, measure
from specrepro.claims import MEASURED_NOW
from specrepro.experiment import COMMITTED, PAPERS, ROOT, TIERS, judge_again, reported_model
from specrepro.prompts import PROMPT_SETS

README = ROOT / "README.md"
NONE = "Not measured yet.\n"
LEGEND = """\
*Reproduced*: the paper's number, with the whole 95 % interval within a tolerance fixed beforehand.
*Direction holds*: the ordering, trend or bound that is claimed, with the whole interval on its
side. *Not reproduced*: the interval lies on the other side. *Inconclusive*: on both, or there is
none. *Proxy*: measured, but on a target or machine whose absolute numbers cannot be set against the
paper's. For an ordering, `reported` and `measured` are differences; for a claim without a number of
the paper's, `reported` is its bound. Intervals resample prompts, or what was decoded as one batch,
and are widened as Student's t is for few; one or two have none, and the mean of several sets of two
need not have one either. They hold the seed, the trained head and the hour fixed, and nothing
corrects for how many claims are judged."""
MARK = "<!-- below: written by python -m specrepro readme -->"
OWN = {  # the method that a paper is about
    "eagle3": "EAGLE-3", "cast": "CAST", "gto": "GTO", "fasteagle": "FastEagle",
    "adaeagle": "AdaEAGLE", "tts": "SAM[EAGLE-3]",
}  # fmt: skip
BESIDE = {  # quantity -> the heading of its table
    "baselines": "Beside other methods, on the same prompts and the same clock",
    "ablation": "Ablation",
    "papers_tree": "With the paper's tree: 60 nodes in eight levels",
}
SINGLE = {("eagle3", "ablation"): ("chat", "maths")}  # sets beside the mean: Table 2's, greedy
OF_SEVERAL_SETS = ("mean", "overall")
_UNITS = (("speedup", "x"), ("tau", ""))


def write() -> None:
    """Judge the claims of every paper again; redo README's table and the papers' pages."""
    for paper in PAPERS:
        judge_again(paper)
    checkpoints.write_text(README, with_table(README.read_text()))
    for paper, text in pages().items():
        checkpoints.write_text(page(paper), text)


def page(paper: str) -> Path:
    """Where the page of a paper is; GitHub shows it below the folder's files."""
    return ROOT / "figures" / paper / "README.md"


def pages() -> dict[str, str]:
    """The page of every paper that has a verdict."""
    folders = {paper: page(paper).parent for paper in PAPERS}
    return {p: page_of(p) for p, folder in folders.items() if (folder / "verdict.json").is_file()}


# --- README's table


def with_table(text: str) -> str:
    """A README text with what stands between `<!-- papers -->` and `<!-- end -->` anew."""
    before, mark, rest = text.partition("<!-- papers -->\n")
    _, end, after = rest.partition("<!-- end -->")
    if not end:
        raise ValueError("README has no place for its table: <!-- papers --> and <!-- end -->")
    return before + mark + _papers_table() + end + after


def _papers_table() -> str:
    names = ("paper", "prompts", "speedup", "tau", "reported: speedup / tau", "claims")
    head = f"| {' | '.join(names)} |\n|{'---|' * len(names)}\n"
    return head + "".join(map(_paper_line, PAPERS))


def _paper_line(paper: str) -> str:
    """A paper's own method at temperature 0 over several prompt sets, ours beside the paper's."""
    name, about, arxiv = re.fullmatch(r"(.+?): (.+) \((\S+)\)", PAPERS[paper]).groups()
    told = page(paper).relative_to(ROOT)
    shown = f"; here its {OWN[paper]}" if OWN[paper] != name else ""
    cells = [f"[{name}]({told}): {about} ([{arxiv}](https://arxiv.org/abs/{arxiv})){shown}"]
    decoded = means(_decoded(paper))
    if decoded.empty:
        return f"| {cells[0]} | {' | '.join(['-'] * 4)} | not measured yet |\n"
    own = decoded[
        (decoded["method"] == OWN[paper]) & (decoded["temperature"] == 0) & (decoded["batch"] == 1)
    ].iloc[-1]  # the last is of all prompts together where the paper has such a row
    cells += [f"{own['num_prompts']:g}", *(_measured_cell(own, *one) for one in _UNITS)]
    beside = _beside(own, ["method", "temperature", "prompts"], _reported(paper))
    cells.append(f"{beside} ({reported_model(paper)})" if beside else "-")
    cells.append(claims.summary([one for one in _verdicts(paper) if not _is_ours(one)]))
    return f"| {' | '.join(cells)} |\n"


# --- a paper's page


def page_of(paper: str) -> str:
    """What its page says by hand, then means, claims, prompt sets and figures; in Markdown."""
    path, verdicts, decoded = page(paper), _verdicts(paper), _decoded(paper)
    by_hand = path.read_text().partition(MARK)[0] if path.is_file() else f"# {PAPERS[paper]}"
    tables = [table_of(paper, rows) for rows in (means(decoded), decoded)] if len(decoded) else []
    parts = [
        by_hand,
        MARK,
        f"## What `./reproduce.sh {paper}` measured\n\n{tables[0] if tables else NONE}",
        f"## Claim by claim\n\n{_summaries(verdicts)}\n\n{LEGEND}\n\n{_claims_table(verdicts)}",
        *(f"## Every prompt set\n\n{table}\n{_sets(decoded)}" for table in tables[1:]),
        *(f"## {title}\n\n{table}" for title, table in _tables_beside(paper).items()),
        f"## Figures\n\n{_figures(path.parent)}",
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _told(paper: str, file: str = "verdict.json") -> dict[str, Any]:
    """What the paper's verdict.json or manifest.json says; nothing where there is none."""
    path = page(paper).with_name(file)
    return json.loads(path.read_text()) if path.is_file() else {"tier": "", "claims": []}


def _tier(paper: str) -> str:
    return _told(paper)["tier"]


def _verdicts(paper: str) -> list[claims.Verdict]:
    return [claims.Verdict(**one) for one in _told(paper)["claims"]]


def _is_ours(verdict: claims.Verdict) -> bool:
    """A bar that we set for ourselves, and not a claim of the paper's."""
    return verdict.id.startswith("own-")


def _summaries(verdicts: list[claims.Verdict]) -> str:
    """What became of the paper's claims, and of bars of our own where there are some."""
    parts = {False: [], True: []}
    for one in verdicts:
        parts[_is_ours(one)].append(one)
    told = f"The paper's: {claims.summary(parts[False])}."
    return told + (f" Bars of our own: {claims.summary(parts[True])}." if parts[True] else "")


def _claims_table(verdicts: list[claims.Verdict]) -> str:
    """Those that were tested, then the ids of those that were not, under each reason once."""
    tested = [one for one in verdicts if one.verdict != "not tested"]
    lines = [
        f"- Not tested, {why}: {', '.join(f'`{one}`' for one in ids)}"
        for why, ids in claims.untested(verdicts).items()
    ]
    return "\n".join([claims.as_markdown(tested), "", *lines])


def _sets(decoded: pd.DataFrame) -> str:
    """What the prompt sets hold, and which of the papers' they stand for."""
    told = [
        f"{name} ({one.stands_for}): {one.holds}"
        for name, one in PROMPT_SETS.items()
        if name in set(decoded["prompts"])
    ]
    return f"Prompts, and the papers' that they stand for: {'; '.join(told)}." if told else ""


def _figures(folder: Path) -> str:
    numbered = {int(path.stem.split("_")[1]): path for path in folder.glob("fig_*.png")}
    captions = (
        f"![{' '.join(path.stem.split('_')[2:])}]({path.name})"
        for _, path in sorted(numbered.items())
    )
    return "\n\n".join(captions)


# --- tables of decoding


def _decoded(paper: str) -> pd.DataFrame:
    """Rows of quantity "decode" at the batch sizes that the paper's tables have, and at 1.

    Of the tier that the verdict is of.
    """
    found = _rows(paper, "decode")
    if found.empty:
        return found
    sizes = [1, *_batch_sizes(_reported(paper))]
    return found[found["batch"].isin(sizes) & (found["tier"] == _tier(paper))]


def _rows(paper: str, quantity: str) -> pd.DataFrame:
    """The committed rows of what was drafted; empty where nothing was measured."""
    path = page(paper).with_name("results.csv")
    if not path.is_file():
        return pd.DataFrame()
    found = pd.read_csv(path, low_memory=False)
    return found[(found["quantity"] == quantity) & (found["method"] != measure.AUTOREGRESSIVE)]


def _tables_beside(paper: str) -> dict[str, str]:
    """Tables of `BESIDE`, by heading, of what was measured at the largest tier."""
    tables = {}
    for quantity, title in BESIDE.items():
        found = _rows(paper, quantity)
        if len(found):
            found = found[found["tier"] == max(found["tier"], key=list(TIERS).index)]
            is_single = found["prompts"].isin(SINGLE.get((paper, quantity), ()))
            shown = pd.concat([means(found), found[is_single & (found["temperature"] == 0)]])
            tables[title] = table_of(paper, shown, _of_any_model(paper, quantity))
    return tables


def means(decoded: pd.DataFrame) -> pd.DataFrame:
    """The rows over several prompt sets, and all rows where there are none of these."""
    is_mean = decoded["prompts"].isin(OF_SEVERAL_SETS)
    setting = [decoded[key] for key in ("method", "temperature", "batch")]
    return decoded[is_mean | ~is_mean.groupby(setting).transform("any")]


def table_of(
    paper: str,
    decoded: pd.DataFrame,
    reported: pd.DataFrame | None = None,
) -> str:
    """Speedup and tau with intervals, measured beside reported, in Markdown.

    With a column of batch sizes where the paper's own tables have one.
    """
    reported = _reported(paper) if reported is None else reported
    batches = ["batch"] if len(_batch_sizes(reported)) else []
    keys = ["method", "temperature", *batches, "prompts"]
    names = ["method", "T", *batches, "prompts", "n", "speedup [95 %]", "tau [95 %]"]
    names += [f"reported ({reported_model(paper)})"]
    head = f"| {' | '.join(names)} |\n|{'---|' * len(names)}\n"
    lines = [_table_line(row, keys, reported) for row in decoded.to_dict("records")]
    return head + "".join(lines) + _provenance(decoded, _told(paper, "manifest.json"))


def _reported(paper: str) -> pd.DataFrame:
    """The authors' own cells of decoding, of the model that is set beside ours."""
    reported = _of_any_model(paper, "decode")
    return reported[reported["model"] == reported_model(paper)].drop(columns="of")


def _of_any_model(paper: str, quantity: str) -> pd.DataFrame:
    """Those of all models, of the `quantity` or of decoding.

    The quantity's own and that model's come first; `of` is the name of any other.
    """
    found = claims.reported(paper)
    found = found[found["quantity"].isin([quantity, "decode"]) & (found["by"] == "authors")]
    is_other = found["model"] != reported_model(paper)
    order = pd.DataFrame({"quantity": found["quantity"] != quantity, "model": is_other})
    found = found.assign(of=found["model"].where(is_other, ""))
    return found.loc[order.sort_values(["quantity", "model"], kind="stable").index]


def _batch_sizes(reported: pd.DataFrame) -> Sequence[float]:
    return reported["batch"].dropna().unique() if "batch" in reported else []


def _table_line(row: Mapping[str, object], keys: Sequence[str], reported: pd.DataFrame) -> str:
    ours = [_measured_cell(row, name, unit) for name, unit in _UNITS]
    place = [f"{row[key]:g}" if key in ("temperature", "batch") else row[key] for key in keys]
    theirs = _beside(row, keys, reported) or "-"
    cells = [*place, f"{row['num_prompts']:g}", *ours, theirs]
    return "| " + " | ".join(cells) + " |\n"


def _beside(row: Mapping[str, object], keys: Sequence[str], reported: pd.DataFrame) -> str:
    """What the paper tells of a row's setting; empty where it tells nothing."""
    is_beside = pd.Series(True, index=reported.index)
    for key in [*keys, *({"paradigm"} & set(row.keys()) & set(reported))]:
        is_beside &= reported[key] == row[key]
    theirs = reported[is_beside].to_dict("records")
    return _reported_cell(theirs[0]) if theirs else ""


def _reported_cell(cell: Mapping[str, object]) -> str:
    """Speedup and tau, as far as the paper tells them."""
    found = ["-" if pd.isna(cell.get(n)) else f"{cell[n]:.2f}{unit}" for n, unit in _UNITS]
    other = f" ({cell['of']})" if cell.get("of") else ""
    return " / ".join(found).removesuffix(" / -") + other


def _measured_cell(row: Mapping[str, object], name: str, unit: str) -> str:
    """A number and its interval, which a lone prompt or batch has not; `-` if not measured."""
    if pd.isna(row[name]):
        return "-"
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    ends = "" if pd.isna(low) else f" [{low:.2f}, {high:.2f}]"
    return f"{row[name]:.2f}{unit}{ends}"


def _short(commit: str) -> str:
    """Of one commit, or of several that a run was interrupted between, what tells them apart."""
    return " and ".join(one[:12] for one in commit.split(" and "))


def _provenance(decoded: pd.DataFrame, manifest: Mapping[str, Any]) -> str:
    one = decoded.iloc[0]
    is_of_it = one["tier"] == manifest.get("tier")
    limit = f" at most {manifest['max_new_tokens']} new tokens," if is_of_it else ""
    others = set(decoded["source"].dropna()) - {MEASURED_NOW, COMMITTED}
    how = ", ".join(sorted(others)) or "prefill timed"
    return (
        f"\nTier `{one['tier']}`, target {one['target']}, {one['dtype']} on {one['device']}"
        f" ({one['threads']:g} threads),{limit} {how}, torch {one['torch']},"
        f" {str(one['when'])[:10]}, commit {_short(str(one['commit']))}.\n"
    )
