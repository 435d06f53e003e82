"""Runs and sessions where something goes wrong."""

import pytest
import torch
from language_models import model, pipeline

import diffusion_cache as dc
from diffusion_cache.engine import session_of
from diffusion_cache.language import DelayedKV, LanguageRun, Prefix
from diffusion_cache.language.session import enabled


class Broken(Exception):
    pass


class Pipe:
    pass


def test_an_error_of_the_model_itself_is_no_failure_of_the_cache(recwarn):
    pipe, calls = Pipe(), []
    run = LanguageRun(None, None, pipe, 4, 12)

    def inner(tokens):
        calls.append(tokens)
        raise Broken

    run._failed = True
    with pytest.raises(Broken):
        run.model_call(inner, (torch.zeros(1, 4),), {})
    assert len(calls) == 1
    assert not recwarn.list


def test_a_cache_that_is_changed_inside_does_not_hide_an_error():
    pipe = pipeline(model())
    dc.enable(pipe, method="prefix")
    before = session_of(pipe)

    @enabled(pipe, DelayedKV())
    def failing():
        assert session_of(pipe).method == DelayedKV()
        dc.disable(pipe)
        raise Broken

    with pytest.raises(Broken):
        failing()
    assert session_of(pipe) is before
    dc.disable(pipe)
    with enabled(pipe, Prefix()):
        dc.enable(pipe, method="dkv")
    assert session_of(pipe).method == DelayedKV()  # what the block has put there stays
    dc.disable(pipe)
