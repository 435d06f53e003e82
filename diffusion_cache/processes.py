"""The processes of an `accelerate launch`."""

from datetime import timedelta
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator

# that they wait for one that works alone; torch ends them after ten minutes on GPUs, and a profile takes longer
PATIENCE = timedelta(days=7)


def accelerator(mixed_precision: str | None = None) -> "Accelerator":
    """On GPUs where there are any; mixed_precision: as accelerate names it, None for what it is set up for."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    waiting = InitProcessGroupKwargs(timeout=PATIENCE)
    return Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=mixed_precision, kwargs_handlers=[waiting])
