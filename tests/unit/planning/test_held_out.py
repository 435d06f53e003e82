"""Which prompts plans are measured on."""

from types import SimpleNamespace

import pytest

from diffusion_cache.cli import plan as module
from diffusion_cache.cli.plan import Settings, Source, _planner
from diffusion_cache.errors import DiffusionCacheWarning


@pytest.fixture
def planner_of(monkeypatch):
    """What a planner is given, for prompts that a profile is of: the held-out ones, and how many count."""

    def planner(profile, fitting, tuning, held_out, seeds, search, progress, origin, texts, fitted):
        return SimpleNamespace(
            fitting=fitting, held_out=[each.prompt for part in held_out for each in part], texts=texts
        )

    monkeypatch.setattr(module, "teach", lambda batch: batch)
    monkeypatch.setattr(module, "Planner", planner)

    def made(profiled, prompts, classes=False):
        source = Source(None, prompts, list, classes, {})
        profile = SimpleNamespace(samples=[(prompt, seed) for seed, prompt in enumerate(profiled)])
        settings = Settings(fitting=2, tuning=2, held_out=4)
        return _planner(profile, source, settings, lambda *told: None)

    return made


def test_no_prompt_of_the_profile_is_held_out_where_others_remain(planner_of):
    found = planner_of("efgh", "abcdefgh")
    assert (found.held_out, found.texts) == ([*"abcd"], 4)
    assert planner_of("ab", "abcdefgh").held_out == [*"efgh"]  # the profile's come first anyway: as they are


def test_prompts_of_the_profile_do_not_count_where_none_remain(planner_of):
    with pytest.warns(DiffusionCacheWarning, match="are of 2 prompts beside the profile's"):
        found = planner_of("cdefgh", "abcdefgh")
    assert (found.held_out, found.texts) == ([*"ghab"], 2)
    assert planner_of("01", [0, 1, 2], classes=True).texts is None
