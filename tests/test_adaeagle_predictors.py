"""AdaEAGLE's predictors: alike but for one setting, and taken only for the head they know."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from drafter_cases import RECIPE
from test_eagle2 import make_head
from torch import Tensor

from specrepro import adaeagle, adaeagle_predictors, checkpoints, corpus, draft_labels
from specrepro.adaeagle import AdaEagle
from specrepro.adaeagle_predictors import Budget
from specrepro.eagle2 import Eagle2


@pytest.fixture
def own(chat_target, tmp_path) -> AdaEagle:
    """Of a head that is a checkpoint."""
    Eagle2().save(make_head(chat_target), tmp_path / "head")
    return AdaEagle(head=str(tmp_path / "head"), most=3, width=8)


def save(method: AdaEagle, target, root: Path) -> Path:
    folder = adaeagle_predictors.folder_of(method, root)
    method.save(method.new_module(target, []), folder)
    return folder


def test_each_has_a_folder_of_its_own_and_adaeagles_is_the_one_that_is_loaded():
    every = [
        AdaEagle(**settings)
        for base in adaeagle.BASES
        for settings in adaeagle_predictors.all_settings(base)
    ]
    folders = [adaeagle_predictors.folder_of(method, adaeagle.CHECKPOINT) for method in every]
    assert len(set(folders)) == len(every) == len(adaeagle_predictors.PENALTIES) + 2
    assert folders[every.index(AdaEagle())] == adaeagle.CHECKPOINT
    assert AdaEagle("EAGLE-3") in every


def test_a_committed_one_is_taken_only_with_these_settings_and_on_this_head(
    chat_target, own, tmp_path, monkeypatch
):
    monkeypatch.setattr(adaeagle, "CHECKPOINT", tmp_path / "kept")
    assert adaeagle_predictors.committed(own) is None
    light = replace(own, penalty=2.0)
    folders = [save(one, chat_target, tmp_path / "kept") for one in (own, light)]
    assert [adaeagle_predictors.committed(one) for one in (own, light)] == folders
    assert adaeagle_predictors.committed(replace(own, penalty=3.0)) is None
    assert adaeagle_predictors.committed(replace(own, most=4)) is None
    Eagle2().save(make_head(chat_target, seed=7), tmp_path / "other")
    other = replace(own, head=str(tmp_path / "other"))
    assert checkpoints.digest(other.head_folder) != checkpoints.digest(own.head_folder)
    assert adaeagle_predictors.committed(other) is None


def test_they_see_the_same_answers_as_often_and_share_their_drafts(
    chat_target, features, own, tmp_path, monkeypatch
):
    drafted: list[int] = []
    label = draft_labels.Labels._label

    def counted(self, batch: corpus.Batch) -> Tensor:
        drafted.append(len(batch.tokens))
        return label(self, batch)

    monkeypatch.setattr(draft_labels.Labels, "_label", counted)
    cards, budget, counts = [], Budget(4, 2.0), []
    for method in (replace(own, penalty=2.0), replace(own, is_classifier=True)):
        name = adaeagle_predictors.name_of(method)
        recipe = replace(RECIPE, method=method)
        folder = adaeagle_predictors.train_alike(
            recipe, chat_target, features, tmp_path / name, tmp_path / name / "own", budget
        )
        cards.append(json.loads((folder / "card.json").read_text()))
        assert adaeagle.load_predictor(folder)[1]["is_classifier"] == method.is_classifier
        counts.append(sum(drafted))
    assert 0 < counts[0] == counts[1] <= 4, "each answer is drafted once, whoever learns from it"
    alike = [card | {"recipe": card["recipe"] | {"method": None}} for card in cards]
    assert alike[0] == alike[1] and alike[0]["num_answers"] == 4
    one_epoch = corpus.num_batches(
        corpus.FeatureCache(features, chat_target.hidden_size, 4).answers, RECIPE.batch_tokens, 1.0
    )
    assert cards[0]["recipe"]["loop"]["total_steps"] == 2 * one_epoch


KEPT = sorted(path.parent for path in adaeagle.CHECKPOINT.rglob(checkpoints.CONFIG))


@pytest.mark.parametrize("folder", KEPT, ids=lambda path: path.name)
def test_what_is_committed_knows_the_committed_head_and_lies_where_it_is_looked_for(folder):
    method = AdaEagle(**json.loads((folder / "card.json").read_text())["recipe"]["method"])
    assert not method.head, "trained on the head of another folder than the committed one's"
    assert adaeagle_predictors.committed(method) == folder
