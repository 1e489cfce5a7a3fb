"""Do the intervals hold? Simulated scores of Gaussians of known distance, and studies without a difference.

    python -m benchmarks.intervals [--quick]

The first table covers the jackknife: how often the interval contains the score that N images have on average
("at N") and, where half of the images agree, the score of infinitely many ("limit"). The second table covers
paired differences, the third the claims of studies.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lit_transdiff.base.student import student
from lit_transdiff.evaluation.functions import frechet_values
from lit_transdiff.evaluation.groups import checked_limit, groups_of, jackknife_error
from lit_transdiff.evaluation.kernels import cmmd_values
from lit_transdiff.evaluation.moments import Gaussian
from lit_transdiff.evaluation.sliced import directions, mind_values
from lit_transdiff.study.claims import OPEN, StudyRule, claim
from lit_transdiff.study.verdicts import NO_DIFFERENCE


@dataclass(frozen=True)
class Case:
    """Images of a Gaussian with mean ``shift`` and ``scale`` times the standard deviations of the reference.

    ``along`` adds a shift in units of these. The reference has variances 1, 1/2, 1/3, ... if ``power_law``,
    else 1. Each of ``classes`` has its own mean, and the groups hold equal parts of each.
    """

    name: str
    size: int
    images: int
    repeats: int
    shift: float = 0.0
    scale: float = 1.0
    power_law: bool = False
    classes: int = 1
    along: float = 0.0

    def deviations(self) -> Tensor:
        order = torch.arange(1, self.size + 1, dtype=torch.float64)
        return 1 / order.sqrt() if self.power_law else torch.ones_like(order)

    def mean(self) -> Tensor:
        return self.shift + self.along * self.deviations()

    def centres(self) -> Tensor:
        """The means [C, D] of the classes, whose average is 0."""
        means = torch.randn(self.classes, self.size, generator=torch.Generator().manual_seed(7)).double()
        means = 0.5 * (means - means.mean(dim=0))
        return means if self.classes > 1 else torch.zeros(1, self.size, dtype=torch.float64)

    def reference(self) -> Gaussian:
        between = self.centres().T @ self.centres() / self.classes
        return Gaussian(np.zeros(self.size), (between + self.deviations().square().diag()).numpy())

    def distance(self) -> float:
        """The true Frechet distance of the images' mean and covariance."""
        from lit_transdiff.evaluation.moments import frechet

        between = self.centres().T @ self.centres() / self.classes
        own = between + (self.scale * self.deviations()).square().diag()
        return frechet(Gaussian(self.mean().numpy(), own.numpy()), self.reference())

    def draw(self, seed: int) -> tuple[Tensor, Tensor]:
        """Images [N, D] and their labels [N], in order of class."""
        labels = torch.arange(self.images) * self.classes // self.images
        noise = torch.randn(self.images, self.size, generator=torch.Generator().manual_seed(seed)).double()
        return self.mean() + self.centres()[labels] + self.scale * self.deviations() * noise, labels


CASES = (
    Case("identical", 32, 2000, 500),
    Case("near", 32, 2000, 500, shift=0.05, scale=0.97),
    Case("far", 32, 2000, 500, shift=0.35, scale=0.9),
    Case("50 classes", 32, 2000, 400, shift=0.05, scale=0.95, classes=50),
    Case("power law, identical", 256, 2000, 150, power_law=True),
    Case("power law, near", 256, 2000, 150, shift=0.01, power_law=True),
    Case("power law, near in large variances", 256, 2000, 40, along=0.0583, power_law=True),
    Case("power law, far in large variances", 256, 2000, 40, along=0.357, scale=0.97, power_law=True),
    Case("power law, near, N = 2 D", 256, 512, 150, shift=0.01, power_law=True),
    Case("power law, far, N = 2 D", 256, 512, 150, shift=0.05, scale=0.95, power_law=True),
)


@dataclass(frozen=True)
class Cover:
    """How often intervals contain what they should: at N, and the limit where it is not refused."""

    average: float  # score at N
    at_n: float
    limit: float  # NaN if all are refused
    refused: float  # fraction of the runs in which the check refuses the limit


def cover(values: Callable[[Tensor, Tensor], Tensor], case: Case, truth: float) -> Cover:
    """Repeat a case; ``values`` are a score and its values without each group, [1 + K]."""
    scores, errors, limits = [], [], []
    for seed in range(case.repeats):
        x, labels = case.draw(seed)
        group = groups_of(labels)
        assert group is not None
        found, half = values(x, group), group < (int(group.max()) + 1) // 2
        scores.append(float(found[0]))
        errors.append(jackknife_error(found[1:]))
        limits.append(checked_limit(found, values(x[half], group[half])))
    width = student(int(group.max())) * np.array(errors)
    kept = np.array([limit is not None for limit in limits])
    known = np.array([limit for limit in limits if limit is not None])
    return Cover(
        float(np.mean(scores)),
        float(np.mean(np.abs(np.array(scores) - np.mean(scores)) <= width)),
        float(np.mean(np.abs(known - truth) <= width[kept])) if len(known) else float("nan"),
        1 - float(np.mean(kept)),
    )


def cover_of_frechet(case: Case) -> Cover:
    real = case.reference()
    return cover(lambda x, group: frechet_values(x, group, real), case, case.distance())


def paired(
    correlation: float, shift: float, repeats: int, images: int = 2000, size: int = 32
) -> tuple[float, float]:
    """Two arms whose images share noise: how often the interval contains the mean difference, and 0."""
    real, labels = Gaussian(np.zeros(size), np.eye(size)), torch.zeros(images, dtype=torch.long)
    group = groups_of(labels)
    assert group is not None
    gaps, widths = [], []
    for seed in range(repeats):
        stream = torch.Generator().manual_seed(seed)
        first, other = torch.randn(2, images, size, generator=stream, dtype=torch.float64)
        other = correlation * first + (1 - correlation**2) ** 0.5 * other
        values = [frechet_values(x + by, group, real) for x, by in ((first, 0.1), (other, 0.1 + shift))]
        gap = values[1] - values[0]
        gaps.append(float(gap[0]))
        widths.append(student(int(group.max())) * jackknife_error(gap[1:]))
    error, width = np.array(gaps), np.array(widths)
    return float(np.mean(np.abs(error - error.mean()) <= width)), float(np.mean(np.abs(error) > width))


NOISES: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda random, count: random.normal(size=count),
    "heavy tails (t of 3)": lambda random, count: random.standard_t(3, size=count),
    "skewed (exponential)": lambda random, count: random.exponential(size=count) - 1,
}


def wrong_claims(noise: str, arms: int, seeds: int, studies: int) -> float:
    """The fraction of studies without a difference in which an arm is called better or worse, at any look."""
    random, rule, wrong = np.random.default_rng(0), StudyRule(0.05, arms, seeds), 0
    for _ in range(studies):
        baseline = NOISES[noise](random, seeds)
        wrong += any(is_claimed(NOISES[noise](random, seeds) - baseline, rule) for _ in range(arms))
    return wrong / studies


def is_claimed(differences: np.ndarray, rule: StudyRule) -> bool:
    """Whether the study of an arm ends with a difference, looking after every seed."""
    for count in range(2, rule.seeds + 1):
        word = claim(differences[:count].tolist(), rule).word
        if word != OPEN:
            return word != NO_DIFFERENCE
    return False


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--quick", action="store_true", help="a tenth of the repetitions")
    part = 10 if options.parse_args().quick else 1
    start = time.process_time()
    print("| case | D | N | true distance | mean at N | cover at N | cover of the limit | limit refused |")
    print("|---|---|---|---|---|---|---|---|")
    for case in CASES:
        case = Case(**{**vars(case), "repeats": case.repeats // part})
        found = cover_of_frechet(case)
        print(
            f"| {case.name} | {case.size} | {case.images} | {case.distance():.3f} | {found.average:.3f} | "
            f"{found.at_n:.3f} | {found.limit:.3f} | {found.refused:.0%} |",
            flush=True,
        )
    other = Case("shifted", 16, 1000, 200 // part, shift=0.1)
    y, units = Case("real", 16, 1000, 1).draw(10**6)[0], directions(16, 100)
    scores: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "MIND": lambda x, group: mind_values(x, y, group, units),
        "CMMD, unbiased": lambda x, group: cmmd_values(x, y, group, biased=False),
    }
    for name, values in scores.items():
        found = cover(values, other, float("nan"))
        print(f"| {name}, shifted | 16 | 1000 | - | {found.average:.3f} | {found.at_n:.3f} | - | - |")
    print(
        "\n| correlation of the noise | cover of the difference | false alarms without one |\n|---|---|---|"
    )
    for correlation in (0.0, 0.7, 0.95):
        held, _ = paired(correlation, 0.03, 500 // part)
        _, false = paired(correlation, 0.0, 500 // part)
        print(f"| {correlation} | {held:.3f} | {false:.3f} |", flush=True)
    print("\n| noise over seeds | arms | seeds | studies with a wrong claim |\n|---|---|---|---|")
    for noise in NOISES:
        for arms, seeds in ((1, 6), (1, 12), (3, 12), (7, 8)):
            wrong = wrong_claims(noise, arms, seeds, 1000 // part)
            print(f"| {noise} | {arms} + baseline | {seeds} | {wrong:.1%} |", flush=True)
    print(f"\n{time.process_time() - start:.0f} CPU seconds, torch {torch.__version__}")


if __name__ == "__main__":
    main()
