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
    row_stream,
    select_rows,
    signature,
    tensor_inputs,
)
from diffusion_cache.errors import ConfigError


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


def test_tensors_inside_lists_and_dicts_are_inputs():
    a, b, c, d, e = (full(i) for i in range(5))
    inputs = tensor_inputs(
        ([a, None, b], "x", {"skip": (c, 3)}), {"kwargs": {"ids": d, "none": None}, "text": e, "flags": [True]}
    )
    assert list(inputs) == ["0.0", "0.2", "2.skip.0", "kwargs.ids", "text"]
    assert all(tensor is other for tensor, other in zip(inputs.values(), (a, b, c, d, e), strict=True))


def test_tensors_of_named_tuples_and_model_outputs_are_inputs():
    inputs = tensor_inputs((Pair(A, B), Transformer2DModelOutput(sample=A)), {})
    assert list(inputs) == ["0.0", "0.1", "1.sample"]


def test_an_output_may_continue_an_input_inside_a_list():
    inputs = tensor_inputs(([full(0, 4), full(0)],), {})
    assert [leaf.base for leaf in Template.of((full(1), full(2, 4)), inputs, residual=True).leaves] == ["0.1", "0.0"]


def test_image_stream_inside_a_list():
    x = full(1)
    assert image_stream(tensor_inputs(([x, full(2)], full(3)), {})) is x
    assert image_stream(tensor_inputs(([full(2)],), {"hidden_states": x})) is x


def test_signature_tells_how_long_a_list_is():
    skips = [full(1), full(1)]
    base = signature(tensor_inputs((), {"skips": skips}))
    assert base == signature(tensor_inputs((), {"skips": tuple(skips)}))
    assert base != signature(tensor_inputs((), {"skips": skips[:1]}))


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


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("poisoned", [False, True])
def test_passthrough_looks_like_the_output(name, poisoned):
    output, tensors = OUTPUTS[name]
    through = PassThrough.of(output).output(poisoned)
    template = Template.of(output, {}, residual=False)
    parts = template.split(through)
    assert [(part.shape, part.dtype) for part in parts] == [(tensor.shape, tensor.dtype) for tensor in tensors]
    for part in parts:
        part.fill_(0)
    zeros = template.join([torch.zeros_like(tensor) for tensor in tensors])
    assert equal(through, zeros)  # and what is no tensor is the same


def test_passthrough_tensors_are_new_each_time():
    """Code between the members may write into them."""
    through = PassThrough.of((A, (A, B)))
    first, (second, third) = through.output()
    again = through.output()
    seen = {id(A), id(B), *map(id, (first, second, third)), id(again[0]), *map(id, again[1])}
    assert len(seen) == 8
    places = [tensor.data_ptr() for tensor in (A, B, first, second, third, again[0], *again[1])]
    assert len(set(places)) == 8


def test_passthrough_does_not_keep_the_output():
    through = PassThrough.of((A, None, {"text": B, "scale": 2.5}))
    assert not any(isinstance(constant, torch.Tensor) for constant in through.constants)
    skipped = through.output()
    assert (skipped[1], skipped[2]["scale"]) == (None, 2.5)


def test_poison_is_nan_where_there_can_be_one():
    halves = tuple(full(1, dtype=dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64))
    *floats, integers, flags = PassThrough.of((*halves, torch.arange(3), torch.tensor([True]))).output(poisoned=True)
    assert all(part.isnan().all() for part in floats)
    assert [part.dtype for part in floats] == [half.dtype for half in halves]
    assert (integers.shape, integers.dtype) == ((3,), torch.int64)
    assert (flags.shape, flags.dtype) == ((1,), torch.bool)


def test_spread_puts_rows_where_they_belong():
    through = PassThrough.of(full(0, 4, 2))
    rows = torch.tensor([3, 1])
    spread = through.spread(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), rows)
    assert spread.tolist() == [[0, 0], [3, 4], [0, 0], [1, 2]]


def test_spread_keeps_the_structure_and_what_is_not_batched():
    scale = full(7, 5)
    through = PassThrough.of((full(0, 3, 2), None, {"ids": torch.zeros(3, dtype=torch.long), "scale": scale}))
    part = (full(1, 1, 2), None, {"ids": torch.tensor([9]), "scale": scale})
    hidden, none, rest = through.spread(part, torch.tensor([2]))
    assert hidden.tolist() == [[0, 0], [0, 0], [1, 1]]
    assert none is None
    assert rest["ids"].tolist() == [0, 0, 9]
    assert rest["ids"].dtype == torch.long
    assert rest["scale"] is scale
    assert torch.equal(part[0], full(1, 1, 2))  # what was given stays as it was


def test_spread_of_every_row_is_the_output():
    output = (full(1, 2, 3), full(2, 2))
    spread = PassThrough.of(output).spread(output, torch.tensor([0, 1]))
    assert equal(spread, output)


# rows of a batch


def test_rows_of_tensors():
    x = torch.arange(6.0).reshape(3, 2)
    assert select_rows(x, 3, torch.tensor([2, 0])).tolist() == [[4, 5], [0, 1]]
    assert select_rows(torch.arange(3), 3, torch.tensor([1])).tolist() == [1]


@pytest.mark.parametrize("value", [torch.tensor(3.0), torch.ones(4, 3), torch.ones(0), None, "text", 3, 2.5])
def test_what_is_not_batched_stays(value):
    assert select_rows(value, 3, torch.tensor([1])) is value


def test_rows_inside_lists_and_dicts():
    x, other = torch.arange(3), torch.arange(5)
    value = ([x, None], {"ids": x, "more": (x, other), "scale": 2})
    selected = select_rows(value, 3, torch.tensor([2]))
    assert equal(selected, ([x[2:], None], {"ids": x[2:], "more": (x[2:], other), "scale": 2}))
    assert value[0][0] is x  # what was given stays as it was


def test_arguments_of_a_call_keep_their_kinds():
    args, kwargs = (torch.arange(2), 1), {"t": torch.arange(2)}
    rows = torch.tensor([1])
    assert equal(select_rows(args, 2, rows), (torch.tensor([1]), 1))
    assert equal(select_rows(kwargs, 2, rows), {"t": torch.tensor([1])})
    assert select_rows((), 2, rows) == ()


def test_inputs_are_kept_beside_outputs_that_continue_them():
    """Whether the output or its residual is stored."""
    inputs = {"hidden": full(1), "text": full(2, 4)}
    output = (full(5, 4), full(6))
    for residual in (False, True):
        leaves = Template.of(output, inputs, residual, keeps_inputs=True).leaves
        assert [leaf.kept for leaf in leaves] == ["text", "hidden"]
        assert [leaf.base for leaf in leaves] == (["text", "hidden"] if residual else [None, None])
    assert [leaf.kept for leaf in Template.of(output, inputs, residual=True).leaves] == [None, None]
    with pytest.raises(ConfigError, match="none of its inputs has the shape of its output"):
        Template.of(full(1, 7), inputs, residual=False, keeps_inputs=True)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("wrap", [list, lambda x: (list(x),), lambda x: Transformer2DModelOutput(sample=list(x))])
def test_entries_of_a_list_continue_those_of_a_list(wrap, residual):
    """Whatever is nearest in value, and wherever other lists are as long."""
    inputs = tensor_inputs(([full(5), full(1)],), {"prompts": [full(3), full(3)]})
    leaves = Template.of(wrap((full(1), full(5))), inputs, residual, keeps_inputs=True).leaves
    assert [leaf.kept for leaf in leaves] == ["0.0", "0.1"]
    assert [leaf.base for leaf in leaves] == (["0.0", "0.1"] if residual else [None, None])
    longer = tensor_inputs(([full(5), full(1), full(2)],), {})
    leaves = Template.of(wrap((full(1), full(5))), longer, residual, keeps_inputs=True).leaves
    assert [leaf.kept for leaf in leaves] == ["0.1", "0.0"]


def test_the_input_that_is_kept_is_the_sample_where_others_are_as_large():
    """Velocities are not near to what they are of."""
    for inputs in ({"condition": full(5), "hidden_states": full(0)}, {0: full(0), 1: full(5)}):
        (leaf,) = Template.of(full(5), inputs, residual=False, keeps_inputs=True).leaves
        assert leaf.kept in ("hidden_states", 0)
        (leaf,) = Template.of(full(5), inputs, residual=True, keeps_inputs=True).leaves
        assert (leaf.base, leaf.kept) in (("condition", "hidden_states"), (1, 0))


def test_rows_of_the_sample():
    x, other = torch.ones(2, 3), torch.zeros(2, 3)
    assert row_stream({"timestep": other, "hidden_states": x}) is x
    assert row_stream({0: x, 1: other}) is x
    assert row_stream({"bb_ca": x, "local_latents": other}) is x
    assert row_stream({"input_ids": other, "vision_tokens.0": x}).tolist() == [x.tolist()]
    assert torch.equal(row_stream({"x.0": x, "x.1": other}), torch.stack([x, other]))
    assert torch.equal(row_stream({"0.0": x, "0.1": other, 1: x}), torch.stack([x, other]))
    with pytest.raises(ConfigError, match="samples of this call are of different sizes"):
        row_stream({"x.0": x, "x.1": torch.ones(2, 4)})
