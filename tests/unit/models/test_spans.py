"""Which spans are found in real diffusers models, at every scope, and in which order they run."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from diffusion_cache import reference
from diffusion_cache.errors import ConfigError, NoSpansError
from diffusion_cache.models import (
    Called,
    Layout,
    Span,
    arrange,
    default_scope,
    find_denoisers,
    find_layout,
    joined,
    unwrap,
)


def build_dit():
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=1, out_channels=1, num_layers=4, norm_num_groups=16,
        sample_size=4, patch_size=2, num_embeds_ada_norm=4,
    )  # fmt: skip


def build_flux():
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip


def build_wan():
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=1, out_channels=1, text_dim=8,
        freq_dim=16, ffn_dim=32, num_layers=3, rope_max_seq_len=8,
    )  # fmt: skip


def build_unet(blocks=3, mid="UNetMidBlock2DCrossAttn"):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,) * blocks, layers_per_block=1,
        down_block_types=("DownBlock2D",) * blocks, up_block_types=("UpBlock2D",) * blocks, mid_block_type=mid,
        cross_attention_dim=8, attention_head_dim=2, norm_num_groups=4,
    )  # fmt: skip


def call(model, name):
    text, t = torch.ones(1, 2, 8), torch.tensor([5])
    if name == "dit":
        return model(torch.ones(1, 1, 4, 4), timestep=t, class_labels=torch.tensor([0]))
    if name == "flux":
        ids = dict(txt_ids=torch.zeros(2, 3), img_ids=torch.zeros(4, 3))
        return model(
            hidden_states=torch.ones(1, 4, 4),
            timestep=t / 10,
            encoder_hidden_states=text,
            pooled_projections=torch.ones(1, 8),
            **ids,
        )
    if name == "wan":
        return model(hidden_states=torch.ones(1, 1, 1, 4, 4), timestep=t, encoder_hidden_states=text)
    return model(torch.ones(1, 1, 8, 8), t, encoder_hidden_states=text)


BUILDERS = {"dit": build_dit, "flux": build_flux, "wan": build_wan, "unet": build_unet}


@pytest.fixture(scope="module")
def models():
    return {name: build() for name, build in BUILDERS.items()}


UNET_MIDDLE = ["down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0", "up_blocks.1"]
TABLE = {  # model, scope -> {span: its members by their place in the model}
    ("dit", "stack"): {"transformer_blocks": [f"transformer_blocks.{i}" for i in range(4)]},
    ("dit", "block"): {f"transformer_blocks.{i}": [f"transformer_blocks.{i}"] for i in range(4)},
    ("dit", "denoiser"): {"denoiser": [""]},
    ("flux", "stack"): {
        "transformer_blocks": [f"transformer_blocks.{i}" for i in range(2)],
        "single_transformer_blocks": [f"single_transformer_blocks.{i}" for i in range(3)],
    },
    ("flux", "block"): {
        name: [name]
        for name in [
            *(f"transformer_blocks.{i}" for i in range(2)),
            *(f"single_transformer_blocks.{i}" for i in range(3)),
        ]
    },
    ("flux", "denoiser"): {"denoiser": [""]},
    ("wan", "stack"): {"blocks": [f"blocks.{i}" for i in range(3)]},
    ("wan", "block"): {f"blocks.{i}": [f"blocks.{i}"] for i in range(3)},
    ("wan", "denoiser"): {"denoiser": [""]},
    ("unet", "cut"): {"cut.1": UNET_MIDDLE},
    ("unet", "block"): {name: [name] for name in ["down_blocks.0", *UNET_MIDDLE, "up_blocks.2"]},
    ("unet", "denoiser"): {"denoiser": [""]},
}


def described(model, layout):
    places = {module: name for name, module in model.named_modules()}
    return {span.name: [places[member] for member in span.members] for span in layout.spans}


@pytest.mark.parametrize(("name", "scope"), TABLE)
def test_spans(models, name, scope):
    layout = find_layout(models[name], scope)
    assert described(models[name], layout) == TABLE[name, scope]
    assert layout.scope == scope
    assert layout.probe is None
    assert all(span.kind == scope for span in layout.spans)
    assert all(span.stores_residual == (scope in ("stack", "block")) for span in layout.spans)


@pytest.mark.parametrize(("name", "scope"), [key for key in TABLE if key[1] != "denoiser"])
def test_members_run_once_and_in_the_order_given(models, name, scope):
    members = [member for span in find_layout(models[name], scope).spans for member in span.members]
    ran = []
    hooks = [member.register_forward_pre_hook(lambda module, args: ran.append(module)) for member in members]
    with torch.no_grad():
        call(models[name], name)
    for hook in hooks:
        hook.remove()
    assert ran == members


@pytest.mark.parametrize(("name", "scope"), [("dit", "stack"), ("flux", "stack"), ("wan", "stack"), ("unet", "cut")])
def test_default_scope(models, name, scope):
    assert default_scope(models[name]) == scope
    assert default_scope(torch.compile(models[name], backend="eager")) == scope
    assert default_scope(nn.Linear(2, 2)) == "denoiser"


def test_parameters_of_a_span(models):
    blocks = models["dit"].transformer_blocks
    (span,) = find_layout(models["dit"], "stack", probe=1).spans
    assert span.parameters == sum(p.numel() for block in blocks[1:] for p in block.parameters())


# probe and tail


@pytest.mark.parametrize(
    ("name", "probe", "tail", "sizes", "first"),
    [
        ("dit", 1, 0, [3], 1),
        ("dit", 0, 1, [3], 0),
        ("dit", 2, 1, [1], 2),
        ("dit", 3, 0, [1], 3),
        ("flux", 1, 1, [1, 2], 1),
        ("flux", 2, 0, [3], 0),  # the whole first stack is the probe: only the second is skipped
        ("flux", 0, 3, [2], 0),
        ("flux", 2, 2, [1], 0),
        ("wan", 1, 1, [1], 1),
    ],
)
def test_probe_and_tail_stay_outside(models, name, probe, tail, sizes, first):
    model = models[name]
    layout = find_layout(model, "stack", probe=probe, tail=tail)
    every = [member for span in find_layout(model, "stack").spans for member in span.members]
    kept = [member for span in layout.spans for member in span.members]
    assert kept == every[probe : len(every) - tail]
    assert [len(span.members) for span in layout.spans] == sizes
    assert described(model, layout)[layout.spans[0].name][0].endswith(f".{first}")
    assert layout.probe is (every[0] if probe else None)


def test_stacks_beside_the_main_ones_are_left_out_of_what_waits_for_a_signal():
    model = nn.Module()
    for name in ("context_refiner", "layers"):
        stack = nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(2))
        model.add_module(name, stack)
    assert [span.name for span in find_layout(model, "stack").spans] == ["context_refiner", "layers"]
    assert [span.name for span in find_layout(model, "stack", adaptive=True).spans] == ["layers"]


@pytest.mark.parametrize(
    ("name", "probe", "tail"),
    [("dit", 4, 0), ("dit", 0, 4), ("dit", 2, 2), ("dit", 9, 9), ("flux", 3, 0), ("flux", 0, 4), ("flux", 2, 3)],
)
def test_probe_and_tail_that_do_not_fit(models, name, probe, tail):
    with pytest.raises(ConfigError, match=f"front={probe} and back={tail}") as caught:
        find_layout(models[name], "stack", probe=probe, tail=tail)
    assert "transformer_blocks: " in str(caught.value)  # says how many there are


# cuts


@pytest.mark.parametrize(
    ("depth", "members"),
    [(1, UNET_MIDDLE), (2, ["down_blocks.2", "mid_block", "up_blocks.0"]), (3, ["mid_block"])],
)
def test_cut_depths(models, depth, members):
    assert described(models["unet"], find_layout(models["unet"], "cut", depth=depth)) == {f"cut.{depth}": members}


@pytest.mark.parametrize("depth", [0, 4, -1])
def test_depth_that_leaves_nothing(models, depth):
    with pytest.raises(ConfigError, match=f"depth must be between 1 and 3 for UNet2DConditionModel, not {depth}"):
        find_layout(models["unet"], "cut", depth=depth)


def test_unet_without_a_middle_block():
    unet = build_unet(blocks=2, mid=None)
    assert described(unet, find_layout(unet, "cut")) == {"cut.1": ["down_blocks.1", "up_blocks.0"]}
    assert list(described(unet, find_layout(unet, "block"))) == [
        f"{side}_blocks.{i}" for side in ("down", "up") for i in (0, 1)
    ]
    with pytest.raises(ConfigError, match="between 1 and 1"):
        find_layout(unet, "cut", depth=2)


# what cannot be


def test_wrong_scopes_say_what_to_use(models):
    with pytest.raises(NoSpansError, match=r"DiTTransformer2DModel has no cut .*use scope stack, block or denoiser$"):
        find_layout(models["dit"], "cut")
    with pytest.raises(NoSpansError, match=r"Model is a UNet, which has no stack; use scope cut, block or denoiser$"):
        find_layout(models["unet"], "stack")
    for scope in ("stack", "block", "cut"):
        with pytest.raises(NoSpansError, match=rf"Linear has no {scope} .*use scope denoiser$"):
            find_layout(nn.Linear(2, 2), scope)


def test_unknown_scope_is_an_error(models):
    with pytest.raises(ConfigError, match=r"^Unknown scope 'blocks'\. Did you mean 'block'\?$"):
        find_layout(models["dit"], "blocks")
    with pytest.raises(ConfigError, match=r"^Unknown scope 'xyz'\. Known: block, branch, cut, denoiser, stack\.$"):
        find_layout(models["unet"], "xyz")


class Toy(nn.Module):
    """A ModuleList of blocks, one of plain layers, one that is tiny, and one that is empty."""

    def __init__(self):
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(2))
        self.adapters = nn.ModuleList([nn.Sequential(nn.Linear(1, 1))])
        self.none = nn.ModuleList()


def test_only_composite_lists_with_a_share_of_the_parameters_are_stacks():
    assert [span.name for span in find_layout(Toy(), "stack").spans] == ["layers"]


def test_compiled_models_are_looked_into(models):
    compiled = torch.compile(models["dit"], backend="eager")
    assert unwrap(compiled) is models["dit"]
    assert unwrap(models["dit"]) is models["dit"]
    assert find_layout(compiled, "stack").spans[0].members == tuple(models["dit"].transformer_blocks)
    # the whole denoiser is skipped from outside what was compiled
    assert find_layout(compiled, "denoiser").spans[0].members == (compiled,)


# spans as they were seen to run


def span(name, count, kind="stack"):
    return Span(name, kind, tuple(nn.Linear(1, 1) for _ in range(count)))


def traced(text, spans):
    """ "a0 b1": the first member of span a, then the second of span b."""
    by_name = {span.name: span for span in spans}
    return [Called(by_name[called[0]], int(called[1:])) for called in text.split()]


def arranged(spans, text):
    """The names of the spans after that trace, with their members named as in it."""
    names = {member: f"{span.name}{i}" for span in spans for i, member in enumerate(span.members)}
    layout = Layout("stack", spans, probe=spans[0].members[0])
    result = arrange(layout, traced(text, spans))
    assert (result.scope, result.probe) == ("stack", layout.probe)
    assert all(span.kind == "stack" for span in result.spans)
    return {span.name: " ".join(names[member] for member in span.members) for span in result.spans}


@pytest.mark.parametrize(
    "text",
    [
        "a0 a1 a2 b0 b1",
        "a0 a1 a2",  # the other span was not reached
        "b0 b1",
        "b0 b1 a0 a1 a2",
        "",
        "a0 a1 a2 b0 b1 a0 a1 a2 b0 b1",  # a denoiser that runs all of it twice
        "a0 a1 a2 a0 a1 a2 b0 b1",
        "a0 a1 a2 b0 b1 a0",  # the first time counts
        "a0 a0 a1 a1 a2 a2 b0 b1",
    ],
)
def test_a_layout_that_runs_as_it_says_stays_the_same(text):
    spans = (span("a", 3), span("b", 2))
    layout = Layout("stack", spans)
    assert arrange(layout, traced(text, spans)) is layout


def test_spans_of_one_member_stay_the_same():
    spans = tuple(span(name, 1) for name in "abc")
    layout = Layout("stack", spans)
    assert arrange(layout, traced("a0 b0 c0 a0", spans)) is layout
    assert arrange(layout, traced("a0 c0", spans)) is layout


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a2 a0 a1 b0 b1", {"a": "a2 a0 a1", "b": "b0 b1"}),
        ("a0 a1 a2 b1 b0", {"a": "a0 a1 a2", "b": "b1 b0"}),
        ("a0 a2 b0 b1", {"a": "a0 a2", "b": "b0 b1"}),  # a member that is not called is none
        ("b0 b1 a1 a0 a2", {"b": "b0 b1", "a": "a1 a0 a2"}),
        ("b1 b0", {"b": "b1 b0", "a": "a0 a1 a2"}),  # spans that were not reached come last, as they were
    ],
)
def test_members_and_spans_take_the_order_they_ran_in(text, expected):
    result = arranged((span("a", 3), span("b", 2)), text)
    assert result == expected
    assert list(result) == list(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a0 b0 a1 b1 a2", {"a+b": "a0 b0 a1 b1 a2"}),
        ("b0 a0 a1 b1 a2", {"b+a": "b0 a0 a1 b1 a2"}),
        ("a0 b0 b1 a1 a2", {"a+b": "a0 b0 b1 a1 a2"}),  # one inside the other
        ("a0 a1 b0 a2 b1", {"a+b": "a0 a1 b0 a2 b1"}),
        ("a0 b0 a1 b1 a2 a0 b0 a1 b1 a2", {"a+b": "a0 b0 a1 b1 a2"}),
        ("a0 b0 a1", {"a+b": "a0 b0 a1"}),
    ],
)
def test_spans_that_take_turns_become_one(text, expected):
    assert arranged((span("a", 3), span("b", 2)), text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a0 b0 c0 a1 b1 c1", {"a+b+c": "a0 b0 c0 a1 b1 c1"}),
        ("a0 b0 a1 c0 b1 c1", {"a+b+c": "a0 b0 a1 c0 b1 c1"}),  # each with the next
        ("a0 b0 a1 b1 c0 c1", {"a+b": "a0 b0 a1 b1", "c": "c0 c1"}),
        ("c0 c1 a0 b0 a1 b1", {"c": "c0 c1", "a+b": "a0 b0 a1 b1"}),
        ("a0 c0 a1 c1", {"a+c": "a0 c0 a1 c1", "b": "b0 b1"}),
        ("a0 b0 b1 c0 c1 a1", {"a+b+c": "a0 b0 b1 c0 c1 a1"}),
    ],
)
def test_turns_among_three_spans(text, expected):
    result = arranged(tuple(span(name, 2) for name in "abc"), text)
    assert result == expected
    assert list(result) == list(expected)


def with_side_stack(text, name="context_blocks"):
    """The names of the spans after that trace, where c is a side stack beside the main stacks a and b."""
    a, b, c = span("a", 2), span("b", 2), span(name, 2)
    assert (a.side, c.side) == (False, True)
    by_letter = {"a": a, "b": b, "c": c}
    layout = Layout("stack", (c, a, b))
    result = arrange(layout, [Called(by_letter[called[0]], int(called[1:])) for called in text.split()])
    return result is layout, [other.name for other in result.spans], a in result.spans


@pytest.mark.parametrize("text", ["a0 c0 c1 a1 b0 b1", "c0 a0 c1 a1 b0 b1", "a0 c0 a1 c1 b0 b1"])
def test_a_side_stack_between_the_blocks_of_another_is_left_out(text):
    assert with_side_stack(text) == (False, ["a", "b"], True)


@pytest.mark.parametrize("text", ["c0 c1 a0 a1 b0 b1", "a0 a1 c0 c1 b0 b1", "a0 a1 b0 b1"])
def test_a_side_stack_that_runs_before_another_stays(text):
    assert with_side_stack(text) == (True, ["context_blocks", "a", "b"], True)


def test_a_side_stack_is_left_out_of_main_stacks_that_take_turns():
    assert with_side_stack("a0 b0 c0 c1 a1 b1") == (False, ["a+b"], False)


def test_blocks_are_no_side_stacks():
    assert not Span("context_blocks.0", "block", (nn.Linear(1, 1),)).side


def test_spans_that_do_not_change_stay_themselves():
    a, b, c = spans = tuple(span(name, 2) for name in "abc")
    result = arrange(Layout("stack", spans), traced("a0 a1 b1 b0", spans))
    assert result.spans[0] is a
    assert result.spans[1] is not b
    assert result.spans[2] is c


def test_an_arranged_layout_runs_as_it_says():
    """Traced once more, nothing changes."""
    spans = (span("a", 3), span("b", 2))
    once = arrange(Layout("stack", spans), traced("b0 a2 b1 a0", spans))
    (merged,) = once.spans
    assert arrange(once, [Called(merged, member) for member in range(4)]) is once


# stacks in a row as one span

TEXT, IMAGE = (1, 2, 8), (1, 4, 8)


def stacked(*names):
    """Stacks of two blocks, the main ones joined, and for a trace what "a0" is in that layout."""
    layout = joined(Layout("stack", tuple(span(name, 2) for name in names)))
    called = {}
    for own in layout.spans:
        for member in range(len(own.members)):
            name = f"{own.name.split('+')[member // 2]}{member % 2}"
            called[name] = Called(own, member, member > 0, member > 0, (TEXT, IMAGE))
    return layout, called


def test_joined_stacks_are_kept_apart_as_well():
    layout, _ = stacked("text", "a", "b")
    assert layout.apart is not None
    assert [span.name for span in layout.spans] == ["text", "a+b"]
    assert [span.name for span in layout.apart.spans] == ["text", "a", "b"]
    text, a, b = layout.apart.spans
    assert [span.members for span in layout.spans] == [text.members, a.members + b.members]


@pytest.mark.parametrize("names", ["a", ("a", "text"), ("text", "captions")])
def test_there_is_nothing_to_join(names):
    layout = Layout("stack", tuple(span(name, 2) for name in names))
    assert joined(layout) is layout


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("text0 text1 a0 a1 b0 b1", {}),
        ("a0 a1 b0 b1 a0 a1 b0 b1", {}),
        ("a0 a1 b0 b1 text0 text1", {}),
        ("a0 a1 b0 b1", {"b1": {"shapes": (IMAGE,)}}),  # one stream is used no further
        ("a0 a1 b0 b1", {"b0": {"shapes": (IMAGE,)}, "b1": {"continues": False}}),  # within a stack, as ever
    ],
)
def test_stacks_that_continue_each_other_stay_one(text, changed):
    layout, called = stacked("text", "a", "b")
    assert arrange(layout, [called[name]._replace(**changed.get(name, {})) for name in text.split()]) is layout


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("a0 a1 b0 b1", {"b0": {"continues": False}}),  # something is done between them
        ("a0 a1 text0 text1 b0 b1", {}),
        ("a0 a1 b0 b1 a0 a1", {}),  # not all of it runs each time
        ("a0 a1", {}),
        ("text0 text1", {}),
        ("a0 a1 a0 a1 b0 b1", {}),
        ("a0 a1 b0 b1", {"a1": {"shapes": (IMAGE, IMAGE)}}),  # which stream is which cannot be told
        ("a0 a1 b0 b1", {"a1": {"shapes": (IMAGE,)}}),  # a stream begins with the second stack
        ("", {}),
    ],
)
def test_stacks_that_do_not_are_taken_apart(text, changed):
    layout, called = stacked("text", "a", "b")
    assert arrange(layout, [called[name]._replace(**changed.get(name, {})) for name in text.split()]) is layout.apart


@pytest.mark.parametrize("text", ["b0 b1 a0 a1", "a1 a0 b0 b1", "a0 b0 a1 b1"])
def test_stacks_that_run_in_another_order_are_as_if_never_joined(text):
    layout, called = stacked("a", "b")
    assert layout.apart is not None
    found = arrange(layout, [called[name] for name in text.split()])
    never = arrange(layout.apart, traced(text, layout.apart.spans))
    assert found.apart is None
    assert [(span.name, span.members) for span in found.spans] == [(span.name, span.members) for span in never.spans]


def test_a_side_stack_between_blocks_is_left_out_of_both():
    layout, called = stacked("text", "a", "b")
    assert layout.apart is not None
    found = arrange(layout, [called[name] for name in ["a0", "text0", "text1", "a1", "b0", "b1"]])
    assert found.spans == layout.spans[1:]
    assert found.apart is not None
    assert found.apart.spans == layout.apart.spans[1:]


# denoisers among components


class TakesTime(nn.Module):
    def forward(self, x, timestep_ratio):
        return x


def test_find_denoisers(models):
    from diffusers import DDIMScheduler

    custom = TakesTime()
    pipe = SimpleNamespace(
        components={
            "unet": models["unet"],
            "scheduler": DDIMScheduler(),
            "transformer": torch.compile(models["wan"], backend="eager"),
            "text_encoder": nn.Linear(1, 1),
            "custom": custom,
            "safety_checker": None,
        }
    )
    found = find_denoisers(pipe)
    assert list(found) == ["unet", "transformer", "custom"]
    assert found["custom"] is custom
    assert unwrap(found["transformer"]) is models["wan"]


def test_controlnets_and_autoencoders_are_no_denoisers():
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.controlnets.controlnet import ControlNetModel

    components = {"vae": AutoencoderKL.__new__(AutoencoderKL), "controlnet": ControlNetModel.__new__(ControlNetModel)}
    with pytest.raises(NoSpansError, match=r"no denoiser among its components \(vae, controlnet\)"):
        find_denoisers(SimpleNamespace(components=components))


def test_containers_of_motion_modules_are_no_denoisers(models):
    from diffusers import MotionAdapter

    adapter = MotionAdapter((8, 8), motion_layers_per_block=1, motion_num_attention_heads=2, motion_norm_num_groups=4)
    assert list(find_denoisers(SimpleNamespace(components={"unet": models["unet"], "motion_adapter": adapter}))) == [
        "unet"
    ]


@pytest.mark.parametrize(
    ("wrapper", "inside", "words"),
    [
        (FullyShardedDataParallel, "_fsdp_wrapped_module", r"shard it by fully_shard \(FSDP2\)"),
        (DistributedDataParallel, "module", "the module that it wraps"),
        (nn.DataParallel, "module", "the module that it wraps"),
    ],
)
def test_wrappers_are_refused(models, wrapper, inside, words):
    """Around a denoiser, and not around anything else."""
    wrapped = {}
    for name, module in (("unet", models["unet"]), ("text_encoder", nn.Linear(1, 1))):
        wrapped[name] = wrapper.__new__(wrapper)
        nn.Module.__init__(wrapped[name])
        setattr(wrapped[name], inside, module)
    with pytest.raises(ConfigError, match=f"the pipeline's unet is wrapped in {wrapper.__name__}: .*{words}"):
        find_denoisers(SimpleNamespace(components=wrapped))
    assert [*find_denoisers(SimpleNamespace(components=wrapped | {"unet": models["unet"]}))] == ["unet"]


def test_a_denoiser_in_a_wrapper_for_adapters_is_refused():
    peft = pytest.importorskip("peft")
    model = reference.denoiser("flux-digits")
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["to_q"]))
    with pytest.raises(ConfigError, match=r"transformer is wrapped in PeftModel: give the pipeline its get_base_model"):
        find_denoisers(SimpleNamespace(components={"transformer": wrapped}))
    assert [*find_denoisers(SimpleNamespace(components={"transformer": wrapped.get_base_model()}))] == ["transformer"]


def test_no_pipeline(models):
    with pytest.raises(ConfigError, match=r"for a bare denoiser use diffusion_cache\.run"):
        find_denoisers(models["dit"])


def test_chosen_blocks_side_by_side_are_one_span():
    chosen = [
        "transformer_blocks.1",
        "transformer_blocks.0",
        "single_transformer_blocks.0",
        "single_transformer_blocks.2",
    ]
    flux = build_flux()
    layout = find_layout(flux, "block", blocks=chosen)
    single = flux.single_transformer_blocks
    assert [(span.name, span.members) for span in layout.spans] == [
        ("transformer_blocks.0 to transformer_blocks.1", tuple(flux.transformer_blocks)),  # stacks are not joined
        ("single_transformer_blocks.0", (single[0],)),
        ("single_transformer_blocks.2", (single[2],)),
    ]
    assert all(span.kind == "block" and span.stores_residual for span in layout.spans)
    with pytest.raises(ConfigError, match=r"Did you mean 'transformer_blocks\.1'"):
        find_layout(flux, "block", blocks=["transformer_blocks.11"])
    for denoiser, scope in ((flux, "stack"), (build_unet(), "block")):
        with pytest.raises(ConfigError, match="at scope block of a transformer"):
            find_layout(denoiser, scope, blocks=chosen)
