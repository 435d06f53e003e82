"""What a published system is to the rest of the package: something that makes a plan, or a policy and a forecaster."""

from abc import ABC
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from torch import nn

from ..context import Forecaster, Policy
from ..errors import ConfigError
from ..forecasters.fitted import Fitted
from ..models import is_unet, unwrap
from ..plan import Plan
from ..policies import Planned
from ..profile import Profile

DENOISER_KINDS = ("transformer", "unet")


class Parts(NamedTuple):
    """What `enable` needs of a system."""

    policy: Policy
    forecaster: Forecaster
    scope: str | None
    depth: int | None


class System(ABC):
    """A published system; a frozen dataclass whose fields are its settings.

    paper: name and number of the paper. scopes: of the spans it caches; a profile for it must have one of them.
    denoisers: the kinds it serves, of "transformer" and "unet". needs_profile: whether it plans from measurements,
    sensitivity: of the output to errors among them, foreground: of attention against a foreground among them.
    by_prompt: whether what it does depends on the prompt, so that a batch's samples are not independent.

    One that needs a profile defines `plan`, any other `parts`.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    scopes: ClassVar[frozenset[str]]
    denoisers: ClassVar[frozenset[str]] = frozenset(DENOISER_KINDS)
    needs_profile: ClassVar[bool] = True
    sensitivity: ClassVar[bool] = False
    foreground: ClassVar[bool] = False
    by_prompt: ClassVar[bool] = False

    def plan(self, profile: Profile) -> Plan:
        """The schedule, and what else is static, for the profiled model and sampler.

        Raises:
            ConfigError: for a profile that lacks what the system reads, or settings that it does not allow.
        """
        raise ConfigError(f"{self.name} has no plan: its schedule is known from the number of steps alone")

    def parts(self, profile: Profile | None) -> Parts:
        """Policy, forecaster and place of the spans."""
        assert profile is not None
        plan = self.plan(profile)
        return Parts(Planned(plan), Fitted.of(plan), plan.scope, plan.depth)

    def why_not(self, denoisers: Mapping[str, nn.Module]) -> str | None:
        """Why the system cannot serve these denoisers, if so."""
        for denoiser in map(unwrap, denoisers.values()):
            kind = DENOISER_KINDS[is_unet(denoiser)]
            if kind not in self.denoisers:
                served = " and ".join(sorted(self.denoisers))
                return f"{self.name} is for a {served}, and {type(denoiser).__name__} is a {kind}"
        return None

    def made_for(self, denoisers: Mapping[str, nn.Module], profile: Profile | None) -> Parts:
        """`parts` for these denoisers.

        Raises:
            ConfigError: where the system does not serve them or the profile, or has to have one.
        """
        reason = self.why_not(denoisers)
        if reason is not None:
            raise ConfigError(reason)
        if not self.needs_profile:
            if profile is not None:
                raise ConfigError(f"{self.name} needs no profile: leave it out")
        elif profile is None:
            raise ConfigError(
                f"{self.name} plans from measurements: enable(pipe, method={self.name!r}, profile=…), with one at "
                f"scope {' or '.join(sorted(self.scopes))} that `diffusion-cache profile` makes"
            )
        elif profile.scope not in self.scopes:
            raise ConfigError(
                f"{self.name} needs a profile at scope {' or '.join(sorted(self.scopes))}, and this one is at scope "
                f"{profile.scope}: `diffusion-cache profile scope={min(self.scopes)}` makes another"
            )
        return self.parts(profile)

    def require(self, profile: Profile, array: str, how: str = "profile again with it") -> None:
        """ConfigError where the profile lacks the array, with how it comes to have it."""
        if array not in profile.arrays:
            raise ConfigError(f"{self.name} reads {array}, which this profile does not have: {how}")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            cls.name = cls.__name__.lower()  # until it is registered under another
