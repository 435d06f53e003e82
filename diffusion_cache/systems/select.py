"""FiRST-style selection: one of a profile's ready plans, chosen from the prompt before the first step."""

from dataclasses import dataclass

from ..errors import ConfigError
from ..forecasters.fitted import Fitted
from ..plain import Fields, integer, text, tuple_of
from ..policies import Planned
from ..policies.select import Select
from ..profile import Profile
from ..registry import systems
from .base import Parts, System


@systems.register("select")
@dataclass(frozen=True)
class Selection(System):
    """Choose one of a profile's plans by the prompt or class, before the first step.

    The profile holds the scores that `planning.select.with_selector` has learned. A batch of several prompts runs the
    plan with the highest mean score; prompts that cannot be read run the plan that is best on average, with a warning.
    """

    paper = "after FiRST (input-adaptive routing): one of a few ready plans for each prompt"
    scopes = frozenset({"denoiser", "stack", "block", "branch", "cut"})

    def parts(self, profile: Profile | None) -> Parts:
        assert profile is not None
        stored = profile.facts.get("select")
        if stored is None or not {"select_weights", "select_bias"} <= set(profile.arrays):
            raise ConfigError(
                "this profile has not learned which of its plans suits a prompt: make that with "
                "diffusion_cache.planning.select.with_selector, or choose a plan with enable(pipe, profile=…, plan=…)"
            )
        fields = Fields(stored, "profile: facts.select")
        names, source = fields("plans", tuple_of(text)), fields("source", text)
        labels, fallback = fields("labels", tuple_of(integer)), fields("fallback", text)
        known = {plan.name: plan for plan in profile.plans}
        weights, bias = profile.arrays["select_weights"], profile.arrays["select_bias"]
        gone = [name for name in (*names, fallback) if name not in known]
        if gone or len(names) != len(weights) or len(names) != len(bias) or fallback not in names:
            raise ConfigError(
                f"the profile's scores are for the plans {', '.join(names)}, and it has {', '.join(known) or 'none'}: "
                "learn them again with diffusion_cache.planning.select.with_selector"
            )
        if labels and len(labels) != weights.shape[1]:
            raise ConfigError(f"the profile's scores are for {weights.shape[1]} classes, and {len(labels)} are named")
        plans = [known[name] for name in names]
        if len({(plan.scope, plan.depth) for plan in plans}) > 1:
            raise ConfigError("select cannot change the scope from run to run: choose plans of one scope and depth")
        forecasters = tuple(map(Fitted.of, plans))
        policy = Select(tuple(map(Planned, plans)), forecasters, weights, bias, source, labels, names.index(fallback))
        return Parts(policy, forecasters[policy.fallback], plans[0].scope, plans[0].depth)
