"""What caching costs and saves: output quality, executed arithmetic and paired wall time."""

from .flops import BlockCount, count_blocks, executed_flops, flop_counter
from .metrics import Quality, latent_error, psnr, quality, ssim
from .timing import PairedTiming, elapsed, paired

__all__ = [
    "BlockCount",
    "PairedTiming",
    "Quality",
    "count_blocks",
    "elapsed",
    "executed_flops",
    "flop_counter",
    "latent_error",
    "paired",
    "psnr",
    "quality",
    "ssim",
]
