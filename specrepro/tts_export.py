"""SpecTTS-Bench's records as other tools read them: Spec-Bench's layout, and one line a request.

Spec-Bench's scripts read a file per method, paradigm and temperature, a line a question. Beside
them `requests.jsonl` has a line for every generation, under the names that vLLM gives to the
acceptance of a request, with what each round drafted from.
"""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from specrepro.checkpoints import write_text
from specrepro.measure import Record


def request_summary(record: Record) -> dict[str, Any]:
    """The acceptance of one generation, under the names that vLLM gives per request."""
    if record.error is not None:
        return {"error": record.error}
    emitted, drafted = record.emitted, record.drafted
    accepted = [num - 1 for num in emitted]
    by_length: dict[int, Counter[int]] = defaultdict(Counter)
    for num_drafted, num_accepted in zip(drafted, accepted, strict=True):
        by_length[num_drafted][num_accepted] += 1
    return {
        "mean_acceptance_length": _over(sum(emitted), len(emitted)),
        "conditional_acceptance_rates": conditional_acceptance(accepted),
        "draft_acceptance_rate": _over(sum(accepted), sum(drafted)),
        "acceptance_histogram": dict(sorted(Counter(accepted).items())),
        "acceptance_histogram_by_draft_length": {k: dict(v) for k, v in sorted(by_length.items())},
        "num_spec_steps": len(emitted),
        "steps_without_draft": drafted.count(0),
        "num_accepted_draft_tokens": sum(accepted),
        "num_draft_tokens": sum(drafted),
        "per_step_accepted": accepted,
        "per_step_drafted": drafted,
        "per_step_source": record.sources,
        "turn": record.turn,
        "sample_index": record.sample - 1,
        "forced": len(record.forced),
    }


def conditional_acceptance(accepted: Sequence[int]) -> list[float]:
    """How often a round that accepted n - 1 tokens accepts an nth, for n = 1, 2, ...

    One and the sums of their products are the mean acceptance length.
    """
    counts = [sum(num >= n for num in accepted) for n in range(max(accepted, default=0) + 2)]
    return [_over(after, before) for before, after in zip(counts, counts[1:-1], strict=False)]


def _over(number: float, of: float) -> float | None:
    return number / of if of else None


def write_requests(records: Sequence[Record], folder: str | Path) -> Path:
    """requests.jsonl: the acceptance of every generation, repeats among them."""
    names = ("method", "paradigm", "temperature", "prompts", "session", "repeat", "score")
    lines = [
        json.dumps({name: getattr(one, name) for name in names} | request_summary(one)) + "\n"
        for one in records
    ]
    path = Path(folder) / "requests.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(lines))
    return path


def export(records: Sequence[Record], folder: str | Path, decode: Callable[..., str]) -> list[Path]:
    """A .jsonl file per method, paradigm and temperature, as Spec-Bench's scripts read them.

    Turns and samples are the turns of one choice. A round after prefill is a decoding step, and
    what it emitted its accept length, so that these add up to `new_tokens`; the prefill's own token
    is in the text alone. Questions of which a generation failed are left out. `decode` makes text
    of token ids.
    """
    files: dict[tuple[Any, ...], dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record.repeat == 0:
            key = (record.method, record.paradigm, record.temperature)
            files[key][record.session].append(record)
    return [_export_one(key, sessions, Path(folder), decode) for key, sessions in files.items()]


def _export_one(
    key: tuple[Any, ...],
    sessions: Mapping[str, list[Record]],
    folder: Path,
    decode: Callable[..., str],
) -> Path:
    method, paradigm, temperature = key
    model = f"{method}, {paradigm}, temperature {temperature:g}"
    lines = [
        json.dumps(_spec_bench_row(session, mine, model, decode)) + "\n"
        for session, mine in sessions.items()
        if all(record.error is None for record in mine)
    ]
    path = folder / f"{model.replace(', ', '-').replace(' ', '-')}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(lines))
    return path


def _spec_bench_row(
    session: str, records: list[Record], model: str, decode: Callable[..., str]
) -> dict[str, Any]:
    ordered = sorted(records, key=lambda record: (record.turn, record.sample))
    choice = {
        "index": 0,
        "turns": [decode(record.tokens, skip_special_tokens=True) for record in ordered],
        "decoding_steps": [record.target_passes for record in ordered],
        "new_tokens": [sum(record.emitted) for record in ordered],
        "wall_time": [record.seconds for record in ordered],
        "accept_lengths": [num for record in ordered for num in record.emitted],
    }
    return {
        "question_id": session,
        "category": ordered[0].prompts,
        "answer_id": f"{model}, {session}",
        "model_id": model,
        "choices": [choice],
        "tstamp": time.time(),
    }
