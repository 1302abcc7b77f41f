"""Accuracy and its uncertainty against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from mmcompress.evals.statistics import clustered_mean, paired_difference


def test_one_question_per_image_gives_the_textbook_error() -> None:
    # mean 3/4; residuals 1/4, 1/4, 1/4, -3/4; squares sum to 12/16; s^2 = 1/4; s^2 / 4 = 1/16
    estimate = clustered_mean([1, 1, 1, 0], "abcd")
    assert estimate.value == 0.75
    assert estimate.error == pytest.approx(0.25)
    assert estimate.margin == pytest.approx(0.49)


def test_questions_of_one_image_count_together() -> None:
    # mean 1/2; residuals per image +1 and -1; 2 / 1 / 16 * (1 + 1) = 1/4
    assert clustered_mean([1, 1, 0, 0], "aabb").error == pytest.approx(0.5)
    # opposite answers within an image cancel: every image says exactly 1/2
    assert clustered_mean([1, 0, 1, 0], "aabb").error == 0


def test_images_of_unequal_size() -> None:
    # mean 3/5; residuals: a 2/5 + 2/5 - 3/5 = 1/5, b 2/5, c -3/5; 3 / 2 / 25 * (1 + 4 + 9) / 25 = 42 / 1250
    assert clustered_mean([1, 1, 0, 1, 0], "aaabc").error == pytest.approx(math.sqrt(42 / 1250))


def test_a_paired_difference_ignores_what_both_find_hard() -> None:
    first, second = [1, 1, 0, 0], [0, 0, 0, 0]
    difference = paired_difference(first, second, "abcd")
    # differences 1, 1, 0, 0: mean 1/2, squares 4 * 1/4, 4 / 3 / 16 = 1/12
    assert difference.value == 0.5 and difference.error == pytest.approx(math.sqrt(1 / 12))
    assert paired_difference(first, first, "abcd") == paired_difference(second, second, "abcd")
    assert paired_difference(first, first, "abcd").error == 0


def test_one_image_says_nothing_about_others() -> None:
    assert math.isnan(clustered_mean([1, 0], "aa").error)


def test_malformed_input_is_refused() -> None:
    with pytest.raises(ValueError, match="no values"):
        clustered_mean([], "")
    with pytest.raises(ValueError):
        clustered_mean([1, 0], "a")
    with pytest.raises(ValueError):
        paired_difference([1], [1, 0], "ab")
