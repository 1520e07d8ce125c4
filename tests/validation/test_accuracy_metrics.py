from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtforge.runtime.errors import ConfigError
from trtforge.validation.accuracy_metrics import Scores, find_metric, user_metric

RNG = np.random.default_rng(0)


def score(name: str, predictions: Any, labels: Any, **options: Any) -> float:
    metric = find_metric(name, **options)
    return Scores(metric, metric.rows(predictions, labels)).value


def test_top_k_counts_ranks_and_nan_is_wrong() -> None:
    logits = np.array([[3.0, 2, 1], [1, 2, 3], [np.nan, 0, 0], [1, 1, 1]])
    assert score("top1", logits, np.array([0, 1, 0, 0])) == 0.5
    assert score("top2", logits, np.array([0, 1, 0, 1])) == 0.75
    assert score("top1", logits, np.array([0, 1, 0, -100])) == pytest.approx(1 / 3)


def test_top1_of_tokens_leaves_out_what_has_no_label() -> None:
    logits = np.eye(4)[None, [0, 1, 2, 3]].repeat(2, 0)
    labels = np.array([[0, 1, 2, -100], [0, 0, -100, -100]])
    assert score("top1", logits, labels) == 4 / 5


def test_top1_equals_argmax_on_ties() -> None:
    logits = RNG.integers(0, 3, (200, 5)).astype(np.float32)
    assert score("top1", logits, logits.argmax(1)) == 1


def test_miou_is_the_mean_over_classes_of_all_samples_together() -> None:
    logits = RNG.normal(size=(6, 3, 8, 8))
    labels = RNG.integers(0, 3, (6, 8, 8))
    labels[0, :4] = 255
    found = logits.argmax(1)
    judged = labels != 255
    expected = [
        ((found == c) & (labels == c) & judged).sum() / (((found == c) | (labels == c)) & judged).sum()
        for c in range(3)
    ]
    assert score("miou", logits, labels) == pytest.approx(np.mean(expected))
    assert score("miou", found, labels, classes=3) == pytest.approx(np.mean(expected))
    with pytest.raises(ConfigError, match="classes"):
        score("miou", found, labels)


def test_cosine_has_no_overflow_and_nan_is_the_worst() -> None:
    vectors = RNG.normal(size=(5, 7))
    assert score("cosine", vectors * 1e300, vectors) == pytest.approx(1)
    assert score("cosine", np.full((1, 3), np.nan), np.ones((1, 3))) == -1


def test_word_and_character_errors() -> None:
    texts = ["the cat sat", "on the mat"]

    def decode(outputs: Any) -> list[str]:
        return [texts[int(i)] for i in outputs]

    assert score("wer", np.array([0, 1]), texts, decode=decode) == 1
    assert score("wer", np.array([0, 1]), ["the cat sat", "on a mat today"], decode=decode) == 1 - 2 / 7
    assert score("cer", np.array([0]), ["the bat sat"], decode=decode) == 1 - 1 / 11
    assert score("wer", np.array([[1, 2, 3, -1]]), [np.array([1, 3])]) == 0.5
    with pytest.raises(ConfigError, match="decode"):
        score("wer", np.zeros((1, 4, 5)), ["a"])


@given(st.lists(st.integers(0, 3), max_size=6), st.lists(st.integers(0, 3), min_size=1, max_size=6))
def test_edit_distance_is_a_metric(first: list[int], second: list[int]) -> None:
    def edits(a: list[int], b: list[int]) -> float:
        metric = find_metric("wer", decode=lambda outputs: outputs)
        return float(metric.rows([a], [b])[0, 0])

    assert edits(first, second) == edits(second, first)
    assert (edits(first, second) == 0) == (first == second)
    assert abs(len(first) - len(second)) <= edits(first, second) <= max(len(first), len(second))


def test_a_function_of_the_users_gives_a_number_a_sample_or_one_for_all() -> None:
    predictions, labels = RNG.normal(size=(10, 1)), RNG.normal(size=10)

    def each(p: Any, t: Any) -> Any:
        return -np.abs(p[:, 0] - t)

    def whole(p: Any, t: Any) -> float:
        return float(np.corrcoef(p[:, 0], t)[0, 1])

    mean = user_metric("m:each", each, predictions, labels)
    assert Scores(mean, mean.rows(predictions, labels)).value == pytest.approx(each(predictions, labels).mean())
    one = user_metric("m:whole", whole, predictions, labels)
    scores = Scores(one, np.zeros((10, 0)), predictions, labels)
    assert scores.value == pytest.approx(whole(predictions, labels))
    times = np.array([[1] * 10, [2] * 5 + [0] * 5])
    assert scores.resampled(times) == pytest.approx(
        [whole(predictions, labels), whole(predictions[:5].repeat(2, 0), labels[:5].repeat(2))]
    )
    with pytest.raises(ConfigError, match="one number"):
        user_metric("m:odd", lambda p, t: p, predictions, labels)


@pytest.mark.parametrize("name", ["top1", "miou", "cosine"])
def test_resampling_rows_is_resampling_samples(name: str) -> None:
    shapes = {"top1": ((20, 4), (20,)), "miou": ((20, 4, 3, 3), (20, 3, 3)), "cosine": ((20, 4), (20, 4))}
    predictions = RNG.normal(size=shapes[name][0])
    labels: Any = RNG.integers(0, 4, shapes[name][1]) if name != "cosine" else RNG.normal(size=(20, 4))
    metric = find_metric(name)
    scores = Scores(metric, metric.rows(predictions, labels))
    index = RNG.integers(0, 20, 20)
    times = np.bincount(index, minlength=20)[None]
    direct = Scores(metric, metric.rows(predictions[index], labels[index])).value
    assert scores.resampled(times)[0] == pytest.approx(direct)
    alone = scores.without_each()
    assert alone is not None
    assert alone[3] == pytest.approx(Scores(metric, np.delete(scores.rows, 3, 0)).value)


def test_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'miou'"):
        find_metric("mioU")


@pytest.mark.parametrize(
    ("labels", "said"),
    [(np.zeros((3, 2), int), "labels are"), (np.array([0, 1, 9]), "label 9"), (np.zeros(3), "float64")],
)
def test_labels_that_do_not_fit_are_named(labels: np.ndarray, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        score("top1", np.zeros((3, 4)), labels)
