"""What caching costs and saves: output quality, executed arithmetic, paired time and memory."""

from .flops import BlockCount, FlopCounter, count_blocks, executed_flops
from .memory import LiveBytes, peak_bytes
from .metrics import Quality, latent_error, psnr, quality, ssim
from .timing import PairedTiming, elapsed, paired

__all__ = [
    "BlockCount",
    "FlopCounter",
    "LiveBytes",
    "PairedTiming",
    "Quality",
    "count_blocks",
    "elapsed",
    "executed_flops",
    "latent_error",
    "paired",
    "peak_bytes",
    "psnr",
    "quality",
    "ssim",
]
