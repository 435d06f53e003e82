"""Measure every class of denoisers, pipelines and language models that the tests know.

Writes docs/coverage.md and results/coverage.json.

Usage: python scripts/coverage.py [--only slicing …] [--out results/coverage.json] [--page docs/coverage.md]
"""

import argparse
import dataclasses
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from rich.progress import track

import diffusion_cache as dc
from diffusion_cache import models

TESTS = Path(__file__).parent.parent / "tests"
POLICIES = {"mask": dict(mask="1010"), "first_block": dict(threshold=1e9, max_consecutive=1)}


def denoisers() -> dict[str, list[dict[str, Any]]]:
    import zoo
    from zoo_checks import checks

    rows = {}
    for case in track(zoo.cases(), "denoisers"):
        rows[case.id] = [dataclasses.asdict(check) for check in checks(case)]
    return rows | {name: [{"scope": "", "reason": why}] for name, why in zoo.unbuildable().items()}


def slicing() -> dict[str, dict[str, Any]]:
    import zoo
    from zoo_checks import sliced

    found = {case.id: sliced(case, zoo.build(case)) for case in track(zoo.cases(), "slicing")}
    return {name: dataclasses.asdict(row) for name, row in found.items() if row is not None}


def language() -> dict[str, Any]:
    import language_zoo

    classes = {name: language_zoo.measured(name) for name in track(language_zoo.CASES, "language models")}
    return {"transformers": transformers.__version__, "classes": classes}


def pipelines() -> dict[str, dict[str, Any]]:
    import pipeline_zoo

    return {case.id: pipeline(case) for case in track(pipeline_zoo.cases(), "pipelines")}


def pipeline(case: Any) -> dict[str, Any]:
    """Whether it is as before when off, and how many denoiser calls each policy reuses."""
    from pipeline_zoo import equal, tensors

    pipe = case.build()
    uncached = tensors(pipe(**case.call()))
    row: dict[str, Any] = {"class": case.name, "calls": case.iterations * case.calls, "reused": {}, "reasons": {}}
    for policy, options in POLICIES.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", dc.DiffusionCacheWarning)
            try:
                with dc.cached(pipe, policy, "reuse", **options):
                    pipe(**case.call())
                    row["reused"][policy] = dc.summary(pipe).reused
                    if len(dc.summary(pipe).records) != row["calls"]:
                        raise SystemExit(f"{case.id}: calls were miscounted")
            except dc.DiffusionCacheError as error:
                row["reasons"][policy] = str(error)
        told = [str(w.message) for w in caught if issubclass(w.category, dc.DiffusionCacheWarning)]
        if told:
            row["reasons"][policy] = "; ".join(told)
    row["restored"] = equal(tensors(pipe(**case.call())), uncached)
    return row


def streams() -> dict[str, Any]:
    """Which pipelines run as a stream: their calls, how many are reused, and the noise levels in one call."""
    import pipeline_zoo

    rows, refused = {}, {}
    for case in track(pipeline_zoo.cases(), "streams"):
        try:
            rows[case.id] = stream(case)
        except dc.DiffusionCacheError as error:
            refused[case.id] = str(error)
    return {"rows": rows, "refused": refused}


def stream(case: Any) -> dict[str, Any]:
    from pipeline_zoo import equal, tensors

    pipe, levels = case.build(), [0]
    options: dict[str, Any] = {"policy": "interval", "stream": dc.Stream()}

    def seen(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        levels.append(max(len(row.unique()) for row in kwargs["timestep"]))

    with dc.cached(pipe, every=2, **options), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", dc.DiffusionCacheWarning)
        pipe(**case.call())
        summary = dc.summary(pipe)
    hooks = [model.register_forward_pre_hook(seen, with_kwargs=True) for model in models.find_denoisers(pipe).values()]
    uncached = tensors(pipe(**case.call()))
    for hook in hooks:
        hook.remove()
    with dc.cached(pipe, every=1, **options):
        computed = tensors(pipe(**case.call()))
    return {
        "class": case.name,
        "calls": len(summary.records),
        "reused": summary.reused,
        "levels": max(levels),
        "reason": "; ".join(str(w.message) for w in caught if issubclass(w.category, dc.DiffusionCacheWarning)),
        "identical": equal(computed, uncached),
        "restored": equal(tensors(pipe(**case.call())), uncached),
    }


def declared() -> list[str]:
    """The families of which something had to be declared in diffusion_cache/models."""
    return sorted({*models.DENOISERS, *models.LOOKING_INSIDE})


def page(report: dict[str, Any]) -> str:
    checked, piped = report["denoisers"], report["pipelines"]
    built = {name: rows for name, rows in checked.items() if rows[0]["scope"]}
    cached = [row for row in piped.values() if any(row["reused"].values())]
    lines = [
        "# Coverage",
        "",
        f"Measured by `make coverage` with diffusers {report['diffusers']} and torch {report['torch']}, on tiny models "
        "with random weights.",
        "",
        f"- **{len({name.split('-')[0] for name in built})} denoiser classes** in {len(built)} configurations, "
        f"{sum(len(rows) for rows in built.values())} pairs of configuration and scope.",
        f"- **{len({row['class'] for row in cached})} pipeline classes** in {len(cached)} configurations generate with "
        "reused steps, and as before when the cache is off.",
        f"- {len(report['declared'])} classes needed a declaration in `diffusion_cache/models`: "
        f"{', '.join(f'`{name}`' for name in report['declared'])}. Everything else is inferred from the modules and "
        "from what they receive and return. Calls that fill a cache of keys and values are known by their arguments.",
        "",
        "## Denoisers",
        "",
        "For each scope: spans found, and the largest relative error of a step that is reused with the inputs it was "
        "computed from (0 is exact, rounding is below 1e-5). Always computing was bit-identical and the model was "
        "restored in every case listed. Where nothing can be reused, the reason that is told stands instead.",
        "",
        "| class | denoiser | stack or cuts | block | branch |",
        "|---|---|---|---|---|",
    ]
    notes: list[str] = []
    for name, rows in built.items():
        cells = {"denoiser": [], "middle": [], "block": [], "branch": []}
        for row in rows:
            if not (row["identical"] and row["restored"]):
                raise SystemExit(f"{name} at {row['scope']} is not as before: no page")
            kind = row["scope"] if row["scope"] in cells else "middle"
            prefix = f"{row['scope']}: " if row["scope"].startswith("cut") else ""
            if row["reused"]:
                cells[kind].append(f"{prefix}{row['spans']} ({row['error']:.0e})".replace("(0e+00)", "(0)"))
            else:
                if row["reason"] not in notes:
                    notes.append(row["reason"])
                cells[kind].append(f"{prefix}[{notes.index(row['reason']) + 1}]")
        lines.append(f"| {name} | " + " | ".join("<br>".join(cell) for cell in cells.values()) + " |")
    lines += ["", *(f"{i}. {note}" for i, note in enumerate(notes, 1)), ""]
    lines += ["No denoisers, though exported among them:", ""]
    lines += [f"- {name}: {rows[0]['reason']}" for name, rows in checked.items() if not rows[0]["scope"]]
    lines += [
        "",
        "## Slices",
        "",
        "`dc.slice_features` with the least `max_bytes` that works: modules that can run in slices, bytes that the "
        "most demanding group takes for a slice of one (at the tiny size of these models), and the largest relative "
        "error of the output. The model was restored in every case listed.",
        "",
        "| class | modules | least bytes | error |",
        "|---|---:|---:|---:|",
    ]
    for name, row in report["slicing"].items():
        if not row["restored"]:
            raise SystemExit(f"{name} in slices is not as before: no page")
        lines.append(f"| {name} | {row['modules']} | {row['least']:,} | {row['error']:.0e} |".replace("0e+00", "0"))
    sliced = {name.split("-")[0] for name in report["slicing"]}
    whole = [name for name in dict.fromkeys(name.split("-")[0] for name in built) if name not in sliced]
    language = report["language"]
    lines += [
        "",
        f"Left whole are {', '.join(whole)}: none of their modules is of a class that can be "
        "[sliced](slicing.md#what-is-sliced), and `slice_features` refuses them with an error that says so.",
        "",
        "## Language models",
        "",
        f"`dc.enable(pipe, method=…)` on a `LLaDA2Pipeline` with a causal model of transformers "
        f"{language['transformers']}, given each kind of attention: the largest difference of a generation's logits "
        "from those of no cache, over the largest logit, with a method that is exact there (`prefix`; with full "
        "attention, where `prefix` is refused, `dkv(refresh=1)`); the tokens that `prefix` runs of the uncached ones; "
        "and which methods generate with fewer tokens run.",
        "",
        "| class | block-causal | tokens run | causal | full | methods |",
        "|---|---:|---:|---:|---:|---|",
    ]
    refused = []
    for name, row in language["classes"].items():
        if row["reason"]:
            refused.append(row["reason"])
            continue
        errors = [f"{row['error'][kind]:.0e}".replace("0e+00", "0") for kind in ("block-causal", "causal", "full")]
        methods = ", ".join(f"`{method}`" for method in row["methods"])
        lines.append(f"| {name} | {errors[0]} | {row['share']:.0%} | {errors[1]} | {errors[2]} | {methods} |")
    lines += ["", "Refused, before anything has changed:", ""]
    lines += [f"- {reason}." for reason in refused]
    lines += [
        "",
        "## Pipelines",
        "",
        "Denoiser calls in one generation, and how many of them two policies reused: the mask 1010 (rescaled to the "
        "run), and first_block with every other step allowed. Step, pass and total are checked by the tests.",
        "",
        "| pipeline | calls | mask | first_block |",
        "|---|---|---|---|",
    ]
    told: list[str] = []
    for name, row in piped.items():
        if not row["restored"]:
            raise SystemExit(f"{name} is not as before: no page")
        cells = []
        for policy in POLICIES:
            why = row["reasons"].get(policy)
            if why and why not in told:
                told.append(why)
            count = row["reused"].get(policy)
            cells.append(
                " ".join(str(x) for x in (count, f"[{told.index(why) + 1}]" if why else None) if x is not None)
            )
        lines.append(f"| {name} | {row['calls']} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{i}. {note}" for i, note in enumerate(told, 1)), "", *streams_page(report)])


def streams_page(report: dict[str, Any]) -> list[str]:
    found, refused = report["streams"]["rows"], report["streams"]["refused"].values()
    single = sum("the noise level of each latent frame" in why for why in refused)
    lines = [
        "## Streams",
        "",
        "The pipelines whose calls have a noise level for each latent frame (or token), with `stream=dc.Stream()`, "
        "`interval` and `taylor`: denoiser calls in one generation, how many of them are reused with every second one "
        "computed, and the most different levels in a call. With all computed the output was bit-identical, and as "
        f"before when the cache is off. Of the other configurations above, {single} have one level a call and "
        f"are refused with an error that says so; {len(refused) - single} are refused for what they are.",
        "",
        "| pipeline | denoiser calls | reused | levels |",
        "|---|---:|---:|---:|",
    ]
    told = list(dict.fromkeys(row["reason"] for row in found.values() if row["reason"]))
    for name, row in found.items():
        if not (row["identical"] and row["restored"]):
            raise SystemExit(f"{name} as a stream is not as before: no page")
        note = f" [{told.index(row['reason']) + 1}]" if row["reason"] else ""
        lines.append(f"| {name} | {row['calls']} | {row['reused']}{note} | {row['levels']} |")
    return [*lines, "", *(f"{i}. {note}" for i, note in enumerate(told, 1)), ""]


PARTS = {"denoisers": denoisers, "slicing": slicing, "language": language, "pipelines": pipelines, "streams": streams}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=list(PARTS), help="the rest stays as it is in --out"
    )
    parser.add_argument("--out", type=Path, default=Path("results/coverage.json"))
    parser.add_argument("--page", type=Path, default=Path("docs/coverage.md"))
    options = parser.parse_args()
    sys.path.insert(0, str(TESTS))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    report = {
        "diffusers": diffusers.__version__,
        "torch": torch.__version__.split("+")[0],
        "declared": declared(),
    }
    kept = json.loads(options.out.read_text()) if set(options.only) < set(PARTS) else {}
    if kept and any(kept[name] != report[name] for name in ("diffusers", "torch")):
        raise SystemExit(f"{options.out} was measured with other versions: measure everything, without --only")
    report |= {name: part() if name in options.only else kept[name] for name, part in PARTS.items()}
    text = page(report)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    options.page.write_text(text)


if __name__ == "__main__":
    main()
