"""Profiles: what is refused, files that nobody can harm with, resampling, and whether one is of a model."""

import contextlib
import hashlib
import json
import math
import random
import re
import resource
import shutil
import warnings
from dataclasses import replace
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from diffusion_cache.errors import ConfigError, DiffusionCacheWarning
from diffusion_cache.fingerprint import Fingerprint
from diffusion_cache.plan import Plan, Quality, Speed
from diffusion_cache.profile import Profile, SpanFacts
from diffusion_cache.schedule import Schedule

NAN, INF = math.nan, math.inf
JSON, ARRAYS = "profile.json", "arrays.safetensors"
STEPS, SPANS, PASSES = 6, 3, 2


class Scheduler:
    def __init__(self, **config):
        self.config = {"shift": 3.0, "prediction_type": "flow", **config}


def model(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(4, 4)


def pipe(**config):
    return SimpleNamespace(scheduler=Scheduler(**config))


def levels(total, low=-5.0, high=5.0):
    return tuple(np.linspace(low, high, total).tolist())


def fingerprint(total=STEPS, **fields):
    found = Fingerprint.of(pipe(), {"transformer": model()}, steps=total, noise_levels=levels(total), guidance=4.0)
    return replace(found, sample_shape=(4, 8, 8), **fields)


def features(total=STEPS, spans=SPANS, passes=PASSES, size=16, seed=0):
    """A smooth path for each span and pass: [S, P, T, size], float64."""
    generator = torch.Generator().manual_seed(seed)
    path = torch.randn(spans, passes, total, size, generator=generator, dtype=torch.float64).cumsum(dim=2)
    return path + 5 * torch.randn(spans, passes, 1, size, generator=generator, dtype=torch.float64)


def gram(path):
    return torch.einsum("spti,spui->sptu", path, path).float()


def arrays(total=STEPS):
    path = features(total)
    sizes = SPANS, PASSES, total
    generator = torch.Generator().manual_seed(1)
    signal = torch.rand(sizes, generator=generator) * 0.1
    signal[..., 0] = NAN
    residual = gram(path)
    residual[2] = NAN  # the last span has none
    return {
        "gram_residual": residual,
        "gram_output": gram(path + 1),
        "cross_input": gram(path),
        "input_energy": torch.rand(sizes, generator=generator),
        "channel_mean.0": torch.randn(PASSES, total, 5, generator=generator),
        "channel_square.2": torch.rand(PASSES, total, 7, generator=generator),
        "residual_l1": signal,
        "input_l1": signal + 1,
        "filtered_l1": torch.full(sizes, NAN),
        "norm_ratio": signal + 1,
        "attention_received.1": torch.full((total, 4), 0.25),
        "foreground_share": torch.rand(SPANS, total, generator=generator),
        "sensitivity": torch.rand(2, total, generator=generator),
        "sensitivity_sampled": torch.ones(2, total, dtype=torch.uint8),
    }


def plan(name="half", total=STEPS, **fields):
    nodes = torch.full((total, 1, 2), -1, dtype=torch.int32)
    weights = torch.full((total, PASSES, 1, 2), NAN, dtype=torch.float64)
    nodes[1, 0], weights[1, :, 0] = torch.tensor([-1, 0]), torch.tensor([0.0, 1.0])
    schedule = Schedule.uniform(step % 2 == 0 for step in range(total))
    return Plan(name, "block", 2, "auto", schedule, levels(total), nodes, weights, **fields)


def profile(**fields):
    spans = tuple(
        SpanFacts(f"blocks.{i}", "transformer", "block", "output" if i == 2 else "residual", 16, 0.25)
        for i in range(SPANS)
    )
    given = {
        "fingerprint": fingerprint(),
        "scope": "block",
        "depth": 2,
        "spans": spans,
        "passes": ("cond", "uncond"),
        "row_passes": 1,
        "samples": (("a cat", 0), ("ein Hund\nim Wald", 2**63)),
        "arrays": arrays(),
        "facts": {"seconds": 1.5, "groups": [[0, 1], [2]]},
        "plans": (
            plan(quality=Quality.of("psnr", [30.0, INF], [3, 4]), speed=Speed(1.9, 1.8, 2.0, "cpu", 1)),
            plan("other", facts={"objective": "sum"}, sigmas=tuple(range(1, 7))),
        ),
    }
    return Profile(**{**given, **fields})


def same(one, other):
    """Whether two profiles hold the same."""
    for name in ("fingerprint", "scope", "depth", "spans", "passes", "row_passes", "samples", "facts"):
        assert getattr(one, name) == getattr(other, name), name
    assert one.arrays.keys() == other.arrays.keys()
    for name, tensor in one.arrays.items():
        torch.testing.assert_close(other.arrays[name], tensor, rtol=0, atol=0, equal_nan=True)
    assert len(one.plans) == len(other.plans)
    for a, b in zip(one.plans, other.plans, strict=True):
        assert a.to_json() == b.to_json()
        for name, tensor in a.tensors().items():
            torch.testing.assert_close(b.tensors()[name], tensor, rtol=0, atol=0, equal_nan=True)
    return True


def test_inner_products_may_be_wide(tmp_path):
    path = features()
    wide = torch.einsum("spti,spui->sptu", path, path)
    made = profile(arrays={**arrays(), **dict.fromkeys(("gram_residual", "gram_output", "cross_input"), wide)})
    made.save(tmp_path)
    found = Profile.load(tmp_path)
    assert same(made, found)
    assert found.arrays["gram_residual"].dtype == torch.float64
    with pytest.warns(DiffusionCacheWarning, match="resampled"):
        fewer = found.resampled(levels(STEPS - 1))
    assert fewer.arrays["gram_output"].dtype == torch.float64
    assert fewer.arrays["input_energy"].dtype == torch.float32


def test_storing_changes_nothing(tmp_path):
    made = profile()
    made.save(tmp_path / "new" / "folder")
    assert same(Profile.load(tmp_path / "new" / "folder"), made)
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [ARRAYS, JSON]


def test_storing_twice_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        profile().save(tmp_path / name)
    for file in (JSON, ARRAYS):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_saving_what_was_loaded_into_its_own_folder(tmp_path):
    profile().save(tmp_path)
    loaded = Profile.load(tmp_path)
    loaded.with_plans(loaded.plans[:1]).save(tmp_path)
    assert same(Profile.load(tmp_path), profile().with_plans(profile().plans[:1]))


def test_a_profile_is_shown_in_a_line():
    found = profile()
    shown = f"SimpleNamespace, Scheduler, {STEPS} steps, scope='block', 2 samples, plans: half, other"
    assert repr(found) == f"Profile({shown})"
    assert repr(found.plans[0]) == f"Plan('half', scope='block', {STEPS / 2:g} evaluations in {STEPS} steps)"


def test_with_plans():
    made = profile().with_plans([plan("new")])
    assert [p.name for p in made.plans] == ["new"]
    assert made.arrays is not None
    with pytest.raises(ConfigError, match="names of their own"):
        made.with_plans([plan("new"), plan("new")])


def test_with_plan_replaces_the_one_of_its_name_and_puts_the_most_evaluations_first():
    first = plan("a")
    more = replace(first, name="b", nfe=5.0)
    changed = replace(more, name="a")
    assert more.nfe > first.nfe
    assert profile().with_plans([first]).with_plan(more).plans == (more, first)
    assert profile().with_plans([more, first]).with_plan(changed).plans == (more, changed)


def replaced(**changes):
    return {**arrays(), **changes}


def poked(name, place, value):
    made = arrays()
    made[name][place] = value
    return {"arrays": made}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fingerprint": fingerprint(5)}, r"gram_residual must be torch.float32 or torch.float64 \[3, 2, 5, 5\]"),
        ({"fingerprint": replace(fingerprint(), steps=None, noise_levels=())}, "number of steps"),
        ({"spans": ()}, "needs a span"),
        ({"passes": ()}, "a pass"),
        ({"row_passes": 0}, "passes in the rows"),
        ({"row_passes": 3}, "passes in the rows"),
        ({"facts": {"a": INF}}, "facts"),
        ({"arrays": {"gram_output": arrays()["gram_output"]}}, "gram_residual is missing"),
        ({"arrays": replaced(extra=torch.zeros(1))}, "no array 'extra'"),
        ({"arrays": replaced(**{"channel_mean.3": torch.zeros(2, 6, 1)})}, "no array 'channel_mean.3'"),
        ({"arrays": replaced(**{"channel_mean.00": torch.zeros(2, 6, 1)})}, "no array"),
        ({"arrays": replaced(**{"sensitivity.0": torch.zeros(2, 6, 1)})}, "no array"),
        ({"arrays": replaced(sensitivity=torch.zeros(0, 6))}, "sensitivity must be"),
        ({"arrays": replaced(input_energy=torch.zeros(3, 2, 6).double())}, "float64"),
        ({"arrays": replaced(sensitivity_sampled=torch.zeros(2, 6))}, "uint8"),
        ({"arrays": replaced(sensitivity_sampled=torch.full((2, 6), 2, dtype=torch.uint8))}, "0 and 1"),
        (poked("gram_output", (0, 0, 0, 0), INF), "gram_output is not finite"),
        (poked("gram_residual", (1, 0, 2, 0), NAN), "gram_residual of span 'blocks.1'"),
        (poked("gram_output", (2, 1, 0, 0), NAN), "gram_output of span 'blocks.2'"),
        (poked("input_energy", (0, 0, 0), NAN), "input_energy is not finite"),
        (poked("residual_l1", (0, 0, 3), INF), "residual_l1 is not finite"),
        (poked("sensitivity", (0, 1), -1.0), "negative"),
        ({"plans": [plan(f"p{i}") for i in range(1001)]}, "at most 1000"),
    ],
)
def test_profiles_that_cannot_be(fields, message):
    with pytest.raises(ConfigError, match=message):
        profile(**{"plans": (), **fields})


def test_plans_must_fit_the_profile():
    with pytest.raises(ConfigError, match="is for 2 passes"):
        profile(
            passes=("only",),
            arrays={name: value[:, :1] for name, value in arrays().items() if name.startswith("gram")},
        )
    nodes, weights = torch.full((6, 2, 1), -1, dtype=torch.int32), torch.full((6, 1, 2, 1), NAN, dtype=torch.float64)
    two_spans = replace(plan(), nodes=nodes, weights=weights)
    with pytest.raises(ConfigError, match="2 spans"):
        profile(plans=(two_spans,))
    assert profile(plans=(replace(two_spans, scope="denoiser"),)).plans  # its spans are not the profile's


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"feature": "auto"}, "feature must be 'residual' or 'output', not 'auto'"),
        ({"elements": 0}, "0 elements and a share of .* cannot be"),
        ({"share": 1.5}, "a share of 1.5 cannot be"),
        ({"share": NAN}, "a share of nan cannot be"),
    ],
)
def test_span_facts_refuse(facts, message):
    with pytest.raises(ConfigError, match=message):
        SpanFacts(**{**vars(profile().spans[0]), **facts})


def test_squares_that_are_negative():
    made = profile()
    grams = {name: -array for name, array in made.arrays.items() if name.startswith("gram_")}
    with pytest.raises(ConfigError, match="holds negative squares"):
        replace(made, arrays={**made.arrays, **grams})


# --- files


def rewritten(folder, change, schema=1):
    """Change a stored profile as one would who knows how digests are made."""
    stored = json.loads((folder / JSON).read_text())
    body = stored["profile"]
    change(body)
    body["arrays_sha256"] = hashlib.sha256((folder / ARRAYS).read_bytes()).hexdigest()
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (folder / JSON).write_text(json.dumps({"schema": schema, "digest": digest, "profile": body}))


@pytest.fixture
def stored(tmp_path):
    profile().save(tmp_path)
    return tmp_path


def test_no_profile(tmp_path, stored):
    with pytest.raises(ConfigError, match="holds no profile"):
        Profile.load(tmp_path / "nowhere")
    (stored / ARRAYS).unlink()
    with pytest.raises(ConfigError, match="half a profile"):
        Profile.load(stored)


@pytest.mark.parametrize("schema", [0, 2, 10**6])
def test_another_schema_version(stored, schema):
    rewritten(stored, lambda body: body.clear(), schema)
    with pytest.raises(ConfigError, match=f"schema version {schema}; this version of diffusion_cache reads version 1"):
        Profile.load(stored)


def test_a_changed_document(stored):
    document = (stored / JSON).read_text()
    (stored / JSON).write_text(document.replace('"a cat"', '"a dog"'))
    with pytest.raises(ConfigError, match="changed or damaged"):
        Profile.load(stored)
    (stored / JSON).write_text(json.dumps(json.loads(document)))  # laid out otherwise, it says the same
    assert same(Profile.load(stored), profile())


def test_arrays_of_another_profile(stored, tmp_path):
    made = profile()
    replace(made, arrays=replaced(sensitivity=torch.ones(2, 6))).save(tmp_path / "other")
    shutil.copy(tmp_path / "other" / ARRAYS, stored / ARRAYS)
    with pytest.raises(ConfigError, match="changed or damaged"):
        Profile.load(stored)


@pytest.mark.parametrize("name", [JSON, ARRAYS])
def test_size_limits(stored, name):
    size = (stored / name).stat().st_size
    limit = {"max_json" if name == JSON else "max_arrays": size - 1}
    with pytest.raises(ConfigError, match=f"{name} has"):
        Profile.load(stored, **limit)
    assert Profile.load(stored, **{key: value + 1 for key, value in limit.items()}).total == STEPS


def set_in(*path, value):
    def change(body):
        place = body
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return change


def long_run(body):
    body["fingerprint"] |= {"steps": 10**9, "noise_levels": []}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_in("spans", value={}), "profile.json.spans: expected a list"),
        (set_in("spans", 1, "share", value="all"), r"spans\[1\].share: expected a whole number"),
        (set_in("spans", 1, "elements", value=1e3), r"spans\[1\].elements"),
        (set_in("spans", 1, "cls", value="os.system"), r"spans\[1\]: unknown 'cls'"),
        (set_in("samples", 0, value=["a cat"]), "a prompt and a seed"),
        (long_run, "more than it can hold"),
        (set_in("fingerprint", "steps", value=-1), "at least one step"),
        (set_in("fingerprint", "noise_levels", value=[0.0]), "noise levels"),
        (set_in("fingerprint", "denoisers", "transformer", value="x"), "denoisers.transformer"),
        (set_in("passes", value=["\ud800", "b"]), "expected text"),
        (set_in("scope", value=None), "profile.json.scope"),
        (set_in("plans", 0, "nfe", value="nan"), "NFE"),
        (set_in("plans", 0, "nfe", value=[]), r"plans\[0\].nfe"),
        (set_in("plans", 0, "quality", "values", value=["nan", 1.0]), "NaN"),
        (set_in("plans", 0, "quality", "seeds", value=[1]), "1 seeds"),
        (set_in("plans", 0, "speed", "low", value=99.0), "spread"),
        (set_in("plans", 0, value=[]), "expected an object"),
        (set_in("plans", value=[{}, {}]), "is missing"),
        (set_in("plans", value=[{}] * 3), "plan.2.compute"),
        (set_in("plans", value=[{}]), "no array of a profile"),
        (set_in("plans", value=[{}] * 2000), "is missing"),
        (lambda body: body.pop("facts"), "facts is missing"),
        (set_in("extra", value=1), "unknown 'extra'"),
    ],
)
def test_documents_by_someone_who_can_make_digests(stored, change, message):
    rewritten(stored, change)
    with pytest.raises(ConfigError, match=message):
        Profile.load(stored)


def document(body, schema="1", written=None):
    """With the digest that fits, so that it is not what is refused. body: as it is written for digests."""
    digest = hashlib.sha256(body.encode()).hexdigest()
    return f'{{"schema": {schema}, "digest": "{digest}", "profile": {written or body}}}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("null", "expected an object, found NoneType"),
        ("[]", "expected an object, found list"),
        ("1" * 5000, "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        (document('{"a": ' + "[" * 900 + "]" * 900 + "}"), "cannot be read|fingerprint is missing"),
        (document("{}"), "fingerprint is missing"),
        ('{"schema": 1}', "digest is missing"),
        (document("{}", schema="true"), "schema: expected a whole number, found True"),
        (document('{"a": NaN}'), "cannot be read: Out of range float"),
        (document('{"a": Infinity}', written='{"a": 1e999}'), "cannot be read: Out of range float"),
        ('{"schema": 1, "digest": "\\ud800", "profile": {}}', "digest: expected text"),
    ],
    ids=lambda given: given[:40],
)
def test_documents_that_are_none(stored, text, message):
    (stored / JSON).write_text(text)
    with pytest.raises(ConfigError, match=message):
        Profile.load(stored)


def nothing(body):
    pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"os.system": torch.zeros(1)}, "'os.system' is no array"),
        ({"gram_output": None}, "gram_output is missing"),
        ({"gram_output": torch.zeros(3, 2, 6, 7)}, "gram_output must be"),
        ({"gram_output": torch.zeros(3, 2, 6, 6, dtype=torch.float8_e4m3fn)}, "another type"),
        ({"gram_output": torch.full((3, 2, 6, 6), INF)}, "not finite"),
        ({"plan.0.nodes": None}, "plan.0.nodes is missing"),
        ({"plan.0.nodes": torch.zeros(6, 1, 2, dtype=torch.int64)}, "another type"),
        ({"plan.0.nodes": torch.full((6, 1, 2), 10**6, dtype=torch.int32)}, "earlier steps"),
        ({"plan.0.weights": torch.zeros(6, 2, 1, 2, dtype=torch.float64)}, "weights"),
        ({"plan.0.compute": torch.ones(0, dtype=torch.uint8)}, "schedule"),
        ({"plan.0.compute": torch.ones(6, 0, 1, dtype=torch.uint8)}, "schedule"),
        ({"plan.0.compute": torch.ones(10_001, 1, 1, dtype=torch.uint8)}, "schedule"),
        ({"plan.0.compute": torch.ones(20_000_001, dtype=torch.uint8)}, "larger than any"),
        ({"plan.2.nodes": torch.zeros(6, 1, 2, dtype=torch.int32)}, "no array"),
    ],
)
def test_arrays_by_someone_who_can_make_digests(stored, change, message):
    tensors = {**load((stored / ARRAYS).read_bytes()), **change}
    (stored / ARRAYS).write_bytes(save({name: tensor for name, tensor in tensors.items() if tensor is not None}))
    rewritten(stored, nothing)
    with pytest.raises(ConfigError, match=message):
        Profile.load(stored)


def test_every_number_of_its_plans_counts(stored, monkeypatch):
    count = sum(tensor.numel() for plan in profile().plans for tensor in plan.tensors().values())
    monkeypatch.setattr("diffusion_cache.profile.MAX_PLAN_CELLS", count)
    Profile.load(stored)
    monkeypatch.setattr("diffusion_cache.profile.MAX_PLAN_CELLS", count - 1)
    with pytest.raises(ConfigError, match="larger than any"):
        Profile.load(stored)


def test_no_pickle(stored):
    torch.save(arrays(), stored / ARRAYS)
    rewritten(stored, nothing)
    with pytest.raises(ConfigError, match="cannot be read"):
        Profile.load(stored)


@pytest.mark.parametrize("knows_digests", [False, True])
@pytest.mark.parametrize("name", [JSON, ARRAYS])
def test_damaged_files_give_a_clear_error_and_nothing_else(stored, name, knows_digests):
    """Truncated or with a few bits flipped, at 150 places each."""
    sound = {file: (stored / file).read_bytes() for file in (JSON, ARRAYS)}
    rng = random.Random(f"{name} {knows_digests}")
    loaded = 0
    for attempt in range(150):
        for file, content in sound.items():
            (stored / file).write_bytes(content)
        data = bytearray(sound[name])
        if attempt % 3 == 0:
            del data[rng.randrange(len(data)) :]
        else:
            # the header, where the structure is, half of the time
            reach = len(data) if attempt % 2 else min(len(data), 2500)
            for _ in range(rng.choice([1, 1, 2, 8])):
                data[rng.randrange(reach)] ^= 1 << rng.randrange(8)
        (stored / name).write_bytes(data)
        if knows_digests:
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):  # no longer a document
                rewritten(stored, nothing)
        try:
            Profile.load(stored)
            loaded += 1
        except ConfigError:
            pass
    # only who can make digests gets anything changed in
    assert loaded == 0 or knows_digests
    assert loaded < 150


# --- writing


def limited(size):
    """No file may grow beyond this many bytes: what a full disk does to a writer."""

    @contextlib.contextmanager
    def limit():
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit()


def test_a_full_disk_leaves_the_earlier_profile(stored):
    changed = profile(facts={"new": True})
    wordy = profile(samples=tuple(("word " * 100, seed) for seed in range(500)))  # more text than numbers
    for made, size in ((changed, 2000), (wordy, (stored / ARRAYS).stat().st_size + 10)):
        with limited(size), pytest.raises(ConfigError, match="cannot write a profile"):
            made.save(stored)
        assert same(Profile.load(stored), profile())
        assert sorted(path.name for path in stored.iterdir()) == [ARRAYS, JSON]


def test_a_failed_renaming_puts_the_earlier_arrays_back(stored):
    before = (stored / ARRAYS).read_bytes()
    (stored / JSON).unlink()
    (stored / JSON).mkdir()
    with pytest.raises(ConfigError, match="cannot write a profile"):
        profile(facts={}, plans=()).save(stored)
    assert (stored / ARRAYS).read_bytes() == before
    assert sorted(path.name for path in stored.iterdir()) == [ARRAYS, JSON]


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write a profile"):
        profile().save(tmp_path / "file")


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    with pytest.raises(ConfigError, match="16 MiB of text"):
        profile(facts={"long": "x" * 17 * 2**20}).save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


# --- matching


def test_its_own_model_matches():
    made = profile()
    assert made.matches(pipe(), {"transformer": model()}) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.check(pipe(), {"transformer": model()})


def test_check_names_every_strict_difference_and_the_way_round_it():
    other = pipe(prediction_type="v", shift=1.0), {"transformer": model(seed=1)}
    found = {difference.field: difference.strict for difference in profile().matches(*other)}
    assert found == {"transformer.weights": True, "scheduler_config": True, "spacing": False}
    with pytest.raises(ConfigError) as error:
        profile().check(*other)
    text = str(error.value)
    assert "transformer.weights is" in text
    assert "prediction_type=v" in text
    assert "shift" not in text
    assert "ignore=['scheduler_config', 'weights']" in text

    with pytest.raises(ConfigError, match=r"ignore=\['scheduler_config'\]"):
        profile().check(*other, ignore=["transformer.weights"])
    with pytest.warns(DiffusionCacheWarning, match="shift") as caught:
        profile().check(*other, ignore=("scheduler_config", "weights"))
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        profile().check(*other, ignore=("scheduler_config", "weights", "spacing"))


def test_check_refuses_to_ignore_what_is_not_there():
    with pytest.raises(ConfigError, match="Did you mean 'weights'"):
        profile().check(pipe(), {"transformer": model()}, ignore=("weihgts",))
    with pytest.raises(ConfigError, match=r"no field 'transformer\.scheduler'"):
        profile().check(pipe(), {"transformer": model()}, ignore=("transformer.scheduler",))
    for name in ("steps", "noise_levels"):
        with pytest.raises(ConfigError, match=f"ignore: {name} is of a run and not compared"):
            profile().check(pipe(), {"transformer": model()}, ignore=(name,))
    profile().check(pipe(), {"transformer": model()}, ignore=("guidance", "sample_shape", "transformer.dtype"))


# --- resampling


def test_its_own_noise_levels_keep_a_profile_as_it_is():
    made = profile()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert made.resampled([level + 0.0005 for level in made.noise_levels]) is made


def resampled(made, new):
    with pytest.warns(DiffusionCacheWarning, match="resampled") as caught:
        after = made.resampled(new)
    return after, str(caught[0].message)


def test_grams_are_those_of_features_on_straight_lines():
    coarse = features(STEPS)
    made = profile()
    new = levels(16, -5.0, 5.0)
    after, message = resampled(made, new)
    assert "(6 steps) than these (16 steps)" in message
    assert "log-SNR" in message
    assert "beyond" not in message
    # the features themselves, interpolated
    places = np.interp(new, made.noise_levels, range(STEPS))
    low = np.minimum(places.astype(int), STEPS - 2)
    rest = torch.tensor(places - low)[:, None]
    fine = coarse[:, :, low] * (1 - rest) + coarse[:, :, low + 1] * rest
    torch.testing.assert_close(after.arrays["gram_residual"][:2], gram(fine)[:2], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(after.arrays["cross_input"], gram(fine), rtol=1e-5, atol=1e-4)
    assert after.arrays["gram_residual"][2].isnan().all()
    assert torch.linalg.eigvalsh(after.arrays["gram_output"].double()).min() > -1e-3
    assert after.total == 16
    assert after.noise_levels == new
    assert after.fingerprint.sigmas is None
    assert [p.total for p in after.plans] == [16, 16]
    assert after.facts["resampled_from_steps"] == STEPS


def test_at_the_profiled_levels_nothing_is_interpolated():
    made = profile()
    new = made.noise_levels[::2]
    after, _ = resampled(made, new)
    for name in ("gram_output", "cross_input"):
        torch.testing.assert_close(after.arrays[name], made.arrays[name][:, :, ::2, ::2])
    torch.testing.assert_close(after.arrays["input_energy"], made.arrays["input_energy"][..., ::2])
    torch.testing.assert_close(after.arrays["channel_mean.0"], made.arrays["channel_mean.0"][:, ::2])
    torch.testing.assert_close(after.arrays["attention_received.1"], made.arrays["attention_received.1"][::2])
    torch.testing.assert_close(after.arrays["foreground_share"], made.arrays["foreground_share"][:, ::2])


def test_changes_add_up_and_ratios_multiply():
    made = profile()
    after, _ = resampled(made, made.noise_levels[::2])
    before = made.arrays["residual_l1"]
    torch.testing.assert_close(after.arrays["residual_l1"][..., 1], before[..., 1] + before[..., 2])
    torch.testing.assert_close(after.arrays["residual_l1"][..., 2], before[..., 3] + before[..., 4])
    before = made.arrays["norm_ratio"]
    torch.testing.assert_close(after.arrays["norm_ratio"][..., 2], before[..., 3] * before[..., 4])
    assert after.arrays["norm_ratio"][..., 0].isnan().all()
    assert after.arrays["filtered_l1"].isnan().all()
    finer, _ = resampled(made, levels(11))
    halves = finer.arrays["residual_l1"][..., 1] + finer.arrays["residual_l1"][..., 2]
    torch.testing.assert_close(halves, made.arrays["residual_l1"][..., 1])


def test_a_step_is_as_sensitive_as_it_is_long():
    constant = profile(arrays=replaced(sensitivity=torch.ones(2, 6)))
    after, _ = resampled(constant, levels(3))
    assert after.arrays["sensitivity"].tolist() == [[2.5, 2.5, 1.0]] * 2
    assert not after.arrays["sensitivity_sampled"].any()
    own = constant.noise_levels
    after, _ = resampled(constant, (own[0], own[1], (own[1] + own[2]) / 2, own[2], own[4]))
    torch.testing.assert_close(after.arrays["sensitivity"], torch.tensor([[1.0, 0.5, 0.5, 2.0, 2.0]] * 2))
    after, _ = resampled(constant, (-9.0, -7.0, *own))  # beyond the profile's: they share its first step
    torch.testing.assert_close(after.arrays["sensitivity"], torch.tensor([[1 / 3] * 3 + [1.0] * 5] * 2))


def test_what_was_not_measured_is_unknown_there_alone():
    """Where guidance ended, or a step was not seen."""
    known = arrays()
    arrays_with_gaps = {name: known[name].clone() for name in ("foreground_share", "residual_l1", "norm_ratio")}
    grams = known["gram_residual"].clone()
    grams[2] = known["gram_output"][2]
    for tensor in (*arrays_with_gaps.values(), grams):
        tensor[2, ..., 3] = NAN
    grams[2, :, 3] = NAN  # of a span whose feature is its output
    made = profile(arrays=replaced(**arrays_with_gaps, gram_residual=grams))
    after, _ = resampled(made, levels(11))  # every other step is one of the profile's
    assert after.arrays["foreground_share"][2].isnan().nonzero().flatten().tolist() == [5, 6, 7]
    for name in ("residual_l1", "norm_ratio"):
        assert after.arrays[name][2, 0].isnan().nonzero().flatten().tolist() == [0, 5, 6]
        assert after.arrays[name][1, 0].isnan().nonzero().flatten().tolist() == [0]
    gaps = after.arrays["gram_residual"][2, 0].isnan()
    assert torch.equal(gaps, gaps.diagonal()[:, None] | gaps.diagonal())
    assert gaps.diagonal().nonzero().flatten().tolist() == [5, 6, 7]
    # and elsewhere as without gaps
    whole, _ = resampled(profile(), levels(11))
    for name in ("foreground_share", "residual_l1", "norm_ratio"):
        found, expected = after.arrays[name], whole.arrays[name]
        torch.testing.assert_close(found[..., 8:], expected[..., 8:])
        torch.testing.assert_close(found[..., 1:5], expected[..., 1:5])


def test_a_ratio_of_nothing_stays_where_it_is():
    ratios = arrays()["norm_ratio"]
    ratios[0, 0, 3] = 0.0
    after, _ = resampled(profile(arrays=replaced(norm_ratio=ratios)), levels(11))
    found = after.arrays["norm_ratio"][0, 0]
    assert found[5:7].max() < 1e-15
    torch.testing.assert_close(found[7] * found[8], ratios[0, 0, 4])


def test_what_was_found_at_the_profiles_levels_is_dropped():
    learned = {"select_weights": torch.ones(2, 3), "select_bias": torch.ones(2)}
    facts = {"seconds": 1.5, "key": "ab", "select": {"choices": [{"held_out": {"values": [30.0]}}]}}
    after, _ = resampled(profile(arrays={**arrays(), **learned}, facts=facts), levels(3))
    assert after.facts == {"seconds": 1.5, "resampled_from_steps": STEPS}
    assert not set(learned) & set(after.arrays)


def test_levels_beyond_the_profile_take_its_nearest_step():
    made = profile()
    after, message = resampled(made, [-INF, -9.0, -5.0, 0.0, 7.0])
    assert "at 3 levels beyond them" in message
    for index, step in ((0, 0), (1, 0), (2, 0), (4, 5)):
        torch.testing.assert_close(
            after.arrays["gram_output"][:, :, index, index], made.arrays["gram_output"][:, :, step, step]
        )


def test_infinite_levels_at_the_profiles_ends():
    made = profile(fingerprint=replace(fingerprint(), noise_levels=(-INF, -3.0, -1.0, 1.0, 3.0, INF)), plans=())
    after, _ = resampled(made, (-INF, -4.0, 0.0, INF))
    energy = made.arrays["input_energy"]
    expected = [energy[..., 0], energy[..., :2].mean(-1), energy[..., 2:4].mean(-1), energy[..., 5]]
    torch.testing.assert_close(after.arrays["input_energy"], torch.stack(expected, dim=-1))


def test_without_noise_levels_the_share_of_the_run_counts():
    made = profile(fingerprint=replace(fingerprint(), noise_levels=()), plans=())
    after, message = resampled(made, levels(11))
    assert "share of the run" in message
    torch.testing.assert_close(after.arrays["input_energy"][..., ::2], made.arrays["input_energy"])


@pytest.mark.parametrize("total", [1, 2, 50])
def test_any_number_of_steps(total, tmp_path):
    after, _ = resampled(profile(), levels(total, -4.0, 6.0))
    after.save(tmp_path)
    assert same(Profile.load(tmp_path), after)
    one = Profile(
        **{**vars(profile()), "fingerprint": fingerprint(1), "arrays": arrays(1), "plans": ()},
    )
    after, _ = resampled(one, levels(total, 1.0, 2.0))
    assert after.arrays["gram_output"].shape == (SPANS, PASSES, total, total)


# --- the Hub


def test_a_local_folder_wins(stored, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("not asked"))
    assert same(Profile.from_pretrained(stored), profile())
    assert same(Profile.from_pretrained(str(stored)), profile())


def test_from_the_hub(stored, monkeypatch):
    asked = []

    def download(repo_id, **options):
        asked.append((repo_id, options))
        return str(stored)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert same(Profile.from_pretrained("someone/profile", revision="v1"), profile())
    assert asked == [("someone/profile", {"revision": "v1", "allow_patterns": [JSON, ARRAYS]})]


def test_offline(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="'someone/profile' is no folder here"):
        Profile.from_pretrained("someone/profile")
    with pytest.raises(ConfigError, match="could not be uploaded"):
        profile().push_to_hub("someone/profile")


def test_names_that_are_no_repository_are_not_looked_for_on_the_hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    assert len(Profile.from_pretrained("dit-digits-ddim").plans) > 1
    for name, told in (
        ("dit-digits-ddm", "Did you mean 'dit-digits-ddim'?"),
        ("./somewhere/else", "Known: dit-digits-ddim, "),
        ("no such//name", "Known: "),
    ):
        with pytest.raises(
            ConfigError, match=f"is no folder, nor a profile that comes with the package. {re.escape(told)}"
        ):
            Profile.from_pretrained(name)


def test_push_to_hub(monkeypatch):
    done = []

    class Api:
        def create_repo(self, repo_id, **options):
            done.append(("create", repo_id, options))

        def upload_folder(self, folder_path, **options):
            done.append(("upload", Profile.load(folder_path), options))
            return SimpleNamespace(commit_url="https://hub/commit")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert profile().push_to_hub("someone/profile", private=True, revision="dev") == "https://hub/commit"
    (_, name, options), (_, uploaded, upload) = done
    assert (name, options) == ("someone/profile", {"private": True, "exist_ok": True})
    assert same(uploaded, profile())
    assert upload["revision"] == "dev"
    assert upload["repo_id"] == "someone/profile"
