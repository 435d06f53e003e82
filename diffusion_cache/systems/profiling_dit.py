"""ProfilingDiT: blocks that look at the background are refreshed seldom, the others are always computed.

R of a block is the share of the foreground among the tokens that receive most of its attention (`foreground_share` in
a profile); blocks with a small R are background blocks. Their Δ = h_out − h_in is reused, one Δ for each run of
neighbouring background blocks. After `full_steps` complete steps the background is refreshed at intervals T_s that go
linearly from `interval_from` to `interval_to` over the rest of the run.
"""

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from ..context import Needs, PassState, Policy, Step, Verdict
from ..errors import ConfigError, DiffusionCacheWarning
from ..forecasters import Reuse
from ..plan import Plan
from ..profile import Profile
from ..registry import systems
from ..schedule import Schedule
from .base import Parts, System


@systems.register("profiling_dit")
@dataclass(frozen=True)
class ProfilingDiT(System):
    """Reuse blocks that attend to the background, by a refresh interval that shrinks.

    background: share of the blocks that are background blocks, those with the smallest R (published for Wan: 28 of 40).
    tau: instead of that, every block with R < τ. full_steps: steps at the start that are computed whole. interval_from,
    interval_to: steps from one refresh to the next, after those and at the end of the run; equal ones are the fixed
    interval published for Wan. The paper states neither its intervals nor τ; the defaults are ours, near its list of
    refreshed steps, which `profile="published/profilingdit/hunyuanvideo-50"` follows to the step.
    """

    background: float = 0.7
    tau: float | None = None
    full_steps: int = 6
    interval_from: float = 12.0
    interval_to: float = 2.0

    paper = "ProfilingDiT, Model Reveals What to Cache (2025)"
    scopes = frozenset({"block"})
    denoisers = frozenset({"transformer"})
    foreground = True

    def __post_init__(self) -> None:
        for share in (self.background, self.tau):
            if share is not None and not 0 <= share <= 1:
                raise ConfigError(f"profiling_dit: background and tau are shares between 0 and 1, not {share}")
        if self.full_steps < 1 or not all(1 <= steps < math.inf for steps in (self.interval_from, self.interval_to)):
            raise ConfigError(
                "profiling_dit: full_steps and both intervals must be at least 1 and finite, not "
                f"{self.full_steps}, {self.interval_from} and {self.interval_to}"
            )

    def background_blocks(self, profile: Profile) -> tuple[int, ...]:
        """Which of the profile's spans are background blocks.

        Raises:
            ConfigError: for a profile without R, or of several denoisers.
        """
        how = "`diffusion-cache profile scope=block attention=true foreground=…` (motion, or a file of masks)"
        self.require(profile, "foreground_share", how)
        if len({span.denoiser for span in profile.spans}) > 1:
            raise ConfigError("profiling_dit is for pipelines with one denoiser")
        mean = profile.arrays["foreground_share"].nanmean(dim=1)
        unseen = [span.name for span, share in zip(profile.spans, mean.tolist(), strict=True) if share != share]
        if unseen:
            warnings.warn(
                f"profiling_dit: no attention was seen in {len(unseen)} blocks, as {unseen[0]}: they are computed",
                DiffusionCacheWarning,
                stacklevel=2,
            )
        return self.classified(mean)

    def classified(self, shares: Tensor) -> tuple[int, ...]:
        """The background blocks among blocks with these R, [S]; NaN is foreground."""
        if self.tau is not None:
            return tuple((shares < self.tau).nonzero().flatten().tolist())
        seen = int((~shares.isnan()).sum())
        lowest = shares.nan_to_num(torch.inf).argsort(stable=True)[: min(round(self.background * len(shares)), seen)]
        return tuple(sorted(lowest.tolist()))

    def refreshed(self, total: int) -> list[int]:
        """The steps at which everything is computed: the first ones, then s → s + round(T_s)."""
        steps, step = list(range(min(self.full_steps, total))), self.full_steps
        while step < total:
            steps.append(step)
            done = (step - self.full_steps) / (total - self.full_steps)
            step += max(1, round(self.interval_from - (self.interval_from - self.interval_to) * done))
        return steps

    def plan(self, profile: Profile) -> Plan:
        """All blocks' schedule, block by block: the same outputs as `parts`, from a Δ for each block."""
        total, spans, background = profile.total, len(profile.spans), set(self.background_blocks(profile))
        refreshed = set(self.refreshed(total))
        computed = [[step in refreshed or span not in background for span in range(spans)] for step in range(total)]
        share = sum(profile.spans[span].share for span in background)
        return Plan(
            name=self.name,
            scope="block",
            depth=None,
            feature="auto",
            schedule=Schedule(tuple((tuple(row),) for row in computed)),
            noise_levels=profile.noise_levels,
            nfe=total - (total - len(refreshed)) * share,
            facts={"background": sorted(background)},
        )

    def parts(self, profile: Profile | None) -> Parts:
        assert profile is not None
        names = [profile.spans[span].name for span in self.background_blocks(profile)]
        if not names:
            option = "background" if self.tau is None else "tau"
            raise ConfigError(
                f"profiling_dit: no block is a background block, so there is nothing to reuse: raise {option}"
            )
        return Parts(Refreshing(self, tuple(names)), Reuse(), "block", None)


@dataclass(frozen=True)
class Refreshing(Policy):
    """Computes some blocks at a system's refreshed steps, whatever the length of the run; the others at every step."""

    system: ProfilingDiT
    blocks: tuple[str, ...]

    name = "profiling_dit"
    scopes = frozenset({"block"})

    @property
    def needs(self) -> Needs:
        return Needs(blocks=self.blocks)

    def decide(self, step: Step, value: float | None, state: PassState) -> Verdict:
        if step.total is None:
            raise ConfigError("profiling_dit needs the run's number of steps: pass num_steps to diffusion_cache.run")
        return Verdict(step.index in self.system.refreshed(step.total), "refreshed")
