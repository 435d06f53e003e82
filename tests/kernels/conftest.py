"""The kernels' own tests need a GPU, or Triton's interpreter, which is chosen when Triton is imported.

`test_interpreted.py` runs them in a process of their own.
"""

import os

import torch

if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    collect_ignore = ["ops"]
