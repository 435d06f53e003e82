import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffusion_cache.errors import ConfigError
from diffusion_cache.evaluation.prompts import BUILTIN, FITTING_SEEDS, read_prompts, samples

CLASSES = {"kind": "classes", "n": 12, "n_video": 4, "first_seed": 7}


def test_classes_go_round_with_seeds_counted_up():
    found = samples(CLASSES, classes=True, video=False)
    assert [sample.prompt for sample in found] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert [sample.seed for sample in found] == list(range(7, 19))
    assert [sample.index for sample in found] == list(range(12))


def test_videos_may_have_a_number_of_their_own():
    assert len(samples(CLASSES, classes=True, video=True)) == 4
    assert len(samples({**CLASSES, "n_video": None}, classes=True, video=True)) == 12


def test_builtin_lists():
    options = {"kind": "builtin", "list": "motion", "n": None, "n_video": None, "first_seed": 0}
    found = samples(options, classes=False, video=True)
    assert [sample.prompt for sample in found] == list(BUILTIN["motion"])
    with pytest.raises(ConfigError, match="Did you mean 'motion'"):
        samples({**options, "list": "motoin"}, classes=False, video=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "classs"}, "Did you mean 'classes'"),
        ({"n": 0}, "at least 1"),
        ({"n": "many"}, "at least 1"),
        ({"first_seed": -1}, "are for fitting"),
        ({"first_seed": None}, r"prompts\.first_seed must be a whole number, 0 or more, not None"),
        ({"first_seed": "abc"}, "not 'abc'"),
        ({"first_seed": FITTING_SEEDS - 3}, "are for fitting"),
    ],
)
def test_bad_options(change, message):
    with pytest.raises(ConfigError, match=message):
        samples({**CLASSES, **change}, classes=True, video=False)


def test_text_for_a_model_of_classes_and_the_reverse():
    with pytest.raises(ConfigError, match="takes text"):
        samples(CLASSES, classes=False, video=False)
    with pytest.raises(ConfigError, match="takes class labels"):
        samples({**CLASSES, "kind": "builtin", "list": "short"}, classes=True, video=False)


def test_a_file_that_is_not_named():
    with pytest.raises(ConfigError, match=r"prompts\.path must be the path of a file of prompts, not None"):
        samples({**CLASSES, "kind": "file", "path": None, "column": "prompt"}, classes=False, video=False)


def test_files_of_prompts(tmp_path):
    text = tmp_path / "prompts.txt"
    text.write_text("a fox\n\n  a boat, at night \n", encoding="utf-8")
    assert read_prompts(text, "prompt") == ["a fox", "a boat, at night"]
    table = tmp_path / "prompts.csv"
    table.write_text('id,prompt\n1,"a fox, running"\n2,"two\nlines"\n')
    assert read_prompts(table, "prompt") == ["a fox, running", "two\nlines"]
    with pytest.raises(ConfigError, match="Did you mean 'prompt'"):
        read_prompts(table, "promt")
    parquet = tmp_path / "prompts.parquet"
    pq.write_table(pa.table({"caption": ["x", None, "y"]}), parquet)
    assert read_prompts(parquet, "caption") == ["x", "y"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_prompt_is_as_written(tmp_path, end):
    mark, text = "\ufeff", tmp_path / "prompts.txt"
    text.write_bytes(f"{mark}a fox{end}a boat\u2028at night{end}".encode())
    assert read_prompts(text, "prompt") == ["a fox", "a boat\u2028at night"]
    table = tmp_path / "prompts.csv"
    table.write_bytes(f"{mark}prompt,id{end}007,1{end}1.50,2{end}".encode())
    assert read_prompts(table, "prompt") == ["007", "1.50"]
    table.write_bytes(f"prompt,id{end}true,1{end}".encode())
    assert read_prompts(table, "prompt") == ["true"]


def test_files_that_hold_no_prompts(tmp_path):
    with pytest.raises(ConfigError, match="there is no file"):
        read_prompts(tmp_path / "missing.txt", "prompt")
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    with pytest.raises(ConfigError, match="holds no prompts"):
        read_prompts(empty, "prompt")
    damaged = tmp_path / "damaged.parquet"
    damaged.write_bytes(b"PAR1 but not really")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_prompts(damaged, "prompt")
