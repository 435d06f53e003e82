"""Published figures: all of them are there as published, and they drive a model where a policy for them exists."""

import hashlib
import json
import math
from collections import Counter, defaultdict
from functools import cache

import diffusers
import pytest
import torch
import zoo
from diffusers.hooks.mag_cache import MagCacheConfig, apply_mag_cache

import diffusion_cache as dc
from diffusion_cache import published, reference, resolve
from diffusion_cache.errors import ConfigError
from diffusion_cache.forecasters import Hermite, Reuse
from diffusion_cache.policies import Guarded, Mask
from diffusion_cache.registry import policies

NAMES = published.names()
ENTRIES = {name: published.load(name) for name in NAMES}
COUNTS = {
    "dbcache": 32,
    "faster_cache": 1,
    "first_block_cache": 1,
    "fora": 3,
    "l2c": 1,
    "lemica": 37,
    "magcache": 29,
    "meancache": 11,
    "profilingdit": 1,
    "pyramid_attention_broadcast": 1,
    "scm": 19,
    "sea_cache": 1,
    "smoothcache": 5,
    "taylorseer": 1,
    "teacache": 39,
}
# SHA-256 over the collected figures (canonical JSON, one entry a line, sorted), and what was added to them since
DIGEST = "ec87a1fa944aa5938e68812a8b3c25a0b713785043dc115db6b4658acfb716ca"
ADDED_ENTRIES = {"profilingdit/hunyuanvideo-50"}
ADDED_FIGURES = {"magcache/wan2.2-i2v-a14b-40": {"first_reusable_step"}}  # stated in its notes
DRIVING = [name for name in NAMES if ENTRIES[name].is_scheduled and ENTRIES[name].transformer]


def collected(entry: published.Published) -> str:
    figures = {key: entry.figures[key] for key in entry.figures if key not in ADDED_FIGURES.get(entry.name, ())}
    fields = {
        "method": entry.method,
        "model": entry.model,
        "diffusers_transformer": entry.transformer,
        "variant": entry.variant,
        "num_inference_steps": entry.steps,
        "figures": figures,
        "recommended": entry.recommended,
        "notes": entry.notes,
        "source": f"{entry.source}, {entry.licence}",
    }
    return json.dumps(fields, sort_keys=True)


def test_nothing_is_lost_or_altered():
    lines = sorted(collected(entry) for name, entry in ENTRIES.items() if name not in ADDED_ENTRIES)
    assert len(lines) == 181
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == DIGEST
    assert Counter(entry.method for entry in ENTRIES.values()) == COUNTS


def test_names_are_unique_and_found_in_the_file_of_their_method():
    files = published._shipped()
    # as lists of pairs: a name that stands twice in a file counts twice
    pairs = [pair for file in files.values() for pair in json.loads(file.read_text(), object_pairs_hook=list)]
    assert sorted(name for name, _ in pairs) == NAMES
    assert len(set(NAMES)) == len(NAMES)
    assert all(name.startswith(f"{stem}/") for stem, file in files.items() for name in json.loads(file.read_text()))


def test_figures_for_one_number_of_steps_say_so_in_their_name():
    for name, entry in ENTRIES.items():
        if entry.method in published._LISTS | {"magcache"}:
            assert str(entry.steps) in name.split("/")[1].replace("of", "-").split("-"), name


def test_licence_and_source_are_told():
    assert {entry.licence for entry in ENTRIES.values()} == {"Apache-2.0"}
    assert all("(" in entry.source and "/" in entry.source for entry in ENTRIES.values())


def test_classes_exist_in_diffusers():
    classes = {entry.transformer for entry in ENTRIES.values()} - {None}
    assert len(classes) == 20
    for name in classes:
        assert issubclass(getattr(diffusers, name), torch.nn.Module), name


def test_entry_as_documented():
    entry = published.load("published/teacache/wan2.1-t2v-1.3b")
    assert entry.name == "teacache/wan2.1-t2v-1.3b"
    assert entry.figures["coefficients"] == [2396.76752, -1311.10545, 201.331979, -8.29855975, 0.137887774]
    assert (entry.model, entry.transformer, entry.steps) == ("Wan-AI/Wan2.1-T2V-1.3B", "WanTransformer3DModel", 50)
    assert entry.source == "ali-vilab/TeaCache TeaCache4Wan2.1/teacache_generate.py (7c10efc)"
    assert [setting["latency_speedup"] for setting in entry.recommended[:3]] == [1.5, 1.59, 1.99]


# ratios


def test_ratios_are_the_published_ones():
    entry = ENTRIES["magcache/wan2.1-t2v-1.3b-50"]
    assert entry.ratios()["cond"] == tuple(entry.figures["mag_ratios_cond"])
    assert set(ENTRIES["magcache/omnigen2-edit-50"].ratios()) == {"cond", "uncond", "ref"}
    assert ENTRIES["magcache/flux-dev-28"].ratios()["all"][:3] == (1.0, 1.21094, 1.11719)
    tail = ENTRIES["magcache/wan2.1-t2v-1.3b-evaluation-50"].ratios()["uncond"]
    assert tail[:6] == (1.0, 1.0, 1.0, 1.0, 1.0, 0.998309)
    assert len(tail) == 50


def steps_of(entry: published.Published, steps: int | None = None, **changed) -> list[str]:
    """What the policy of a MagCache entry computes, of each guidance stream; a step list's mask."""
    driven = entry.driven()
    schedule = Guarded(policies.get(driven.policy)(**{**driven.options, **changed})).schedule(steps or entry.steps)
    return ["".join(str(int(compute)) for (compute,) in of_pass) for of_pass in zip(*schedule.compute, strict=True)]


def computed_by_diffusers(ratios, steps, threshold, max_skip, retention) -> str:
    case = next(case for case in zoo.cases() if case.id == "FluxTransformer2DModel")
    model = zoo.build(case)
    computed: list[int] = []
    config = MagCacheConfig(threshold, max_skip, retention, num_inference_steps=steps, mag_ratios=list(ratios))
    apply_mag_cache(model, config)
    model.transformer_blocks[0].attn.register_forward_hook(lambda *_: computed.append(step))
    with torch.no_grad():
        for step in range(steps):
            model(**case.inputs(zoo.Draw(step)))
    return "".join(str(int(step in computed)) for step in range(steps))


@pytest.mark.parametrize(
    ("steps", "threshold", "max_skip", "retention"),
    [
        (28, 0.06, 3, 0.2),
        (28, 0.24, 5, 0.1),
        (28, 0.5, 2, 0.0),
        (50, 0.1, 4, 0.2),
        (20, 0.15, 20, 0.35),
        (9, 1.0, 1, 0.15),
        (28, 0.0, 3, 0.2),
        (28, 0.3, 0, 0.2),
    ],
)
def test_magcache_computes_the_steps_that_diffusers_computes(steps, threshold, max_skip, retention):
    entry = ENTRIES["magcache/flux-dev-diffusers-28"]
    (mine,) = steps_of(entry, steps, threshold=threshold, max_skip=max_skip, retention=retention)
    assert mine == computed_by_diffusers(entry.ratios()["all"], steps, threshold, max_skip, retention)


def test_magcache_defaults_are_the_entrys():
    entry = ENTRIES["magcache/flux-dev-diffusers-28"]
    assert steps_of(entry) == steps_of(entry, threshold=0.06, max_skip=3, retention=0.2)
    assert steps_of(entry) == ["1111110101000100010001001011"]


def magcache(steps=10, **figures):
    """An entry whose ratios are all 0.9, unless told otherwise."""
    given = {"mag_ratios": [0.9] * 10, "default_threshold": 0.35, "default_K": 9, "default_retention_ratio": 0.2}
    return made("magcache/mine-10", figures={**given, **figures}, steps=steps)


def made(name, **fields):
    entry = dict(model="me/mine", transformer=None, variant="t2i", steps=None, figures={}, recommended=[], notes="")
    return published._entry(name, entry | dict(source="my own run", licence="MIT") | fields)


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        # two steps kept; then errors .1, .1 + .19, .1 + .19 + .271 > .35
        ({}, "1100100100"),
        ({"default_K": 1}, "1101010101"),
        ({"default_threshold": 0.0}, "1" * 10),
        ({"default_retention_ratio": 0.45}, "1111100100"),
        ({"max_single_step_deviation": 0.05}, "1" * 10),
        ({"max_single_step_deviation": None}, "1100100100"),
        ({"forced_indices_28_grid": [9]}, "1101001001"),  # index 9 of 28 is step 3 of 10
        ({"expert_switch_step": 5}, "1001010010"),  # one step kept of each
        ({"first_reusable_step": 6}, "1111110010"),
    ],
)
def test_magcache_rules(figures, expected):
    assert steps_of(magcache(**figures)) == [expected]


def test_magcache_computes_the_steps_before_a_tail():
    figures = {"tail_ratios_cond": [0.9] * 7, "tail_ratios_uncond": [1.0] * 7, "first_step_of_tail": 3}
    figures |= {"default_threshold": 0.35, "default_K": 9, "default_retention_ratio": 0.0}
    entry = made("magcache/mine-10", figures=figures, steps=10)
    assert list(entry.ratios()) == ["cond", "uncond"]
    assert steps_of(entry) == ["1110010010", "1110000000"]


def test_wan22_image_to_video_reuses_in_its_second_expert_only():
    for mask in steps_of(ENTRIES["magcache/wan2.2-i2v-a14b-40"]):
        assert mask[:16] == "1" * 16
        assert "0" in mask[16:]


def test_guidance_streams_have_schedules_of_their_own():
    entry = ENTRIES["magcache/omnigen2-edit-50"]
    cond, *others = steps_of(entry)
    assert list(entry.ratios()) == ["cond", "uncond", "ref"]
    assert cond[-6:] == "100101"
    assert [stream[-6:] for stream in others] == ["101011", "101011"]


# masks


def test_step_lists_become_masks():
    assert ENTRIES["lemica/z-image-turbo-6of10"].mask() == "1110010011"
    assert ENTRIES["meancache/qwen-image-2512-10of50"].mask().count("1") == 10
    assert ENTRIES["scm/few-steps-4"].mask() == "1101"
    refreshed = ENTRIES["profilingdit/hunyuanvideo-50"].mask()
    assert [step for step, entry in enumerate(refreshed) if entry == "1"] == [*range(7), 18, 26, 32, 38, 42, 46, 48]
    assert ENTRIES["fora/dit-xl-2-256-30-every-2"].mask() == "10" * 14 + "11"


@pytest.mark.parametrize("name", ["scm/slow-15", "scm/fast-28"])
def test_a_run_goes_by_the_mask_published_for_its_steps(name):
    entry = ENTRIES[name]
    lists = {entry.steps: entry.figures["mask"]}
    lists |= {int(steps): mask for steps, mask in entry.figures["masks_by_steps"].items()}
    for steps, mask in lists.items():
        assert steps_of(entry, steps) == ["".join(map(str, mask))]
    assert steps_of(entry) == [entry.mask()]


def test_entries_are_carried_out_with_the_forecaster_of_their_source():
    """All that are driven reuse what was computed last, but for MeanCache, whose own is none of ours."""
    found = defaultdict(set)
    for entry in ENTRIES.values():
        if entry.is_scheduled or entry.name == "teacache/flux-dev":
            found[entry.method].add(entry.driven().forecaster)
    assert found.pop("meancache") == {None}
    assert set(map(frozenset, found.values())) == {frozenset({"reuse"})}


def test_step_lists_count_from_their_base():
    figures = {"budget": 3, "computed_steps": [1, 3, 5], "step_base": 1}
    assert made("lemica/mine-3of5", figures=figures, steps=5).mask() == "10101"


def test_masks_of_parts():
    entry = ENTRIES["l2c/dit-xl-2-256-50"]
    masks = entry.masks()
    assert len(masks) == 56
    assert sum(mask.count("1") for mask in masks.values()) == 2136
    assert not entry.is_scheduled
    with pytest.raises(ConfigError, match="one for each of 56 parts"):
        entry.mask()
    attention = ENTRIES["smoothcache/dit-xl-2-256-50-attn1-alpha-0.15"]
    assert not attention.is_scheduled  # its feed-forward layers are always computed
    assert set(attention.masks()) == {"attn1"}
    with pytest.raises(ConfigError, match="attn1"):
        attention.mask()


def test_masks_of_branches_are_for_branches():
    for name in ("smoothcache/dit-xl-2-256-50-alpha-0.18", "fora/dit-xl-2-256-50-every-2"):
        assert ENTRIES[name].driven().scope == "branch"
    assert ENTRIES["lemica/flux-dev-10of50"].driven().scope is None


def test_settings_are_no_step_lists():
    for name, policy in [("dbcache/flux-dev-slow", "first_block"), ("sea-cache/diffusers-default", "seacache")]:
        with pytest.raises(ConfigError, match=f"its figures are settings: give them to policy '{policy}'"):
            ENTRIES[name].driven()


def test_figures_of_a_model_that_diffusers_has_not_are_told():
    pipe = reference.load("flux-digits")
    with pytest.warns(dc.DiffusionCacheWarning, match="for OmniGen2/OmniGen2.*cannot be told from FluxTransformer"):
        dc.enable(pipe, profile="published/magcache/omnigen2-50")


def test_entries_without_a_mask_say_so():
    for name, call in [
        ("teacache/flux-dev", lambda entry: entry.mask()),
        ("dbcache/flux-dev-slow", lambda entry: entry.masks()),
        ("lemica/flux-dev-10of50", lambda entry: entry.ratios()),
        ("magcache/flux-dev-28", lambda entry: entry.mask()),
    ]:
        with pytest.raises(ConfigError, match=f"{name} holds no"):
            call(ENTRIES[name])


@cache
def model_of(transformer: str):
    case = next(case for case in zoo.cases() if case.id == transformer)
    return zoo.build(case), case


def computed_steps(entry: published.Published, steps: int, **options) -> list[int]:
    """Drive a tiny model of the entry's class for a run, with equal inputs; the steps that were computed."""
    model, case = model_of(entry.transformer)
    driven = entry.driven()
    forecaster = driven.forecaster or "taylor"
    options = {"policy": driven.policy, "forecaster": forecaster, "scope": driven.scope, **driven.options, **options}
    if driven.policy == "mask":
        options |= {"scope": None, "blocks": ()}  # the tiny model has fewer blocks
    with torch.no_grad(), dc.run(model, num_steps=steps, **options) as run:
        for _ in range(steps):
            run.next_step()
            model(**case.inputs(zoo.Draw(1)))
        records = run.summary().records
    assert [record.step for record in records] == list(range(steps))
    assert all(record.spans_reused == record.spans for record in records if not record.computed)
    return [record.step for record in records if record.computed]


@pytest.mark.parametrize("name", DRIVING)
def test_masks_and_magcache_drive_their_class(name):
    entry = ENTRIES[name]
    first = steps_of(entry)[0]  # the tiny model is called once a step, as the first guidance branch is
    assert computed_steps(entry, entry.steps) == [step for step, mark in enumerate(first) if mark == "1"]


TEACACHE = [
    name
    for name in NAMES
    if ENTRIES[name].method == "teacache"
    and ENTRIES[name].figures["signal_kind"] == "modulated_input"
    and ENTRIES[name].transformer
]


@pytest.mark.parametrize("name", TEACACHE)
def test_teacache_drives_its_class(name):
    """With equal inputs, each step adds the polynomial's value at 0."""
    entry, steps = ENTRIES[name], 8
    least = entry.figures["coefficients"][-1]
    threshold = 2.5 * least if least > 0 else 0.1
    first, last = entry.figures.get("forced_first_steps") or 1, entry.figures.get("forced_last_steps") or 0
    start, end = (0.2, 0.9) if name == "teacache/flux-kontext-dev" else (0.0, 1.0)
    total, expected = 0.0, []
    for step in range(steps):
        total += least
        outside = not math.ceil(start * steps) <= step < math.ceil(end * steps)
        if step < first or step >= steps - last or outside or not total < threshold:
            expected.append(step)
            total = 0.0
    assert computed_steps(entry, steps, threshold=threshold) == expected
    assert 1 < len(expected) < steps or least <= 0


def test_teacache_entries_of_other_signals_say_so():
    for name, kind in [
        ("teacache/wan2.1-t2v-1.3b", "timestep embedding"),
        ("teacache/hidream-i1-dev", "raw input"),
        ("teacache/z-image", "one that its source does not name"),
    ]:
        with pytest.raises(ConfigError, match=f"{name} is fitted to another signal .*: {kind}"):
            ENTRIES[name].driven()


def test_an_entry_drives_a_pipeline():
    pipe = dc.reference.load("flux-digits")
    with dc.cached(pipe, profile="published/teacache/flux-dev"):
        dc.reference.images("flux-digits", pipe(**dc.reference.inputs("flux-digits", (3,), (5,), steps=6)))
        summary = dc.summary(pipe)
    coefficients = ENTRIES["teacache/flux-dev"].figures["coefficients"]
    assert f"TeaCache(threshold=0.6, coefficients={tuple(coefficients)}) + reuse(".lower() in summary.method.lower()
    assert summary.records[0].computed
    assert summary.records[-1].reason == "last steps"
    assert summary.reused > 0


def test_an_entry_may_go_with_another_forecaster():
    name, (model, _) = "published/fora/dit-xl-2-256-50-every-2", model_of("DiTTransformer2DModel")
    wish = dict.fromkeys(("speedup", "min_psnr", "nfe", "plan"))
    watch = dict.fromkeys(("guard", "guard_factor", "strict"))
    for said, options, forecaster in ((None, {}, Reuse()), ("hermite", {"order": 1}, Hermite(1))):
        parts = {"forecaster": said}
        made = resolve.planned(None, {"denoiser": model}, name, parts, wish, watch, (), {}, options)
        assert made.forecaster == forecaster


def test_an_entry_without_a_threshold_says_so():
    figures = {"coefficients": [1.0, 0.0], "polynomial_degree": 1, "coefficient_order": "highest_power_first"}
    entry = made("teacache/mine", figures={**figures, "signal_kind": "modulated_input"}, steps=None)
    with pytest.raises(ConfigError, match="recommends no threshold"):
        entry.driven()


def test_what_drives_a_class_today():
    methods = Counter(ENTRIES[name].method for name in DRIVING)
    assert methods == {
        "fora": 3,
        "lemica": 37,
        "magcache": 26,
        "meancache": 11,
        "profilingdit": 1,
        "scm": 5,
        "smoothcache": 4,
    }


@pytest.mark.parametrize("name", ["lemica/flux-dev-20of50", "magcache/flux-dev-28", "scm/z-image-turbo-fast-9"])
@pytest.mark.parametrize("steps", [8, 20])
def test_other_numbers_of_steps(name, steps):
    entry = ENTRIES[name]
    computed = computed_steps(entry, steps)
    assert computed == [step for step, mark in enumerate(steps_of(entry, steps)[0]) if mark == "1"]
    assert 1 < len(computed) < steps


# names and entries


def test_unknown_names():
    with pytest.raises(ConfigError, match="Did you mean 'published/magcache/flux-dev-28'"):
        published.load("magcache/flux-dev28")
    with pytest.raises(ConfigError, match="'published/teacache/hunyuanvideo'"):
        published.load("published/teecache/hunyuanvideo")
    with pytest.raises(ConfigError, match="names"):
        published.load("qqqq")


MAGCACHE = {"mag_ratios": [1.0, 0.9], "default_threshold": 0.1, "default_K": 2, "default_retention_ratio": 0.2}
POLYNOMIAL = {"coefficients": [1.0, 0.5], "polynomial_degree": 1, "coefficient_order": "highest_power_first"}
LIST = {"budget": 2, "computed_steps": [0, 3], "step_base": 0}
BINS = {"compute_bins": [2, 1], "cache_bins": [1], "mask": [1, 1, 0, 1]}
MASKS = {"masks": {"attn": [1, 0, 1, 0], "mlp": [1, 1, 0, 0]}}
REFRESH = {"full_steps": 1, "refresh_steps": [2, 3]}


@pytest.mark.parametrize(
    ("method", "figures", "message"),
    [
        ("teacache", POLYNOMIAL | {"coefficients": []}, "coefficients must be a list of 1 to 6"),
        ("teacache", POLYNOMIAL | {"coefficients": [1.0] * 7}, "coefficients must be a list of 1 to 6"),
        ("teacache", POLYNOMIAL | {"coefficients": [1.0, float("nan")]}, "coefficients must be"),
        ("teacache", POLYNOMIAL | {"coefficients": "12"}, "coefficients must be"),
        ("teacache", POLYNOMIAL | {"coefficients": [1.0]}, "degree 1 has 2 coefficients, not 1"),
        ("teacache", POLYNOMIAL | {"coefficient_order": "lowest"}, "one of highest_power_first"),
        ("teacache", POLYNOMIAL | {"default_threshold": -0.1}, "default_threshold must be a finite number at least 0"),
        ("teacache", POLYNOMIAL | {"treshold": 0.1}, "unknown 'treshold'"),
        ("teacache", {"coefficients": [1.0]}, "polynomial_degree is missing"),
        ("magcache", MAGCACHE | {"mag_ratios": [1.0] * 3}, "ratios for 3 steps, but steps is 4"),
        ("magcache", MAGCACHE | {"mag_ratios": [1.0, 0.9, 0.0, 1.0]}, "finite number above 0"),
        ("magcache", MAGCACHE | {"mag_ratios": [1.0, 0.9, 10**400, 1.0]}, "finite number above 0"),
        ("magcache", MAGCACHE | {"mag_ratios": None, "mag_ratios_cond": [1.0] * 4}, "needs mag_ratios"),
        ("magcache", MAGCACHE | {"mag_ratios_cond": [1.0] * 4}, "needs mag_ratios"),
        ("magcache", MAGCACHE | {"mag_ratios": [1.0] * 4, "first_step_of_tail": 1}, "belong together"),
        ("magcache", MAGCACHE | {"mag_ratios": [1.0] * 4, "raw_ratios": [1.0] * 4}, "raw_ratios needs"),
        ("magcache", MAGCACHE | {"mag_ratios": [1.0] * 4, "expert_switch_step": 4}, "expert_switch_step must be below"),
        ("magcache", MAGCACHE | {"default_retention_ratio": 1.1}, "default_retention_ratio must be"),
        ("magcache", MAGCACHE | {"default_K": True}, "default_K must be a whole number at least 0"),
        ("magcache", MAGCACHE | {"default_threshold": None}, "default_threshold must be .*, not None"),
        ("lemica", LIST | {"computed_steps": [0, 4]}, "stay below 4"),
        ("lemica", LIST | {"computed_steps": [3, 0]}, "ascending"),
        ("lemica", LIST | {"computed_steps": [0, 0]}, "ascending"),
        ("lemica", LIST | {"computed_steps": [1, 3]}, "must start with 0"),
        ("lemica", LIST | {"budget": 3}, "2 steps, but budget is 3"),
        ("meancache", LIST | {"edge_order": [1, 1]}, "edge_order"),
        ("scm", BINS | {"mask": [1, 1, 1, 0]}, "compute_bins and cache_bins"),
        ("scm", BINS | {"mask": [1, 1, 0]}, "must hold 4 steps, not 3"),
        ("scm", BINS | {"mask": [0, 1, 0, 1]}, "starts with 1"),
        ("scm", BINS | {"num_computed": 2}, "num_computed is 2, but the masks give 3"),
        ("scm", BINS | {"masks_by_steps": {"3": [1, 1]}}, "mask '3' must hold 3 steps, not 2"),
        ("smoothcache", MASKS | {"computed": {"attn": 2, "mlp": 3}}, "computed is"),
        ("smoothcache", {"masks": {"attn": [1, 0, 2, 0]}}, "masks must be"),
        ("smoothcache", {"masks": {}}, "masks must be"),
        ("l2c", MASKS | {"total": 9}, "total is 9, but the masks give 8"),
        ("profilingdit", REFRESH | {"full_steps": 3}, "at full_steps"),
        ("profilingdit", REFRESH | {"refresh_steps": [2, 4]}, "stay below 4"),
        ("profilingdit", REFRESH | {"cached_single_blocks": [0, 2], "num_single_blocks": 2}, "cached_single_blocks"),
        ("dbcache", {"residual_diff_threshold": -1}, "residual_diff_threshold must be"),
        ("sea_cache", {"threshold": 0.1}, "is missing"),
        ("newcache", {}, "method 'newcache' is not among"),
    ],
)
def test_broken_figures(method, figures, message):
    with pytest.raises(ConfigError, match=message):
        made(f"{method.replace('_', '-')}/mine-4", figures=figures, steps=4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": ""}, "model must be a text"),
        ({"licence": None}, "licence must be a text"),
        ({"steps": 0}, "steps must be a whole number at least 1 or null"),
        ({"figures": []}, "figures must be an object"),
        ({"notes": 3}, "notes must be a text"),
        ({"transformer": 3}, "transformer must be a text or null"),
        ({"recommended": {}}, "recommended must be a list"),
        ({"recommended": [3]}, "recommended must be a list of objects"),
        ({"recommended": [{"threshold": -1}]}, "recommended threshold"),
        ({"recommended": [{"treshold": 1}]}, "unknown 'treshold'"),
        ({"author": "me"}, "unknown 'author'"),
    ],
)
def test_broken_fields(fields, message):
    with pytest.raises(ConfigError, match=message):
        made("teacache/mine", **{"figures": POLYNOMIAL} | fields)


def test_figures_that_need_their_number_of_steps():
    with pytest.raises(ConfigError, match="steps is missing"):
        made("lemica/mine", figures=LIST)


def test_an_entry_names_every_field():
    with pytest.raises(ConfigError, match="transformer is missing"):
        published._entry("teacache/mine", {"model": "m"})


def test_names_have_one_form():
    with pytest.raises(ConfigError, match="lower case"):
        made("teacache/My Model", figures=POLYNOMIAL)


def test_masks_in_runs_of_other_lengths_are_told():
    mask = Mask("100100", others=("1010",), source="theirs")
    assert mask.departure(6) == mask.departure(4) == mask.departure(None) == ""
    assert "theirs is for 6 steps, and this run has 9" in mask.departure(9)
    assert Mask("100100").departure(9) == ""  # one's own, for runs that start late as well
    listed = published.load("lemica/flux-dev-10of50").driven()
    assert "lemica/flux-dev-10of50 is for 50 steps, and this run has 7" in Mask(**listed.options).departure(7)
