"""What a call holds of spans that it has left: nothing but their features."""

import pytest
import torch

import diffusion_cache as dc
from diffusion_cache import reference
from diffusion_cache.engine.patches import ACTIVE
from diffusion_cache.measure import peak_bytes

NAME, BATCH = "flux-digits", 4


@pytest.fixture(scope="module")
def call():
    """A call of the denoiser, and the bytes of what its blocks hand on."""
    pipe, calls, handed = reference.load(NAME), [], []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    block = pipe.transformer.single_transformer_blocks[0]
    other = block.register_forward_hook(lambda module, args, output: handed.append(sum(part.nbytes for part in output)))
    pipe(**reference.inputs(NAME, range(BATCH), range(BATCH), steps=1))
    hook.remove()
    other.remove()
    return pipe.transformer, lambda: pipe.transformer(**calls[0]), handed[0]


@pytest.mark.parametrize("policy", ["interval", "first_block"])
def test_nothing_is_held_while_latents_are_decoded(policy):
    pipe = reference.load(NAME)
    given = reference.inputs(NAME, range(2), range(2), steps=6)
    with dc.cached(pipe, policy, "taylor"):
        held, decode = [], pipe.vae.decode

        def watched(*args, **kwargs):
            run = ACTIVE.get()
            states = run.spans._states.values()
            held.append((sum(state.history.nbytes for state in states), run.decisions._kept))
            return decode(*args, **kwargs)

        pipe.vae.decode = watched
        pipe(**given)
        assert held == [(0, {})]
        summary = dc.summary(pipe)
        assert summary.cache_bytes > 0
        assert all(span.feature_bytes > 0 for span in dc.inspect(pipe).spans)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("scope", ["block", "branch"])
def test_inputs_and_forecasts_of_spans_are_let_go(call, scope, mode):
    denoiser, make, handed = call
    with mode():
        uncached = peak_bytes(make)
        with dc.run(denoiser, "interval", "taylor", every=2, num_steps=8, scope=scope) as run:
            peaks = []
            for _ in range(8):
                run.next_step()
                peaks.append(peak_bytes(make))
    assert [record.computed for record in run.summary().records] == [True, False] * 4
    for peak in peaks[4:]:  # slots are allocated at the first two computed steps
        assert peak <= uncached + 2 * handed
