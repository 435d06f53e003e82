"""What is generated in an evaluation: prompts or classes, each with its seed."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..registry import suggest, unknown_name

# seeds from here on are for fitting; nothing that is reported uses them
FITTING_SEEDS = 100_000
TABLES = (".csv", ".tsv", ".parquet")

BUILTIN = {
    "short": (
        "a red bicycle leaning against a white wall",
        "a bowl of ramen with a soft-boiled egg",
        "an old lighthouse in a storm, oil painting",
        "a cat asleep on a pile of books",
        "a glass of water on a wooden table, morning light",
        "a mountain lake mirroring snow-covered peaks",
        "a street market at night in the rain",
        "a paper boat on a puddle",
        "a portrait of an elderly fisherman, black and white",
        "a steam locomotive crossing a stone bridge",
        "three green apples and one lemon on a blue plate",
        "a hot-air balloon over lavender fields",
        "a robot watering tomatoes in a greenhouse",
        "a handwritten sign that says OPEN in a bakery window",
        "a fox in fresh snow, looking at the camera",
        "an astronaut reading a newspaper on a park bench",
    ),
    "motion": (
        "waves rolling onto a pebble beach",
        "a candle flame flickering in the dark",
        "a dog running through tall grass towards the camera",
        "clouds moving fast over a city skyline",
        "a woman pouring tea from a clay pot",
        "a red car driving along a coastal road, seen from above",
        "leaves falling in an autumn forest",
        "a dancer turning on an empty stage",
    ),
}


@dataclass(frozen=True)
class Sample:
    """One thing to generate. prompt: text, or a class label; seed: of its initial noise."""

    index: int
    prompt: str | int
    seed: int


def samples(options: Mapping[str, Any], classes: bool, video: bool) -> list[Sample]:
    """The samples that a `prompts` configuration names, seeds counted up from its first one.

    classes: whether the model takes class labels, 0 to 9, rather than text; video: whether `n_video`, where it is
    given, is the number.

    Raises:
        ConfigError: for an unknown kind or list, a file that cannot be read or holds no prompts, or seeds in the range
            that fitting uses.
    """
    kind = options["kind"]
    n = options["n_video"] if video and options["n_video"] is not None else options["n"]
    if kind not in ("classes", "builtin", "file"):
        raise unknown_name("kind of prompts", kind, ("classes", "builtin", "file"))
    if classes != (kind == "classes"):
        raise ConfigError(
            "this model takes class labels: use prompts=classes"
            if classes
            else "this model takes text: use prompts=builtin, or prompts=file prompts.path=…"
        )
    if n is not None and (not isinstance(n, int) or n < 1):
        raise ConfigError(f"prompts.n must be at least 1, not {n!r}")
    texts: list[Any]
    if kind == "classes":
        texts = list(range(10))
        n = n or len(texts)
    elif kind == "builtin":
        if options["list"] not in BUILTIN:
            raise unknown_name("list of prompts", options["list"], BUILTIN)
        texts = list(BUILTIN[options["list"]])
        n = n or len(texts)
    else:
        if not isinstance(options["path"], str):
            raise ConfigError(f"prompts.path must be the path of a file of prompts, not {options['path']!r}")
        texts = read_prompts(Path(options["path"]), options["column"])
        n = n or len(texts)
    first = options["first_seed"]
    check_reported(first, n)
    return [Sample(index, texts[index % len(texts)], first + index) for index in range(n)]


def check_reported(first: int, n: int) -> None:
    """ConfigError for n seeds from `first` on of which some are negative, or in the range that fitting uses."""
    if isinstance(first, bool) or not isinstance(first, int):
        raise ConfigError(f"prompts.first_seed must be a whole number, 0 or more, not {first!r}")
    if first < 0 or first + n > FITTING_SEEDS:
        raise ConfigError(
            f"seeds {first} to {first + n - 1} are asked for; those from {FITTING_SEEDS} on are for fitting: "
            f"take seeds from 0 to {FITTING_SEEDS - 1}"
        )


def read_prompts(path: Path, column: str) -> list[str]:
    """The prompts in a text file, one a line, or in a column of a CSV, TSV or Parquet table.

    Raises:
        ConfigError: if the file is missing, not readable as what its name says, lacks the column or has no prompts.
    """
    if not path.is_file():
        raise ConfigError(f"there is no file {path} to read prompts from")
    try:
        if path.suffix.lower() in TABLES:
            found = _column(path, column)
        else:
            found = path.read_text(encoding="utf-8-sig").split("\n")  # which stands for any end of a line here
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors as well
        raise ConfigError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    prompts = [text.strip() for text in found if text and text.strip()]
    if not prompts:
        raise ConfigError(f"{path} holds no prompts")
    return prompts


def _column(path: Path, column: str) -> list[str]:
    import pyarrow.csv
    import pyarrow.parquet

    if path.suffix.lower() == ".parquet":
        table = pyarrow.parquet.read_table(path)
    else:
        separator = "\t" if path.suffix.lower() == ".tsv" else ","
        multiline = pyarrow.csv.ParseOptions(delimiter=separator, newlines_in_values=True)
        as_written = pyarrow.csv.ConvertOptions(column_types={column: pyarrow.string()})
        table = pyarrow.csv.read_csv(path, parse_options=multiline, convert_options=as_written)
    if column not in table.column_names:
        raise ConfigError(f"{path} has no column {column!r}. {suggest(column, table.column_names)}")
    return [str(value) for value in table[column].to_pylist() if value is not None]
