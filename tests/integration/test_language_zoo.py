"""Language models of transformers: a few of those that scripts/coverage.py measures."""

import pytest
from language_zoo import METHODS, measured


@pytest.mark.parametrize("name", ["Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM"])
def test_a_model_is_cached(name):
    row = measured(name)
    assert row["reason"] == ""
    assert row["methods"] == list(METHODS)
    assert max(row["error"].values()) < 1e-5
    assert row["share"] < 0.5


def test_a_model_that_cannot_be_is_told():
    row = measured("MiniMaxForCausalLM")
    assert "cannot be run layer by layer" in row["reason"]
    assert row["methods"] == []
