"""What users change between and during the calls of a pipeline that a cache is enabled on."""

import copy
import gc
import threading

import pytest
import torch
import torch.nn.functional as F
import zoo_image
from cases import load, tiny_unet
from diffusers import HunyuanDiT2DModel, UNet2DConditionModel
from zoo import Draw

import diffusion_cache as dc
from diffusion_cache import reference
from diffusion_cache.engine import session_of
from diffusion_cache.engine.intercept import sessions_on

STEPS = 6


def generate(name, pipe, count=2):
    inputs = reference.inputs(name, labels=[3, 5, 7][:count], seeds=[0, 1, 2][:count], steps=STEPS)
    return reference.images(name, pipe(**inputs))


class ToFirst:
    """All images attend to the first one of their guidance branch."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        given = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        key, value = attn.to_k(given), attn.to_v(given)
        if encoder_hidden_states is None:
            count = len(given) // 2
            key, value = (x.unflatten(0, (2, count))[:, [0] * count].flatten(0, 1) for x in (key, value))
        heads = [x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (attn.to_q(hidden_states), key, value)]
        return attn.to_out[0](F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


def test_attention_processors_changed_after_a_run():
    """Whether images can be computed apart is found out anew."""
    name = "unet-digits"
    torch.manual_seed(0)
    pipe = reference.assemble(name, tiny_unet())
    own = pipe.unet.attn_processors
    dc.enable(pipe, "first_block", threshold=0.1)
    before = generate(name, pipe, 3)
    assert not any("told apart" in warning for warning in dc.summary(pipe).warnings)

    pipe.unet.set_attn_processor(ToFirst())
    with pytest.warns(dc.DiffusionCacheWarning, match="told apart"):
        changed = generate(name, pipe, 3)
    dc.enable(pipe, "first_block", threshold=0.1)
    with pytest.warns(dc.DiffusionCacheWarning, match="told apart"):
        assert torch.equal(generate(name, pipe, 3), changed)

    pipe.unet.set_attn_processor(own)
    assert torch.equal(generate(name, pipe, 3), before)
    assert dc.summary(pipe).warnings == ()


@pytest.mark.parametrize("change", ["replaced", "removed", "added", "inside"])
@pytest.mark.parametrize("options", [{"policy": "interval", "every": 2}, {"policy": "first_block", "threshold": 0.1}])
def test_blocks_changed_after_a_run(change, options):
    """As if the cache had been enabled after the change."""
    name = "dit-digits"
    pipe = load(name)
    blocks = pipe.transformer.transformer_blocks
    dc.enable(pipe, **options)
    generate(name, pipe)
    gone = blocks[0] if change == "removed" else blocks[-1]
    if change == "removed":
        del blocks[0]
    elif change == "added":
        blocks.append(copy.deepcopy(blocks[-1]))
    elif change == "replaced":
        blocks[-1] = copy.deepcopy(blocks[-1])
    else:
        blocks[-1].ff = copy.deepcopy(blocks[-1].ff)
    found, told = generate(name, pipe), dc.summary(pipe)
    assert told.warnings == ()
    dc.enable(pipe, **options)
    assert torch.equal(generate(name, pipe), found)
    assert dc.summary(pipe).hit_rate == told.hit_rate
    assert change in ("added", "inside") or not sessions_on(gone)
    dc.disable(pipe)
    assert not any(sessions_on(module) for module in pipe.transformer.modules())


# forwards that take items out of the lists that they are given


class Residuals:
    """What an adapter gives a UNet, which takes each out of the list when it gets there."""

    def __init__(self):
        torch.manual_seed(0)
        blocks = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
        self.model = UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 32), layers_per_block=1,
            down_block_types=blocks[0], up_block_types=blocks[1], cross_attention_dim=16, attention_head_dim=8,
            norm_num_groups=8,
        ).eval()  # fmt: skip
        self.sample, self.text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
        self.residuals = [torch.randn(2, 32, 8, 8), torch.randn(2, 32, 4, 4)]

    def __call__(self, step):
        drift = torch.tensor([0.01, 0.2])[:, None, None, None] * step
        return self.model(
            self.sample + drift,
            torch.tensor(900 - 50 * step),
            encoder_hidden_states=self.text,
            down_intrablock_additional_residuals=list(self.residuals),
        ).sample


@torch.no_grad()
def test_samples_are_told_apart_where_a_list_is_used_up():
    call = Residuals()
    with dc.run(call.model, "easycache", threshold=0.1, num_steps=STEPS) as run:
        for step in range(STEPS):
            call(step)
            run.next_step()
    assert run.summary().warnings == ()
    apart = [[sample.computed for sample in record.samples] for record in run.summary().records]
    assert [False, True] in apart, apart


@torch.no_grad()
def test_a_call_is_made_again_where_a_list_is_used_up():
    """`speca` computes what it finds to be forecast wrongly."""
    (case,) = [x for x in vars(zoo_image).values() if isinstance(x, dict) and x.get("name") == "HunyuanDiT2DModel"]
    torch.manual_seed(0)
    model = HunyuanDiT2DModel(**case["config"]).eval()
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    with dc.run(model, "speca", num_steps=STEPS, threshold=0.0, rollback=True) as run:
        for step in range(STEPS):
            inputs = zoo_image.hunyuan_inputs(Draw(1), 2)
            assert inputs["controlnet_block_samples"]
            inputs["hidden_states"] += 0.2 * step * Draw(50 + step)(*inputs["hidden_states"].shape)
            inputs["timestep"] = torch.full((1,), 900.0 - 100 * step)
            model(**inputs)
            run.next_step()
    assert "computed again" in [record.reason for record in run.summary().records]


# other threads


@pytest.mark.parametrize("act", ["disable", "enable"])
def test_another_thread_during_the_first_call(act):
    """The generation goes on: without the cache, or with the earlier one."""
    name = "flux-digits"
    pipe = load(name)
    uncached = generate(name, pipe)
    dc.enable(pipe, "interval", every=2)
    reached, go_on, made = threading.Event(), threading.Event(), []

    def wait(*_):
        reached.set()
        assert go_on.wait(60)

    hook = pipe.transformer.norm_out.register_forward_pre_hook(wait)
    thread = threading.Thread(target=lambda: made.append(generate(name, pipe)))
    thread.start()
    assert reached.wait(60)
    if act == "disable":
        dc.disable(pipe)
    else:
        dc.enable(pipe, "interval", every=3)
    go_on.set()
    thread.join()
    hook.remove()
    assert made[0].isfinite().all()
    if act == "disable":
        assert torch.equal(made[0], uncached)
    dc.disable(pipe)
    assert not any(sessions_on(module) for module in pipe.transformer.modules())
    assert torch.equal(generate(name, pipe), uncached)


# what stays behind


def test_schedulers_that_are_gone_are_forgotten():
    pipe = load("dit-digits")
    dc.enable(pipe, "interval", every=2)
    for _ in range(4):
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        gc.collect()
        generate("dit-digits", pipe)
    assert len(session_of(pipe)._marked) <= 2


def test_inspecting_tells_no_callback():
    pipe, seen = load("flux-digits"), []

    def callback(pipe, step, timestep, kwargs):
        seen.append(step)
        return kwargs

    inputs = {**reference.inputs("flux-digits", labels=[3], seeds=[0], steps=STEPS), "callback_on_step_end": callback}
    assert dc.inspect(pipe, inputs).cache_bytes
    assert seen == []
