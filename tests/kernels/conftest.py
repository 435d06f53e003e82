"""What needs a GPU or Triton's interpreter, which is chosen when Triton is imported, so in a process of its own.

`test_interpreted*.py` start such processes.
"""

import os

import torch

collect_ignore = []
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    collect_ignore.append("ops")
if os.environ.get("DIFFUSION_CACHE_KERNELS") != "interpret":
    collect_ignore.append("engine")
