"""The choice of hyperparameters with the labels of a draw: `mae.compare.choices`."""

import numpy as np
import pytest

from mae.compare import choices
from mae.compare.classifiers import BASELINES, COMPONENTS, KNN, LOGISTIC_REGRESSION, SVM, Classifier

LABELS = np.repeat(np.arange(4), 50)


def clusters(spread: float, width: int = 16, labels: np.ndarray = LABELS) -> np.ndarray:
    """Returns features (n, width) around one center for each class."""
    draw = np.random.default_rng(1)
    centers = draw.normal(size=(labels.max() + 1, width))
    return (centers[labels] + spread * draw.normal(size=(len(labels), width))).astype(np.float32)


def planted(right: dict[tuple[float, ...], int], default: tuple[float, ...], grid: tuple[float, ...]) -> Classifier:
    """Returns a classifier whose predictions for the first images are right, for as many as `right` says."""

    def leave_one_out(features, labels, values):
        found = np.tile(labels, (len(values), 1))
        for row, value in zip(found, values, strict=True):
            row[right.get(value, 0) :] += 1
        return found

    return Classifier("planted", ("C",), (grid,), default, lambda *_: np.empty(0), leave_one_out)


def test_the_default_stands_unless_another_value_is_better_by_more_than_the_standard_error():
    # 200 images: a difference of d images has a standard error of about the root of d / 200 of the images
    features = {"": np.zeros((200, 1))}
    near = planted({(1.0,): 100, (2.0,): 101, (3.0,): 99}, (1.0,), (1.0, 2.0, 3.0))
    assert choices.choose(near, features, LABELS, 0).values == (1.0,)
    far = planted({(1.0,): 100, (2.0,): 120, (3.0,): 99}, (1.0,), (1.0, 2.0, 3.0))
    assert choices.choose(far, features, LABELS, 0).values == (2.0,)
    assert choices.choose(far, features, LABELS, 0).accuracy == 0.6


def test_a_grid_that_ends_at_its_best_is_extended():
    features = {"": np.zeros((200, 1))}
    rising = planted({(1.0,): 20, (3.0,): 40, (10.0,): 80, (30.0,): 160, (100.0,): 100}, (1.0,), (1.0, 3.0))
    assert choices.choose(rising, features, LABELS, 0).values == (30.0,)


def test_features_are_chosen_as_hyperparameters_are():
    options = {"class token": clusters(9), "mean of the patches": clusters(0.5)}
    for classifier in (KNN, LOGISTIC_REGRESSION):
        chosen = choices.choose(classifier, options, LABELS, 0)
        assert chosen.option == "mean of the patches" and chosen.accuracy > 0.9
    same = choices.choose(KNN, {"class token": clusters(0.5), "mean of the patches": clusters(0.5)}, LABELS, 0)
    assert same.option == "class token"


@pytest.mark.parametrize("classifier", [KNN, *BASELINES], ids=lambda each: each.title)
def test_no_image_is_judged_by_a_fit_that_has_seen_it(classifier):
    """Features and labels are independent: any fit that sees an image gets more than a quarter right."""
    draw = np.random.default_rng(0)
    features = draw.normal(size=(200, 300)).astype(np.float32)
    found = choices.choose(classifier, {"": features}, draw.permutation(LABELS), 0)
    assert abs(found.accuracy - 0.25) < 0.12


def test_neighbors_leave_out_the_image_itself_as_scikit_learn_does():
    from sklearn.neighbors import NearestNeighbors

    features = clusters(1.5)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    distances, near = NearestNeighbors(n_neighbors=10).fit(unit).kneighbors()  # without the image itself
    votes = np.zeros((200, 4))
    for row in range(200):
        np.add.at(votes[row], LABELS[near[row]], np.exp((1 - distances[row] ** 2 / 2) / 0.07))
    assert KNN.leave_one_out is not None
    assert (KNN.leave_one_out(features, LABELS, [(10,)])[0] == votes.argmax(axis=1)).mean() > 0.99


@pytest.mark.parametrize("classifier", [KNN, LOGISTIC_REGRESSION, SVM, COMPONENTS], ids=lambda each: each.title)
def test_classes_are_predicted_for_each_value(classifier):
    features, queries = clusters(0.3)[::2], clusters(0.3)[1::2]
    values = [classifier.default, tuple(axis[0] for axis in classifier.grid)]
    classes = classifier.predict(features, LABELS[::2], queries, values)
    assert classes.shape == (2, 100) and (classes == LABELS[1::2]).mean() > 0.9


def test_an_image_that_is_the_only_one_of_its_class_leaves_the_default():
    labels = np.array([0] * 10 + [1])
    chosen = choices.choose(SVM, {"": clusters(1, labels=labels)}, labels, 0)
    assert chosen.values == SVM.default and np.isnan(chosen.accuracy)
    pairs = np.repeat(np.arange(8), 2)  # two folds
    assert choices.choose(SVM, {"": clusters(0.1, labels=pairs)}, pairs, 0).accuracy > 0.9


def test_a_grid_is_searched_on_a_part_of_many_images_with_the_shares_of_the_classes():
    labels = np.repeat([0, 1, 2], [3000, 900, 100])
    rows = choices.stratified(labels, 2000, 0)
    assert np.bincount(labels[rows]).tolist() == [1500, 450, 50]
    assert len(choices.stratified(labels, 5000, 0)) == 4000
    assert not np.array_equal(rows, choices.stratified(labels, 2000, 1))
