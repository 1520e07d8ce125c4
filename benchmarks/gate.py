"""The accuracy gate keeps its word: how often it passes what is beyond the budget, where the truth is known.

    python benchmarks/gate.py [--metric top1 miou wer cosine] [--perturbations 200] [--resamples 50] [--json]

A population of 50,000 samples is made for each metric, and seeded perturbations of it whose drop over the population is
known: half of them a hair beyond the budget, where a wrong pass is likeliest, half spread from half to one and a half
times the budget. Of each, samples are drawn and judged as `convert` judges them. A pass where the drop is beyond the
budget is false; the gate promises at most 5 % of those, whatever the perturbation.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import numpy as np

from trtforge.validation.accuracy import Budget, judge
from trtforge.validation.accuracy_metrics import Scores, find_metric

POPULATION = 50_000
Rows = np.ndarray
Perturb = Callable[[np.random.Generator, float], tuple[Rows, Rows]]


def top1(rng: np.random.Generator, drop: float) -> tuple[Rows, Rows]:
    """Some right answers lost, some wrong ones won; up to 3 % of all answers change beside the drop."""
    right = rng.random(POPULATION) < 0.76
    won = int(rng.choice([0.0, 0.003, 0.03]) * POPULATION)
    lost = won + int(np.ceil(drop * POPULATION - 1e-9))
    after = right.copy()
    after[rng.choice(np.flatnonzero(right), lost, replace=False)] = False
    after[rng.choice(np.flatnonzero(~right), won, replace=False)] = True
    one = np.ones(POPULATION)
    return np.stack([right, one], 1).astype(float), np.stack([after, one], 1).astype(float)


def cosine(rng: np.random.Generator, drop: float) -> tuple[Rows, Rows]:
    """Agreement with the model itself: losses are log-normal, a few samples lose much."""
    loss = rng.lognormal(0, rng.choice([0.5, 1.0]), POPULATION)
    one = np.ones(POPULATION)
    return np.stack([one, one], 1), np.stack([1 - loss * (drop / loss.mean()), one], 1)


def wer(rng: np.random.Generator, drop: float) -> tuple[Rows, Rows]:
    """Utterances of 3 to 40 words, errors in clumps: an utterance's own difficulty is log-normal."""
    words = rng.integers(3, 41, POPULATION).astype(float)
    hard = np.minimum(0.08 * rng.lognormal(-0.3, 0.8, POPULATION), 0.9)
    before = rng.binomial(words.astype(int), hard).astype(float)
    change = rng.binomial(words.astype(int), np.minimum(hard * rng.choice([0.05, 0.3]), 0.5)).astype(float)
    after = np.maximum(before + change * rng.choice([-1, 1], POPULATION), 0)
    missing = int(np.ceil(drop * words.sum() - (after - before).sum()))
    spots = rng.choice(POPULATION, abs(missing), p=words / words.sum())
    np.add.at(after, spots, np.sign(missing))
    return np.stack([before, words], 1), np.stack([after, words], 1)


def miou(rng: np.random.Generator, drop: float) -> tuple[Rows, Rows]:
    """Five classes, one of them rare; a candidate gets some images wrong in some classes."""
    shares = np.array([0.5, 0.25, 0.15, 0.08, 0.02])
    truth = np.stack([rng.gamma(0.7, s * 4000, POPULATION) for s in shares], 1)
    hit = np.clip(rng.beta(8, 2, truth.shape), 0, 1)
    wrong = truth * rng.beta(2, 8, truth.shape)
    harm = rng.beta(0.3, 3, truth.shape)
    metric = find_metric("miou")

    def rows(scale: float) -> Rows:
        found = hit * np.maximum(1 - scale * harm, 0)
        both = truth * found
        return np.concatenate([both, truth + wrong * (1 + scale * harm)], 1)

    before = rows(0.0)
    target = metric.value(before.sum(0)) - drop
    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if metric.value(rows(middle).sum(0)) > target else (low, middle)
    return before, rows(high)


METRICS: dict[str, tuple[Perturb, float, int]] = {
    "top1": (top1, 0.01, 1000),
    "miou": (miou, 0.01, 500),
    "wer": (wer, 0.01, 500),
    "cosine": (cosine, 0.005, 300),
}
"""Of each metric: its population, the budget, and how many samples are drawn."""


def measure(name: str, perturbations: int, resamples: int, *, count: int | None = None) -> dict[str, object]:
    """How often the gate is wrong about one metric."""
    make, budget, drawn = METRICS[name]
    drawn = count or drawn
    metric = find_metric(name)
    if name in ("wer", "cer"):
        metric = find_metric(name, decode=lambda outputs: outputs)
    rng = np.random.default_rng(0)
    tally = {"beyond": [0, 0], "just_beyond": [0, 0], "within": [0, 0]}
    settled = 0
    start = time.perf_counter()
    for number in range(perturbations):
        just = number % 2 == 0
        wanted = budget + 1 / POPULATION if just else budget * (0.5 + (number // 2 + 0.5) / (perturbations // 2 or 1))
        before, after = make(np.random.default_rng(number), wanted)
        drop = float(metric.value(before.sum(0)) - metric.value(after.sum(0)))
        for _ in range(resamples):
            index = rng.integers(0, POPULATION, drawn)
            result = judge(Scores(metric, before[index]), Scores(metric, after[index]), Budget(budget), resamples=1000)
            settled += result.verdict != "inconclusive"
            if drop > budget:
                for kind in ("beyond", "just_beyond") if just else ("beyond",):
                    tally[kind][0] += result.verdict == "passed"
                    tally[kind][1] += 1
            else:
                tally["within"][0] += result.verdict == "failed"
                tally["within"][1] += 1
    rates = {kind: round(wrong / runs, 4) if runs else None for kind, (wrong, runs) in tally.items()}
    return {
        "metric": name,
        "budget": budget,
        "samples": drawn,
        "runs": perturbations * resamples,
        "false_passes": rates["beyond"],
        "false_passes_just_beyond": rates["just_beyond"],
        "false_failures": rates["within"],
        "settled": round(settled / (perturbations * resamples), 4),
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--metric", nargs="*", default=list(METRICS), choices=list(METRICS))
    parser.add_argument("--perturbations", type=int, default=200)
    parser.add_argument("--resamples", type=int, default=50)
    parser.add_argument("--samples", type=int, default=None)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = [measure(name, options.perturbations, options.resamples, count=options.samples) for name in options.metric]
    if options.json:
        print(json.dumps(found, indent=2))
        return
    for line in found:
        print(", ".join(f"{key} {value}" for key, value in line.items()))


if __name__ == "__main__":
    main()
