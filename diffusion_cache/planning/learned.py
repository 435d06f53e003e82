"""What a schedule will score, learned from those that were run.

A profile's surrogate knows how far a forecast is off, and hardly what comes of it: errors cancel or add up, the next
computed step and the fitted weights make up for some of them. How they do changes slowly along the trajectory and
with the distance from the last computed step. So let the error of a schedule be

    E(S) = Σ over reused steps t of d(h, i, t) · exp(θ · φ(t, t − i))

with the surrogate's damage d of forecasting t from the computed steps h < i, and φ a few polynomials of the place and
of the logarithm of the distance, and find θ by Bayesian least squares on the logarithms of the errors that were
measured. The sum runs over edges again, so `dynamic.best_schedule` finds its optimum exactly.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from .dynamic import Steps, best_schedule
from .surrogate import TINY, Array, edge_damages

DECIBEL = math.log(10) / 10  # a decibel as a difference of logarithms
SPREAD = 2.0  # what the coefficients are thought to be, before anything was run: a standard deviation
NOISE = 0.05  # the least that the model is thought to be wrong by
UPDATES = 12  # of Gauss–Newton
LARGEST = 30.0  # exponent


class Learned:
    """damage: [h + 1, i, t], [T, T, T], as for `best_schedule`, at least 0 and finite."""

    def __init__(self, damage: Array):
        self.damage = np.asarray(damage, dtype=np.float64) + TINY
        steps = np.arange(len(self.damage))
        place = np.broadcast_to(steps / len(steps) - 0.5, (len(steps), len(steps)))  # [i, t]
        distance = np.log(np.maximum(steps[None, :] - steps[:, None], 1))
        features = [place, place**2, place**3, distance, place * distance, distance**2]
        self._features = np.stack([np.ones_like(distance), *features], axis=-1)  # [i, t, F]
        self._terms: dict[Steps, tuple[Array, Array]] = {}
        self._mean = np.zeros(self._features.shape[-1])
        self._covariance = np.zeros((len(self._mean), len(self._mean)))

    def learn(self, scores: Mapping[Steps, float]) -> None:
        """Take in what schedules scored, in dB: all that are known, of equally many computed steps."""
        terms = [self._terms_of(steps) for steps in scores]
        damage, features = np.stack([one for one, _ in terms]), np.stack([one for _, one in terms])  # [n, r], [n, r, F]
        errors = -DECIBEL * np.fromiter(scores.values(), dtype=np.float64)
        prior = np.full(len(self._mean), SPREAD**-2)
        prior[0] = 0.0  # the surrogate's unit means nothing
        mean = self._mean.copy()
        for _ in range(UPDATES):
            costs = damage * np.exp(np.clip(features @ mean, -LARGEST, LARGEST))
            totals = costs.sum(axis=1)
            jacobian = np.einsum("nr,nrf->nf", costs, features) / totals[:, None]
            missed = errors - np.log(totals)
            noise = max(float(missed.std()), NOISE)
            precision = jacobian.T @ jacobian / noise**2 + np.diag(prior)
            step = np.linalg.lstsq(precision, jacobian.T @ missed / noise**2 - prior * mean, rcond=None)[0]
            mean += step / max(1.0, float(np.abs(step[1:]).max()))
        self._mean, self._covariance = mean, np.linalg.pinv(precision, hermitian=True)

    def drawn(self, generator: np.random.Generator) -> "Guess":
        """One of the models that what is known allows for (Thompson sampling: what is uncertain gets tried)."""
        chosen = generator.multivariate_normal(self._mean, self._covariance, method="eigh")
        return Guess(self.damage * np.exp(np.clip(self._features @ chosen, -LARGEST, LARGEST)))

    def _terms_of(self, computed: Steps) -> tuple[Array, Array]:
        """The damage [r] and features [r, F] of the steps that a schedule reuses."""
        if computed not in self._terms:
            before = (-1, *computed)
            after = (*computed[1:], len(self.damage))
            places = [
                (h + 1, i, t) for h, i, end in zip(before, computed, after, strict=False) for t in range(i + 1, end)
            ]
            h, i, t = np.array(places).T
            self._terms[computed] = self.damage[h, i, t], self._features[i, t]
        return self._terms[computed]


class Guess:
    """What schedules would do if these were the damages of their forecasts, [T, T, T]."""

    def __init__(self, damage: Array):
        self.damage = damage
        self._until = edge_damages(damage)  # of steps i + 1 … t

    def optimum(self, computed: int, last: int) -> Steps:
        """The best schedule with so many computed steps."""
        return best_schedule(self.damage, range(computed, computed + 1), last=last)[computed].computed

    def errors(self, schedules: Sequence[Steps]) -> Array:
        """Of each of the schedules, which compute equally many steps."""
        computed = np.array(schedules)
        total = len(self.damage)
        before = np.pad(computed[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
        until = np.pad(computed[:, 1:], ((0, 0), (0, 1)), constant_values=total) - 1
        return np.asarray(self._until[before + 1, computed, until].sum(axis=1))
