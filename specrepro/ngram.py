"""Drafters that nobody trained, from text alone: PLD, SAM-Decoding, SuffixDecoding, REST and PIA.

They look for the end of a sequence in what it said before or in a store, and draft what followed.
Token ids are all they read, so what is accepted of them can be replayed from a recorded answer
(`replay`). Drafters that also read the target's guesses are in `recycling`.

Reproduced: the data structures, the drafting rules and the default sizes of each method.
Not reproduced: how they accept. The shared verification does that, so all are lossless at any
temperature; REST's own code is not.
Departs from all: a round that finds nothing drafts nothing, where PLD and REST send a dummy token.
Other departures stand with each class.

What is kept, and how long:
- within a call of `decode`, each sequence has a state of its own, and reads a round's tokens when
  the next round begins. Those of the last round are never read, as only `decode` knows where they
  were cut;
- with `carries=True` what was learnt also serves later calls: sequence i of a call goes on where
  sequence i of the call before ended. `reset()` forgets all of it, and whoever runs an experiment
  says when. SpecTTS-Bench resets SAM and PIA at each new question and Token Recycling never;
- a store given at construction (a suffix array, texts for a static automaton) always stays.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from operator import itemgetter
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from specrepro.decoding import Drafter, Verdict
from specrepro.draft_tree import PADDING, ROOT, DraftTree
from specrepro.suffix import (
    Branch,
    Node,
    SuffixArray,
    SuffixAutomaton,
    SuffixTree,
    Text,
    frequent_prefixes,
    longest,
    most_frequent,
)
from specrepro.target_model import Scores, Target

# --- what one sequence proposes


@dataclass(slots=True)
class Draft:
    """The candidates of one sequence: the root is node 0 and parents precede children."""

    tokens: list[int]
    parents: list[int]
    score: float = 0.0  # tokens matched, or expected to be accepted: what a hybrid decides by
    source: str = "none"  # where the candidates come from

    @classmethod
    def root(cls, token: int) -> Draft:
        return cls([token], [ROOT])

    @classmethod
    def chain(cls, tokens: list[int], score: float, source: str) -> Draft:
        """One child per node; `tokens` starts with the root."""
        source = source if len(tokens) > 1 else "none"
        return cls(tokens, list(range(ROOT, len(tokens) - 1)), score, source)

    def num_accepted(self, answer: Sequence[int]) -> int:
        """How many of its tokens a target accepts that goes on with `answer`."""
        nodes = {
            pair: node for node, pair in enumerate(zip(self.parents, self.tokens, strict=True))
        }
        node = 0
        for depth, token in enumerate(answer):
            if (node, token) not in nodes:
                return depth
            node = nodes[node, token]
        return len(answer)


def stack(drafts: Sequence[Draft], device: torch.device | str = "cpu") -> DraftTree:
    """The drafts of a batch as one tree of padded rows."""
    width = max(len(draft.tokens) for draft in drafts)
    missing = [width - len(draft.tokens) for draft in drafts]
    tokens = [d.tokens + [0] * m for d, m in zip(drafts, missing, strict=True)]
    parents = [d.parents + [PADDING] * m for d, m in zip(drafts, missing, strict=True)]
    return DraftTree(torch.tensor(tokens, device=device), torch.tensor(parents, device=device))


Successors = Callable[[object, float], Iterable[tuple[float, int, object]]]


def grow(
    root: int,
    state: object,
    successors: Successors,
    num_nodes: int,
    source: str,
    max_width: int | None = None,
) -> Draft:
    """A tree of at most `num_nodes`, the root included, that takes the most probable node first.

    `successors(state, probability)` yields the probability, token and state of each child; none may
    exceed its parent's. `max_width` bounds the nodes of a level. The score is the sum of
    probabilities: the tokens that are expected to be accepted.
    """
    draft, heap, serial = Draft.root(root), [], itertools.count()
    widths: dict[int, int] = {}

    def push(node: int, depth: int, state: object, probability: float) -> None:
        for p, token, following in successors(state, probability):
            heapq.heappush(heap, (-p, next(serial), token, node, depth + 1, following))

    push(0, 0, state, 1.0)
    while heap and len(draft.tokens) < num_nodes:
        negative, _, token, parent, depth, following = heapq.heappop(heap)
        if widths.setdefault(depth, 0) == max_width:
            continue
        widths[depth] += 1
        draft.tokens.append(token)
        draft.parents.append(parent)
        draft.score -= negative
        push(len(draft.tokens) - 1, depth, following, -negative)
    draft.source = source if len(draft.tokens) > 1 else "none"
    return draft


# --- drafters that read token ids alone


class Reader(Protocol):
    """What one sequence has read, and what it proposes to go on with."""

    def begin(self, prompt: list[int]) -> None:
        """Start a turn; what is kept of earlier ones is the reader's business."""

    def read(self, tokens: list[int]) -> None:
        """Take in emitted tokens; the last is the root of the next draft."""

    def draft(self) -> Draft:
        """Candidates behind the last token read."""


class TextDrafter:
    """A reader per sequence behind the `Drafter` protocol."""

    def __init__(self, new_reader: Callable[[], Reader], max_nodes: int, carries: bool = False):
        self.new_reader, self.max_nodes, self.carries = new_reader, max_nodes, carries
        self.device: torch.device | str = "cpu"
        self.reset()

    def reset(self) -> None:
        """Forget what was learnt from earlier calls."""
        self.kept: list[Reader] = []

    def begin(self, prompts: Tensor, lengths: Tensor, roots: Tensor, scores: Scores) -> None:
        self.device = roots.device
        rows = zip(prompts.tolist(), lengths.tolist(), strict=True)
        self.start([prompt[:length] for prompt, length in rows], roots.tolist())

    def start(self, prompts: Sequence[list[int]], roots: Sequence[int]) -> None:
        """Begin a turn of every sequence with its prompt and its first emitted token."""
        if not self.carries:
            self.reset()
        self.kept += [self.new_reader() for _ in prompts[len(self.kept) :]]
        self.readers = self.kept[: len(prompts)]
        self.unread = [[root] for root in roots]
        for reader, prompt in zip(self.readers, prompts, strict=True):
            reader.begin(prompt)

    def drafts(self) -> list[Draft]:
        """Read what the last round emitted, and draft behind it."""
        for reader, tokens in zip(self.readers, self.unread, strict=True):
            reader.read(tokens)
        self.unread = [[] for _ in self.readers]
        return [reader.draft() for reader in self.readers]

    def propose(self) -> DraftTree:
        self.drafted = self.drafts()
        self.sources = [draft.source for draft in self.drafted]  # for records
        return stack(self.drafted, self.device)

    def observe(self, verdict: Verdict, scores: Scores) -> None:
        self.unread = [
            tokens[: count + 1]
            for tokens, count in zip(
                verdict.tokens.tolist(), verdict.num_accepted.tolist(), strict=True
            )
        ]

    def select(self, rows: Tensor) -> None:
        self.readers = [self.readers[i] for i in rows.tolist()]
        self.unread = [self.unread[i] for i in rows.tolist()]


def replay(
    prompt: Sequence[int],
    answer: Sequence[int],
    drafter: TextDrafter,
    forced: Collection[int] = (),
    decide: Callable[[int, Draft, int], int] | None = None,
) -> list[int]:
    """The accepted tokens of each round of greedy decoding, from the recorded ids of one answer.

    Equals `Generation.accepted` round by round, but for what the last round accepted beyond the
    end of the answer, which no record holds. A drafter that carries goes on from turn to turn.
    `forced` are the places of tokens that the target did not choose: a round ends before each.
    `decide` may accept another number of tokens than the draft at a place has right.
    """
    drafter.start([list(prompt)], [answer[0]])
    accepted, place = [], 1
    while place < len(answer):
        (draft,) = drafter.drafts()
        num_right = draft.num_accepted(chosen_from(place, answer, forced))
        accepted.append(decide(place, draft, num_right) if decide else num_right)
        following = place + accepted[-1] + 1
        drafter.unread = [list(answer[place:following])]
        place = following
    return accepted


def chosen_from(place: int, answer: Sequence[int], forced: Collection[int]) -> Sequence[int]:
    """What a draft for `place` on may have right: with forced tokens ahead, not the last before.

    The round that reaches them emits that one as its bonus.
    """
    end = min((p for p in forced if p >= place), default=None)
    return answer[place:] if end is None else answer[place : max(end - 1, place)]


# --- prompt lookup decoding


@dataclass(frozen=True, slots=True)
class LookupConfig:
    """Prompt lookup; defaults of the original, which SpecTTS-Bench runs.

    vLLM's variant is `require_full=False`.
    """

    max_n: int = 3  # longest n-gram looked up
    min_n: int = 1
    num_tokens: int = 10  # copied from behind the match
    require_full: bool = True  # only where all `num_tokens` are there
    occurrence: str = "first"  # or "last"

    def __post_init__(self) -> None:
        if self.occurrence not in ("first", "last"):
            raise ValueError(f"occurrence is {self.occurrence!r}; choose first or last")
        if not 1 <= self.min_n <= self.max_n or self.num_tokens < 1:
            raise ValueError(f"lookup needs 1 <= min_n <= max_n and num_tokens >= 1, not {self}")


class LookupReader:
    """The ids of prompt and answer in one growing array."""

    def __init__(self, config: LookupConfig):
        self.config = config

    def begin(self, prompt: list[int]) -> None:
        self.ids, self.length = np.empty(256, np.int64), 0
        self.read(prompt)

    def read(self, tokens: list[int]) -> None:
        end = self.length + len(tokens)
        if end > len(self.ids):
            self.ids = np.resize(self.ids, 2 * end)
        self.ids[self.length : end] = tokens
        self.length = end

    def draft(self) -> Draft:
        config, text = self.config, self.ids[: self.length]
        for n in range(min(config.max_n, len(text) - 1), config.min_n - 1, -1):
            end = self._match_end(text, n)
            if end is not None:
                tokens = text[end : end + config.num_tokens].tolist()
                return Draft.chain([int(text[-1]), *tokens], n, "own")
        return Draft.root(int(text[-1]))

    def _match_end(self, text: np.ndarray, n: int) -> int | None:
        """Behind the chosen earlier occurrence of the last `n` ids."""
        num_starts = len(text) - n
        is_match = text[:num_starts] == text[-n]
        for i in range(1, n):
            is_match &= text[i : num_starts + i] == text[i - n]
        if self.config.require_full:
            is_match = is_match[: max(num_starts - self.config.num_tokens + 1, 0)]
        starts = is_match.nonzero()[0]
        if not len(starts):
            return None
        return int(starts[0 if self.config.occurrence == "first" else -1]) + n


class PromptLookup(TextDrafter):
    """PLD: copy what followed an earlier occurrence of the last three, two or one ids.

    Nothing is carried: prompt and answer of the running call are all it reads.
    """

    def __init__(self, config: LookupConfig | None = None):
        config = config or LookupConfig()
        super().__init__(lambda: LookupReader(config), 1 + config.num_tokens)


# --- SAM-Decoding (arXiv:2411.10666)


@dataclass(frozen=True, slots=True)
class SamConfig:
    """SAM-Decoding's sizes, as SpecTTS-Bench runs it."""

    max_nodes: int = 40  # n_predicts: of a draft, the root included
    alpha: float = 4.0  # 1 + alpha nodes per matched token
    length_bias: int = 0  # l_bias: by how much a static match must be longer; 5 beside a drafter
    width: int = 8  # static drafts: successors per state and nodes per level
    fills: bool = False  # prefer a shorter match that fills the draft: the rule inside a hybrid


class StaticTexts:
    """A static automaton over a collection, with the most frequent successors of each state."""

    def __init__(self, texts: Iterable[Sequence[int]], end_token: int, width: int = 8):
        joined = (token for text in texts for token in (*text, end_token))
        self.automaton = SuffixAutomaton(joined)
        counts = self.automaton.counts()

        def best(state: int, following: dict[int, int]) -> list[tuple[float, int, int]]:
            """Share of the occurrences, token and state of the most frequent successors."""
            ranked = heapq.nlargest(width, following.items(), key=lambda item: counts[item[1]])
            return [(counts[to] / counts[state], token, to) for token, to in ranked]

        self.best = [best(*pair) for pair in enumerate(self.automaton.next)]

    def successors(self, state: int, probability: float) -> Iterator[tuple[float, int, int]]:
        for share, token, following in self.best[state]:
            yield probability * share, token, following


class SamReader:
    """The automaton of a sequence's own text, or of all texts, and its place in the static one."""

    def __init__(
        self, config: SamConfig, store: StaticTexts | None, shared: SuffixAutomaton | None = None
    ):
        self.config, self.store, self.is_shared = config, store, shared is not None
        self.own, self.place = shared if self.is_shared else SuffixAutomaton(), 0
        self.static = 0, 0

    def begin(self, prompt: list[int]) -> None:
        self.static = 0, 0
        if self.is_shared:
            self.place = self.own.new_text()
        self.read(prompt)

    def read(self, tokens: list[int]) -> None:
        for token in tokens:
            self.own.append(token, self.place)
            if self.store is not None:
                self.static = self.store.automaton.follow(*self.static, token)

    @property
    def match(self) -> tuple[int, int]:
        """State and length of the longest suffix that was there before and that something followed.

        What another sequence has only just said, nothing has followed yet.
        """
        state = self.own.ancestor(self.own.match_of(self.place)[0], 1)
        return state, self.own.length[state]

    @property
    def match_length(self) -> int:
        """Tokens of the best match, a static one counting `length_bias` less."""
        return max(self.match[1], self.static[1] - self.config.length_bias)

    def draft(self) -> Draft:
        own_state, own_length = self.match
        static_state, static_length = self.static
        if static_length > own_length + self.config.length_bias:
            size, width = self._size(static_length), self.config.width
            draft = grow(self.root, static_state, self.store.successors, size, "static", width)
            draft.score = static_length - self.config.length_bias
            return draft
        return self._copy(own_state, own_length)

    @property
    def root(self) -> int:
        return self.own.texts[self.place][-1]

    def _copy(self, state: int, length: int) -> Draft:
        num_tokens = self._size(length) - 1
        if self.config.fills:
            num_tokens = self.config.max_nodes - 1
            state = self.own.ancestor(state, num_tokens) or state
        copied = self.own.following(state, num_tokens) if state else []
        return Draft.chain([self.root, *copied], length, "own")

    def _size(self, length: int) -> int:
        return min(self.config.max_nodes, 1 + int(self.config.alpha * length))


class Sam(TextDrafter):
    """SAM-Decoding: copy what followed the longest suffix that was there before.

    With `store`, a longer match in a collection gives a tree instead of the copy. What is carried:
    the automaton of the own text, a new prompt being appended to the turns before. With `shares`,
    one automaton holds the texts of all sequences, which copy from each other.
    Departs: the root is already part of the text, so a copy may reach one token further; a filled
    draft (`fills`) is not padded with token 0, and where no match fills it the longest is copied.
    """

    def __init__(
        self,
        config: SamConfig | None = None,
        store: StaticTexts | None = None,
        carries: bool = False,
        shares: bool = False,
    ):
        self.config, self.store, self.shares = config or SamConfig(), store, shares
        super().__init__(self._new_reader, self.config.max_nodes, carries)

    def reset(self) -> None:
        super().reset()
        self.shared = SuffixAutomaton() if self.shares else None

    def _new_reader(self) -> SamReader:
        return SamReader(self.config, self.store, self.shared)


# --- SuffixDecoding (arXiv:2411.04975)


@dataclass(frozen=True, slots=True)
class SuffixConfig:
    """SuffixDecoding's sizes, as ArcticInference runs it where nothing else is said."""

    max_depth: int = 64  # tokens of a suffix in the tree; vLLM takes 24
    max_tokens: int = 64  # of a draft; the sources leave it to the deployment
    alpha: float = 1.0  # max_spec_factor: drafted tokens per matched token
    offset: float = 0.0  # max_spec_offset
    min_probability: float = 0.1  # of a drafted token
    is_tree: bool = False  # the best tree instead of the best path
    max_texts: int = 10_000  # answers in the global tree when a call begins (vLLM)


@cache
def _budgets(config: SuffixConfig, max_depth: int) -> list[tuple[int, int]]:
    """Tokens to draft behind a match, and its length: largest budgets first, then the longest."""
    lengths = range(max_depth, 0, -1)
    wanted = [int(config.alpha * length + config.offset + 1e-6) for length in lengths]
    budgets = [min(config.max_tokens, *pair) for pair in zip(wanted, range(max_depth), strict=True)]
    return sorted(zip(budgets, lengths, strict=True), key=itemgetter(0), reverse=True)


def draft_suffix(
    tree: SuffixTree,
    context: list[int],
    config: SuffixConfig,
    source: str,
    text: Text | None = None,
) -> Draft:
    """The best-scored draft behind any matched suffix of `context`; the longest of equals.

    A draft scores at most its budget of tokens, so suffixes are tried from the largest budget on,
    until none left can win. `text` is one of the tree's that ends like `context`.
    """
    best, matched = Draft.root(context[-1]), 0
    context = context[-tree.max_depth :]
    most = tree.longest_continued(context, text)
    for budget, length in _budgets(config, tree.max_depth):
        if budget < best.score:
            break
        if length > most:
            continue
        place = tree.place_of(context, length, text)
        draft = _draft_at(place, best.tokens[0], budget, config, source)
        if (draft.score, length) > (best.score, matched):
            best, matched = draft, length
    return best


def _draft_at(
    place: tuple[Node, int], root: int, budget: int, config: SuffixConfig, source: str
) -> Draft:
    if not config.is_tree:
        tokens, score = _best_path(*place, budget, config.min_probability)
        return Draft.chain([root, *tokens], score, source)

    def successors(place: tuple[Node, int], probability: float) -> Iterator[tuple]:
        node, offset = place
        if offset < node.length:
            yield probability, node.text[node.start + offset], (node, offset + 1)
            return
        for token, child in node.children.items():
            p = probability * child.count / node.count
            if p >= config.min_probability:
                yield p, token, (child, 1)

    return grow(root, place, successors, 1 + budget, source)


def _best_path(node: Node, offset: int, budget: int, least: float) -> tuple[list[int], float]:
    """The most frequent continuation and the sum of its tokens' probabilities."""
    tokens, score, probability = [], 0.0, 1.0
    while len(tokens) < budget:
        if offset == node.length:
            parent, node, offset = node, node.favourite(), 0
            if node is None or (probability := probability * node.count / parent.count) < least:
                break
        start = node.start + offset
        run = node.text[start : start + min(node.length - offset, budget - len(tokens))]
        tokens += run
        score += probability * len(run)
        offset += len(run)
    return tokens, score


class SuffixReader:
    """The tree of the running prompt and answer, and this answer's place in the global tree."""

    def __init__(self, config: SuffixConfig, store: GlobalTree | None):
        self.config, self.store = config, store

    def begin(self, prompt: list[int]) -> None:
        self.local, self.text = SuffixTree(self.config.max_depth), Text()
        self.local.extend(self.text, prompt)
        self.answer = None if self.store is None else self.store.new_text()

    def read(self, tokens: list[int]) -> None:
        self.local.extend(self.text, tokens)
        if self.store is not None:
            self.store.tree.extend(self.answer, tokens)

    def draft(self) -> Draft:
        context = self.text.tokens
        local = draft_suffix(self.local, context, self.config, "local", self.text)
        if self.store is None:
            return local
        stored = draft_suffix(self.store.tree, context, self.config, "global", self.answer)
        return stored if stored.score > local.score else local


class GlobalTree:
    """A suffix tree over the answers of all sequences; the oldest go first."""

    def __init__(self, max_depth: int):
        self.tree = SuffixTree(max_depth)
        self.texts: deque[Text] = deque()

    def new_text(self) -> Text:
        self.texts.append(Text())
        return self.texts[-1]

    def evict(self, num_kept: int) -> None:
        """Keep the `num_kept` last texts; none that goes may still grow."""
        while len(self.texts) > num_kept:
            self.tree.remove(self.texts.popleft())


class SuffixDecoding(TextDrafter):
    """SuffixDecoding: the most frequent continuation of any suffix, in two suffix trees.

    The local tree holds prompt and answer of the running call. What is carried: the global tree,
    of the answers of all sequences, which grows while they do; without `carries` there is none.
    It is the one store that the sequences of a batch share, so that with `carries` a batch drafts
    other trees than its sequences would alone. Old answers leave it when a call begins.
    """

    def __init__(self, config: SuffixConfig | None = None, carries: bool = False):
        self.config = config or SuffixConfig()
        super().__init__(self._new_reader, 1 + self.config.max_tokens, carries)

    def reset(self) -> None:
        super().reset()
        self.store = GlobalTree(self.config.max_depth) if self.carries else None

    def start(self, prompts: Sequence[list[int]], roots: Sequence[int]) -> None:
        if self.store is not None:
            self.store.evict(self.config.max_texts)
        super().start(prompts, roots)

    def _new_reader(self) -> SuffixReader:
        return SuffixReader(self.config, self.store)


# --- REST (arXiv:2311.08252)


@dataclass(frozen=True, slots=True)
class RestConfig:
    """REST's sizes, as SpecTTS-Bench runs it."""

    max_span: int = 16  # longest suffix looked up; the depth of the datastore at most
    min_span: int = 2
    num_places: int = 5000  # occurrences looked at
    num_tokens: int = 10  # behind each
    num_draft: int = 64  # most frequent prefixes of what followed


class RestReader:
    """The last ids of a sequence beside the datastore that all share."""

    def __init__(self, config: RestConfig, store: SuffixArray):
        self.config, self.store = config, store

    def begin(self, prompt: list[int]) -> None:
        self.tail = deque(prompt, maxlen=self.config.max_span)

    def read(self, tokens: list[int]) -> None:
        self.tail.extend(tokens)

    def draft(self) -> Draft:
        config, tail = self.config, list(self.tail)
        span = longest(lambda m: len(self.store.search(tail[-m:])) > 0, len(tail))
        if span < config.min_span:
            return Draft.root(tail[-1])
        places = self.store.search(tail[-span:])[: config.num_places]
        rows = self.store.continuations(places, config.num_tokens)
        tokens, parents = frequent_prefixes(rows, config.num_draft)
        source = "store" if tokens else "none"
        return Draft([tail[-1], *tokens], [ROOT, *parents], span, source)


class Rest(TextDrafter):
    """REST: what most often followed the longest suffix that a datastore knows.

    Nothing is carried; the datastore, indexed to `max_span` tokens at least, is never changed.
    """

    def __init__(self, store: SuffixArray, config: RestConfig | None = None):
        config = config or RestConfig()
        if store.depth < config.max_span:
            raise ValueError(
                f"the datastore is sorted by {store.depth} tokens but max_span is"
                f" {config.max_span}; build it with depth={config.max_span}"
            )
        super().__init__(lambda: RestReader(config, store), 1 + config.num_draft)


# --- PIA (arXiv:2312.12728)


@dataclass(frozen=True, slots=True)
class PiaConfig:
    """PIA's sizes, as SpecTTS-Bench runs it."""

    branch_length: int = 12  # a key's branches hold one token more
    decoding_length: int = 64  # nodes of a draft, the root included
    min_output_nodes: int = 32  # of them ranked by the counts of answers alone
    output_weight: float = 1e-4  # of an answer's count beside a prompt's in the other ranking
    max_output_nodes: int = 512  # of a trie; beyond, its counts are halved at the next turn


class PiaReader:
    """A trie for each token of what followed it, in the prompt and in the answers so far."""

    def __init__(self, config: PiaConfig):
        self.config = config
        self.tries: dict[int, Branch] = {}
        self.stream: list[int] = []  # of the running answer, not yet counted in full

    def begin(self, prompt: list[int]) -> None:
        self._end_turn()
        self.last = prompt[-2:]
        # as in the reference, the last token of the prompt belongs to the answer
        self._insert(prompt[:-1], range(len(prompt) - 2), in_prompt=True)
        self.stream = prompt[-1:]

    def read(self, tokens: list[int]) -> None:
        self.last = [*self.last, *tokens][-2:]
        self.stream += tokens
        num_full = max(len(self.stream) - self.config.branch_length - 1, 0)
        self._insert(self.stream, range(num_full), in_prompt=False)
        del self.stream[:num_full]

    def draft(self) -> Draft:
        draft = Draft.root(self.last[-1])
        for place in range(len(self.last)):
            trie = self.tries.get(self.last[place])
            for token in self.last[place + 1 :]:
                trie = trie and trie.children.get(token)
            if trie is not None:
                draft = self._keep_frequent(trie)
            if len(draft.tokens) >= self.config.branch_length:
                break
        return draft

    def _end_turn(self) -> None:
        self._insert(self.stream, range(len(self.stream) - 1), in_prompt=False)
        for trie in self.tries.values():
            if trie.forget_prompt() > self.config.max_output_nodes:
                trie.squeeze()

    def _insert(self, tokens: list[int], places: range, in_prompt: bool) -> None:
        for place in places:
            trie = self.tries.setdefault(tokens[place], Branch())
            trie.insert(tokens[place + 1 : place + 2 + self.config.branch_length], in_prompt)

    def _keep_frequent(self, trie: Branch) -> Draft:
        """The best nodes by the counts of answers, then by both counts, as one tree."""
        config, weight = self.config, self.config.output_weight
        num_nodes = config.decoding_length - 1
        by_answers = most_frequent(trie, lambda b: b.in_answers, config.min_output_nodes)
        by_both = most_frequent(
            trie, lambda b: (1 - weight) * b.in_prompt + weight * b.in_answers, num_nodes
        )
        kept = set(itertools.islice(dict.fromkeys([*by_answers, *by_both]), num_nodes))
        draft = Draft([self.last[-1]], [ROOT], source="trie")
        level = [(0, trie)]
        for node, branch in level:  # grows as it goes
            for token, child in branch.children.items():
                if child in kept:
                    level.append((len(draft.tokens), child))
                    draft.tokens.append(token)
                    draft.parents.append(node)
        return draft


class Pia(TextDrafter):
    """PIA: what most often followed the last two tokens, or the last one, in tries.

    What is carried: the tries of prompts and answers. When a turn begins, the counts of the prompt
    before are forgotten and tries that grew too large are squeezed, as in the authors' library;
    SpecTTS-Bench's copy never ends a turn, and so does neither.
    Departs: the root is already part of the stream, so a branch is known a token sooner; of two
    nodes of one token, the reference keeps or drops both, here each stands for itself.
    """

    def __init__(self, config: PiaConfig | None = None, carries: bool = False):
        config = config or PiaConfig()
        super().__init__(lambda: PiaReader(config), config.decoding_length, carries)


DRAFTERS: dict[str, Callable[[Target], Drafter]] = {
    "PLD": lambda target: PromptLookup(),
    "SAM": lambda target: Sam(),
    "SuffixDecoding": lambda target: SuffixDecoding(),
    "PIA": lambda target: Pia(),
}  # REST has no default: its datastore is the experiment's
