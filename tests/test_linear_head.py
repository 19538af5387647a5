"""The linear head in closed form: sums of features give what the images themselves would give."""

from __future__ import annotations

import numpy as np
import pytest

from hf_datavec import probe
from hf_datavec.linear_head import (
    PENALTIES,
    PENALTY,
    SHARPNESS,
    FeatureSums,
    leave_one_site_out,
    pooled_head,
    ridge,
    score,
    total,
)

LABELS = ("cat", "dog", "owl")


def some_images(count: int, width: int, seed: int, labels: tuple[str, ...] = LABELS):
    """Features (n, d) that tell something of their labels, and the labels."""
    random = np.random.default_rng(seed)
    names = random.choice(labels, count)
    centres = np.random.default_rng(9).normal(0, 1, (len(LABELS), width))
    places = [LABELS.index(name) for name in names]
    return 3 + centres[places] + random.normal(0, 2, (count, width)), names


def sums_of(features: np.ndarray, names: np.ndarray, labels: tuple[str, ...] = LABELS) -> FeatureSums:
    extended = np.column_stack([features, np.ones(len(features))])
    return FeatureSums(labels, extended.T @ extended, one_hot(names, labels).T @ extended)


def one_hot(names: np.ndarray, labels: tuple[str, ...] = LABELS) -> np.ndarray:
    return np.array([[float(name == label) for label in labels] for name in names])


def outputs(weights: np.ndarray, features: np.ndarray) -> np.ndarray:
    return features @ weights[:, :-1].T + weights[:, -1]


def direct(features: np.ndarray, targets: np.ndarray, penalty: float) -> np.ndarray:
    """Ridge regression as least squares with one row more for each feature, from the features themselves."""
    mean = features.mean(0)
    centred = features - mean
    penalised = np.sqrt(penalty * (centred**2).sum() / features.shape[1]) * np.eye(features.shape[1])
    rows = np.vstack([centred, penalised])
    found = np.linalg.lstsq(rows, np.vstack([targets - targets.mean(0), np.zeros((len(mean), targets.shape[1]))]))[0]
    return np.column_stack([found.T, targets.mean(0) - mean @ found])


@pytest.mark.parametrize("penalty", [1e-6, 1e-2, 10.0])
@pytest.mark.parametrize(("count", "width"), [(60, 7), (30, 80)])
def test_the_head_of_the_sites_sums_is_the_ridge_regression_on_all_images(penalty, count, width):
    sites = [some_images(count, width, seed) for seed in range(3)]
    found = ridge(total([sums_of(*site) for site in sites]), penalty)
    features, names = (np.concatenate(parts) for parts in zip(*sites, strict=True))
    expected = direct(features, one_hot(names), penalty)
    np.testing.assert_allclose(outputs(found, features), outputs(expected, features), rtol=0, atol=1e-7)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * abs(expected).max())


def test_it_is_the_ridge_regression_of_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, names = some_images(80, 12, 1)
    strength = 0.1 * ((features - features.mean(0)) ** 2).sum() / 12
    other = linear_model.Ridge(alpha=strength).fit(features, one_hot(names))
    found = ridge(sums_of(features, names), 0.1)
    np.testing.assert_allclose(found[:, :-1], other.coef_, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found[:, -1], other.intercept_, rtol=1e-9, atol=1e-12)


def test_more_features_than_images_give_a_head_that_knows_its_images():
    features, names = some_images(200, 1280, 2)
    features = np.maximum(features, 0)  # as after a ReLU
    features[:, :50] = 0
    features[:, 50:60] = 4
    for penalty in PENALTIES:
        found = ridge(sums_of(features, names), penalty)
        assert np.isfinite(found).all()
        assert (found[:, :60] == 0).all() or abs(found[:, :60]).max() < 1e-6 * abs(found).max()
    exact = ridge(sums_of(features, names), 1e-6)
    np.testing.assert_allclose(outputs(exact, features), one_hot(names), rtol=0, atol=1e-3)
    expected = direct(features, one_hot(names), 1e-6)
    np.testing.assert_allclose(outputs(exact, features), outputs(expected, features), rtol=0, atol=1e-6)


def test_sums_rounded_to_32_bits_are_too_coarse_and_those_of_64_are_not():
    """Why the file that travels holds 64 bits: the middle of large features is taken off again."""
    features, names = some_images(200, 300, 3)
    features = 0.02 * features + 5
    sums = sums_of(features, names)
    rounded = FeatureSums(LABELS, *(np.float64(np.float32(part)) for part in (sums.products, sums.by_label)))
    expected = outputs(direct(features, one_hot(names), 1e-4), features)
    size = abs(expected).max()
    assert abs(outputs(ridge(sums, 1e-4), features) - expected).max() < 1e-6 * size
    assert abs(outputs(ridge(rounded, 1e-4), features) - expected).max() > 1e-2 * size


def test_one_image_and_images_that_are_all_alike_give_the_shares_of_the_labels():
    features = np.full((4, 5), 2.0)
    found = ridge(sums_of(features, np.array(["cat", "cat", "dog", "owl"])), 1e-2)
    np.testing.assert_allclose(outputs(found, features), [[0.5, 0.25, 0.25]] * 4)
    alone = ridge(sums_of(features[:1], np.array(["dog"])), 1e-2)
    np.testing.assert_allclose(outputs(alone, features[:1]), [[0.0, 1.0, 0.0]], atol=1e-12)


def test_labels_are_matched_by_name_and_a_site_that_lacks_one_counts_for_the_others():
    ours, theirs = some_images(40, 6, 1, LABELS[:2]), some_images(50, 6, 2, LABELS[1:])
    found = total([sums_of(*ours, LABELS[1::-1]), sums_of(*theirs, LABELS[:0:-1])])
    assert found.labels == ("dog", "cat", "owl")
    names = np.concatenate([ours[1], theirs[1]])
    assert found.counts.tolist() == [sum(names == label) for label in found.labels]
    expected = direct(np.concatenate([ours[0], theirs[0]]), one_hot(names, found.labels), 1e-2)
    np.testing.assert_allclose(ridge(found, 1e-2), expected, rtol=0, atol=1e-9)
    absent = found.aligned(("owl", "bat"))
    assert absent.by_label[1].tolist() == [0.0] * 7
    assert absent.by_label[0].tolist() == found.by_label[2].tolist()


def test_a_site_left_out_is_judged_by_its_sums_as_by_its_images():
    sites = [some_images(count, 9, seed, labels) for count, seed, labels in
             ((30, 1, LABELS), (25, 2, LABELS[:2]), (40, 3, LABELS))]  # fmt: skip
    sums = [sums_of(*site, LABELS[:2] if place == 1 else LABELS) for place, site in enumerate(sites)]
    penalties = (1e-3, 1.0, 30.0)
    best, errors = leave_one_site_out(sums, penalties)
    expected = []
    for penalty in penalties:
        wrong = 0.0
        for place, (features, names) in enumerate(sites):
            others = [site for other, site in enumerate(sites) if other != place]
            pooled, told = (np.concatenate(parts) for parts in zip(*others, strict=True))
            head = direct(pooled, one_hot(told), penalty)
            for feature, name in zip(features, names, strict=True):
                wrong += float(((outputs(head, feature[None])[0] - one_hot(np.array([name]))[0]) ** 2).sum())
        expected.append(wrong / 95)
    np.testing.assert_allclose(errors, expected, rtol=1e-9)
    assert best == penalties[int(np.argmin(expected))]


def test_the_score_of_any_head_is_its_mean_squared_error():
    features, names = some_images(50, 6, 4)
    weights = np.random.default_rng(1).normal(0, 1, (3, 7))
    expected = ((outputs(weights, features) - one_hot(names)) ** 2).sum(1).mean()
    assert score(weights, sums_of(features, names)) == pytest.approx(expected, rel=1e-9)


def test_a_single_site_takes_the_default_penalty():
    sums = sums_of(*some_images(30, 5, 1))
    assert leave_one_site_out([sums]) == (PENALTY, ())
    nobody = FeatureSums(LABELS, np.zeros((6, 6)), np.zeros((3, 6)))
    head = pooled_head([sums, nobody])
    assert (head.penalty, head.errors) == (PENALTY, ())
    np.testing.assert_allclose(head.weights, SHARPNESS * ridge(sums, PENALTY)[:, :-1])


def test_noise_is_shrunk_and_what_is_the_same_everywhere_is_not():
    random = np.random.default_rng(0)
    noise = [sums_of(random.normal(0, 1, (40, 30)), random.choice(LABELS, 40)) for _ in range(3)]
    clear = []
    for seed in range(3):
        names = np.random.default_rng(seed).choice(LABELS, 60)
        clear.append(sums_of(one_hot(names) + 0.01 * random.normal(0, 1, (60, 3)), names))
    assert pooled_head(noise).penalty >= 1
    assert pooled_head(clear).penalty <= 1e-2
    assert len(pooled_head(clear).errors) == len(PENALTIES)
    assert PENALTIES[0] == pytest.approx(1e-6)
    assert PENALTIES[-1] == pytest.approx(1e2)


def test_sharpness_multiplies_the_outputs_and_is_the_target_of_other_heads_by_least_squares():
    sums = [sums_of(*some_images(30, 5, seed)) for seed in range(2)]
    once, twice = pooled_head(sums, sharpness=1.0), pooled_head(sums, sharpness=2.0)
    np.testing.assert_allclose(twice.weights, 2 * once.weights)
    np.testing.assert_allclose(twice.bias, 2 * once.bias)
    assert probe.TARGET == SHARPNESS
