"""Train a reference model, pass it through its gate, and only then store its 16-bit weights with their card.

Run as `python scripts/train_reference.py reference=flux-digits`. A run that was stopped continues from its last
checkpoint, exactly: the data of step n depend on the seed and n alone. A finished training goes straight to the
gate. A checkpoint of other settings is refused.
"""

import copy
import math
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import torch
from omegaconf import DictConfig
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from diffusion_cache.files import written
from diffusion_cache.reference import data, models

LOSS_WINDOW = 50


def noise_batch(
    spec: models.ReferenceModel, clean: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy samples, timesteps in 0…1000 and regression targets for clean samples [n, ...] in [-1, 1]."""
    n = len(clean)
    noise = torch.randn(clean.shape, generator=generator)
    shape = (n,) + (1,) * (clean.ndim - 1)
    if spec.objective == "flow":
        u = torch.rand(n, generator=generator)
        sigma = 2 * u / (1 + u)  # half-way to the samplers' shift of 3, so that both ends are seen
        s = sigma.view(shape)
        return (1 - s) * clean + s * noise, 1000 * sigma, noise - clean
    alphas_cumprod = models.scheduler(spec).alphas_cumprod
    t = torch.randint(len(alphas_cumprod), (n,), generator=generator)
    a, s = alphas_cumprod[t].sqrt().view(shape), (1 - alphas_cumprod[t]).sqrt().view(shape)
    return a * clean + s * noise, t, a * noise - s * clean


def training_batch(spec: models.ReferenceModel, n: int, null_fraction: float, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    if len(spec.sample_shape) == 4:
        clean, labels, _ = data.sample_moving_digits(n, generator)
    else:
        clean, labels = data.sample_digits(n, generator)
    dropped = torch.rand(n, generator=generator) < null_fraction
    labels = torch.where(dropped, models.NULL_CLASS, labels)
    return *noise_batch(spec, clean, generator), labels


def learning_rate(step: int, cfg: DictConfig) -> float:
    if step < cfg.warmup:
        return cfg.reference.lr * (step + 1) / cfg.warmup
    progress = (step - cfg.warmup) / max(1, cfg.reference.steps - cfg.warmup)
    return cfg.reference.lr * 0.5 * (1 + math.cos(math.pi * progress))


def settings_of(cfg: DictConfig) -> dict[str, str | int | float]:
    """What a training's weights depend on."""
    own = {key: cfg[key] for key in ("seed", "ema", "weight_decay", "warmup", "null_fraction")}
    return own | {key: cfg.reference[key] for key in ("name", "steps", "batch", "lr")}


def regression(spec: models.ReferenceModel, cfg: DictConfig) -> Callable[[torch.nn.Module, int], Tensor]:
    """The loss of a shipped pipeline's denoiser on the batch of a seed."""

    def loss(model: torch.nn.Module, seed: int) -> Tensor:
        batch = training_batch(spec, cfg.reference.batch, cfg.null_fraction, seed)
        noisy, timesteps, target, labels = (tensor.to(cfg.device) for tensor in batch)
        return (spec.denoise(model, noisy, timesteps, labels) - target).square().mean()

    return loss


def train(
    build: Callable[[], torch.nn.Module],
    loss_of: Callable[[torch.nn.Module, int], Tensor],
    cfg: DictConfig,
    run_dir: Path,
) -> tuple[torch.nn.Module, dict]:
    """Train to cfg.reference.steps and return the averaged model with what its card says of the training.

    Raises:
        SystemExit: where the checkpoint in run_dir is of a training with other settings.
    """
    name, settings = cfg.reference.name, settings_of(cfg)
    torch.manual_seed(cfg.seed)
    model = build().to(cfg.device).eval()  # eval: DiT's own label dropout draws per block, ours per sample
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=cfg.reference.lr, betas=(0.9, 0.99), weight_decay=cfg.weight_decay
    )
    checkpoint = run_dir / "checkpoint.pt"
    start, seconds, losses = 0, 0.0, []
    hardware, versions = [], []  # of all stretches of the training
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=cfg.device, weights_only=True)
        before = state.get("settings", {})
        changed = [
            f"{key} {before.get(key, 'unknown')} (now {now})" for key, now in settings.items() if before.get(key) != now
        ]
        if changed:
            raise SystemExit(
                f"{checkpoint} is of a training with {', '.join(changed)}: delete it to train anew, or train as before"
            )
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        start, seconds, losses = state["step"], state["seconds"], state["losses"]
        hardware, versions = state.get("hardware", ["unknown"]), state.get("torch", ["unknown"])
    if start < cfg.reference.steps:
        hardware = list(dict.fromkeys([*hardware, hardware_of(cfg)]))
        versions = list(dict.fromkeys([*versions, str(torch.__version__)]))

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task(name, total=cfg.reference.steps, completed=start)
        began = time.perf_counter()
        for step in range(start, cfg.reference.steps):
            loss = loss_of(model, cfg.seed * 10**6 + step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, cfg)
            optimizer.step()
            decay = min(cfg.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
            losses.append(float(loss.detach()))
            progress.update(
                task,
                advance=1,
                description=f"{name} loss {sum(losses[-LOSS_WINDOW:]) / len(losses[-LOSS_WINDOW:]):.4f}",
            )
            if (step + 1) % cfg.checkpoint_every == 0 or step + 1 == cfg.reference.steps:
                state = {
                    "settings": settings,
                    "model": model.state_dict(),
                    "average": average.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step + 1,
                    "seconds": seconds + time.perf_counter() - began,
                    "losses": losses,
                    "hardware": hardware,
                    "torch": versions,
                }
                with written(checkpoint) as draft:
                    torch.save(state, draft)
        seconds += time.perf_counter() - began
    facts = {
        "steps": cfg.reference.steps,
        "batch": cfg.reference.batch,
        "learning_rate": cfg.reference.lr,
        "seconds": round(seconds),
        "hardware": "; ".join(hardware),
        "torch": "; ".join(versions),
        "loss": round(sum(losses[-LOSS_WINDOW * 4 :]) / len(losses[-LOSS_WINDOW * 4 :]), 5),
    }
    plot_losses(losses, run_dir / "loss.png", name)
    return average, facts


def hardware_of(cfg: DictConfig) -> str:
    if cfg.device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"CPU {platform.machine()}, {cfg.threads} thread(s)"


def plot_losses(losses: list[float], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    smooth = torch.tensor(losses).unfold(0, min(LOSS_WINDOW, len(losses)), 1).mean(1)
    figure, axes = plt.subplots(figsize=(6, 3.5))
    axes.semilogy(smooth)
    axes.set(xlabel="optimizer step", ylabel=f"loss (mean of {LOSS_WINDOW})", title=title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


class Bare(NamedTuple):
    """A shipped model that is no image pipeline's: how to build it, its loss, what it learns, and how it is judged."""

    build: Callable[[], torch.nn.Module]
    loss: Callable[[torch.nn.Module, int, int, str], Tensor]  # of a model, a batch size, a seed and a device
    data: str
    score: str
    judge: Callable[[torch.nn.Module, int], float]  # a model's score over so many samples
    gate: float


def reacher() -> Bare:
    from diffusion_cache.reference import reacher as module
    from diffusion_cache.reference import reaching

    def judge(model: torch.nn.Module, samples: int) -> float:
        seeds = range(module.FIRST_SEED, module.FIRST_SEED + samples)
        return module.successes(model, seeds).float().mean().item()

    return Bare(module.Reacher, module.loss, reaching.__doc__, "success_rate", judge, module.GATE)


def fill_forward() -> Bare:
    from diffusion_cache.reference import fill_forward as module

    return Bare(module.FillForward, module.loss, module.__doc__, "exact_match", module.exact_match, module.GATE)


def rolling() -> Bare:
    from diffusion_cache.reference import rolling as module

    return Bare(module.build, module.loss, module.__doc__, "class_accuracy", module.recognised, module.GATE)


BARE = {"reacher": reacher, "fill-forward": fill_forward, "rolling-digits": rolling}


def as_stored(build: Callable[[], torch.nn.Module], trained: torch.nn.Module) -> torch.nn.Module:
    """The model as it is loaded from what is stored of it: on the CPU, with weights rounded to 16 bits."""
    model = build()
    model.load_state_dict({key: value.half() for key, value in trained.state_dict().items()})
    return model.eval()


def store(name: str, model: torch.nn.Module, card: Mapping[str, Any], scores: Mapping[str, float], gate: float) -> None:
    """Store a model that passes its gate in place of the shipped one.

    Raises:
        SystemExit: where it does not pass.
    """
    from diffusion_cache import reference

    if not all(score >= gate for score in scores.values()):
        raise SystemExit(f"not stored: {name} does not pass its gate of {gate:.0%}: {dict(scores)}")
    folder = reference.save(name, model, card)
    print((folder / "card.json").read_text())


def make_bare(bare: Bare, cfg: DictConfig, run_dir: Path) -> None:
    """Train, judge and store a shipped model that is no image pipeline's."""

    def loss(model: torch.nn.Module, seed: int) -> Tensor:
        return bare.loss(model, cfg.reference.batch, seed, cfg.device)

    name = cfg.reference.name
    model, facts = train(bare.build, loss, cfg, run_dir)
    score = bare.judge(as_stored(bare.build, model), cfg.gate_samples)
    card = {"data": bare.data.split("\n")[0], "training": facts, bare.score: round(score, 4)}
    store(name, model, {**card, "gate_samples": cfg.gate_samples}, {bare.score: score}, bare.gate)


@hydra.main(config_path="../configs", config_name="train_reference", version_base="1.3")
def main(cfg: DictConfig) -> None:
    torch.set_num_threads(cfg.threads)
    run_dir = Path(hydra.core.hydra_config.HydraConfig.get().runtime.output_dir)
    if cfg.reference.name in models.BARE:
        make_bare(BARE[cfg.reference.name](), cfg, run_dir)
        return
    spec = models.MODELS[cfg.reference.name]
    model, facts = train(spec.build, regression(spec, cfg), cfg, run_dir)

    from diffusion_cache.reference import gate

    judged = as_stored(spec.build, model)
    scores = {
        sampler: gate.class_accuracy(
            spec.name, sampler, cfg.gate_samples, grid=run_dir / f"samples-{sampler}.png", model=judged
        )
        for sampler in spec.samplers
    }
    rounded = {sampler: round(score, 4) for sampler, score in scores.items()}
    card = {"data": data.__doc__.split("\n")[0], "training": facts, "class_accuracy": rounded}
    store(spec.name, model, {**card, "gate_samples": cfg.gate_samples}, scores, spec.gate)


if __name__ == "__main__":
    main()
