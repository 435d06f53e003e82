"""Forecasts that are made where they are used: the values of the plain way, whatever is done with them."""

import copy

import pytest
import torch
from torch.nn import functional

from diffusion_cache import ops
from diffusion_cache.engine.deferred import Deferred, Terms

SHAPE = (2, 5, 16)


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def terms(dtype=torch.float32, correction=None):
    features = [drawn(*SHAPE, seed=seed, dtype=dtype) for seed in (1, 2)]
    return Terms(features, (-1.0, 2.0), correction, [])


def plain(given):
    return ops.forecast(None, *given[:3])


X, GATE = drawn(*SHAPE, seed=3), drawn(SHAPE[0], SHAPE[2], seed=4)
CORRECTION = torch.stack([drawn(1, 16, seed=5), drawn(1, 16, seed=6)], dim=1)
FUSED = {
    "gate, then stream": lambda branch: X + GATE.unsqueeze(1) * branch,
    "the other way round": lambda branch: branch * GATE.unsqueeze(1) + X,
    "a gate of each token": lambda branch: X + drawn(2, 5, 1, seed=7) * branch,
    "a gate of channels": lambda branch: X + branch * drawn(16, seed=8),
    "the stream alone": lambda branch: branch + X,
    "casts and dropout that change nothing": lambda branch: X + functional.dropout(branch.float(), 0.5, False),
}
PLAIN = {
    "two gates": lambda branch: X + GATE[:, None] * (GATE[:, None] * branch),
    "a number": lambda branch: X + 0.5 * branch,
    "alpha": lambda branch: torch.add(X, branch, alpha=2),
    "chunk": lambda branch: X[..., :8] + branch.chunk(2, dim=-1)[1],
    "slice": lambda branch: X[:, 2:] + branch[:, 2:],
    "concatenation": lambda branch: torch.cat([X, branch], dim=1),
    "norm": lambda branch: X + functional.layer_norm(branch, (16,)),
    "where": lambda branch: torch.where(X > 0, X, branch),
    "detach": lambda branch: X + branch.detach(),
    "linear": lambda branch: functional.linear(branch, drawn(3, 16)),
    "a stream of another shape": lambda branch: X[:1] + branch,
    "into the stream": lambda branch: X.clone().add_(branch),
    "with itself": lambda branch: branch + branch,
    "dropout": lambda branch: (torch.manual_seed(0), functional.dropout(branch, 0.5, True))[1],
    "narrower": lambda branch: X.half() + branch.half(),
    "no tensor operation": lambda branch: torch.tensor(branch.tolist()) + torch.from_numpy(branch.numpy()),
    "a copy": lambda branch: X + copy.deepcopy(branch),
}


@pytest.fixture(params=[torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"], autouse=True)
def mode(request):
    with request.param():
        yield


@pytest.mark.parametrize("how", FUSED)
@pytest.mark.parametrize("correction", [None, CORRECTION], ids=["", "corrected"])
def test_gate_and_stream_are_one_operation(how, correction):
    given = terms(correction=correction)
    expected = FUSED[how](plain(given))
    branch = Deferred(given, torch.float32)
    result = FUSED[how](branch)
    assert type(result) is torch.Tensor
    assert torch.allclose(result, expected, atol=2e-6)
    whole = correction is None or "gate" in how or "way" in how  # a correction is of the branch, not of the sum
    assert (branch._made is None) == whole


@pytest.mark.parametrize("how", PLAIN)
def test_anything_else_is_as_if_it_had_been_made(how):
    given = terms()
    branch = Deferred(given, torch.float32)
    result = PLAIN[how](branch)
    assert type(result) is torch.Tensor
    assert torch.equal(result, PLAIN[how](plain(given)))


def test_what_is_written_into_it_stays():
    given = terms()
    branch = Deferred(given, torch.float32)
    gated = GATE[:, None] * branch
    branch += 1
    assert torch.equal(X + branch, X + (plain(given) + 1))
    assert torch.allclose(X + gated, X + GATE[:, None] * plain(given), atol=2e-6)  # that came before
    branch[:, 0] = 7
    assert bool((branch[:, 0] == 7).all())


@pytest.mark.parametrize(
    ("stream", "gate"), [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)], ids=str
)
def test_low_precision(stream, gate):
    """Wan's blocks gate in float32 what is bfloat16, others all in bfloat16, which the one pass rounds less often."""
    given = terms(torch.bfloat16)
    x, opened = X.to(stream), GATE[:, None].to(gate)
    result = x + Deferred(given, torch.bfloat16).to(gate) * opened
    exact = x.double() + opened.double() * ops.forecast(None, [f.double() for f in given.features], given.weights)
    assert result.dtype == stream
    assert (result.double() - exact).abs().max() <= exact.abs().max() * torch.finfo(stream).eps / 2 + 1e-5


def test_a_result_that_would_be_wider_than_the_stream_is_made_plainly():
    given = terms(torch.bfloat16)
    result = X.bfloat16() + GATE[:, None] * Deferred(given, torch.bfloat16)
    assert torch.equal(result, X.bfloat16() + GATE[:, None] * plain(given))
    assert result.dtype == torch.float32


@pytest.mark.parametrize("number", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_one_number_makes_nothing_wider(number):
    given, gate = terms(torch.bfloat16), torch.tensor(0.7, dtype=number)
    x, expected = X.bfloat16(), gate * plain(given)
    result = x + gate * Deferred(given, torch.bfloat16)
    gated = (gate * Deferred(given, torch.bfloat16)).clone()
    assert result.dtype == gated.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(gated, expected)
    assert (result - (x + expected)).abs().max() <= torch.finfo(torch.bfloat16).eps * 4 * expected.abs().max()


def test_codes():
    features = [ops.encode_residual(feature, None, "int8") for feature in terms().features]
    given = Terms(features, torch.tensor([-1.0, 2.0]), None, [])
    assert torch.allclose(
        X + GATE[:, None] * Deferred(given, torch.float32), X + GATE[:, None] * plain(given), atol=2e-6
    )


def test_all_that_stand_for_a_forecast_are_known():
    given = terms()
    branch = Deferred(given, torch.float32)
    gated = GATE[:, None] * branch
    assert [id(reference()) for reference in given.given] == [id(branch), id(gated)]
