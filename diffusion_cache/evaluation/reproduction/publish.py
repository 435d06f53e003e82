"""Running claims, and what is published of them."""

import ast
import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from ...errors import ConfigError
from ...files import written
from ..store import environment_facts
from . import bench
from .claims import Claim, Outcome, SeedSet

Progress = Callable[[str, int, int], None]
HEAD = """# The published claims, checked here

Each claim was checked on the shipped models (language caches with weights blurred until the model errs; slicing with
random weights) with {sets} disjoint sets of seeds, at equal measured compute (the last column but one). It holds if
it does on every set; where a cell gives several budgets, by their mean. Claims on routers are read off the trainings
of `make routers`, one to a set, of which some have not been made. These are small models: a claim that fails here may
hold on the paper's, and the reason found is given; figures in reasons that the table lacks were read by hand, and no
script prints them. `make reproduce` makes the rest of this page and `results/reproduction.json`.

| system | claim | published | ours, per set of seeds | equal compute | holds |
| --- | --- | --- | --- | --- | --- |
"""


def run(
    claims: Sequence[Claim],
    sets: Sequence[SeedSet],
    folder: Path,
    progress: Progress = lambda what, done, of: None,
) -> list[dict[str, Any]]:
    """Check the claims; outcomes are kept in `folder`, by the claim's source, and not computed again.

    Returns: a row of each claim, see `Claim.row`, with "environments": for each set of seeds what its outcome was made
        with, None where that was not kept.

    Raises:
        ConfigError: where claims fail for which no reason is given, after all have been checked.
    """
    found: dict[str, dict[int, tuple[Outcome, Any]]] = {claim.name: {} for claim in claims}
    places = [(seeds, claim) for seeds in sets for claim in claims]  # modules keep runs that their claims share
    for place, (seeds, claim) in enumerate(places):
        progress(f"{claim.name}, seeds {seeds.index}", place, len(places))
        found[claim.name][seeds.index] = _outcome(claim, seeds, folder)
    rows, problems = [], []
    for claim in claims:
        made = found[claim.name]
        try:
            row = claim.row({index: outcome for index, (outcome, _) in made.items()})
            rows.append({**row, "environments": [made[index][1] for index in row["seeds"]]})
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return rows


def merged(published: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The published rows of all claims, in the order of their names, with these in the place of older ones."""
    found = {row["name"]: row for row in (*published, *rows)}
    return [found[name] for name in sorted(found)]


def publish(
    home: Path, rows: Sequence[dict[str, Any]], stays: Callable[[dict[str, Any]], bool] = lambda row: True
) -> list[dict[str, Any]]:
    """Write docs/reproduction.md and results/reproduction.json: these rows, beside the published ones that stay.

    Returns: all rows that are published now.
    """
    figures = home / "results" / "reproduction.json"
    published = json.loads(figures.read_text(encoding="utf-8"))
    rows = merged([row for row in published if stays(row)], rows)
    for path, text in (
        (home / "docs" / "reproduction.md", markdown(rows)),
        (figures, json.dumps(rows, indent=2) + "\n"),
    ):
        with written(path) as draft:
            draft.write_text(text, encoding="utf-8")
    return rows


def _outcome(claim: Claim, seeds: SeedSet, folder: Path) -> tuple[Outcome, dict[str, Any] | None]:
    """What a check says, and what it was made with (None where an earlier version kept it without)."""
    source = _code(sys.modules[claim.check.__module__]) + _code(bench) + repr(seeds)
    path = folder / f"{claim.name}-{seeds.index}-{hashlib.sha256(source.encode()).hexdigest()[:12]}.json"
    if path.is_file():
        kept = json.loads(path.read_text())
        environment = kept.pop("environment", None)
        return Outcome(**kept), environment
    outcome, environment = claim.check(seeds), environment_facts()
    folder.mkdir(parents=True, exist_ok=True)
    with written(path) as draft:
        draft.write_text(json.dumps({**asdict(outcome), "environment": environment}, indent=2))
    return outcome, environment


def _code(module: ModuleType) -> str:
    """A module's source without what decorators say of its claims: another reason is no other outcome."""
    tree = ast.parse(inspect.getsource(module))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.decorator_list.clear()
    return ast.dump(tree)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The page: a table of all claims, and below it the reasons of those that fail."""
    sets = max(len(row["seeds"]) for row in rows)
    lines = [HEAD.format(sets=sets).rstrip()]
    failed = [row for row in rows if not row["holds"]]
    for row in rows:
        cells = [row["system"], row["claim"], row["published"] or "–", "<br>".join(row["ours"])]
        cells += ["<br>".join(dict.fromkeys(row["equal_compute"])), _verdict(row, failed, sets)]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    if failed:
        lines += ["", "## Where a claim does not hold", ""]
        lines += [f"{place}. {row['claim'].rstrip('.')}. {row['reason']}" for place, row in enumerate(failed, start=1)]
    return "\n".join(lines) + "\n"


def _verdict(row: dict[str, Any], failed: Sequence[dict[str, Any]], sets: int) -> str:
    held = sum(row["held"])
    if row["holds"]:
        return "yes" if held == sets else f"yes, on {held} set{'s' * (held > 1)}"
    word = f"on {held} of {len(row['held'])}" if held else "no"
    return f"{word} ({1 + list(failed).index(row)})"
