"""Interleaved timing, and the few numbers that sum it up."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Call = Callable[[int], object]


@dataclass(frozen=True)
class Summary:
    """Median and spread of a sample."""

    median: float
    p10: float
    p90: float
    samples: int


def quantile(sorted_values: Sequence[float], share: float) -> float:
    """The linearly interpolated quantile of values in rising order.

    >>> quantile([1.0, 2.0, 4.0], 0.5), quantile([1.0, 2.0], 0.9)
    (2.0, 1.9)
    """
    position = share * (len(sorted_values) - 1)
    low = int(position)
    high = min(low + 1, len(sorted_values) - 1)
    weight = position - low
    return sorted_values[low] * (1.0 - weight) + sorted_values[high] * weight


def summarize(values: Sequence[float]) -> Summary:
    """Median, 10th and 90th percentile."""
    if not values:
        raise ValueError("summarize: values must not be empty, got []")
    rising = sorted(values)
    return Summary(quantile(rising, 0.5), quantile(rising, 0.1), quantile(rising, 0.9), len(rising))


@dataclass(frozen=True)
class Timing:
    """Seconds per call of every contender, and `other / first` of the same turns."""

    seconds: dict[str, Summary]
    ratios: dict[str, Summary]
    calls_per_sample: dict[str, int]

    @property
    def best(self) -> str:
        """The fastest contender that is not a form of ours; those bear the first one's name."""
        first = next(iter(self.seconds))
        theirs = [name for name in self.ratios if not name.startswith(f"{first} ")]
        return min(theirs, key=lambda name: self.seconds[name].median)


def interleave(
    contenders: Mapping[str, Call],
    seconds: float,
    *,
    min_rounds: int = 5,
    max_rounds: int = 100,
    sample_seconds: float = 1e-3,
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Times the contenders in turns until `seconds` have gone, at least `min_rounds` rounds.

    Every call gets the next number, so that inputs chosen by number never repeat from one
    contender to the next; who goes first changes with every round. Short calls are repeated until
    a sample lasts `sample_seconds`. The first contender is the one the others are divided by.
    """
    names = list(contenders)
    number = 0
    repeats: dict[str, int] = {}
    for name, call in contenders.items():
        shortest = float("inf")
        warm_until = clock() + 2 * sample_seconds
        while True:  # warms caches, pools and the branch predictor, and sizes the samples
            start = clock()
            call(number)
            end = clock()
            number += 1
            shortest = min(shortest, end - start)
            if end >= warm_until:
                break
        repeats[name] = max(1, min(10_000, round(sample_seconds / max(shortest, 1e-7))))

    samples: dict[str, list[float]] = {name: [] for name in names}
    finish = clock() + seconds
    rounds = 0
    while rounds < max_rounds and (rounds < min_rounds or clock() < finish):
        shift = rounds % len(names)
        for name in names[shift:] + names[:shift]:
            call, count = contenders[name], repeats[name]
            start = clock()
            for index in range(number, number + count):
                call(index)
            samples[name].append((clock() - start) / count)
            number += count
        rounds += 1
    first = samples[names[0]]
    return Timing(
        seconds={name: summarize(values) for name, values in samples.items()},
        ratios={
            name: summarize(
                [theirs / ours for ours, theirs in zip(first, samples[name], strict=True)]
            )
            for name in names[1:]
        },
        calls_per_sample=repeats,
    )
