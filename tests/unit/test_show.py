"""What `show` prints and draws."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from diffusion_cache import profiles
from diffusion_cache.cli.show import _default_out, _drift, _representatives, print_plans, show, strip
from diffusion_cache.errors import ConfigError
from diffusion_cache.fingerprint import DenoiserFacts, Fingerprint
from diffusion_cache.plan import Band, Plan, Quality, Speed
from diffusion_cache.profile import Profile, SpanFacts
from diffusion_cache.profiling.trajectory import ONE_FEATURE
from diffusion_cache.schedule import Schedule

STEPS = 10


def plan(name, mask="1001001001", spans=1, **fields):
    total = len(mask)
    nodes = torch.full((total, spans, 1), -1, dtype=torch.int32)
    weights = torch.full((total, 1, spans, 1), math.nan, dtype=torch.float64)
    # of several spans, the first alone is computed where the mask says 2
    schedule = Schedule(tuple((tuple(e == "1" or (e == "2" and s == 0) for s in range(spans)),) for e in mask))
    return Plan(name, "block", None, "auto", schedule, (), nodes, weights, **fields)


def profile(spans=3, plans=(), **arrays):
    generator = torch.Generator().manual_seed(0)
    path = torch.randn(spans, 1, STEPS, 8, generator=generator).cumsum(dim=2)
    path[:, :, 4] = path[:, :, 3]  # nothing changes at step 4
    gram = torch.einsum("sptd,spud->sptu", path, path)
    fingerprint = Fingerprint(
        {"transformer": DenoiserFacts("Tiny", "c", "l", "0123456789abcdef", "float32", ("style",), "w")},
        "Pipeline",
        "Euler",
        {},
        steps=STEPS,
        noise_levels=tuple(np.linspace(-4.0, 4.0, STEPS).tolist()),
        guidance=4.5,
        sample_shape=(1, 8, 8),
    )
    facts = tuple(SpanFacts(f"blocks.{i}", "transformer", "block", "residual", 1234 + i, 0.1 * i) for i in range(spans))
    return Profile(
        fingerprint,
        "block",
        None,
        facts,
        ("cond",),
        1,
        (("a [bold]cat", 0),),
        {"gram_residual": gram, "gram_output": gram, **arrays},
        plans=tuple(plans),
    )


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch, request):
    """Drawing takes a second a profile, and most tests are of the text."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr("diffusion_cache.cli.show.write_pictures", lambda profile, out: [])


@pytest.fixture
def drawn():
    """For tests of pictures."""


def shown(made, folder, out=None, width=100):
    made.save(folder)
    console = Console(file=io.StringIO(), width=width)
    paths = show(folder, out, console)
    return console.file.getvalue(), paths


def test_tables(tmp_path):
    quality, speed = Quality.of("psnr", [30.25, 31.75], [7, 8]), Speed(2.5, 2.25, 2.75, "H100", 4)
    plans = plan("planned", quality=quality, speed=speed), plan("two", "1010101010", nfe=6.5)
    text, _ = shown(profile(plans=plans), tmp_path)
    for words in (
        "Tiny, float32, weights 0123456789ab",
        "style",
        "Pipeline",
        "Euler, 10 steps",
        "-4.00 to 4.00",
        "4.5",
    ):
        assert words in text
    assert "1 × 8 × 8" in text
    assert "3 spans (of transformer, kind block, feature residual)" in text
    lines = text.splitlines()
    (second,) = [line.split() for line in lines if "blocks.2" in line]
    assert second[:3] == ["blocks.2", "1,236", "20.0%"]
    (line,) = [line.split() for line in lines if line.startswith(" planned")]
    assert line == ["planned", "4", "40%", "31", "30.25", "30.25", "2.50×", "2.25–2.75"]
    (line,) = [line.split() for line in lines if line.startswith(" two")]
    assert line == ["two", "6.5", "65%", *"–" * 5]
    assert "metric psnr, samples 2, on H100, batch 4" in " ".join(text.split())
    assert "planned  █··█··█··█" in lines
    assert "two      █·█·█·█·█·" in lines


def test_guards(tmp_path):
    band = Band("input_turn", (math.nan, *[1.0] * 9), (math.nan, *[0.1] * 9), 4)
    plans = plan("watched", guard=band), plan("not")
    lines = shown(profile(plans=plans), tmp_path)[0].splitlines()
    (line,) = [line.split() for line in lines if line.startswith(" watched")]
    assert line[:2] == ["watched", "input_turn"]
    (line,) = [line.split() for line in lines if line.startswith(" not")]
    assert line[:2] == ["not", "none"]
    assert "guard input_turn" in " ".join(shown(profile(plans=plans[:1]), tmp_path)[0].split())
    assert "none" not in shown(profile(plans=plans[1:]), tmp_path)[0]


def printed(*plans):
    console = Console(file=io.StringIO(), width=100)
    print_plans(plans, console)
    return console.file.getvalue()


def test_steps_that_are_left_to_taylor():
    """Those that could have had other weights."""
    affine, guidance = "the sampler's step is not affine", "guidance is no linear combination"
    left = {"1": ONE_FEATURE, "2": ONE_FEATURE, "4": affine, "5": guidance, "7": guidance}
    early = plan("early", facts={"left_to_taylor": {"1": ONE_FEATURE}})
    (line,) = [
        line for line in printed(plan("some", facts={"left_to_taylor": left}), early).splitlines() if "Taylor" in line
    ]
    assert line == f"some: 3 of 6 reused steps keep Taylor's weights: {guidance} (2); {affine} (1)"
    assert "Taylor" not in printed(plan("odd", facts={"left_to_taylor": ["4"]}))


def test_prompts_of_the_held_out_samples():
    quality = Quality.of("psnr", [30.25, 31.75], [7, 8])
    text = printed(plan("a", quality=quality, facts={"held_out_prompts": 2}))
    assert "samples 2, prompts 2" in " ".join(text.split())
    assert "prompts" not in printed(plan("a", quality=quality))


def test_tables_fit_a_narrow_terminal(tmp_path):
    plans = [plan(f"plan-{i}", "1" + "0" * 99, quality=Quality.of("psnr", [30.0], [0])) for i in range(2)]
    text, _ = shown(profile(plans=plans), tmp_path, out=tmp_path, width=60)
    strips = [line for line in text.splitlines() if "·····" in line]
    assert [len(line) <= 60 for line in strips] == [True] * 4  # 100 steps on two lines each
    assert "".join(line[8:] for line in strips[:2]) == "█" + "·" * 99
    assert all(name in text for name in ("worst", "mean", "plan-1", "blocks.0"))


def test_many_spans_are_cut(tmp_path):
    text, _ = shown(profile(spans=11), tmp_path / "few")
    assert "blocks.10" in text
    made = profile(spans=3)
    many = Profile(
        **{
            **vars(made),
            "spans": made.spans[:1] * 50,
            "arrays": {name: value[:1].expand(50, -1, -1, -1) for name, value in made.arrays.items()},
        }
    )
    text, _ = shown(many, tmp_path / "many")
    assert "50 spans, the first 40" in text
    assert text.count("blocks.0") == 40


def test_without_plans(tmp_path, drawn):
    text, paths = shown(profile(), tmp_path)
    assert "No plans yet." in text
    assert [path.name for path in paths] == ["gram.png", "drift.png"]


def test_strips_shade_what_is_computed_in_part():
    assert strip(plan("a", "1001")) == "█··█"
    assert strip(plan("a", "1021", spans=4)) == "█·░█"
    assert strip(plan("a", "1021", spans=2)) == "█·▒█"


def test_pictures(tmp_path, drawn):
    sensitivity = torch.rand(2, STEPS) + 0.01
    sampled = torch.zeros(2, STEPS, dtype=torch.uint8)
    sampled[:, ::3] = 1
    made = profile(
        plans=[plan("one"), plan("$\\frac{$ 猫 [red]", "1002002001", spans=3)],
        sensitivity=sensitivity,
        sensitivity_sampled=sampled,
    )
    text, paths = shown(made, tmp_path / "profile", tmp_path / "pictures")
    assert [path.name for path in paths] == ["gram.png", "drift.png", "sensitivity.png", "plans.png"]
    for path in paths:
        assert path.parent == tmp_path / "pictures"
        assert str(path) in text.splitlines()
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 30
    with Image.open(tmp_path / "pictures" / "plans.png") as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3).astype(int)
    dark, light = (np.abs(pixels - colour).max(axis=1) < 3 for colour in ([39, 81, 143], [232, 232, 238]))
    # of the strips' areas, 0.36 in and 0.48 in high, 4 of 10 and 2 + 2 · 1/3 of 10 steps are computed
    expected = (0.36 * 4 + 0.48 * (2 + 2 / 3)) / (0.36 * 10 + 0.48 * 10)
    assert dark.sum() / (dark.sum() + light.sum()) == pytest.approx(expected, abs=0.02)


def test_one_span_one_step_and_zero_features(tmp_path, drawn):
    made = profile(spans=1)
    zero = {name: torch.zeros_like(value) for name, value in made.arrays.items()}
    text, paths = shown(Profile(**{**vars(made), "arrays": zero}), tmp_path)
    assert "mean drift" not in text
    assert len(paths) == 2
    short = Fingerprint({}, "", "", {}, steps=1)
    one = {name: value[..., :1, :1] for name, value in made.arrays.items()}
    text, paths = shown(Profile(**{**vars(made), "fingerprint": short, "arrays": one}), tmp_path)
    assert any(line.rstrip().endswith("–, 1 step") for line in text.splitlines())
    assert all(path.stat().st_size for path in paths)


def test_drift_is_the_relative_change():
    made = profile()
    drift = _drift(made)
    assert np.isnan(drift[:, 0]).all()
    assert drift[:, 4] == pytest.approx(0, abs=1e-3)
    grams = made.arrays["gram_residual"][:, 0].double()
    expected = (grams[1, 2, 2] + grams[1, 1, 1] - 2 * grams[1, 1, 2]).sqrt() / grams[1, 1, 1].sqrt()
    assert drift[1, 2] == pytest.approx(float(expected))


def test_representatives():
    assert _representatives(profile(spans=3)) == [0, 1, 2]
    chosen = _representatives(profile(spans=10))
    assert len(chosen) == 6
    assert {0, 9} <= set(chosen)  # the last one is the heaviest
    made = profile(spans=10)
    heavy = [SpanFacts("heavy", "t", "block", "residual", 1, 1.0 if i == 3 else 0.0) for i in range(10)]
    assert 3 in _representatives(Profile(**{**vars(made), "spans": tuple(heavy)}))


def test_names_from_a_file_cannot_control_the_terminal(tmp_path):
    text, _ = shown(profile(plans=[plan("\x1b[31mred\nline [bold]b[/bold]")]), tmp_path)
    assert "\x1b" not in text
    assert "�[31mred�line [bold]b[/bold]" in text


def test_default_folder(tmp_path, monkeypatch):
    assert _default_out(tmp_path) == tmp_path
    assert _default_out(Path(profiles.__path__[0]) / "dit-digits") == Path("profile-pictures/dit-digits")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert _default_out(tmp_path) == Path("profile-pictures") / tmp_path.name


def test_pictures_that_cannot_be_written(tmp_path, drawn):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write pictures"):
        shown(profile(), tmp_path / "profile", tmp_path / "file")


def test_no_profile(tmp_path):
    with pytest.raises(ConfigError, match="holds no profile"):
        show(tmp_path, None, Console(file=io.StringIO()))
