"""What a program should set before Python starts, for pop.py and eval.py."""
import os
import re
import sys
from pathlib import Path

import torch

# Libraries print about a dozen lines of notices at every start.
QUIET = dict(PYTHONWARNINGS="ignore::FutureWarning", TORCH_CPP_LOG_LEVEL="ERROR", TORCH_LOGS="-all")


def start_over() -> None:
    """Without a GPU: start the program again, once, with Intel's OpenMP and fewer warnings.

    With this OpenMP (package intel-openmp) a training step on CPU takes a third of the time.
    """
    if torch.cuda.is_available() or "POP_STARTED" in os.environ:
        return
    environment = dict(QUIET, POP_STARTED="yes") | os.environ
    openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
    # LD_PRELOAD is split at spaces and colons, so a path with one of them cannot be in it.
    if openmp.exists() and not re.search(r"[\s:]", str(openmp)):
        environment.setdefault("LD_PRELOAD", str(openmp))
    os.execve(sys.executable, sys.orig_argv, environment)    # with its -m, if any
