"""Measure caches where chunks of a call have noise levels of their own, and write results/streams.json.

Usage: python scripts/measure_streams.py [--settings window pipeline] [--samples 4] [--pairs 3] [--out FILE]

The model is the shipped wan-moving-digits, whose weights are those of a SkyReelsV2Transformer3DModel, trained on for
some minutes with levels that rise from frame to frame (diffusion forcing) on digits that bounce around for ever; it is
stored under outputs/streams and trained again only if missing. Two ways to generate:

window: a video of 24 frames passes through a window of 7, one clean and six each four steps behind the one before. The
    window moves on every four calls.
pipeline: diffusers' SkyReelsV2DiffusionForcingPipeline in its asynchronous mode, 7 frames each four steps behind.

For each: executed operations and PSNR against the uncached output of the same seeds (mean and worst) of a stream, of
the cache by steps, and of fewer sampler steps at the same number of denoiser calls; for streams, process CPU time of
one sample beside uncached runs in turns. Rows of settings that are not asked for stay as they are. Prints the table of
docs/streams.md.
"""

import argparse
import json
import platform
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

import diffusion_cache as dc
from diffusion_cache import reference
from diffusion_cache.evaluation.environment import cpu_name, versions
from diffusion_cache.evaluation.prompts import FITTING_SEEDS
from diffusion_cache.measure import executed_flops, paired, quality
from diffusion_cache.reference import data, models
from diffusion_cache.reference.autoencoder import IdentityAutoencoder

NAME = "wan-moving-digits"
FRAMES = 24  # of a video that passes through the window
WINDOW = data.VIDEO_FRAMES
STEPS, LAG = 24, 4
FIRST_SEED = 60_000
OPTIMIZER_STEPS, BATCH, LEARNING_RATE = 800, 16, 5e-4


def sigma_at(share: float | Tensor) -> Any:
    """The noise level when this share of the way is left, under the sampler's shift of 3."""
    return 3 * share / (1 + 2 * share)


def bouncing_digits(n: int, frames: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Videos [n, 1, frames, size, size] of digits that bounce off the borders, and their labels."""
    images, labels = data.digit_images(data.VIDEO_DIGIT)
    index = torch.randint(len(images), (n,), generator=generator)
    digits, room = (images[index] + 1) / 2, data.VIDEO_SIZE - data.VIDEO_DIGIT
    start = 2 * room * torch.rand(n, 2, generator=generator)
    angle = 2 * torch.pi * torch.rand(n, generator=generator)
    speed = 0.4 + 0.7 * torch.rand(n, generator=generator)
    velocity = speed[:, None] * torch.stack([angle.sin(), angle.cos()], 1)
    background = data.textures(n, generator)
    corners = [room - ((start + frame * velocity) % (2 * room) - room).abs() for frame in range(frames)]
    drawn = [data.opacity_of(digits, corner) for corner in corners]
    return torch.stack([background * (1 - opacity) + opacity for opacity in drawn], 2), labels[index]


def trained(path: Path) -> nn.Module:
    """The denoiser for levels that differ between frames."""
    model = diffusers.SkyReelsV2Transformer3DModel.from_config(reference.denoiser(NAME).config)
    model.load_state_dict(reference.denoiser(NAME).state_dict())
    model.eval()
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99))
    for step in range(OPTIMIZER_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / 20) * (1 - step / OPTIMIZER_STEPS)
        optimizer.zero_grad()
        loss = forcing_loss(model, torch.Generator().manual_seed(FITTING_SEEDS + step))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 99:
            print(f"trained {step + 1} of {OPTIMIZER_STEPS} steps, loss {loss.item():.3f}", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    return model


def forcing_loss(model: nn.Module, generator: torch.Generator) -> Tensor:
    """Mean squared error of the velocity over frames that are not clean; levels rise by one slope or are all one."""
    clean, labels = bouncing_digits(BATCH, WINDOW, generator)
    labels = torch.where(torch.rand(BATCH, generator=generator) < 0.1, models.NULL_CLASS, labels)
    share = 2 * torch.rand(BATCH, 1, generator=generator) - 1
    share = share + 0.5 * torch.rand(BATCH, 1, generator=generator) * torch.arange(WINDOW)
    one = torch.rand(BATCH, 1, generator=generator) < 0.2
    share = torch.where(one, torch.rand(BATCH, 1, generator=generator), share).clamp(0, 1)
    sigma = sigma_at(share)[:, None, :, None, None]
    noise = torch.randn(clean.shape, generator=generator)
    output = velocity(model, (1 - sigma) * clean + sigma * noise, sigma[:, 0, :, 0, 0], labels)
    noisy = (sigma > 0).float()
    return ((output - (noise - clean)) ** 2 * noisy).sum() / noisy.sum() / data.VIDEO_SIZE**2


def velocity(model: nn.Module, sample: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
    return model(
        hidden_states=sample,
        timestep=1000 * sigma,
        encoder_hidden_states=models.class_embeddings()[labels],
        enable_diffusion_forcing=True,
        return_dict=False,
    )[0]


@torch.no_grad()
def window(
    model: nn.Module, samples: int, run: Any = None, streams: bool = False, steps: int = STEPS, lag: int = LAG
) -> Tensor:
    """Videos in [0, 1], [n, frames, 1, size, size], by Euler's method. run: told of steps, and chunks if it streams."""
    draws = [torch.Generator().manual_seed(FIRST_SEED + row) for row in range(samples)]
    shape = (1, FRAMES + WINDOW, data.VIDEO_SIZE, data.VIDEO_SIZE)
    video, labels = torch.stack([torch.randn(shape, generator=draw) for draw in draws]), torch.arange(samples) % 10
    for call in range((FRAMES - 1) * lag + steps):
        clean = max(0, (call - steps) // lag + 1)  # frames that are finished
        first = max(0, clean - 1)
        done = [min(max(call - frame * lag, 0), steps) for frame in range(first, first + WINDOW)]
        moved = [min(max(call + 1 - frame * lag, 0), steps) for frame in range(first, first + WINDOW)]
        sigma, after = (sigma_at(1 - torch.tensor(ages) / steps) for ages in (done, moved))
        held = video[:, :, first : first + WINDOW]
        if streams:
            run.chunks(range(first, first + WINDOW))
        given = velocity(model, held, sigma.expand(samples, -1), labels)
        video[:, :, first : first + WINDOW] = held + (after - sigma)[:, None, None] * given
        if run is not None:
            run.next_step()
    return (video[:, :, :FRAMES] / 2 + 0.5).clamp(0, 1).transpose(1, 2)


def window_cached(model: nn.Module, samples: int, stream: Any, **options: Any) -> tuple[Tensor, Any]:
    with dc.run(model, policy="interval", stream=stream, **options) as run:
        return window(model, samples, run, stream is not None), run.summary()


class Autoencoder(IdentityAutoencoder):
    temperal_downsample = ()  # which the pipeline asks for


def pipeline_of(model: nn.Module) -> Any:
    pipe = diffusers.SkyReelsV2DiffusionForcingPipeline(
        tokenizer=None,
        text_encoder=None,
        transformer=model,
        vae=Autoencoder(),
        scheduler=models.scheduler(reference.spec(NAME), "unipc"),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def asynchronous(pipe: Any, samples: int, steps: int = STEPS, lag: int = LAG) -> Tensor:
    table = models.class_embeddings()
    output = pipe(
        prompt=None,
        prompt_embeds=table[[row % 10 for row in range(samples)]],
        negative_prompt_embeds=table[[models.NULL_CLASS] * samples],
        guidance_scale=2.0,
        height=data.VIDEO_SIZE,
        width=data.VIDEO_SIZE,
        num_frames=WINDOW,
        num_inference_steps=steps,
        ar_step=lag,
        causal_block_size=1,
        generator=[torch.Generator().manual_seed(FIRST_SEED + row) for row in range(samples)],
        output_type="pt",
    )
    return output.frames.float()


def asynchronous_cached(pipe: Any, samples: int, stream: Any, **options: Any) -> tuple[Tensor, Any]:
    with dc.cached(pipe, policy="interval", stream=stream, **options):
        return asynchronous(pipe, samples), dc.summary(pipe)


def measure(setting: str, samples: int, pairs: int, model: nn.Module) -> list[dict[str, Any]]:
    """A setting's rows."""
    plain, cached, everies, orders = SETTINGS[setting]
    subject = model if plain is window else pipeline_of(model)
    rows: list[dict[str, Any]] = []

    def note(method: str, every: int, expected: Tensor, whole: int, run: Callable[[int], Any], **more: Any) -> None:
        made: list[Any] = []
        flops = executed_flops(lambda: made.append(run(samples)))
        output, summary = made[0] if isinstance(made[0], tuple) else (made[0], None)
        found = quality(output, expected)
        row = {"setting": setting, "method": method, "every": every, "samples": samples}
        row["executed"] = round(flops / whole, 4)
        row |= {"psnr": round(found.psnr_mean, 2), "psnr_worst": round(found.psnr_worst, 2)}
        if summary is not None:
            row |= {"calls": len(summary.records), "computed": summary.computed}
            row |= {"cache_bytes_per_sample": summary.cache_bytes // samples}
        rows.append(row | more)
        print(rows[-1], flush=True)

    uncached: list[Tensor] = []
    whole = executed_flops(lambda: uncached.append(plain(subject, samples)))
    for every in everies:
        fewer = partial(plain, subject, steps=STEPS // every, lag=LAG // every)
        note("fewer steps", every, uncached[0], whole, fewer)
        for order in orders:
            options = {"every": every, "forecaster": "taylor", "order": order}
            note(
                f"by steps, order {order}", every, uncached[0], whole, partial(cached, subject, stream=None, **options)
            )
            stream = partial(cached, subject, stream=dc.Stream(), **options)
            timing = paired(partial(plain, subject, 1), partial(stream, 1), pairs)
            ratios = [round(ratio, 3) for ratio in sorted(timing.cpu_ratios)]
            more = {"faster": round(timing.cpu_ratio, 3), "faster_range": [ratios[0], ratios[-1]]}
            note(f"stream, order {order}", every, uncached[0], whole, stream, **more)
    return rows


# how to generate, without and with a cache; one call in how many is computed; orders of Taylor
SETTINGS: dict[str, tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, Any]], Sequence[int], Sequence[int]]] = {
    "window": (window, window_cached, (2, 4), (0, 1)),
    "pipeline": (asynchronous, asynchronous_cached, (2,), (1,)),
}


def table(report: dict[str, Any]) -> list[str]:
    """Lines of docs/streams.md."""
    lines = ["| | | executed | PSNR, dB | worst | CPU time |", "| --- | --- | ---: | ---: | ---: | ---: |"]
    for row in report["results"]:
        time = ""
        if "faster" in row:
            low, high = row["faster_range"]
            time = f"{row['faster']:.2f}× ({low:.2f}–{high:.2f}) faster"
        numbers = f"{row['psnr']:.1f}", f"{row['psnr_worst']:.1f}"
        cells = f"{row['setting']}, 1 of {row['every']}", row["method"], f"{row['executed']:.0%}", *numbers, time
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=tuple(SETTINGS), default=tuple(SETTINGS))
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("results/streams.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    diffusers.logging.set_verbosity_error()
    model = trained(Path("outputs/streams/model.pt"))
    rows = [row for setting in options.settings for row in measure(setting, options.samples, options.pairs, model)]
    if options.out.exists():
        before = json.loads(options.out.read_text())["results"]
        rows += [row for row in before if row["setting"] not in options.settings]
    rows.sort(key=lambda row: list(SETTINGS).index(row["setting"]))
    report = {
        "model": f"{NAME}, {OPTIMIZER_STEPS} steps of diffusion forcing, batch {BATCH}, seeds from {FITTING_SEEDS}",
        "first_seed": FIRST_SEED,
        "steps": STEPS,
        "lag": LAG,
        "pairs": options.pairs,
        "clock": "process CPU time, one thread",
        "hardware": f"CPU {platform.machine()}, {cpu_name()}",
        "versions": versions(),
        "results": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print("\n".join(table(report)))


if __name__ == "__main__":
    main()
