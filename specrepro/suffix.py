"""Indexes over token ids that answer: where has this ending been seen, and what followed?

`SuffixAutomaton` holds growing texts and finds the longest ending that was there before, at
constant amortised cost a token. `SuffixTree` counts every short substring of many texts and takes
texts out again. `SuffixArray` searches a fixed collection. All take memory linear in the tokens
(the tree's times a constant that its depth bounds), and none knows of drafts or of a target.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

SEPARATOR = -1  # between the texts of a suffix array; no token has this id


def longest(is_found: Callable[[int], bool], most: int) -> int:
    """The largest m in 1..most with `is_found(m)`, which must hold up to some m only; else 0."""
    return bisect.bisect_left(range(1, most + 1), True, key=lambda m: not is_found(m))


class SuffixAutomaton:
    """The substrings of growing texts, those that end at the same places sharing a state.

    Blumer et al. 1985, with the first end of each state. A state's row is its index in the lists:
    at most two states a token. State 0 is the empty string. Text 0 is there from the start; further
    ones may grow beside it, in any order.
    """

    def __init__(self, text: Iterable[int] = ()):
        self.texts: list[list[int]] = [[]]
        self.next: list[dict[int, int]] = [{}]
        self.link = [-1]  # the state of the longest suffix that also ends elsewhere
        self.length = [0]  # tokens of the state's longest string
        self.home = [0]  # the text in which its strings ended first
        self.end = [0]  # tokens of that text up to there: what followed is text[end:]
        self.is_clone = [True]
        self.last = [0]  # the state of each whole text
        for token in text:
            self.append(token)

    @property
    def text(self) -> list[int]:
        return self.texts[0]

    @property
    def match(self) -> tuple[int, int]:
        """`match_of` the first text."""
        return self.match_of(0)

    def match_of(self, place: int) -> tuple[int, int]:
        """State and length of the longest suffix of a text that ended before, here or elsewhere.

        Mostly that is where the suffix link of the whole text leads; the whole text itself where it
        ended first in another.
        """
        state = self.last[place]
        if (self.home[state], self.end[state]) == (place, len(self.texts[place])):
            state = max(self.link[state], 0)
        return state, self.length[state]

    def new_text(self) -> int:
        """The place of a further text, still empty."""
        self.texts.append([])
        self.last.append(0)
        return len(self.texts) - 1

    def append(self, token: int, place: int = 0) -> None:
        text, state = self.texts[place], self.last[place]
        text.append(token)
        if token in self.next[state]:  # another text has gone on like this
            self.last[place] = self._reached(state, token)
            return
        new = self._add({}, len(text), place, len(text))
        while state >= 0 and token not in self.next[state]:
            self.next[state][token] = new
            state = self.link[state]
        self.link[new] = 0 if state < 0 else self._reached(state, token)
        self.last[place] = new

    def follow(self, state: int, length: int, token: int) -> tuple[int, int]:
        """The longest suffix of a matched string plus `token` that is in the text."""
        while state and token not in self.next[state]:
            state = self.link[state]
            length = self.length[state]
        if token not in self.next[state]:
            return 0, 0
        return self.next[state][token], length + 1

    def ancestor(self, state: int, num_tokens: int) -> int:
        """The longest suffix of `state` that `num_tokens` have followed; 0 where there is none."""
        while state and len(self.texts[self.home[state]]) - self.end[state] < num_tokens:
            state = self.link[state]
        return state

    def following(self, state: int, most: int) -> list[int]:
        """At most `most` tokens that followed the strings of a state where they ended first."""
        end = self.end[state]
        return self.texts[self.home[state]][end : end + most]

    def counts(self) -> list[int]:
        """How often the strings of each state occur."""
        counts = [int(not is_clone) for is_clone in self.is_clone]
        for state in sorted(range(1, len(counts)), key=self.length.__getitem__, reverse=True):
            counts[self.link[state]] += counts[state]
        return counts

    def _reached(self, state: int, token: int) -> int:
        """The state of exactly the longest string of `state` and `token`, split off if need be."""
        target = self.next[state][token]
        if self.length[target] == self.length[state] + 1:
            return target
        first = self.home[target], self.end[target]
        clone = self._add(self.next[target].copy(), self.length[state] + 1, *first, is_clone=True)
        self.link[clone], self.link[target] = self.link[target], clone
        while state >= 0 and self.next[state].get(token) == target:
            self.next[state][token] = clone
            state = self.link[state]
        return clone

    def _add(
        self, following: dict[int, int], length: int, home: int, end: int, is_clone: bool = False
    ) -> int:
        self.next.append(following)
        self.link.append(0)
        self.length.append(length)
        self.home.append(home)
        self.end.append(end)
        self.is_clone.append(is_clone)
        return len(self.link) - 1


@dataclass(slots=True, eq=False)
class Node:
    """A place in a suffix tree, and the edge text[start : start + length] that leads to it."""

    text: list[int]
    start: int
    length: int
    count: int  # occurrences of the string that ends here, or anywhere inside the edge
    parent: Node | None
    children: dict[int, Node] = field(default_factory=dict)  # by first token of their edge
    best: int | None = None  # the most frequent child's, the lowest of equals; None: not known

    @property
    def edge(self) -> list[int]:
        return self.text[self.start : self.start + self.length]

    @property
    def first(self) -> int:
        return self.text[self.start]

    def favourite(self) -> Node | None:
        """The child that came most often."""
        if self.best is None and self.children:
            self.best = max(self.children, key=lambda token: (self.children[token].count, -token))
        return self.children.get(self.best)

    def note_gain(self, token: int) -> None:
        """The child of `token` came once more."""
        if self.best is None:
            return
        gains, leads = self.children[token].count, self.children[self.best].count
        if (gains, -token) > (leads, -self.best):
            self.best = token


@dataclass(slots=True, eq=False)
class Text:
    """A text of a suffix tree, and the nodes where its last suffixes end, the longest first."""

    tokens: list[int] = field(default_factory=list)
    ends: list[Node] = field(default_factory=list)


class SuffixTree:
    """Counts of all substrings of up to `max_depth` tokens of many texts, path-compressed.

    A node stands wherever the count changes or a text branches, so the tree depends on its texts
    alone, not on their order. Texts grow by a token at any time, at O(max_depth); `remove` takes
    one out again. Edges refer to the texts, and the edge of a text that goes is copied out of it.
    """

    def __init__(self, max_depth: int):
        self.max_depth = max_depth
        # a count that no test for equality meets: the root is never merged, and never drafted from
        self.root = Node([], 0, 0, count=0, parent=None)

    def append(self, text: Text, token: int) -> None:
        """Let `text` go on with one token."""
        self.extend(text, [token])

    def extend(self, text: Text, tokens: Sequence[int]) -> None:
        """Let `text` go on with `tokens`, which every suffix of it that still grows takes in.

        A suffix takes in all of them at once: where a text goes round in a loop, each moves a
        border in the tree, by one step a call instead of one a token.
        """
        stream, place, depth = text.tokens, len(text.tokens), self.max_depth
        stream += tokens
        stop, ends = len(stream), text.ends + [self.root] * len(tokens)
        first = stop - len(ends)  # where the longest suffix starts
        for i in range(max(0, place + 1 - depth - first), len(ends)):
            node, start = ends[i], first + i
            until = min(stop, start + depth)
            if node.count == 1:  # a leaf: nothing else ends or passes here
                node.length += until - place
                if node.text is not stream:
                    node.text, node.start = stream, until - node.length
            else:
                ends[i] = self._advance(node, stream, max(place, start), until)
        text.ends = ends[-depth:]

    def remove(self, text: Text) -> None:
        """Take out a text that will not grow any more: O(max_depth) a token."""
        for start in range(len(text.tokens)):
            self._remove_suffix(text.tokens, text.tokens[start : start + self.max_depth])

    def find(self, tokens: Sequence[int]) -> tuple[Node, int] | None:
        """Where `tokens` (a list) end: a node and how much of its edge is behind them."""
        node, place, size = self.root, 0, 0
        while place < len(tokens):
            node = node.children.get(tokens[place])
            if node is None:
                return None
            size = min(node.length, len(tokens) - place)
            if node.text[node.start : node.start + size] != tokens[place : place + size]:
                return None
            place += size
        return node, size

    def longest_continued(self, context: list[int], text: Text | None = None) -> int:
        """Tokens of the longest suffix of `context` that something has followed.

        `text` is one of the tree's that ends like `context`: no search where its suffixes end.
        """

        def is_continued(length: int) -> bool:
            found = self.place_of(context, length, text)
            return found is not None and (found[1] < found[0].length or bool(found[0].children))

        return longest(is_continued, min(self.max_depth - 1, len(context)))

    def place_of(
        self, context: list[int], length: int, text: Text | None = None
    ) -> tuple[Node, int] | None:
        """`find` of the last `length` tokens of `context`; of `text`'s own without a search."""
        if text is not None and length <= len(text.ends):
            node = text.ends[-length]
            return node, node.length
        return self.find(context[len(context) - length :])

    def _advance(self, node: Node, stream: list[int], place: int, until: int) -> Node:
        """Where a suffix that ended at `node` ends when stream[place:until] has followed."""
        while place < until:
            token = stream[place]
            child = node.children.get(token)
            if child is None:
                child = node.children[token] = Node(stream, place, until - place, 1, node)
                node.note_gain(token)
                return child
            step = _num_shared(child, stream, place, until)
            place += step
            if child.count + 1 == node.count:
                node = self._slide(node, child, stream, place, step)
                continue
            if step < child.length:
                child = self._split(child, step)
            child.count += 1
            node.note_gain(token)
            node = child
        return node

    def _slide(self, node: Node, child: Node, stream: list[int], place: int, step: int) -> Node:
        """Move the border between a node and its only child: all that came here goes on.

        By `step` tokens, up to stream[place].
        """
        if child.length == step:
            child.count += 1
            _fuse(node, child, stream, place - node.length - step)
            return child
        node.length += step
        node.text, node.start = stream, place - node.length
        child.start += step
        child.length -= step
        node.children, node.best = {child.text[child.start]: child}, None
        return node

    def _split(self, child: Node, length: int) -> Node:
        """A new node behind the first `length` tokens of the edge to `child`."""
        upper = Node(child.text, child.start, length, child.count, child.parent)
        child.parent.children[child.first] = upper
        child.start, child.length, child.parent = child.start + length, child.length - length, upper
        upper.children[child.first] = child
        return upper

    def _remove_suffix(self, tokens: list[int], suffix: list[int]) -> None:
        node, depth, path = self.root, 0, []
        while depth < len(suffix):
            node = node.children[suffix[depth]]
            depth += node.length
            path.append(node)
            if node.text is tokens:
                node.text, node.start = node.edge, 0
        for node in reversed(path):
            node.count -= 1
            node.parent.best = None
            if not node.count:
                del node.parent.children[node.first]
            elif len(node.children) == 1:
                (child,) = node.children.values()
                if child.count == node.count:
                    _fuse(node, child, node.edge + child.edge, 0)


def _num_shared(node: Node, stream: list[int], place: int, until: int) -> int:
    """Tokens that the edge to `node` has in common with stream[place:until]; the first is one."""
    most = min(node.length, until - place)
    edge = node.text[node.start : node.start + most]
    if most == 1 or edge == stream[place : place + most]:
        return most
    return next(i for i, token in enumerate(edge) if token != stream[place + i])


def _fuse(node: Node, child: Node, text: list[int], start: int) -> None:
    """Let an only child take the place of its parent; `text` holds both edges at `start`.

    The child stays, for texts may end at it, and none ends at a node that it equals in count.
    """
    child.text, child.start, child.length = text, start, node.length + child.length
    child.parent = node.parent
    child.parent.children[child.first] = child


class SuffixArray:
    """The places of a fixed collection of texts, sorted by the tokens that follow.

    Ids are kept as int32: a vocabulary beyond 65,535 does not wrap, as it does in REST's index.
    """

    def __init__(self, tokens: np.ndarray, order: np.ndarray, depth: int):
        self.tokens = tokens  # (n,) int32, a separator behind each text
        self.order = order  # (n,) places in the order of their next `depth` tokens
        self.depth = depth

    @classmethod
    def of(cls, texts: Sequence[Sequence[int]], depth: int = 16) -> SuffixArray:
        """Index `texts` for queries of up to `depth` tokens: O(n log n log depth)."""
        joined = [token for text in texts for token in (*text, SEPARATOR)]
        tokens = np.array(joined, np.int32)
        return cls(tokens, _sorted_places(tokens, depth), depth)

    def save(self, path: Path) -> None:
        """Write an .npz file."""
        np.savez(path, tokens=self.tokens, order=self.order, depth=self.depth)

    @classmethod
    def load(cls, path: Path) -> SuffixArray:
        with np.load(path, allow_pickle=False) as file:
            return cls(file["tokens"], file["order"], int(file["depth"]))

    def search(self, query: list[int]) -> np.ndarray:
        """Where `query` occurs: the places (m,) behind it."""

        def tokens_at(place: int) -> list[int]:
            return self.tokens[place : place + len(query)].tolist()

        low = bisect.bisect_left(self.order, query, key=tokens_at)
        high = bisect.bisect_right(self.order, query, lo=low, key=tokens_at)
        return self.order[low:high] + len(query)

    def continuations(self, places: np.ndarray, num_tokens: int) -> np.ndarray:
        """What follows at `places`: (m, num_tokens), with separators from a text's end on."""
        slots = places[:, None] + np.arange(num_tokens)
        rows = self.tokens[np.minimum(slots, len(self.tokens) - 1)]
        return np.where((rows == SEPARATOR).cumsum(1) > 0, SEPARATOR, rows)


def _sorted_places(tokens: np.ndarray, depth: int) -> np.ndarray:
    """Prefix doubling: ranks by the next 1, 2, 4, ... tokens, until `depth` are covered."""
    rank, covered = np.unique(tokens, return_inverse=True)[1], 1
    while covered < min(depth, len(tokens)):
        behind = np.zeros_like(rank)
        behind[:-covered] = rank[covered:] + 1
        rank = np.unique(rank * (len(rank) + 1) + behind, return_inverse=True)[1]
        covered *= 2
    return np.argsort(rank, kind="stable")


def frequent_prefixes(rows: np.ndarray, num_prefixes: int) -> tuple[list[int], list[int]]:
    """The most frequent prefixes of `rows` (m, n) as the tree below a root: tokens and parents.

    A prefix is at least as frequent as what extends it and the shorter of equals is preferred, so
    the ancestors of every node are there too. Node 0 is the root, the first token's node 1.
    """
    base, num_nodes = int(rows.max(initial=0)) + 1, 1
    node, levels = np.zeros(len(rows), np.int64), []
    for column in rows.T.astype(np.int64):
        keys = np.where(column == SEPARATOR, -1, node * base + column)
        levels.append(np.unique(keys[keys >= 0], return_counts=True))
        node = np.searchsorted(levels[-1][0], keys) + num_nodes
        num_nodes += len(levels[-1][0])
    keys, counts = (np.concatenate(column) for column in zip(*levels, strict=True))
    kept = np.sort(np.argsort(-counts, kind="stable")[:num_prefixes])
    new_id = np.zeros(num_nodes, np.int64)
    new_id[kept + 1] = np.arange(1, len(kept) + 1)
    return (keys[kept] % base).tolist(), new_id[keys[kept] // base].tolist()


@dataclass(slots=True, eq=False)
class Branch:
    """A node of a trie."""

    in_prompt: int = 0
    in_answers: float = 0.0
    children: dict[int, Branch] = field(default_factory=dict)

    def insert(self, tokens: Sequence[int], in_prompt: bool) -> None:
        """Count `tokens` below this node."""
        node = self
        for token in tokens:
            node = node.children.setdefault(token, Branch())
            if in_prompt:
                node.in_prompt += 1
            else:
                node.in_answers += 1

    def forget_prompt(self) -> int:
        """Keep what answers brought, and count the nodes that are left below."""
        self.in_prompt = 0
        for token in [t for t, child in self.children.items() if not child.in_answers]:
            del self.children[token]
        return sum(1 + child.forget_prompt() for child in self.children.values())

    def squeeze(self) -> None:
        """Halve the counts of answers; what came once goes."""
        for token in [t for t, child in self.children.items() if child.in_answers <= 1]:
            del self.children[token]
        for child in self.children.values():
            child.in_answers /= 2
            child.squeeze()


def most_frequent(trie: Branch, weight: Callable[[Branch], float], most: int) -> list[Branch]:
    """The `most` heaviest nodes below `trie`, best first; a child never outweighs its parent."""
    serial, found = itertools.count(), []
    heap = [(-weight(trie), next(serial), trie)]
    while heap and len(found) <= most:
        found.append(heapq.heappop(heap)[2])
        for child in found[-1].children.values():
            if weight(child) > 0:
                heapq.heappush(heap, (-weight(child), next(serial), child))
    return found[1:]
