import math

import pytest
import torch

from bunny_lora.evaluation import metrics


def unit(n, d=5, seed=0):
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=1)


X, Y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
DIAGONAL = torch.tensor([math.sqrt(0.5), math.sqrt(0.5)])


def test_fidelity_by_hand():
    scores = metrics.fidelity(torch.stack([X, DIAGONAL]), torch.stack([X, Y]))
    assert scores.tolist() == pytest.approx([0.5, math.sqrt(0.5)])


def test_consistency_by_hand():
    assert metrics.consistency(torch.stack([X, X, Y])).tolist() == pytest.approx([0.5, 0.5, 0.0])
    assert metrics.consistency(torch.stack([X, X])).tolist() == [1, 1]
    assert metrics.consistency(X[None]).shape == (0,)


def test_separation_by_hand():
    references = [X[None], Y[None], -X[None]]
    images = torch.stack([X, X, DIAGONAL, Y])
    labels = torch.tensor([0, 1, 0, 1])
    assert metrics.separation(images, labels, references).tolist() == [1, 0, 0, 1]  # the third is a tie
    assert metrics.separation(images, labels * 0, [X[None]]).tolist() == [1, 1, 1, 1]
    assert metrics.chance_level(4) == 0.25


def test_drift_by_hand():
    base, tuned = torch.stack([X, X, X]), torch.stack([X, Y, -X])
    assert metrics.drift(base, tuned).tolist() == [0, 1, 2]


def test_memorisation_by_hand():
    scores, frames = metrics.memorisation(torch.stack([Y, DIAGONAL]), torch.stack([X, Y, DIAGONAL]))
    assert scores.tolist() == pytest.approx([1, 1])
    assert frames.tolist() == [1, 2]


def test_against_naive_loops():
    images, crops, labels = unit(7), unit(4, seed=1), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    references = [unit(3, seed=2), unit(5, seed=3), unit(1, seed=4)]

    def cosine(a, b):
        return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))

    naive_fidelity = [sum(cosine(g, r) for r in crops) / 4 for g in images]
    naive_consistency = [
        sum(cosine(images[i], images[j]) for j in range(7) if j != i) / 6 for i in range(7)
    ]
    naive_copy = [max(cosine(g, r) for r in crops) for g in images]
    centroids = []
    for rows in references:
        mean = [sum(float(row[k]) for row in rows) / len(rows) for k in range(5)]
        length = math.sqrt(sum(x * x for x in mean))
        centroids.append([x / length for x in mean])
    nearest = [max(range(3), key=lambda k: cosine(g, centroids[k])) for g in images]
    naive_separation = [float(k == int(o)) for k, o in zip(nearest, labels, strict=True)]

    assert metrics.fidelity(images, crops).tolist() == pytest.approx(naive_fidelity, abs=1e-6)
    assert metrics.consistency(images).tolist() == pytest.approx(naive_consistency, abs=1e-6)
    assert metrics.memorisation(images, crops)[0].tolist() == pytest.approx(naive_copy, abs=1e-6)
    assert metrics.separation(images, labels, references).tolist() == naive_separation


def test_interval_is_repeatable_holds_the_mean_and_knows_its_limits():
    scores = torch.rand(12, generator=torch.Generator().manual_seed(3))
    first, again = metrics.interval(scores, seed=5), metrics.interval(scores, seed=5)
    assert first == again
    assert first.low < first.mean < first.high
    assert first.n == 12
    assert metrics.interval(scores, seed=6) != first
    few = metrics.interval(scores[:2])
    assert few.mean == pytest.approx(float(scores[:2].mean()), abs=1e-5)
    assert (few.low, few.high, few.n) == (None, None, 2)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    draws = torch.randn(200, 30, generator=torch.Generator().manual_seed(0))
    intervals = [metrics.interval(row, seed=i) for i, row in enumerate(draws)]
    covered = sum(one.low <= 0 <= one.high for one in intervals) / 200
    assert 0.88 <= covered <= 0.98


def test_crops_themselves_are_judged_without_themselves():
    near_y = torch.nn.functional.normalize(torch.tensor([0.1, 1.0]), dim=0)
    references = [torch.stack([X, near_y]), torch.stack([Y, Y]), DIAGONAL[None]]
    assert metrics.separation_of_crops(references).tolist() == [0, 0, 1, 1]
    assert metrics.separation_of_crops([X[None], Y[None]]).shape == (0,)
    assert metrics.nearest_other(torch.stack([X, Y, DIAGONAL])).tolist() == pytest.approx(
        [math.sqrt(0.5)] * 3
    )
    assert metrics.nearest_other(X[None]).shape == (0,)


def test_consistency_interval_has_the_mean_of_consistency():
    images, base, alone = unit(6), unit(6, seed=9), torch.zeros(6, dtype=torch.long)
    one = metrics.consistency_interval(images, alone)
    assert one.mean == pytest.approx(float(metrics.consistency(images).mean()), abs=1e-5)
    assert one.low < one.mean < one.high
    difference = metrics.consistency_interval(images, alone, base)
    expected = metrics.consistency(images).mean() - metrics.consistency(base).mean()
    assert difference.mean == pytest.approx(float(expected), abs=1e-5)
    same = metrics.consistency_interval(images, alone, images)
    assert (same.mean, same.low, same.high) == (0, 0, 0)
    assert metrics.consistency_interval(images[:1], alone[:1]) is None


def test_consistency_of_several_characters_compares_none_across_them():
    images, labels = unit(6), torch.tensor([0, 0, 0, 1, 1, 1])
    parts = torch.cat([metrics.consistency(images[:3]), metrics.consistency(images[3:])])
    both = metrics.consistency_interval(images, labels)
    assert both.mean == pytest.approx(float(parts.mean()), abs=1e-5)
    assert metrics.consistency_interval(images, torch.arange(6)) is None


def test_consistency_interval_covers_the_truth():
    """Pairs share images: intervals of the scores alone would cover far less often than they say."""
    centre, alone = torch.tensor([1.0, 0, 0, 0, 0]), torch.zeros(15, dtype=torch.long)

    def draw(seed, n=15):
        noise = torch.randn(n, 5, generator=torch.Generator().manual_seed(seed))
        return torch.nn.functional.normalize(centre + 0.5 * noise, dim=1)

    truth = float(metrics.consistency(draw(10_000, 3000)).mean())

    def share_covered(measure):
        return sum(one.low <= truth <= one.high for one in map(measure, range(150))) / 150

    assert share_covered(lambda seed: metrics.consistency_interval(draw(seed), alone)) > 0.85
    assert share_covered(lambda seed: metrics.interval(metrics.consistency(draw(seed)))) < 0.8
