"""The choice of hyperparameters with the labels of a draw: `mae.compare.choices`."""

import numpy as np
import pytest

from mae.compare import choices
from mae.compare.predictors import BASELINES, COMPONENTS, KNN, LOGISTIC_REGRESSION, RIDGE, SVM, SVR, USES, Predictor
from mae.settings.choices import CLASSIFICATION, MULTILABEL, REGRESSION

LABELS = np.repeat(np.arange(4), 50)


def clusters(spread: float, width: int = 16, labels: np.ndarray = LABELS) -> np.ndarray:
    """Returns features (n, width) around one center for each class."""
    draw = np.random.default_rng(1)
    centers = draw.normal(size=(labels.max() + 1, width))
    return (centers[labels] + spread * draw.normal(size=(len(labels), width))).astype(np.float32)


def planted(right: dict[tuple[float, ...], int], default: tuple[float, ...], grid: tuple[float, ...]) -> Predictor:
    """Returns a predictor whose predictions for the first images are right, for as many as `right` says."""

    def leave_one_out(features, labels, values):
        found = np.tile(labels, (len(values), 1))
        for row, value in zip(found, values, strict=True):
            row[right.get(value, 0) :] += 1
        return np.eye(labels.max() + 2)[found]

    return Predictor("planted", ("C",), (grid,), default, lambda *_: np.empty(0), leave_one_out)


def test_the_default_stands_unless_another_value_is_better_by_more_than_the_standard_error():
    # 200 images: a difference of d images has a standard error of about the root of d / 200 of the images
    features = {"": np.zeros((200, 1))}
    near = planted({(1.0,): 100, (2.0,): 101, (3.0,): 99}, (1.0,), (1.0, 2.0, 3.0))
    assert choices.choose(near, features, LABELS, 0).values == (1.0,)
    far = planted({(1.0,): 100, (2.0,): 120, (3.0,): 99}, (1.0,), (1.0, 2.0, 3.0))
    assert choices.choose(far, features, LABELS, 0).values == (2.0,)
    assert choices.choose(far, features, LABELS, 0).score == 0.6


def test_a_grid_that_ends_at_its_best_is_extended():
    features = {"": np.zeros((200, 1))}
    rising = planted({(1.0,): 20, (3.0,): 40, (10.0,): 80, (30.0,): 160, (100.0,): 100}, (1.0,), (1.0, 3.0))
    assert choices.choose(rising, features, LABELS, 0).values == (30.0,)


def test_features_are_chosen_as_hyperparameters_are():
    options = {"class token": clusters(9), "mean of the patches": clusters(0.5)}
    for predictor in (KNN, LOGISTIC_REGRESSION):
        chosen = choices.choose(predictor, options, LABELS, 0)
        assert chosen.option == "mean of the patches" and chosen.score > 0.9
    same = choices.choose(KNN, {"class token": clusters(0.5), "mean of the patches": clusters(0.5)}, LABELS, 0)
    assert same.option == "class token"


@pytest.mark.parametrize("predictor", [KNN, *BASELINES[CLASSIFICATION]], ids=lambda each: each.title)
def test_no_image_is_judged_by_a_fit_that_has_seen_it(predictor):
    """Features and labels are independent: any fit that sees an image gets more than a quarter right."""
    draw = np.random.default_rng(0)
    features = draw.normal(size=(200, 300)).astype(np.float32)
    found = choices.choose(predictor, {"": features}, draw.permutation(LABELS), 0)
    assert abs(found.score - 0.25) < 0.12


def test_neighbors_leave_out_the_image_itself_as_scikit_learn_does():
    from sklearn.neighbors import NearestNeighbors

    features = clusters(1.5)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    distances, near = NearestNeighbors(n_neighbors=10).fit(unit).kneighbors()  # without the image itself
    votes = np.zeros((200, 4))
    for row in range(200):
        np.add.at(votes[row], LABELS[near[row]], np.exp((1 - distances[row] ** 2 / 2) / 0.07))
    assert KNN.leave_one_out is not None
    assert (KNN.leave_one_out(features, LABELS, [(10,)])[0].argmax(axis=1) == votes.argmax(axis=1)).mean() > 0.99


@pytest.mark.parametrize("predictor", [KNN, LOGISTIC_REGRESSION, SVM, COMPONENTS], ids=lambda each: each.title)
def test_classes_are_predicted_for_each_value(predictor):
    features, queries = clusters(0.3)[::2], clusters(0.3)[1::2]
    values = [predictor.default, tuple(axis[0] for axis in predictor.grid)]
    outputs = predictor.predict(features, LABELS[::2], queries, values)
    assert outputs.shape == (2, 100, 4) and (outputs.argmax(axis=2) == LABELS[1::2]).mean() > 0.9


def test_an_image_that_is_the_only_one_of_its_class_leaves_the_default():
    labels = np.array([0] * 10 + [1])
    chosen = choices.choose(SVM, {"": clusters(1, labels=labels)}, labels, 0)
    assert chosen.values == SVM.default and chosen.score == 10 / 11 and "one image" in chosen.note
    pairs = np.repeat(np.arange(8), 2)  # two folds
    assert choices.choose(SVM, {"": clusters(0.1, labels=pairs)}, pairs, 0).score > 0.9


def test_a_grid_is_searched_on_a_part_of_many_images_with_the_shares_of_the_classes():
    labels = np.repeat([0, 1, 2], [3000, 900, 100])
    rows = choices.stratified(labels, 2000, 0)
    assert np.bincount(labels[rows]).tolist() == [1500, 450, 50]
    assert len(choices.stratified(labels, 5000, 0)) == 4000
    assert not np.array_equal(rows, choices.stratified(labels, 2000, 1))


def test_support_vectors_are_those_of_scikit_learn():
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    features, queries = clusters(3)[::2], clusters(3)[1::2]
    model = make_pipeline(StandardScaler(), SVC(C=10, gamma=0.3 / 16)).fit(features, LABELS[::2])
    outputs = SVM.predict(features, LABELS[::2], queries, [(1, 3), (10, 0.3)])[1]
    assert outputs == pytest.approx(model.decision_function(queries), abs=0.01)


@pytest.mark.parametrize("predictor", [KNN, RIDGE, SVR, COMPONENTS], ids=lambda each: each.title)
def test_numbers_are_predicted_in_their_units(predictor):
    features = clusters(0.5)
    numbers = np.stack([100 + 30.0 * LABELS, -LABELS / 50.0], axis=1)
    outputs = predictor.predict(features[::2], numbers[::2], features[1::2], [predictor.default])[0]
    assert (np.abs(outputs - numbers[1::2]).mean(axis=0) < [18, 0.012]).all()  # the mean has 30 and 0.02
    found = choices.choose(predictor, {"": features}, numbers, 0, REGRESSION, "mae")
    assert -10 < found.score < 0


@pytest.mark.parametrize("name", USES[MULTILABEL])
def test_several_labels_are_predicted(name):
    labels = np.stack([LABELS % 2, LABELS // 2, np.zeros_like(LABELS)], axis=1)
    labels[0, 2] = 1  # in some folds, no image has the third label
    found = choices.choose(USES[MULTILABEL][name], {"": clusters(0.5)}, labels, 0, MULTILABEL)
    assert found.score > 0.95


@pytest.mark.parametrize("predictor", [LOGISTIC_REGRESSION, RIDGE], ids=lambda each: each.title)
def test_wide_features_have_the_outputs_of_their_span(predictor):
    """Columns of zeros do not change a fit; with them, the features are wider than the images are many."""
    features = clusters(3)
    wide = np.concatenate([features, np.zeros((200, 400), np.float32)], axis=1)
    targets = LABELS if predictor is LOGISTIC_REGRESSION else LABELS[:, None].astype(float)
    narrow, same = (predictor.predict(each[::2], targets[::2], each[1::2], [(1,)]) for each in (features, wide))
    assert same == pytest.approx(narrow, abs=0.02)
