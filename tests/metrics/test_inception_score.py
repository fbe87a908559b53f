"""Inception score: its two extremes, its definition, its splits."""

import numpy as np
import pytest

from diffusion.metrics.inception_score import inception_score


def test_sure_and_even_answers_score_the_number_of_classes():
    logits = np.where(np.eye(10, dtype=bool)[np.arange(1000) % 10], 0.0, -np.inf)
    assert inception_score(logits, splits=1, replicates=2).value == pytest.approx(10)


def test_the_same_answer_for_all_scores_one():
    logits = np.tile(np.random.default_rng(0).standard_normal(10), (100, 1))
    got = inception_score(logits, replicates=10)
    np.testing.assert_allclose([got.value, got.low, got.high], 1, rtol=1e-12)
    assert got.std < 1e-12


def test_score_is_the_definition_and_ignores_a_shift_of_the_logits():
    logits = np.random.default_rng(0).standard_normal((50, 7)) * 3
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    want = np.exp(np.mean(np.sum(p * np.log(p / p.mean(0)), axis=1)))
    got = inception_score(logits + 1e4, splits=1, replicates=2)
    assert got.value == pytest.approx(want, rel=1e-10)


def test_samples_ordered_by_class_are_shuffled_before_the_splits():
    labels = np.repeat(np.arange(10), 100)
    logits = 20 * np.eye(10)[labels]
    got = inception_score(logits, splits=10)
    assert got.value > 9  # unshuffled, each split has one class and scores 1
    assert got.low <= got.value <= got.high


def test_bad_logits_are_refused():
    with pytest.raises(ValueError, match="splits=10 of 5"):
        inception_score(np.zeros((5, 3)))
    with pytest.raises(ValueError, match="NaN"):
        inception_score(np.full((20, 3), np.nan))
