"""The report's page in headless Chromium, from a file, without a network."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from evaluation_runs import INJECTED_LABEL, INJECTED_PROMPT, write_experiment, write_run

from diffusion_cache.evaluation.report import choices_tables, write_report
from diffusion_cache.evaluation.runs import read_experiment

pytest.importorskip("plotly")
playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on the PATH")

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
SUBJECTS = ("dit-digits, ddim", "dit-digits, dpm++", "wan-moving-digits, unipc", "flux-dev, flow-euler")
POINTS = """id => document.getElementById(id).data.filter(trace => trace.meta === 'points').map(trace =>
    ({name: trace.name, x: [...trace.x], y: [...trace.y], color: trace.marker.color, runs: [...trace.customdata]}))"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A name that must be escaped in the page and in its address."""
    folder = write_experiment(tmp_path_factory.mktemp("page") / "a <b>#?%20", n=6, settings=3, side=12)
    for path in folder.glob("runs/*/summary.json"):
        summary = json.loads(path.read_text())
        if summary["metrics"]:
            summary["metrics"]["temporal_error"] = summary["metrics"]["latent_error"]
        path.write_text(json.dumps(summary))
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def page(browser, folder) -> Iterator[Any]:
    """The page; afterwards, nothing may have been said on the console, asked of the network or run from a prompt."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    address = (folder / "report.html").as_uri()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (said.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.wait_for_selector("#runs tbody tr")
    yield page
    page.wait_for_timeout(100)
    assert said == []
    assert [url for url in asked if not url.startswith(("data:", "blob:"))] == [address]
    context.close()


def points(page: Any, plot: str = "front") -> dict[str, Any]:
    return {trace["name"]: trace for trace in page.evaluate(POINTS, plot)}


def table(page: Any, column: str) -> list[str]:
    """The cells of one column."""
    place = page.locator("#runs thead th").all_inner_texts().index(column)
    return [row.locator("td").nth(place).inner_text() for row in page.locator("#runs tbody tr").all()]


def test_front_shows_the_runs_figures(page, folder):
    runs = [run for run in read_experiment(folder).runs if run.subject == ("dit-digits", "ddim")]
    found = points(page)
    assert set(found) == {run.method for run in runs if run.correct} - {INJECTED_LABEL} | {
        "&lt;b&gt;bold&lt;/b&gt; | label"
    }
    expected = {
        (run.costs["nfe_ratio"], round(run.score("psnr").mean or 0, 1)) for run in runs if run.method == "planned"
    }
    trace = found["planned"]
    assert {(x, round(y, 1)) for x, y in zip(trace["x"], trace["y"], strict=True)} == expected
    # infinite values are drawn above all others, on a line that says so
    highest = max(y for name, each in found.items() if name != "uncached" for y in each["y"])
    assert found["uncached"]["y"] == [highest]
    first_block = max(run.score("psnr").mean or 0 for run in runs if run.method == "first_block")
    assert math.isinf(first_block)
    assert "∞" in page.inner_text("#front")


def test_switches_change_the_plot(page):
    page.select_option("#metric", "psnr_mean")
    mean = points(page)["planned"]
    page.select_option("#metric", "psnr_p5")
    tail = points(page)["planned"]
    assert tail["x"] == mean["x"]
    assert all(p5 < m for p5, m in zip(tail["y"], mean["y"], strict=True))
    assert "5th percentile" in page.text_content("#front .ytitle")
    page.select_option("#cost", "flops_ratio")
    assert points(page)["planned"]["x"] == pytest.approx([x + 0.01 for x in mean["x"]])
    page.select_option("#cost", "speed_ratio")
    fast = points(page)["planned"]
    assert len(fast["x"]) == len(mean["x"]) - 1  # one setting was not timed
    assert min(fast["x"]) > 1
    page.select_option("#subject", label=SUBJECTS[2])
    assert points(page)["planned"]["y"] != fast["y"]
    assert page.input_value("#metric") == "psnr_p5"  # the switches stay as they are
    page.select_option("#subject", label=f"{SUBJECTS[3]} (random weights: speed only)")
    assert set(points(page)) == {"interval", "uncached"}
    assert "Random weights: speed only" in page.inner_text("#front-note")
    assert page.locator("#metric option").all_inner_texts() == ["speed, × the uncached run (wall time)"]


def test_metrics_beside_the_usual_ones_can_be_chosen(page):
    page.select_option("#metric", "latent_error")
    expected = points(page)["planned"]["y"]
    page.select_option("#metric", label="temporal error, mean")
    assert points(page)["planned"]["y"] == expected
    assert "the best are lower left" in page.inner_text("#front-note")


def test_legend_filters_every_plot_and_the_table(page):
    colors = points(page)
    strip = points(page, "strip")
    assert {name: trace["color"] for name, trace in strip.items()} == {name: colors[name]["color"] for name in strip}
    button = page.locator("button[data-method='ours planned']")
    button.focus()
    page.keyboard.press("Space")
    assert button.get_attribute("aria-pressed") == "false"
    assert "planned" not in points(page)
    assert "planned" not in points(page, "strip")
    assert "planned" not in table(page, "method")
    page.click("#no-methods")
    assert points(page) == {}
    assert page.inner_text("#count") == "0 of 81 runs"
    page.click("#all-methods")
    assert set(points(page)) == set(colors)


def test_table_filter_and_order(page):
    assert page.inner_text("#count") == "81 of 81 runs"
    page.fill("#filter", "TAYLOR wan")
    assert page.inner_text("#count") == "6 of 81 runs"
    assert set(table(page, "model")) == {"wan-moving-digits"}
    assert set(table(page, "method")) == {"uniform, Taylor", "diffusers TaylorSeer"}
    page.fill("#filter", "")
    page.select_option("#table-subject", "one")
    assert page.inner_text("#count") == "26 of 81 runs"
    for direction, missing_last in (("ascending", True), ("descending", True)):
        page.click("th[data-key='psnr_mean'] button")
        assert page.get_attribute("th[data-key='psnr_mean']", "aria-sort") == direction
        shown = table(page, "PSNR")
        assert (shown[-1] == "–") == missing_last
        values = [math.inf if text == "∞" else float(text) for text in shown if text != "–"]
        assert values == sorted(values, reverse=direction == "descending")
    assert [text for text in table(page, "note") if text.startswith("incorrect")] != []
    page.check("#table-front")
    assert "–" not in table(page, "PSNR")


def test_one_run(page, folder):
    run = next(run for run in read_experiment(folder).runs if run.method == "planned" and run.sampler == "dpm++")
    page.select_option("#subject", label=SUBJECTS[1])
    page.fill("#filter", f"planned {run.folder.name}")
    page.click("#runs tbody tr td button")
    assert run.folder.name in page.inner_text("#facts")
    heat = page.evaluate("[...document.getElementById('heat').data[0].z].map(row => [...row])")
    assert run.heatmap is not None
    assert [[share / 100 for share in row] for row in heat] == [
        list(row) for row in zip(*run.heatmap["computed"], strict=True)
    ]
    page.select_option("#run", index=0)
    assert "uncached" in page.inner_text("#run option:checked")
    assert "100% over all" in page.inner_text("#heat-note")
    assert "∞ dB" in page.inner_text(".triplet >> nth=0")
    assert page.locator("#pictures .picture span").all_inner_texts().count("difference: none") == 2


def test_click_on_a_point_chooses_the_run(page):
    trace = points(page)["cache-dit DBCache"]
    page.evaluate(
        "i => document.getElementById('front').emit('plotly_click', {points: [{customdata: i}]})", trace["runs"][0]
    )
    assert page.input_value("#run") == str(trace["runs"][0])
    assert "cache-dit DBCache" in page.inner_text("#run option:checked")


def test_pictures_enlarge(page):
    dialog = page.locator("dialog")
    button = page.locator(".triplet button").first
    small = button.locator("img").first.bounding_box()
    assert button.locator("img").first.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [12, 12]
    assert button.locator("img").first.evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"
    assert not dialog.is_visible()
    button.locator("img").nth(1).click()
    assert dialog.is_visible()
    assert dialog.locator("img").count() == 3
    assert dialog.locator("img").first.bounding_box()["width"] > 2 * small["width"]
    assert "|difference| ×" in dialog.inner_text()
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    button.focus()
    page.keyboard.press("Enter")
    assert dialog.is_visible()
    page.click("dialog button")
    assert not dialog.is_visible()


def test_samples_by_method_and_by_prompt(page, folder):
    assert page.locator("#budget option").all_inner_texts() == ["1/2", "1/3", "1/4", "1/5"]
    assert "a budget may be exceeded by up to 6%" in page.inner_text("#strip-note")
    page.select_option("#budget", "1/2")
    by_method = points(page, "strip")["planned"]
    (place,) = set(by_method["runs"])
    name = page.evaluate("i => JSON.parse(document.getElementById('data').textContent).runs[i].run", place)
    (run,) = (run for run in read_experiment(folder).runs if run.folder.name == name)
    assert run.samples.values is not None
    assert by_method["x"] == pytest.approx(run.samples.values["psnr"], abs=0.005)
    assert len({round(y) for y in by_method["y"]}) == 1
    page.select_option("#by", "prompt")
    by_prompt = points(page, "strip")["planned"]
    assert sorted(by_prompt["x"]) == sorted(by_method["x"])
    assert len({round(y) for y in by_prompt["y"]}) == len(set(run.samples.prompts)) == 6
    assert INJECTED_PROMPT[:20] in page.inner_text("#strip")


def test_pictures_without_psnr(browser, tmp_path):
    run = write_run(tmp_path, kind="baseline", method="fewer steps")
    pq.write_table(pq.read_table(run / "rows.parquet").drop_columns(["psnr"]), run / "rows.parquet")
    summary = json.loads((run / "summary.json").read_text())
    del summary["metrics"]["psnr"]
    (run / "summary.json").write_text(json.dumps(summary))
    write_report(tmp_path)
    context = browser.new_context()
    page = context.new_page()
    page.goto((tmp_path / "report.html").as_uri())
    page.wait_for_selector("#runs tbody tr")
    captions = page.locator(".triplet figcaption").all_inner_texts()
    assert captions == ["shown sample: seed 101, zero", f"shown sample: seed 100, {INJECTED_PROMPT}"]
    context.close()


def test_what_to_take_without_a_profile(page, folder):
    expected = choices_tables(read_experiment(folder).runs)
    assert expected[0].rows[0][4] == "dc.enable(pipe, policy='interval', every=2, scope='stack')"
    shown = page.locator("#choices table").all()
    assert [table.locator("caption").inner_text() for table in shown] == [table.title for table in expected]
    cells = shown[0].locator("tbody tr").first.locator("td")
    assert cells.all_inner_texts() == expected[0].rows[0]
    assert cells.locator("code").all_inner_texts() == [expected[0].rows[0][4]]


def test_untrusted_text_is_shown_as_text(page):
    assert page.inner_text("h1") == "a <b>#?%20"
    assert page.locator("img[src='x']").count() == 0
    assert INJECTED_LABEL in table(page, "method")
    assert page.locator("#methods b, #runs b").count() == 0
    page.select_option("#by", "prompt")
    assert page.evaluate("document.querySelectorAll('script').length") == 3


def test_a_handler_that_got_into_the_page_does_not_run(browser, folder):
    """The second line of defence, the page's policy; it reports on the console, hence a page of its own."""
    context = browser.new_context()
    page = context.new_page()
    page.goto((folder / "report.html").as_uri())
    outcome = page.evaluate(
        """() => new Promise(done => {
            document.addEventListener('securitypolicyviolation', event => done(event.violatedDirective));
            const box = document.createElement('div');
            box.setAttribute('onclick', 'window.ran = true');
            box.click();
            setTimeout(() => done(window.ran ? 'it ran' : 'nothing'), 500);
        })"""
    )
    assert outcome == "script-src-attr"
    context.close()


def test_dark_and_narrow(browser, folder):
    context = browser.new_context(color_scheme="dark", viewport={"width": 400, "height": 800})
    page = context.new_page()
    page.goto((folder / "report.html").as_uri())
    page.wait_for_selector("#runs tbody tr")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 20, 23)"
    assert page.evaluate("document.getElementById('front').layout.font.color") == "#e6e6e3"
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    page.emulate_media(color_scheme="light")
    color = "document.getElementById('front').layout.font.color"
    for _ in range(50):  # Playwright's own waiting would need `eval`, which the page's policy forbids
        if page.evaluate(color) == "#1c1e21":
            break
        page.wait_for_timeout(200)
    assert page.evaluate(color) == "#1c1e21"
    context.close()
