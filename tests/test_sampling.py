"""What a sampled round emits is distributed as the target alone would emit it, and the wrong rules
are not.

Three steps: the reference's outcomes are listed with their exact probabilities and sum to the
target's, fraction for fraction; kernel and torch agree with the reference draw by draw; and a chi-
square test on many draws, which a correct sampler fails once in 10^9 runs, refuses rules that
others have shipped.
"""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import pytest
import scipy.stats
import torch
from torch import Tensor
from tree_cases import language_patched_once_a_launch  # noqa: F401

from specrepro.draft_tree import DraftTree
from specrepro.races import draw, race, race_lead, vocabulary_grid
from specrepro.tree_verify import Verdict, verify_sample
from specrepro.verify_checks import SAMPLING_MODES
from specrepro.verify_reference import verify_sample_reference

BACKENDS = ("triton", "torch")
REJECTING = SAMPLING_MODES[1:]
SHAPES = {  # parents
    "root alone": [-1],
    "chain": [-1, 0, 1],
    "star": [-1, 0, 0, 0],
    "random": [-1, 0, 0, 1, 1],
    "children out of a block": [-1, 0, 1, 0, 2],
}
TARGET, DRAFT = (0.2, 0.5, 0.3), (0.6, 0.3, 0.1)
FALSE_ALARM = 1e-9


class Chance:
    """Decisions taken from a script, then the first possible one; the ways not gone are noted."""

    def __init__(self, script: list[int]):
        self.script, self.taken, self.elsewhere = script, [], []
        self.probability = Fraction(1)

    def pick(self, options: Sequence[tuple[Any, Fraction]]) -> Any:
        options = [option for option in options if option[1] > 0]
        place = len(self.taken)
        chosen = self.script[place] if place < len(self.script) else 0
        if place >= len(self.script):
            self.elsewhere += [[*self.taken, other] for other in range(1, len(options))]
        self.taken.append(chosen)
        value, probability = options[chosen]
        self.probability *= probability
        return value

    def token(self, masses: Sequence[Fraction]) -> int:
        return self.pick([(token, mass / sum(masses)) for token, mass in enumerate(masses)])

    def is_accepted(self, child: int, numerator: Fraction, denominator: Fraction) -> bool:
        sure = numerator if denominator == 0 else Fraction(numerator) / denominator
        probability = min(sure, Fraction(1)) if denominator else Fraction(numerator > 0)
        return self.pick([(True, probability), (False, 1 - probability)])


def every_outcome(run: Callable[[Chance], Any]) -> Iterator[tuple[Fraction, Any]]:
    """Each way that `run` can go, with its exact probability."""
    scripts: list[list[int]] = [[]]
    while scripts:
        chance = Chance(scripts.pop())
        outcome = run(chance)
        scripts += chance.elsewhere
        yield chance.probability, outcome


def model(name: str, vocab_size: int, fewest: int) -> Callable[[tuple[int, ...]], list[Fraction]]:
    """A distribution for every context, some tokens without mass if `fewest` is 0."""

    def probs(context: tuple[int, ...]) -> list[Fraction]:
        rng = random.Random(f"{name} {context}")
        weights = [rng.randint(fewest, 4) for _ in range(vocab_size)]
        weights[rng.randrange(vocab_size)] += 2
        return [Fraction(weight, sum(weights)) for weight in weights]

    return probs


def draft(
    parents: list[int], mode: str, probs: Callable, chance: Chance
) -> tuple[list[int], list[tuple[int, ...]]]:
    """Tokens of a tree of this shape, drawn as the mode says, and each node's context."""
    tokens, contexts = [0], [()]
    for node in range(1, len(parents)):
        parent = parents[node]
        siblings = [tokens[other] for other in range(1, node) if parents[other] == parent]
        masses = list(probs(contexts[parent]))
        if mode == "without_replacement":
            masses = [0 if token in siblings else mass for token, mass in enumerate(masses)]
        if mode in ("coupled", "deterministic"):
            free = [token for token in range(len(masses)) if token not in siblings]
            tokens.append(max(free, key=lambda token: masses[token]))
        else:
            tokens.append(chance.token(masses))
        contexts.append((*contexts[parent], tokens[-1]))
    return tokens, contexts


def emitted_distribution(
    parents: list[int],
    mode: str,
    vocab_size: int,
    rule: Callable = verify_sample_reference,
    target: Callable | None = None,
    drafted: Callable | None = None,
    accepted_as: Callable | None = None,
) -> dict[tuple[int, ...], Fraction]:
    """Exact probability of every sequence one token longer than the tree is deep."""
    target = target or model("target", vocab_size, 0)
    drafted = drafted or model("draft", vocab_size, 1)
    accepted_as = accepted_as or drafted
    is_sampled = mode.endswith("_replacement")

    def run(chance: Chance) -> tuple[int, ...]:
        tokens, contexts = draft(parents, mode, drafted, chance)
        p = [target(context) for context in contexts]
        q = (
            [accepted_as(context) for context in contexts]
            if is_sampled or rule is original_target
            else None
        )
        _, emitted = rule(
            tokens,
            parents,
            p,
            chance.is_accepted,
            lambda _, masses: chance.token(masses),
            mode=mode,
            draft_probs=q,
        )
        return tuple(emitted)

    length = depth_of(parents) + 1
    distribution: dict[tuple[int, ...], Fraction] = defaultdict(Fraction)
    for probability, emitted in every_outcome(run):
        for rest in itertools.product(range(vocab_size), repeat=length - len(emitted)):
            sequence = (*emitted, *rest)
            distribution[sequence] += probability * chain_rule(target, sequence, len(emitted))
    return {sequence: mass for sequence, mass in distribution.items() if mass > 0}


def depth_of(parents: list[int]) -> int:
    depths = [0]
    for parent in parents[1:]:
        depths.append(depths[parent] + 1)
    return max(depths)


def chain_rule(target: Callable, sequence: tuple[int, ...], start: int = 0) -> Fraction:
    probability = Fraction(1)
    for place in range(start, len(sequence)):
        probability *= target(sequence[:place])[sequence[place]]
    return probability


def target_alone(vocab_size: int, length: int, target: Callable | None = None) -> dict:
    target = target or model("target", vocab_size, 0)
    sequences = itertools.product(range(vocab_size), repeat=length)
    masses = {sequence: chain_rule(target, sequence) for sequence in sequences}
    return {sequence: mass for sequence, mass in masses.items() if mass > 0}


@pytest.mark.parametrize("mode", SAMPLING_MODES)
@pytest.mark.parametrize("shape", [*SHAPES, "star of six tokens"])
def test_the_rule_emits_the_targets_distribution_fraction_for_fraction(
    shape: str, mode: str
) -> None:
    parents = SHAPES.get(shape, SHAPES["star"])
    vocab_size = {"star": 4, "star of six tokens": 6}.get(shape, 3)
    expected = target_alone(vocab_size, depth_of(parents) + 1)
    assert emitted_distribution(parents, mode, vocab_size) == expected


def original_target(tokens, parents, p, is_accepted, draw_token, *, mode, draft_probs):
    """Wrong: siblings meet the original target (TensorRT-LLM's first tree rejection kernel)."""
    node, emitted = 0, []
    for child in range(1, len(tokens)):
        if parents[child] == node and is_accepted(
            child, p[node][tokens[child]], draft_probs[node][tokens[child]]
        ):
            node = child
            emitted.append(tokens[child])
    if node:
        return [], [*emitted, draw_token(node, p[node])]
    pairs = zip(p[0], draft_probs[0], strict=True)
    return [], [draw_token(0, [max(mass - other, 0) for mass, other in pairs])]


def never_renormalised(tokens, parents, p, is_accepted, draw_token, *, mode, draft_probs):
    """Wrong: a rejected child's mass is removed, but the rest is not scaled up."""
    left, node, emitted = list(p[0]), 0, []
    for child in range(1, len(tokens)):
        if parents[child] != node:
            continue
        if is_accepted(child, left[tokens[child]], Fraction(1)):
            node, left = child, list(p[child])
            emitted.append(tokens[child])
        else:
            left[tokens[child]] = Fraction(0)
    return [], [*emitted, draw_token(node, left)]


def one_coin_for_all(tokens, parents, p, is_accepted, draw_token, *, mode, draft_probs):
    """Wrong: the coin that refused one sibling is used again for the next (SGLang #7207)."""
    left, refused_below = list(p[0]), Fraction(0)
    for child in range(1, len(tokens)):
        probability = left[tokens[child]] / sum(left)
        if is_accepted(child, max(probability - refused_below, 0), 1 - refused_below):
            return [child], [tokens[child], draw_token(child, p[child])]
        refused_below = max(refused_below, probability)
        left[tokens[child]] = Fraction(0)
    return [], [draw_token(0, left)]


def rejected_token_alone(tokens, parents, p, is_accepted, draw_token, *, mode, draft_probs):
    """Wrong: a refused draft that was sampled takes only its own token's share of the draft with it
    (EAGLE #20; its sampler at T > 0 had to be repaired again in #47)."""
    left, q = list(p[0]), draft_probs[0]
    for child in range(1, len(tokens)):
        token = tokens[child]
        if is_accepted(child, left[token], q[token] * sum(left)):
            return [child], [token, draw_token(child, p[child])]
        left[token] = max(left[token] - q[token] * sum(left), Fraction(0))
    return [], [draw_token(0, left if sum(left) else p[0])]


def fractions(masses: Sequence[float]) -> list[Fraction]:
    return [Fraction(str(mass)) for mass in masses]


def first_token(rule: Callable, mode: str) -> list[float]:
    """Exact distribution of the first token for two siblings under TARGET and DRAFT."""
    distribution = emitted_distribution(
        [-1, 0, 0],
        mode,
        3,
        rule,
        lambda context: fractions(TARGET),
        lambda context: fractions(DRAFT),
    )
    first = [Fraction(0)] * 3
    for sequence, mass in distribution.items():
        first[sequence[0]] += mass
    return [float(mass) for mass in first]


def is_plausible(counts: Tensor, expected: Sequence[float]) -> bool:
    """Chi-square: a correct sampler is called implausible once in 1 / FALSE_ALARM runs."""
    expected = torch.tensor(expected, dtype=torch.float64) * counts.sum()
    if (counts[expected == 0] > 0).any():
        return False
    cells = expected > 0
    statistic = ((counts[cells] - expected[cells]) ** 2 / expected[cells]).sum().item()
    return statistic < scipy.stats.chi2.isf(FALSE_ALARM, int(cells.sum()) - 1)


@pytest.mark.parametrize(
    ("rule", "mode", "distribution"),
    [
        (verify_sample_reference, "deterministic", TARGET),
        (verify_sample_reference, "with_replacement", TARGET),
        (verify_sample_reference, "without_replacement", TARGET),
        (original_target, "deterministic", (1 / 3, 2 / 3, 0)),
        (original_target, "with_replacement", (0.28, 0.50, 0.22)),
        (never_renormalised, "deterministic", None),
        (one_coin_for_all, "deterministic", None),
        (rejected_token_alone, "with_replacement", None),
        (rejected_token_alone, "without_replacement", None),
    ],
)
def test_rules_that_others_shipped_are_rejected_and_ours_are_not(
    rule: Callable, mode: str, distribution: Sequence[float] | None
) -> None:
    exact = first_token(rule, mode)
    if distribution is not None:
        assert exact == pytest.approx(distribution)
    is_right = rule is verify_sample_reference
    assert (exact == pytest.approx(TARGET)) == is_right
    rng = torch.Generator().manual_seed(0)
    draws = torch.multinomial(torch.tensor(exact), 20_000, replacement=True, generator=rng)
    assert is_plausible(torch.bincount(draws, minlength=3), TARGET) == is_right


def test_drafts_drawn_in_bfloat16_must_not_be_accepted_by_their_float32_probabilities() -> None:
    # DeepSpec #31
    def rounded(context: tuple[int, ...]) -> list[Fraction]:
        masses = torch.tensor([float(mass) for mass in model("draft", 3, 1)(context)]).bfloat16()
        parts = [Fraction(mass) for mass in masses.tolist()]
        return [part / sum(parts) for part in parts]

    expected = target_alone(3, 2)
    same = dict(drafted=rounded, accepted_as=rounded)
    mixed = dict(drafted=rounded, accepted_as=model("draft", 3, 1))
    assert emitted_distribution([-1, 0, 0], "with_replacement", 3, **same) == expected
    assert emitted_distribution([-1, 0, 0], "with_replacement", 3, **mixed) != expected


def sampled_batch(
    mode: str, B: int, parents: list[int], seed: int, vocab_size: int = 5
) -> tuple[DraftTree, dict[str, Any], Tensor, Tensor]:
    """B drafts of one shape: the tree, the arguments, and both levels of the target."""
    rng = torch.Generator().manual_seed(seed)
    one, two = (torch.rand(n, vocab_size, generator=rng) ** 2 for n in (1, vocab_size))
    # sixteenths, so that no sum depends on its order
    one, two = ((x / x.sum(-1, keepdim=True) * 16).round() + 1 for x in (one, two))
    # drafts lean towards the target, or later siblings would hardly ever be accepted
    draft_one, draft_two = (
        x / x.sum(-1, keepdim=True) + 0.4 * torch.rand(x.shape, generator=rng) for x in (one, two)
    )
    tokens = torch.zeros(B, len(parents), dtype=torch.long)
    for parent in range(len(parents)):
        children = [child for child, other in enumerate(parents) if other == parent]
        if not children:
            continue
        masses = draft_one.expand(B, -1) if parent == 0 else draft_two[tokens[:, parent]]
        if mode in ("coupled", "deterministic"):
            tokens[:, children] = masses.topk(len(children)).indices
        else:
            is_replaced = mode == "with_replacement"
            tokens[:, children] = torch.multinomial(
                masses, len(children), is_replaced, generator=rng
            )
    target = torch.cat([one.expand(B, 1, -1), two[tokens[:, 1:]]], 1)
    arguments = dict(target_probs=target)
    if mode == "coupled":
        width = sum(vocabulary_grid(vocab_size))
        arguments["race_times"] = torch.empty(B, len(parents), width).exponential_(generator=rng)
    else:
        arguments["uniforms"] = torch.rand(B, len(parents), generator=rng)
        arguments["final_uniforms"] = torch.rand(B, generator=rng)
    if mode.endswith("_replacement"):
        arguments["draft_probs"] = torch.cat(
            [draft_one.expand(B, 1, -1), draft_two[tokens[:, 1:]]], 1
        )
    tree = DraftTree(tokens, torch.tensor(parents).repeat(B, 1))
    return tree, arguments | dict(mode=mode), one[0] / one.sum(), two / two.sum(-1, keepdim=True)


def two_tokens(verdict: Verdict, second_level: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """The first two tokens of each round, the second from the target where none was emitted."""
    first = verdict.tokens[:, 0]
    own = torch.multinomial(second_level[first], 1, generator=torch.Generator().manual_seed(seed))
    if verdict.tokens.shape[1] == 1:
        return first, own[:, 0]
    return first, torch.where(verdict.num_accepted > 0, verdict.tokens[:, 1], own[:, 0])


@pytest.mark.parametrize("mode", SAMPLING_MODES)
def test_float64_is_read_and_never_written_to(mode: str) -> None:
    tree, arguments, one, two = sampled_batch(mode, 20_000, [-1, 0, 0, 1, 1, 2], seed=4)
    names = [name for name in ("target_probs", "draft_probs") if arguments.get(name) is not None]
    arguments |= {name: arguments[name].double() for name in names}
    before = {name: arguments[name].clone() for name in names}
    narrow = {name: arguments[name].float() for name in names}
    expected = verify_sample(tree, **(arguments | narrow), backend="torch")
    found = verify_sample(tree, **arguments, backend="torch")
    assert all(torch.equal(arguments[name], before[name]) for name in names)
    assert torch.equal(found.tokens, expected.tokens) and torch.equal(found.path, expected.path)


@pytest.mark.parametrize("mode", SAMPLING_MODES)
def test_many_draws_of_two_tokens_follow_the_target(mode: str) -> None:
    tree, arguments, one, two = sampled_batch(mode, 60_000, [-1, 0, 0, 1, 1, 2], seed=1)
    verdict = verify_sample(tree, **arguments, backend="torch")
    assert verdict.num_accepted.bincount(minlength=3).min() > 1000, "some outcome hardly occurs"
    first, second = two_tokens(verdict, two, seed=7)
    counts = torch.bincount(first * len(one) + second, minlength=len(one) ** 2)
    assert is_plausible(counts, (one[:, None] * two).flatten().tolist())


@pytest.mark.parametrize("mode", SAMPLING_MODES)
@pytest.mark.parametrize("shape", ["chain", "star", "random"])
def test_the_kernels_draws_follow_the_target(shape: str, mode: str) -> None:
    tree, arguments, one, two = sampled_batch(mode, 80, SHAPES[shape], seed=4, vocab_size=6)
    verdict = verify_sample(tree, **arguments, backend="triton")
    assert verdict.num_accepted.unique().numel() > 1, "all walks went alike"
    expected = one, one @ two
    for tokens, masses in zip(two_tokens(verdict, two, seed=7), expected, strict=True):
        assert is_plausible(torch.bincount(tokens, minlength=6), masses.tolist())


@pytest.mark.parametrize("mode", REJECTING)
def test_the_kernels_draws_follow_the_target_where_a_wrong_rule_is_far_off(mode: str) -> None:
    # three siblings, and a rule that forgets one of them moves mass by a fifth or more
    p, q = torch.tensor([0.1, 0.1, 0.1, 0.7]), torch.tensor([0.3, 0.3, 0.3, 0.1])
    rng, B = torch.Generator().manual_seed(0), 200
    is_chosen = mode == "deterministic"
    p = p.flip(0) if is_chosen else p
    drafts = torch.multinomial(q.expand(B, 4), 3, mode == "with_replacement", generator=rng)
    drafts = torch.arange(3).expand(B, 3) if is_chosen else drafts
    tokens = torch.cat([torch.zeros(B, 1, dtype=torch.long), drafts], 1)
    verdict = verify_sample(
        DraftTree(tokens, torch.tensor([[-1, 0, 0, 0]]).repeat(B, 1)),
        p.expand(B, 4, 4),
        torch.rand(B, 4, generator=rng),
        torch.rand(B, generator=rng),
        mode=mode,
        draft_probs=None if is_chosen else q.expand(B, 4, 4),
        backend="triton",
    )
    assert is_plausible(torch.bincount(verdict.tokens[:, 0], minlength=4), p.tolist())


@pytest.mark.parametrize("mode", SAMPLING_MODES)
def test_kernel_torch_and_reference_agree_draw_by_draw(mode: str) -> None:
    tree, arguments, _, _ = sampled_batch(mode, 80, [-1, 0, 0, 1, 2, 1, 4], seed=3)
    kernel = verify_sample(tree, **arguments, backend="triton")
    torchs = verify_sample(tree, **arguments, backend="torch")
    assert torchs.num_accepted.max() > 1, "no walk went deep"
    for b in range(len(tree.tokens)):
        path, emitted = reference_of(tree, arguments, b)
        for verdict in (kernel, torchs):
            n = len(path)
            assert verdict.num_accepted[b] == n
            assert verdict.path[b, : n + 1].tolist() == [0, *path]
            assert (verdict.path[b, n + 1 :] == -1).all() and (
                verdict.tokens[b, n + 1 :] == -1
            ).all()
            assert verdict.tokens[b, : n + 1].tolist() == emitted
            assert verdict.bonus[b] == emitted[-1]


def reference_of(tree: DraftTree, arguments: dict[str, Any], b: int) -> tuple[list[int], list[int]]:
    uniforms, final = (
        arguments[name][b].tolist() if name in arguments else None
        for name in ("uniforms", "final_uniforms")
    )

    def draw_token(node: int, masses: Sequence[float]) -> int:
        if final is None:
            return race_reference(masses, arguments["race_times"][b, node].tolist())
        threshold = final * sum(masses)
        return next(t for t, total in enumerate(itertools.accumulate(masses)) if total > threshold)

    q = arguments.get("draft_probs")
    return verify_sample_reference(
        tree.tokens[b].tolist(),
        tree.parents[b].tolist(),
        arguments["target_probs"][b].tolist(),
        lambda child, numerator, denominator: uniforms[child] * denominator < numerator,
        draw_token,
        mode=arguments["mode"],
        draft_probs=None if q is None else q[b].tolist(),
    )


def race_reference(masses: Sequence[float], times: Sequence[float]) -> int:
    """The first row of the grid to arrive, then its first column; no mass never arrives."""
    num_rows, num_columns = vocabulary_grid(len(masses))
    grid = [masses[row * num_columns :][:num_columns] for row in range(num_rows)]
    row = first_arrival([sum(one) for one in grid], times[:num_rows])
    return row * num_columns + first_arrival(grid[row], times[num_rows:])


def first_arrival(masses: Sequence[float], times: Sequence[float]) -> int:
    pairs = zip(masses, times, strict=False)
    arrivals = [time / mass if mass else float("inf") for mass, time in pairs]
    return arrivals.index(min(arrivals))


@pytest.mark.parametrize("vocab_size", [3, 4, 5, 16, 17, 40])
def test_a_race_over_any_vocabulary_is_won_by_mass(vocab_size: int) -> None:
    rng = torch.Generator().manual_seed(vocab_size)
    masses = torch.rand(vocab_size, generator=rng) ** 3
    masses[vocab_size // 2] = 0
    times = torch.empty(40_000, sum(vocabulary_grid(vocab_size))).exponential_(generator=rng)
    counts = torch.bincount(race(masses.expand(len(times), -1), times), minlength=vocab_size)
    expected = (masses / masses.sum()).tolist()
    assert is_plausible(counts, expected)
    assert not is_plausible(counts, masses.roll(1).tolist())


def test_rounding_turns_a_race_where_its_lead_says_so_and_an_inverted_distribution_anywhere() -> (
    None
):
    # two passes over one prefix differ by some 1e-5 in every logit
    rng = torch.Generator().manual_seed(0)
    num_draws, vocab_size, noise = 400, 49_152, 2e-5
    logits = 3 * torch.randn(num_draws, vocab_size, generator=rng)
    moved = logits + noise * torch.randn(logits.shape, generator=rng)
    p, q = logits.softmax(-1), moved.softmax(-1)
    times = torch.empty(num_draws, sum(vocabulary_grid(vocab_size))).exponential_(generator=rng)
    uniforms = torch.rand(num_draws, generator=rng)
    is_turned = race(p, times) != race(q, times)
    assert not (is_turned & (race_lead(p, times) > 10 * noise)).any()
    assert is_turned.sum() <= 1 < (draw(p, uniforms) != draw(q, uniforms)).sum()


def judge_one(
    mode: str,
    p: Sequence[float],
    q: Sequence[float] | None,
    siblings: list[int],
    coin: float,
    final: float,
    backend: str,
):
    N = len(siblings) + 1
    tree = DraftTree(torch.tensor([[0, *siblings]]), torch.tensor([[-1] + [0] * len(siblings)]))
    drafts = None if q is None else torch.tensor([[list(q)] * N])
    return verify_sample(
        tree,
        torch.tensor([[list(p)] * N]),
        torch.full((1, N), coin),
        torch.tensor([final]),
        mode=mode,
        draft_probs=drafts,
        backend=backend,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", REJECTING)
@pytest.mark.parametrize("final", [0.0, 1 - 2**-24])
def test_a_draft_without_target_mass_is_never_accepted_not_even_by_coin_zero(
    mode: str, final: float, backend: str
) -> None:
    # SGLang #35771
    q = None if mode == "deterministic" else (0.5, 0.25, 0.25)
    verdict = judge_one(mode, (0.0, 0.5, 0.5), q, [0], 0.0, final, backend)
    assert verdict.num_accepted.item() == 0
    assert verdict.bonus.item() == (1 if final == 0 else 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", REJECTING)
@pytest.mark.parametrize("coin", [0.0, 0.5, 1 - 2**-24])
def test_a_draft_that_is_the_target_is_always_accepted(
    mode: str, coin: float, backend: str
) -> None:
    p = (0.0, 1.0, 0.0) if mode == "deterministic" else TARGET
    q = None if mode == "deterministic" else TARGET
    assert judge_one(mode, p, q, [1], coin, 0.3, backend).num_accepted.item() == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["with_replacement", "without_replacement"])
def test_drafts_disjoint_from_the_target_leave_it_whole(mode: str, backend: str) -> None:
    p, q = (0.0, 0.0, 0.25, 0.75), (0.5, 0.5, 0.0, 0.0)
    for final, token in ((0.0, 2), (0.2499, 2), (0.25, 3), (1 - 2**-24, 3)):
        verdict = judge_one(mode, p, q, [1, 0], 0.0, final, backend)
        assert (verdict.num_accepted.item(), verdict.bonus.item()) == (0, token)


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeated_siblings_are_tried_each_in_its_turn(backend: str) -> None:
    refused = judge_one("with_replacement", TARGET, DRAFT, [0, 0], 1 - 2**-24, 0.0, backend)
    assert (refused.num_accepted.item(), refused.bonus.item()) == (0, 1)
    taken = judge_one("with_replacement", TARGET, DRAFT, [0, 1], 0.9, 0.0, backend)
    assert taken.path[0, :2].tolist() == [0, 2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_tokens_drafted_and_refused_still_leave_one_with_mass(backend: str) -> None:
    verdict = judge_one(
        "deterministic", (0.25, 0.25, 0.5), None, [0, 1, 2], 1 - 2**-24, 0.0, backend
    )
    assert verdict.num_accepted.item() == 1 and verdict.tokens[0, 0].item() == 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(mode="typical"), "unknown sampling mode 'typical'; choose coupled"),
        (dict(final_uniforms=None), r"needs final_uniforms \(1,\), not None"),
        (dict(uniforms=torch.rand(1, 2)), r"needs uniforms \(1, 3\), not \(1, 2\)"),
        (dict(mode="coupled", draft_probs=None), r"needs race_times \(1, 3, 4\).* not None"),
        (
            dict(mode="coupled", draft_probs=None, race_times=torch.rand(1, 3, 3)),
            r"race_times .* not \(1, 3, 3\)",
        ),
        (dict(draft_probs=None), "needs draft_probs"),
        (dict(mode="deterministic"), "takes no draft_probs"),
        (
            dict(target_probs=torch.full((1, 3, 3), torch.nan)),
            "token 0 at node 0 of sequence 0 is nan",
        ),
        (dict(draft_probs=torch.full((1, 3, 3), -0.5)), "draft_probs of token 0 .* is -0.5"),
        (dict(target_probs=torch.full((1, 3, 3), torch.inf)), "at node 0 of sequence 0 is inf"),
        (
            dict(target_probs=torch.tensor([[[1.0] * 3, [1.0] * 3, [0.0] * 3]])),
            "target_probs at node 2 of sequence 0 have no mass",
        ),
        (
            dict(uniforms=torch.full((1, 3), torch.nan)),
            r"uniforms must lie in \[0, 1\), not at nan",
        ),
        (dict(final_uniforms=torch.tensor([-0.1])), r"final_uniforms must lie in .* not at -0.1"),
        (
            dict(mode="coupled", draft_probs=None, race_times=torch.full((1, 3, 4), torch.nan)),
            "race times are exponentials and never nan",
        ),
        (dict(target_probs=torch.ones(1, 2, 3)), r"target_probs must be \(1, 3, 3\)"),
        (
            dict(target_probs=torch.ones(1, 3, 2), draft_probs=torch.ones(1, 3, 2)),
            "token ids must lie in 0..1",
        ),
        (
            dict(
                mode="without_replacement",
                tree=DraftTree(torch.tensor([[0, 1, 1]]), torch.tensor([[-1, 0, 0]])),
            ),
            "siblings must differ",
        ),
        (dict(target_probs=lambda nodes: nodes), "as a tensor"),
    ],
)
def test_bad_input_is_refused(change: dict, message: str, backend: str) -> None:
    arguments = dict(
        tree=DraftTree(torch.tensor([[0, 1, 2]]), torch.tensor([[-1, 0, 0]])),
        target_probs=torch.ones(1, 3, 3),
        uniforms=torch.rand(1, 3),
        final_uniforms=torch.rand(1),
        mode="with_replacement",
        draft_probs=torch.ones(1, 3, 3),
    )
    with pytest.raises(ValueError, match=message):
        verify_sample(**arguments | change, backend=backend)
