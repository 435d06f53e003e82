"""What is suggested for a misspelled argument."""

import inspect

from diffusion_cache import api, resolve


def test_every_argument_of_the_front_door_is_suggested():
    parameters = inspect.signature(api.enable).parameters.values()
    named = {one.name for one in parameters if one.kind is inspect.Parameter.KEYWORD_ONLY} | {"policy", "forecaster"}
    assert {*resolve.ARGUMENTS, *resolve.HOW, *resolve.UNNAMED} == named
