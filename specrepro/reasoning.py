"""Questions whose answers can be checked, and what is made of a target's answers to them.

Three generated sets (reasoning-gym: arithmetic, algebra, logic) serve the embedded target, each
answer judged by its generator's own scorer. Where the Hub can be reached, the four sets of
SpecTTS-Bench (arXiv:2509.04474) are read from it: AIME 2024 and 2025, MATH-500, GPQA. Their answers
are judged by `math-verify` where it is installed (`pip install math-verify`), and else by comparing
texts, which misses right answers in other words.

Reproduced: the benchmark's first prompt (the bare question, no system message); what of an answer
the next turn is shown; where thinking is cut short and what is then said.
Not reproduced: its 30 questions of MATH-500 and of GPQA, which were drawn by hand; ours are drawn
by seed. It measures no accuracy.
Departs: a generated question asks for reasoning, without which a small target answers in a line. A
target without a thinking mode shows the next turn its last paragraph. The second turn's request is
in words of our own, which suppose that something was wrong; the benchmark asks to double-check.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from typing import TYPE_CHECKING

from specrepro import prompts
from specrepro.decoding import Thinking
from specrepro.prompts import Prompt
from specrepro.target_model import Target

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATED = {  # set -> generator of reasoning-gym, and whether it asks for a number
    "arithmetic": ("gsm_symbolic", True),
    "algebra": ("simple_equations", True),
    "logic": ("knights_knaves", False),
}
FROM_HUB = {"aime24": "aime", "aime25": "aime25", "math500": "math500", "gpqa": "gpqa"}
REASON = "\n\nReason step by step, then give the final answer between <answer> and </answer>."
AGAIN = (
    "{question}\nYou have answered this before. Check the previous answer, and say where it is"
    " wrong:\n<answer> {answer} </answer>\nThen answer the question again."
)
END_OF_THINKING = "</think>"
# what a model family was told to say when its time is up: Qwen3 technical report, section 4.3
TIME_IS_UP = {
    "qwen3": "Considering the limited time by the user, I have to give the solution based on the"
    " thinking directly now.\n</think>.\n\n",
}
BREAK_OFF = "\n\n</think>\n\n"  # of any other
BUDGET_SHARE = 0.8  # of the new tokens, for thinking

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_MOST_QUESTIONS = 1000  # of a generated set


@dataclass(frozen=True, slots=True)
class Question:
    """One question, its right answer, and how an answer is scored: 1 is right, 0 is not."""

    id: str
    category: str  # the set it is of
    text: str
    answer: str
    scorer: Callable[[str], float]

    def score(self, text: str) -> float:
        """The score of a target's whole text."""
        return self.scorer(stated_answer(text))

    def first_prompt(self, copies: int = 1) -> Prompt:
        """The bare question, or several user turns of it without an answer between."""
        return Prompt(self.id, self.category, _user_turns(self.text, copies), self.answer)

    def next_prompt(self, previous: str) -> Prompt:
        """A fresh request that shows the previous answer; without one, the first prompt."""
        if not previous:
            return self.first_prompt()
        text = AGAIN.format(question=self.text, answer=previous)
        return Prompt(self.id, self.category, _user_turns(text), self.answer)


def _user_turns(text: str, copies: int = 1) -> tuple[prompts.Message, ...]:
    return ({"role": "user", "content": text},) * copies


def generated(name: str, num_questions: int, seed: int = 0) -> list[Question]:
    """The first questions of a generated set; fewer are the start of more.

    Raises ValueError for an unknown set or more questions than one is asked for.
    """
    import reasoning_gym

    _check(name, GENERATED, num_questions)
    generator, is_number = GENERATED[name]
    # question i is drawn from seed + i; half way between the seeds of the prompt set of maths
    start = seed * 1_000_003 + 500_000
    tasks = reasoning_gym.create_dataset(generator, seed=start, size=2 * _MOST_QUESTIONS)
    readable = (i for i in range(len(tasks)) if not re.search(r"\.\d{4}", tasks[i]["question"]))
    return [
        _generated_question(name, f"{name}/{seed}/{i}", tasks, i, is_number)
        for i in islice(readable, num_questions)
    ]


def _generated_question(
    name: str, question_id: str, tasks: Sequence[dict], index: int, is_number: bool
) -> Question:
    entry = tasks[index]

    def score(stated: str) -> float:
        said = last_number(stated) if is_number else stated
        # the scorers give a little for a part of the answer, and for any answer at all
        return float(tasks.score_answer(answer=said, entry=entry) >= 1)

    return Question(question_id, name, entry["question"] + REASON, entry["answer"], score)


def from_hub(
    name: str, num_questions: int, seed: int = 0, source: str | None = None
) -> list[Question]:
    """Questions of one of the benchmark's sets, from the Hub or from `source`, a folder of it."""
    _check(name, FROM_HUB, num_questions)
    found = prompts.load_from_hub(FROM_HUB[name], num_questions, seed, source)
    return [
        Question(
            f"{name}/{one.id.rpartition('/')[2]}", name, one.messages[-1]["content"], one.answer,
            lambda stated, right=one.answer: same_answer(right, stated),
        )
        for one in found
    ]  # fmt: skip


def _check(name: str, known: Sequence[str], num_questions: int) -> None:
    if name not in known:
        raise ValueError(f"unknown set of questions {name!r}; choose one of {', '.join(known)}")
    if not 1 <= num_questions <= _MOST_QUESTIONS:
        raise ValueError(f"{num_questions} questions of {name}; ask for 1 to {_MOST_QUESTIONS}")


# --- what was said


def stated_answer(text: str) -> str:
    """What a text gives as its answer: tagged, boxed, behind "answer is", else its last line."""
    for pattern in (_TAGGED, _BOXED):
        if found := pattern.findall(text):
            return found[-1].strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    return re.split(r"answer is:?\s*", last, flags=re.IGNORECASE)[-1].strip()


def last_number(text: str) -> str:
    """The last number of a text, without the commas between its thousands; "" for none."""
    found = _NUMBER.findall(text)
    return found[-1].replace(",", "") if found else ""


def same_answer(right: str, stated: str) -> float:
    """1 where `stated` is the answer `right`: by math-verify if it is installed, else by text."""
    if _bare(right) == _bare(stated):
        return 1.0
    if find_spec("math_verify") is None:
        return 0.0
    import math_verify

    gold, found = (math_verify.parse(f"\\boxed{{{text}}}") for text in (right, stated))
    return float(math_verify.verify(gold, found))


def _bare(text: str) -> str:
    """A text without case, spaces, the signs around a formula and the stop at its end."""
    return re.sub(r"[\s$]", "", text).rstrip(".").casefold()


def final_answer(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """What the next turn is shown: what came behind the thinking, nothing where it did not end.

    Of a target without a thinking mode, the last paragraph.
    """
    end_id = end_of_thinking(tokenizer)
    if end_id is None:
        text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
        return re.split(r"\n\s*\n", text)[-1].strip()
    ends = [place for place, token in enumerate(tokens) if token == end_id]
    behind = tokens[ends[-1] + 1 :] if ends else []
    return tokenizer.decode(behind, skip_special_tokens=True).strip()


# --- thinking


def end_of_thinking(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that ends thinking; None for a target that does not think aloud."""
    return tokenizer.get_vocab().get(END_OF_THINKING)


def thinking_of(
    target: Target, max_new_tokens: int, share: float = BUDGET_SHARE
) -> Thinking | None:
    """A limit on thinking, `share` of the new tokens; None for a target without such a mode."""
    end_id = end_of_thinking(target.tokenizer)
    if end_id is None:
        return None
    words = TIME_IS_UP.get(target.config.model_type, BREAK_OFF)
    forced = target.tokenizer(words, add_special_tokens=False)["input_ids"]
    return Thinking(max(1, int(share * max_new_tokens)), end_id, tuple(forced))


def about_thinking(target: Target, thinking: Thinking | None) -> str:
    """One line for a notebook: whether, and where, thinking is cut short."""
    if thinking is None:
        return f"{target.name} has no thinking mode ({END_OF_THINKING}): its budget is off"
    words = target.tokenizer.decode(list(thinking.forced))
    return f"after {thinking.budget} new tokens of thinking, {target.name} is made to say {words!r}"
