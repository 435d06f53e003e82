"""Check the published systems' claims: `python scripts/reproduce.py [experiment=bac] [experiment=ertacache.ablation]`.

Writes docs/reproduction.md and results/reproduction.json when all claims were checked, which is resumed where it was
interrupted (outputs/reproduce). A choice of claims is only shown, or with --merge put beside what is published of the
others.
"""

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.markdown import Markdown

from diffusion_cache.cli.interrupts import kept_interrupts
from diffusion_cache.cli.progress import announcing
from diffusion_cache.evaluation.reproduction import load_claims, seed_sets
from diffusion_cache.evaluation.reproduction.publish import markdown, publish, run
from diffusion_cache.evaluation.reproduction.routers import is_of_routers
from diffusion_cache.evaluation.subjects import quieten_libraries

HOME = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", metavar="experiment=NAME", help="a system or one of its claims")
    parser.add_argument("--out", type=Path, default=HOME / "outputs" / "reproduce", help="where outcomes are kept")
    parser.add_argument("--merge", action="store_true", help="publish the chosen claims; the others stay as they are")
    options = parser.parse_args()
    torch.set_num_threads(1)
    quieten_libraries()
    claims = load_claims(name.removeprefix("experiment=") for name in options.experiments)
    console = Console()
    with kept_interrupts(), announcing(console, "reproduction") as progress:
        rows = run(claims, seed_sets(), options.out, progress)
    if options.experiments and not options.merge:
        console.print(Markdown(markdown(rows)))
        return
    rows = publish(HOME, rows, lambda row: options.merge or is_of_routers(row))
    console.print(f"{len(rows)} claims, {sum(row['holds'] for row in rows)} hold: docs/reproduction.md")


if __name__ == "__main__":
    main()
