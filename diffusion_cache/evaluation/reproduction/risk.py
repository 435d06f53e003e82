"""RACER's risk, the disagreement of two forecasts, as a predictor of what a reused step errs by."""

from typing import Any

import torch
from sklearn.metrics import roc_auc_score

from ... import api
from ...engine import session_of
from ...engine.frame import Frame
from ...engine.observer import Again, Observer
from .bench import Bench
from .claims import Outcome, SeedSet, claim

MODELS, SAMPLES = ("flux-digits", "dit-digits"), 4
EVERY = 4
GOOD = 0.7  # AUROC
NEVER = 1e9  # a threshold that exchanges nothing


class Watched(Observer):
    """Of each row of each reused call: its risk, its output's relative error, and the steps since a computed one."""

    def __init__(self) -> None:
        self.risks: list[float] = []
        self.errors: list[float] = []
        self.lags: list[int] = []
        self._lag = 0

    def denoiser_called(self, frame: Frame, output: Any, again: Again) -> None:
        self._lag = self._lag + 1 if frame.reused else 0
        if not frame.reused or frame.signals is None:
            return
        given, computed = (found[0].float().flatten(1) for found in (output, again(compute=True)))
        self.risks += frame.signals["disagreement"].tolist()
        self.errors += ((given - computed).norm(dim=1) / computed.norm(dim=1)).tolist()
        self.lags += [self._lag] * len(given)


@claim(
    system="racer",
    claim="Which reused steps err more than the median is told by the disagreement of two forecasts: AUROC above "
    f"{GOOD}.",
)
def disagreement_tells_the_error(seeds: SeedSet) -> Outcome:
    figures: dict[str, float] = {}
    told = []
    for model in MODELS:
        made = Bench(model, seeds, count=SAMPLES)
        watched = Watched()
        pipe = made.subject.pipe
        with torch.no_grad(), api.cached(pipe, "racer", "taylor", every=EVERY, threshold=NEVER, scope="stack"):
            session_of(pipe).observer = watched
            made.subject.generate(made.reporting)
        errors = torch.tensor(watched.errors)
        large = (errors > errors.median()).int().tolist()
        risk, lag = (float(roc_auc_score(large, values)) for values in (watched.risks, watched.lags))
        figures |= {f"{model} disagreement": risk, f"{model} steps since computed": lag}
        told.append(f"{model} {risk:.2f} (steps since the last computed one: {lag:.2f})")
    return Outcome(
        ", ".join(told),
        f"one run each, every {EVERY}th step computed",
        all(figures[f"{model} disagreement"] > GOOD for model in MODELS),
        figures,
    )
