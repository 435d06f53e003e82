"""Profiles of features that are written down, for tests of what is planned from them."""

import torch

from diffusion_cache.fingerprint import Fingerprint
from diffusion_cache.planning.surrogate import own_grams
from diffusion_cache.profile import Profile, SpanFacts


def profile_of(features, kind="stack", names=None, shares=None, depth=None, sensitivity=None, facts=None, feature=None):
    """features: [S, T, E] or [S, P, T, E]. sensitivity: [G, T], with its facts. feature: default by kind."""
    paths = torch.as_tensor(features, dtype=torch.float64)
    paths = paths[:, None] if paths.ndim == 3 else paths
    spans, passes, steps, elements = paths.shape
    gram = torch.einsum("spte,spue->sptu", paths, paths)
    arrays = {"gram_residual": gram, "gram_output": gram}
    if sensitivity is not None:
        arrays["sensitivity"] = torch.as_tensor(sensitivity, dtype=torch.float32)
    feature = feature or ("residual" if kind in ("stack", "block") else "output")
    return Profile(
        fingerprint=Fingerprint({}, "none", "none", {}, steps=steps),
        scope=kind,
        depth=depth,
        spans=tuple(
            SpanFacts(
                names[i] if names else f"blocks.{i}",
                "denoiser",
                kind,
                feature,
                elements,
                shares[i] if shares else 1 / spans,
            )
            for i in range(spans)
        ),
        passes=tuple(map(str, range(passes))),
        row_passes=1,
        samples=(("", 0),),
        arrays=arrays,
        facts=facts or {},
    )


def mean_gram(profile):
    """Of all spans and passes, each scaled by its own mean energy, where they run at every step: [T, T]."""
    found = own_grams(profile)
    return (found / found.diagonal(axis1=2, axis2=3).mean(axis=2)[:, :, None, None]).mean(axis=(0, 1))
