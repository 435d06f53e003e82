"""Outputs taken apart and put together again; which input an output continues."""

from collections import OrderedDict, namedtuple

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from diffusion_cache.engine.structure import (
    PassThrough,
    Template,
    image_stream,
    matching_input,
    signature,
    tensor_inputs,
)


def full(value, *shape, dtype=torch.float32):
    return torch.full(shape or (2, 3), float(value), dtype=dtype)


Pair = namedtuple("Pair", "hidden text")
A, B = full(1), full(2, 4)
OUTPUTS = {
    "tensor": (A, [A]),
    "tuple": ((A, B), [A, B]),
    "none first": ((None, A), [A]),
    "list": ([B, None, A], [B, A]),
    "dict": (OrderedDict(sample=A, other=None), [A]),
    "model output": (Transformer2DModelOutput(sample=A), [A]),
    "named tuple": (Pair(A, B), [A, B]),
    "model output in a tuple": ((B, Transformer2DModelOutput(sample=A)), [B, A]),
    "nested": ((A, ((B,), {"skip": (A, None)}), 3, "text"), [A, B, A]),
}


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    return a == b


@pytest.mark.parametrize("name", OUTPUTS)
def test_split_and_join(name):
    output, tensors = OUTPUTS[name]
    template = Template.of(output, {}, residual=False)
    parts = template.split(output)
    assert all(part is tensor for part, tensor in zip(parts, tensors, strict=True))
    assert equal(template.join(parts), output)
    changed = template.join([part + 10 for part in parts])
    assert all(torch.equal(a, b + 10) for a, b in zip(template.split(changed), tensors, strict=True))
    assert not equal(changed, output)


def test_joined_model_output_is_one():
    output = Transformer2DModelOutput(sample=A)
    joined = Template.of(output, {}, residual=False).join([B])
    assert isinstance(joined, Transformer2DModelOutput)
    assert joined.sample is B
    assert joined[0] is B


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((A, B), (A,)),
        ((A, B), [A, B]),
        ((A, B), Pair(A, B)),
        (Pair(A, B), (A, B)),
        (A, (A,)),
        ((A, B), (A, None)),
        ((A, (B,)), (A, B)),
        ({"a": A}, {"b": A}),
    ],
)
def test_another_structure_is_noticed(first, second):
    assert Template.of(first, {}, residual=False).split(second) is None


def test_tensor_where_none_was_is_another_structure():
    assert Template.of((None, A), {}, residual=False).split((B, A)) is None


def test_leaves_name_their_input():
    inputs = tensor_inputs((full(0), "x"), {"text": full(0, 4), "mask": full(0, 9)})
    assert set(inputs) == {0, "text", "mask"}
    output = (full(5, 4), full(6), full(7, 1), torch.ones(2, 3, dtype=torch.long))
    assert [leaf.base for leaf in Template.of(output, inputs, residual=True).leaves] == ["text", 0, None, None]
    assert [leaf.base for leaf in Template.of(output, inputs, residual=False).leaves] == [None] * 4


def test_integer_tensors_have_no_residual():
    ids = torch.arange(6).reshape(2, 3)
    (leaf,) = Template.of(ids, {0: ids}, residual=True).leaves
    assert leaf.base is None


@pytest.mark.parametrize(
    ("out", "expected"),
    [(full(5), "a"), (full(5, dtype=torch.float16), "half"), (full(5, 9, 9), None), (full(5, 4), "b")],
)
def test_matching_input_by_shape_and_dtype(out, expected):
    inputs = {"b": full(0, 4), "a": full(0), "half": full(0, dtype=torch.float16)}
    assert matching_input(out, inputs) == expected


def test_matching_input_by_nearness_where_shapes_agree():
    generator = torch.Generator().manual_seed(0)
    hidden, text = (torch.randn(2, 8, 16, generator=generator) for _ in range(2))
    update = 0.3 * torch.randn(2, 8, 16, generator=generator)
    inputs = {"text": text, "hidden": hidden}
    assert matching_input(hidden + update, inputs) == "hidden"
    assert matching_input(text + update, inputs) == "text"
    bases = [leaf.base for leaf in Template.of((text + update, hidden + update), inputs, residual=True).leaves]
    assert bases == ["text", "hidden"]
    low = {key: value.bfloat16() for key, value in inputs.items()}
    assert matching_input((hidden + update).bfloat16(), low) == "hidden"


def test_image_stream():
    x, text = full(1), full(2)
    assert image_stream({"encoder_hidden_states": text, "hidden_states": x}) is x
    assert image_stream({"c": text, "sample": x}) is x
    assert image_stream({0: x, "encoder_hidden_states": text}) is x


def test_signature_tells_shapes_dtypes_and_names():
    base = signature({0: full(1), "text": full(2, 4)})
    assert base == signature({0: full(7), "text": full(8, 4)})
    others = [
        {0: full(1, 2, 4), "text": full(2, 4)},
        {0: full(1, dtype=torch.float16), "text": full(2, 4)},
        {0: full(1), "context": full(2, 4)},
        {0: full(1)},
    ]
    assert all(signature(other) != base for other in others)


# members that are passed through


def test_passthrough_gives_the_inputs_of_now():
    hidden, text = full(1), full(2, 4)
    inputs = tensor_inputs((full(0, 9), hidden), {"text": text})
    through = PassThrough.of((text + 1, hidden + 1, None, 7), inputs)
    new_hidden, new_text = full(10), full(20, 4)
    out = through.output((full(0, 9), new_hidden), {"text": new_text})
    assert out[0] is new_text
    assert out[1] is new_hidden
    assert out[2:] == (None, 7)


def test_passthrough_of_what_no_input_fits_has_the_right_shape():
    through = PassThrough.of((full(1, 5), (full(1), torch.arange(3))), {0: full(1)})
    x = full(3)
    skipped, (kept, integers) = through.output((x,), {})
    assert (skipped.shape, skipped.dtype) == ((5,), torch.float32)
    assert kept is x
    assert (integers.shape, integers.dtype) == ((3,), torch.int64)


def test_passthrough_without_inputs_is_all_empty():
    through = PassThrough.of((A, (A, B)), {})
    x = full(3)
    sample, residuals = through.output((x,), {})
    assert [tensor.shape for tensor in (sample, *residuals)] == [(2, 3), (2, 3), (4,)]
    assert sample is not x
