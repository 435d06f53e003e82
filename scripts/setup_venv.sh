#!/usr/bin/env bash
# Create .venv with torch and this package, editable. Run by `make venv`; the argument is the torch version to install
# where there is none: torch in .venv or a CUDA-enabled torch of the system python3 is kept.
set -euo pipefail

python=.venv/bin/python

python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "diffusers 0.42 needs Python 3.11 or newer; python3 is $(python3 --version)" >&2
  exit 1
}

if ! "$python" -m pip --version >/dev/null 2>&1; then
  options=()
  if python3 -c "import torch; assert torch.version.cuda" 2>/dev/null; then
    options=(--system-site-packages)
  fi
  python3 -m venv ${options[@]+"${options[@]}"} .venv || {
    echo "python3 -m venv failed. On Debian and Ubuntu: apt install python3-venv. Then remove .venv and try again." >&2
    exit 1
  }
fi

# The +cpu build outranks the CUDA one where its index can be reached; otherwise pip goes on with the other indexes.
"$python" -c "import torch" 2>/dev/null || "$python" -m pip install --retries 0 --timeout 15 \
  --extra-index-url https://download.pytorch.org/whl/cpu "torch==$1"

# what the extras need must not replace the torch that is there
"$python" -c 'import torch; print("torch==" + torch.__version__.split("+")[0])' >.venv/constraints.txt
"$python" -m pip install --constraint .venv/constraints.txt --editable ".[dev,report,peers,sweep]"
