"""AdaEAGLE: labels are where decoding finds them, a loss asks for a quantile, any length drafts."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from drafter_cases import (
    OTHER_PROMPTS,
    PROMPT,
    RECIPE,
    assert_ragged_batch_decodes_as_each_alone,
    assert_says_what_the_target_says,
    make_batch,
    trained,
)
from test_eagle2 import make_head
from torch import Tensor

from specrepro import (
    adaeagle,
    checkpoints,
    corpus,
    draft_training,
    eagle2,
    eagle3,
    hybrid,
    recipes,
    target_model,
)
from specrepro.adaeagle import (
    AdaEagle,
    Chain,
    Drafter,
    Fixed,
    LengthLoss,
    Predicted,
    Predictor,
    PredictorConfig,
)
from specrepro.decoding import decode, decode_autoregressively
from specrepro.draft_labels import NO_LABEL, Labels, are_greedy, num_right
from specrepro.draft_training import LoopConfig
from specrepro.eagle2 import DraftHead, Eagle2, FeatureLoss, TrainingConfig
from specrepro.target_model import Target

ASKED, NUM_NEW, MOST = [PROMPT, *OTHER_PROMPTS], 40, 5
PENALTIES = (1.0, 2.0, 4.0, 8.0)


@pytest.fixture(scope="module")
def target(tiny_target_folder) -> Target:
    return target_model.load(str(tiny_target_folder()), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def texts(target: Target) -> corpus.Batch:
    """Four prompts with 40 greedy tokens behind each."""
    said = [run.tokens for run in decode_autoregressively(target, ASKED, max_new_tokens=NUM_NEW)]
    tokens, lengths = target_model.pad([p + words for p, words in zip(ASKED, said, strict=True)])
    places, prompts = torch.arange(tokens.shape[1]), torch.tensor([len(p) for p in ASKED])
    is_answer = (places >= prompts[:, None]) & (places < lengths[:, None])
    return make_batch(target, tokens, is_answer)


@pytest.fixture(scope="module")
def head(target: Target, texts: corpus.Batch, tmp_path_factory) -> DraftHead:
    """EAGLE's head, with half of these texts in its head; not to be changed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        half_learnt = Eagle2().new_module(target, [])
    loss = FeatureLoss(half_learnt, target, TrainingConfig(noise=0.02))
    loop = LoopConfig(learning_rate=3e-3, warmup_steps=5, total_steps=150)
    folder = tmp_path_factory.mktemp("half_learnt")
    return draft_training.train(half_learnt, lambda step: texts, loss, loop, folder)


def drafter_of(
    head: DraftHead, target: Target, lengths: adaeagle.Lengths, threshold: float | None = None
) -> Drafter:
    base = eagle2.Drafter(copy.deepcopy(head), target, Chain(MOST))
    return Drafter(base, lengths, MOST, threshold)


@pytest.fixture(scope="module")
def labels(head: DraftHead, target: Target, texts: corpus.Batch) -> Tensor:
    found = Labels(copy.deepcopy(head), target, MOST)(texts)
    counts = torch.bincount(found[found != NO_LABEL], minlength=MOST + 1)
    assert (counts > 0).sum() > 3, f"lengths are distributed {counts.tolist()}: too plain a test"
    return found


class Given:
    """Labels that somebody hands over."""

    def __init__(self, labels: Tensor, most: int = MOST):
        self.labels, self.most = labels, most

    def __call__(self, batch: corpus.Batch) -> Tensor:
        return self.labels


class Random(Fixed):
    """Any length from none to more than there may be."""

    def __init__(self) -> None:
        super().__init__(0)
        self.draws = torch.Generator().manual_seed(1)

    def wanted(self) -> Tensor:
        return torch.randint(0, MOST + 3, self.counts.shape, generator=self.draws)


# --- the equations


@pytest.mark.parametrize("penalty", [1.0, 4.0])
def test_gradient_is_minus_lambda_below_the_length_and_one_above(penalty):
    predicted = torch.tensor([-3.0, 1.9, 2.1, 9.0], requires_grad=True)
    loss = adaeagle.asymmetric_l1(predicted, torch.full((4,), 2), penalty)
    assert loss.tolist() == pytest.approx([5 * penalty, 0.1 * penalty, 0.1, 7.0], rel=1e-4)
    (gradient,) = torch.autograd.grad(loss.sum(), predicted)
    assert gradient.tolist() == [-penalty, -penalty, 1.0, 1.0]


@pytest.mark.parametrize("penalty", PENALTIES)
def test_the_best_constant_is_the_quantile_and_the_median_without_penalty(penalty):
    lengths = torch.randn(2001, generator=torch.Generator().manual_seed(0)).exp()
    constant, rate = torch.zeros((), requires_grad=True), 0.1
    for step in range(1500):
        loss = adaeagle.asymmetric_l1(constant, lengths, penalty).mean()
        (gradient,) = torch.autograd.grad(loss, constant)
        with torch.no_grad():
            constant -= rate / (1 + step / 100) * gradient
    covered = (lengths <= constant.detach()).float().mean().item()
    assert covered == pytest.approx(adaeagle.quantile_of(penalty), abs=0.01)
    assert adaeagle.quantile_of(1.0) == 0.5


def test_break_even_of_the_papers_table_2():
    """Its head takes 1.54 ms a token, a pass 1.33 ms more for each, a token 43.4 / 3.03 ms."""
    token = 43.4 / 3.03
    assert adaeagle.break_even_penalty(1.54, 0.0, token) == pytest.approx(8.3, abs=0.05)
    assert adaeagle.break_even_penalty(1.54, 1.33, token) == pytest.approx(4.0, abs=0.05)
    assert adaeagle.break_even_penalty(2.0, 3.0, 4.0) == 0, "what never pays is never drafted"


def test_the_break_even_penalty_asks_for_the_longest_draft_that_pays():
    """By brute force: of all fixed quantiles the break-even one brings most time per token."""
    lengths = torch.distributions.Geometric(0.3).sample((4000,)).clamp_max(20)
    draft, verify, rest = 1.0, 0.5, 20.0

    def rate(number: int) -> float:
        emitted = 1 + lengths.clamp_max(number).mean().item()
        return emitted / (rest + number * (draft + verify))

    best = max(range(21), key=rate)
    penalty = adaeagle.break_even_penalty(draft, verify, 1 / rate(best))
    quantile = lengths.quantile(adaeagle.quantile_of(penalty), interpolation="lower").item()
    assert 2 < best < 19 and abs(quantile - best) <= 1


def test_lengths_are_rounded_and_kept_between_none_and_the_most():
    outputs = torch.tensor([-7.0, -0.4, 0.49, 0.51, 3.6, 9.4, 12.0])[:, None]
    assert adaeagle.lengths_of(outputs, 10).tolist() == [0, 0, 0, 1, 4, 9, 10]
    assert adaeagle.lengths_of(outputs.bfloat16(), 3).tolist() == [0, 0, 0, 1, 3, 3, 3]
    assert adaeagle.lengths_of(torch.eye(4), 2).tolist() == [0, 1, 2, 2], "classes by the largest"


def length_reference(wanted: int, scores: list[float], threshold: float | None) -> int:
    """Token by token, as the paper says it: stop once long enough and below the threshold."""
    drafted = 0
    while drafted < len(scores):
        is_short = drafted < wanted
        is_sure = threshold is not None and (drafted == 0 or scores[drafted - 1] >= threshold)
        if not (is_short or is_sure):
            break
        drafted += 1
    return drafted


@pytest.mark.parametrize("threshold", [None, -0.6, -3.0])
def test_a_chain_is_as_long_as_the_longer_rule_says(threshold):
    draws = torch.Generator().manual_seed(0)
    scores = -torch.rand(300, 6, generator=draws).mul(1.2).cumsum(1)
    wanted = torch.randint(0, 9, (300,), generator=draws)
    found = adaeagle.chain_lengths(wanted, scores, threshold)
    pairs = zip(wanted.tolist(), scores.tolist(), strict=True)
    assert found.tolist() == [length_reference(*pair, threshold) for pair in pairs]
    nothing = adaeagle.chain_lengths(torch.zeros_like(wanted), scores, threshold)
    assert torch.equal(found, torch.maximum(nothing, wanted.clamp_max(6)))
    assert len(set(found.tolist())) > 3


# --- the predictor


def test_predictor_is_three_layers_with_two_residuals_written_out():
    predictor, x = Predictor(PredictorConfig(6, 5, 3)), torch.randn(12)
    w = predictor.state_dict()

    def layer(name: str, x: Tensor) -> Tensor:
        z = w[f"{name}.weight"] @ x + w[f"{name}.bias"]
        return z * torch.sigmoid(z)

    y = layer("first", x)
    for name in ("blocks.0", "blocks.1"):
        y = y + layer(name, y)
    expected = w["last.weight"] @ y + w["last.bias"]
    torch.testing.assert_close(predictor(x), expected)


def test_one_prediction_computes_less_than_a_hundredth_of_a_round():
    """Vicuna-7B with EAGLE's head, at the paper's mean of four drafted tokens; biases left out."""
    with torch.device("meta"):
        predictor = Predictor(PredictorConfig(4096, 4096))
        head = DraftHead(eagle2.HeadConfig(4096, 11008, 32, 32, 128, 32000))
    ours, drafting = (
        sum(w.numel() for w in module.parameters() if w.dim() > 1) for module in (predictor, head)
    )
    language_head = 4096 * 32000
    target_pass = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + language_head
    assert ours < 0.01 * (target_pass + 4 * (drafting + language_head))


def test_a_length_is_predicted_once_a_round_and_without_a_draft_the_head_sits_out(
    target, head, monkeypatch
):
    predictions, drafts = [], []
    predictor = Predictor(PredictorConfig(target.hidden_size, 8))
    with torch.no_grad():
        predictor.last.weight.zero_(), predictor.last.bias.fill_(-1.0)  # never worth it
    drafter = drafter_of(head, target, Predicted(predictor, target, MOST))
    forward = drafter.lengths.predictor.forward
    monkeypatch.setattr(
        drafter.lengths.predictor, "forward", lambda x: predictions.append(1) or forward(x)
    )
    monkeypatch.setattr(drafter.head, "_layer", lambda *x: drafts.append(1))
    run = decode(target, drafter, PROMPT, max_new_tokens=12)
    assert run.tokens == decode_autoregressively(target, PROMPT, max_new_tokens=12).tokens
    assert len(predictions) == run.num_passes == 11 and not drafts and not any(run.drafted)


# --- labels


def test_counts_of_right_tokens_are_a_plain_double_loop():
    draws = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 3, (3, 14), generator=draws)
    is_answer = torch.zeros(3, 14, dtype=torch.bool)
    is_answer[0, 4:], is_answer[1, 6:12], is_answer[2, 2:9] = True, True, True
    drafts = torch.randint(0, 2, (4, 3, 14), generator=draws)
    rows, is_row = eagle3.rows_of_mask(eagle3.supervised_rows(is_answer, 0))
    chain = (draft.gather(1, rows)[..., None] for draft in drafts)
    lengths, is_open = num_right(chain, lambda x: x[:, 0], tokens, is_answer, rows, is_row)
    for b, m in is_row.nonzero().tolist():
        i, right, ends = int(rows[b, m]), 0, False
        while right < 4:
            place = i + 2 + right
            ends = place >= 14 or not is_answer[b, place]
            if ends or drafts[right, b, i] != tokens[b, place]:
                break
            right += 1
        assert (int(lengths[b, m]), bool(is_open[b, m])) == (right, ends), (b, i)
    assert is_open[is_row].any() and len(set(lengths[is_row].tolist())) > 2


def test_labels_are_what_decoding_has_right_at_every_place(target, head, texts, labels):
    """One token a round, drafted to the most by the drafter itself: the shift is decoding's."""
    compared = 0
    for row in (0, 2):
        n = len(ASKED[row])
        answer = texts.tokens[row, n : n + NUM_NEW].tolist()
        drafter = drafter_of(head, target, Fixed(MOST))
        right = hybrid.head_acceptance(target, drafter, ASKED[row], answer)
        for place, number in right.items():
            label = int(labels[row, n - 2 + place])
            compared += label != NO_LABEL
            assert label in (number, NO_LABEL), f"row {row}, place {place}"
    assert compared > 60


def test_an_answer_that_was_cut_leaves_its_last_right_drafts_without_a_label(
    target, head, texts, labels, monkeypatch
):
    """The text is cut behind the first of two tokens that a draft has right."""
    start, place = len(PROMPT) - 1, int((labels[0] >= 2).nonzero()[0])
    end, rows = place + 3, torch.arange(start, place + 1)
    is_kept = (torch.arange(4) == 0)[:, None] & (torch.arange(texts.tokens.shape[1]) < end)
    shorter = replace(texts, is_answer=texts.is_answer & is_kept)
    whole, room = labels[0, rows], end - 2 - rows
    cut = Labels(copy.deepcopy(head), target, MOST)(shorter)[0]
    assert torch.equal(cut[rows], whole.where(whole < room, NO_LABEL)) and cut[place] == NO_LABEL
    monkeypatch.setattr(target, "stop_ids", texts.tokens[0, end - 1][None])
    ended = Labels(copy.deepcopy(head), target, MOST)(shorter)[0]
    assert torch.equal(ended[rows], torch.minimum(whole, room)) and ended[place] == 1
    assert (ended[:start] == NO_LABEL).all()


def test_answers_that_were_sampled_have_no_labels(target, head, texts):
    sampled = decode_autoregressively(
        target, PROMPT, max_new_tokens=NUM_NEW, temperature=1.0, seed=3, ignore_stop=True
    ).tokens
    tokens = texts.tokens.clone()
    tokens[0, len(PROMPT) : len(PROMPT) + NUM_NEW] = torch.tensor(sampled)
    batch = make_batch(target, tokens, texts.is_answer)
    assert are_greedy(batch).tolist() == [False, True, True, True]
    found = Labels(copy.deepcopy(head), target, MOST)(batch)
    assert (found[0] == NO_LABEL).all() and (found[1:] != NO_LABEL).any(1).all()


def test_labels_are_remembered_whatever_batch_a_text_comes_in(target, head, texts, labels):
    remembered = Labels(copy.deepcopy(head), target, MOST)
    order = torch.tensor([3, 0, 1, 2])
    parts = [
        corpus.Batch(*(getattr(texts, name)[rows] for name in corpus.Batch.__slots__))
        for rows in (order[:2], order)
    ]
    parts[0] = corpus.Batch(  # without the padding that the longest of all asks for
        *(getattr(parts[0], name)[:, :48] for name in corpus.Batch.__slots__)
    )
    assert torch.equal(remembered(parts[0]), labels[order[:2], :48])
    remembered.head = None  # what is known is not drafted again
    with pytest.raises(AttributeError):
        remembered(parts[1])
    remembered.head = head
    assert torch.equal(remembered(parts[1]), labels[order])


def test_labels_of_eagle3s_head_are_its_own_drafts(target, texts, tmp_path):
    """A reduced vocabulary and fused taps: the second base, trained a little."""
    said = [corpus.Answer("", 0, 0.0, 0, row.tolist()) for row in texts.tokens]
    method = eagle3.Eagle3(80, training=eagle3.TrainingConfig(steps=2))
    other = method.new_module(target, said)
    loop = LoopConfig(learning_rate=3e-3, warmup_steps=5, total_steps=60)
    draft_training.train(other, lambda step: texts, method.loss(other, target), loop, tmp_path)
    found = Labels(copy.deepcopy(other), target, 3)(texts)
    drafter = Drafter(eagle3.Drafter(other, target, Chain(3)), Fixed(3), 3)
    answer = texts.tokens[0, len(PROMPT) : len(PROMPT) + NUM_NEW].tolist()
    right = hybrid.head_acceptance(target, drafter, PROMPT, answer)
    own = {place: int(found[0, len(PROMPT) - 2 + place]) for place in right}
    assert all(own[place] in (number, NO_LABEL) for place, number in right.items())
    assert max(own.values()) > 0, "nothing was right"


# --- training


def agreeing_by_token(num_sequences: int = 24, length: int = 40) -> tuple[corpus.Batch, Tensor]:
    """A target and a head that agree for as long as the last known token says: its id modulo 5.

    What the head drafts behind token i + 1 is right for tokens[i] % 5 tokens, then wrong. The batch
    and its labels.
    """
    draws = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 30, (num_sequences, length), generator=draws)
    is_answer = torch.ones_like(tokens, dtype=torch.bool)
    hidden = torch.randn(30, 16, generator=draws)[tokens]
    rows, is_row = eagle3.rows_of_mask(eagle3.supervised_rows(is_answer, 0))
    agrees = tokens.gather(1, rows) % 5
    chain = (
        (eagle3.shift_left(tokens, 2 + step).gather(1, rows) + 50 * (step >= agrees))[..., None]
        for step in range(6)
    )
    lengths, is_open = num_right(chain, lambda x: x[:, 0], tokens, is_answer, rows, is_row)
    labels = torch.full_like(tokens, NO_LABEL)
    labels[is_row.nonzero()[:, 0], rows[is_row]] = lengths.where(~is_open, NO_LABEL)[is_row]
    return corpus.Batch(tokens, is_answer, tokens, hidden, hidden), labels


def synthetic_target() -> Target:
    embedding = torch.nn.Embedding(30, 16).requires_grad_(False)
    model = SimpleNamespace(get_input_embeddings=lambda: embedding)
    return SimpleNamespace(model=model, hidden_size=16, name="synthetic")


def fitted(
    batch: corpus.Batch, labels: Given, penalty: float, folder: Path, num_outputs: int = 1
) -> LengthLoss:
    """The loss of a predictor after 200 steps on one batch."""
    torch.manual_seed(0)
    predictor = Predictor(PredictorConfig(16, 48, num_outputs))
    loss = LengthLoss(predictor, synthetic_target(), labels, penalty)
    loop = LoopConfig(learning_rate=1e-2, warmup_steps=5, total_steps=200)
    draft_training.train(predictor, lambda step: batch, loss, loop, folder)
    return loss


@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_lengths_are_learnt_with_the_right_shift_and_with_no_other(shift, tmp_path):
    """The index trap: features lie one token behind the bonus token."""
    batch, labels = agreeing_by_token()
    assert len(labels[labels != NO_LABEL].unique()) == 5
    shifted = labels.roll(-shift, 1)
    shifted[:, :1], shifted[:, -1:] = NO_LABEL, NO_LABEL
    error = fitted(batch, Given(shifted), 1.0, tmp_path)(batch)[0].item()
    assert error < 0.15 if shift == 0 else error > 0.7


@pytest.fixture(scope="module")
def uncertain(tmp_path_factory) -> dict[str, tuple[float, float]]:
    """Mean length predicted, and tau, by penalty, where a token only says what is likely."""
    draws = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 30, (8, 100), generator=draws)
    hidden = torch.randn(30, 16, generator=draws)[tokens]
    batch = corpus.Batch(tokens, torch.ones_like(tokens).bool(), tokens, hidden, hidden)
    sure = (0.3 + 0.02 * tokens)[..., None]
    lengths = (torch.rand(8, 100, 10, generator=draws) < sure).long().cumprod(-1).sum(-1)
    found, variants = {}, [(f"{penalty:g}", penalty, 1) for penalty in PENALTIES]
    for name, penalty, num_outputs in [*variants, ("classes", 1.0, 11)]:
        folder = tmp_path_factory.mktemp("uncertain")
        loss = fitted(batch, Given(lengths, most=10), penalty, folder, num_outputs)
        with torch.no_grad():
            outputs = loss.predictor(adaeagle.inputs_of(tokens, hidden, loss.embedding))
        wanted = adaeagle.lengths_of(outputs, 10)
        tau = 1 + torch.minimum(wanted, lengths).float().mean().item()
        found[name] = wanted.float().mean().item(), tau
    return found


def test_drafts_and_tau_grow_with_the_penalty(uncertain):
    """Figure 4 and the first line of Table 4: without the penalty drafts are too short."""
    ours = [uncertain[f"{penalty:g}"] for penalty in PENALTIES]
    for (short, low), (long, high) in itertools.pairwise(ours):
        assert long > short and high > low, uncertain


def test_classes_know_no_penalty_and_draft_shorter_than_with_one(uncertain):
    assert uncertain["classes"][0] < uncertain["4"][0], uncertain
    assert uncertain["classes"][1] < uncertain["4"][1], uncertain


def test_loss_and_metrics_are_means_over_the_labelled_rows(target, texts, labels):
    found = labels.clone()
    source = Given(found)
    predictor = Predictor(PredictorConfig(target.hidden_size, 8))
    with torch.no_grad():
        predictor.last.weight.zero_(), predictor.last.bias.fill_(1.2)
    loss, metrics = LengthLoss(predictor, target, source, 3.0)(texts)
    known = found[found != NO_LABEL].tolist()
    each = [3 * (k - 1.2) if k > 1.2 else 1.2 - k for k in known]
    assert loss.item() == pytest.approx(sum(each) / len(each), rel=1e-4)
    expected = {"predicted": 1.0, "length": sum(known) / len(known)}
    expected["too_short"] = sum(k > 1 for k in known) / len(known)
    assert metrics == pytest.approx(expected)
    found.fill_(NO_LABEL)
    nothing, _ = LengthLoss(predictor, target, source, 3.0)(texts)
    nothing.backward()
    assert nothing == 0, "a batch of sampled answers teaches nothing"


def test_the_loss_of_classes_is_their_cross_entropy(target, texts, labels):
    source = Given(labels)
    predictor = Predictor(PredictorConfig(target.hidden_size, 8, MOST + 1))
    loss, _ = LengthLoss(predictor, target, source, 3.0)(texts)
    embedding, is_row = target.model.get_input_embeddings().weight, labels != NO_LABEL
    states = torch.cat([F.embedding(texts.tokens, embedding), texts.hidden], -1)[is_row]
    log_q = predictor(states).log_softmax(-1)
    expected = -log_q[torch.arange(len(log_q)), labels[is_row]].mean()
    torch.testing.assert_close(loss, expected)


# --- decoding

WAYS = {
    "nothing ever": (lambda: Fixed(0), None),
    "the most always": (lambda: Fixed(MOST), None),
    "any length": (Random, None),
    "DDD": (lambda: Fixed(0), adaeagle.DDD_THRESHOLD),
    "any length and DDD": (Random, -2.0),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_output_is_the_targets_own_whatever_the_lengths(target, head, way, temperature):
    make, threshold = WAYS[way]
    options = {"temperature": temperature, "seed": [5, 6, 7, 8], "max_new_tokens": NUM_NEW}
    plain = decode_autoregressively(target, ASKED, **options)
    runs = decode(target, drafter_of(head, target, make(), threshold), ASKED, **options)
    assert [run.tokens for run in runs] == [run.tokens for run in plain]
    assert (max(max(run.accepted) for run in runs) > 0) == (way != "nothing ever")


def test_what_is_accepted_is_the_label_wherever_the_draft_is_long_enough(
    target, head, texts, labels
):
    """After rounds that the head sat out too: what it drafts depends on the text alone."""
    runs = decode(target, drafter_of(head, target, Random()), ASKED, max_new_tokens=NUM_NEW)
    compared, zeros = 0, 0
    for row, run in enumerate(runs):
        place = 1
        for accepted, drafted in zip(run.accepted, run.drafted, strict=True):
            label = int(labels[row, len(ASKED[row]) - 2 + place])
            if label != NO_LABEL:
                assert accepted == min(drafted, label), (row, place)
                compared += 1
            zeros += drafted == 0
            place += accepted + 1
    assert compared > 20 and zeros > 2


class Watched(Predicted):
    """Remembers what was read in each round."""

    def begin(self, *arguments: object) -> None:
        super().begin(*arguments)
        self.read: list[Tensor] = []

    def wanted(self) -> Tensor:
        self.read.append(self.states[0].clone())
        return super().wanted()


def scattered(target: Target, seed: int = 0) -> Predictor:
    """Random weights whose predictions go from none to the most."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        predictor = Predictor(PredictorConfig(target.hidden_size, 16))
        with torch.no_grad():
            predictor.last.weight.mul_(8), predictor.last.bias.fill_(2.0)
    return predictor


def test_the_predictor_reads_the_token_before_the_bonus_token_in_every_round(target, head, texts):
    lengths = Watched(scattered(target), target, MOST)
    run = decode(target, drafter_of(head, target, lengths), PROMPT, max_new_tokens=NUM_NEW)
    embedding = target.model.get_input_embeddings().weight
    states = torch.cat([F.embedding(texts.tokens[0], embedding), texts.hidden[0]], -1)
    row = len(PROMPT) - 1
    for accepted, read in zip(run.accepted, lengths.read, strict=True):
        torch.testing.assert_close(read, states[row], rtol=1e-3, atol=1e-3)
        assert (read - states[row + 1]).abs().max() > 0.1
        row += accepted + 1
    assert max(run.accepted) > 1 and len(set(run.drafted)) > 2


def test_a_round_of_adaeagle_ddd_is_the_longer_of_its_parts(target, head):
    """Each part alone would have drafted these lengths at the same place."""
    threshold, predictor, seen = -0.5, scattered(target), []
    both = drafter_of(head, target, Predicted(copy.deepcopy(predictor), target, MOST), threshold)
    prune = both.chain.prune

    def watched(growth: object) -> object:
        tree = prune(growth)
        seen.append((both.chain.wanted.tolist(), growth.pool()[2][:, 1:].tolist()))
        return tree

    both.chain.prune = watched
    run = decode(target, both, PROMPT, max_new_tokens=NUM_NEW)
    alone = {"wanted": 0, "sure": 0}
    for ((wanted,), (scores,)), drafted in zip(seen, run.drafted, strict=True):
        sure = length_reference(0, scores, threshold)
        assert drafted == max(min(wanted, MOST), sure) <= MOST
        alone["wanted" if wanted > sure else "sure"] += wanted != sure
    assert min(alone.values()) > 0, f"one part always decided: {alone}"


@pytest.mark.parametrize("threshold", [None, -0.6])
def test_rows_of_a_ragged_batch_draft_as_each_alone(target, head, monkeypatch, threshold):
    drafter = drafter_of(head, target, Predicted(scattered(target), target, MOST), threshold)
    runs = assert_ragged_batch_decodes_as_each_alone(target, drafter, monkeypatch, 0.0)
    assert len({number for run in runs for number in run.drafted}) > 2


def test_a_chain_of_no_token_is_refused():
    with pytest.raises(ValueError, match="longest chain has 0 tokens"):
        Chain(0)


# --- checkpoints and the recipe


@pytest.fixture
def method(target: Target, head: DraftHead, tmp_path) -> AdaEagle:
    """Of a head that is a checkpoint."""
    Eagle2().save(head, tmp_path / "head")
    return AdaEagle(head=str(tmp_path / "head"), most=MOST, width=24)


def test_what_is_saved_predicts_the_same_and_drafts_with_its_head(target, method, tmp_path):
    predictor = scattered(target)
    method.save(predictor, tmp_path / "own")
    loaded, config = adaeagle.load_predictor(tmp_path / "own")
    x = torch.randn(7, 2 * target.hidden_size)
    assert torch.equal(loaded(x), predictor(x)) and config["most"] == MOST
    own = adaeagle.drafters(tmp_path / "own", method.head)
    assert own.keys() == adaeagle.DRAFTERS.keys() == {"AdaEAGLE", "AdaEAGLE-DDD", "DDD"}
    runs = {name: decode(target, load(target), PROMPT, 24) for name, load in own.items()}
    assert len({tuple(run.tokens) for run in runs.values()}) == 1
    assert own["AdaEAGLE"](target).max_nodes == MOST + 1
    assert own["AdaEAGLE-DDD"](target).chain.threshold == adaeagle.DDD_THRESHOLD
    assert min(runs["DDD"].drafted) >= 1 and len({str(run.drafted) for run in runs.values()}) > 1
    fixed = adaeagle.fixed(target, 2, head=method.head)
    assert set(decode(target, fixed, PROMPT, 24).drafted) == {2}


def test_a_predictor_on_another_head_is_refused(target, method, tmp_path):
    method.save(scattered(target), tmp_path / "own")
    Eagle2().save(make_head(target), tmp_path / "other")
    with pytest.raises(ValueError, match="trained on drafts of head .* name that head"):
        adaeagle.load(target, tmp_path / "own", tmp_path / "other")


def test_another_papers_checkpoint_is_refused(target, method):
    with pytest.raises(ValueError, match="no draft length predictor but a 'llama'"):
        adaeagle.load_predictor(method.head)


def test_predictor_of_another_target_is_refused(target):
    with pytest.raises(ValueError, match="hidden size 96, but .* has 64"):
        Predicted(Predictor(PredictorConfig(96, 8)), target)


def test_training_from_features_leaves_a_checkpoint_that_drafts(chat_target, features, tmp_path):
    Eagle2().save(make_head(chat_target), tmp_path / "head")
    method = AdaEagle(head=str(tmp_path / "head"), most=3, width=16)
    loop = replace(RECIPE.loop, learning_rate=1e-2)
    recipe = replace(RECIPE, method=method, loop=loop, epochs=3)
    out, card, _ = trained(recipe, chat_target, features, tmp_path)
    assert card["recipe"]["method"]["penalty"] == 4.0
    assert checkpoints.load(out)[1]["head"] == checkpoints.digest(tmp_path / "head")
    assert_says_what_the_target_says(chat_target, adaeagle.load(chat_target, out, method.head))


@pytest.mark.parametrize("base", ["EAGLE", "EAGLE-3"])
def test_both_bases_decode_in_bfloat16(tiny_chat_folder, tmp_path, base):
    target = target_model.load(str(tiny_chat_folder), dtype="bfloat16", device="cpu")
    heads = {"EAGLE": Eagle2().new_module, "EAGLE-3": eagle3.Eagle3(40).new_module}
    answers = [corpus.Answer("a", 3, 0.0, 0, [50, 60, 60, 70])]
    module = heads[base](target, answers)
    eagle3.save_head(module, tmp_path / "head")
    method = AdaEagle(base, str(tmp_path / "head"), most=3)
    method.save(scattered(target), tmp_path / "own")
    run = decode(target, adaeagle.load(target, tmp_path / "own", method.head), PROMPT, 16)
    assert len(run.tokens) == 16 and max(run.drafted) == 3


def test_settings_are_checked_and_a_section_overrides_the_papers(target, monkeypatch):
    assert AdaEagle.of({"penalty": 2.0}) == AdaEagle(penalty=2.0)
    assert AdaEagle().new_module(target, []).config == PredictorConfig(64, 64)
    classes = AdaEagle(is_classifier=True, width=8).new_module(target, []).config
    assert classes == PredictorConfig(64, 8, 11) and classes.is_classifier
    with pytest.raises(ValueError, match="unknown base 'Medusa'; choose one of EAGLE, EAGLE-3"):
        AdaEagle("Medusa")
    with pytest.raises(ValueError, match="penalty > 0"):
        AdaEagle(penalty=0.0)
    monkeypatch.setattr(target, "name", "smollm2")
    own = recipes.Recipe.of(AdaEagle, target)
    assert own.method == AdaEagle(width=256) and own.epochs == 5, "lambda and k_max are the papers"
