"""How sure the numbers of eval.py are."""
from collections import Counter
from typing import Any

import numpy as np


def compare(pairs: list[list[tuple[list[float], list[float]]]],
            clip: bool = False) -> dict[str, Any]:
    """Points of (model, baseline) for each answer to each prompt -> the two means and their
    difference as [value, low, high], and how many answers won, tied, lost. The intervals are 95% of
    2,000 paired bootstrap draws over prompts, since answers to one prompt are not independent.
    """
    n = len(pairs)
    if n == 0:
        return dict(n=0, win=0, tie=0, loss=0)
    totals = np.zeros((n, 2, 2))    # prompt, side, (sum of points, number of points)
    signs: Counter[int] = Counter()
    for i, answers in enumerate(pairs):
        for sides in answers:
            for side, points in enumerate(sides):
                totals[i, side] += sum(points), len(points)
            gap = np.mean(sides[0]) - np.mean(sides[1])
            signs[int(np.sign(round(gap, 9)))] += 1

    def means(sample: np.ndarray) -> np.ndarray:    # (n, 2, 2) -> model, baseline, difference
        sums = sample.sum(axis=0)
        model, baseline = sums[:, 0] / sums[:, 1]
        return np.array([model, baseline, model - baseline])

    rng = np.random.default_rng(0)
    draws = [means(totals[rng.integers(n, size=n)]) for _ in range(2000)]
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)    # (3,) each
    found = np.stack([means(totals), low, high], axis=1)    # (3, 3)
    if clip:    # both means, but not the difference
        found[:2] = found[:2].clip(0, 1)
    result = dict(zip(("model", "baseline", "difference"), found.tolist(), strict=True))
    return result | dict(n=n, win=signs[1], tie=signs[0], loss=signs[-1])


def agreement(y: np.ndarray, v: np.ndarray) -> dict[str, Any]:
    """Labels and verdicts, both (N,) -> accuracy, balanced accuracy (mean of the recalls of both
    classes), Cohen's kappa (None where it is not defined). No labels: n = 0 only.
    """
    if len(y) == 0:
        return dict(n=0)
    right = v == y
    recalls = [right[y == label].mean() for label in np.unique(y)]
    chance = y.mean() * v.mean() + (1 - y.mean()) * (1 - v.mean())
    kappa = float((right.mean() - chance) / (1 - chance)) if chance < 1 else None
    return dict(n=len(y), accuracy=float(right.mean()), balanced_accuracy=float(np.mean(recalls)),
                kappa=kappa)


# 97.5% quantile of Student's t by degrees of freedom, 0 to 9.
STUDENT = (np.nan, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


def interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, ...) -> mean over n, half its 95% interval (Student's t; from n = 10 on that of 10)."""
    n = len(values)
    quantile = STUDENT[min(n, len(STUDENT)) - 1]
    return values.mean(axis=0), quantile * values.std(axis=0, ddof=1) / n**0.5
