"""Programs in processes of their own, for test_pop.py and bench.py.

To be imported before torch, and before anything changes the environment: theirs is the one found here.
"""
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPO = Path(__file__).parent.parent
ENVIRONMENT = dict(os.environ)
OPENMP = Path(sys.prefix) / "lib" / "libiomp5.so"
if OPENMP.exists():
    ENVIRONMENT |= dict(LD_PRELOAD=str(OPENMP), POP_STARTED="yes")    # as pop.py does

TINY = ("pop.py", "--preset", "tiny", "--docs_per_step", 2, "--num_generations", 4, "--max_new_tokens", 64)
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


def run_python(*args: Any) -> str:
    """What Python prints, which must end well."""
    done = subprocess.run([sys.executable, *map(str, args)], cwd=REPO, env=ENVIRONMENT, timeout=3600,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def found_by(*args: Any) -> Any:
    """The JSON in the last line that Python prints."""
    return json.loads(run_python(*args).splitlines()[-1])


def start_real(out: Path, *args: Any, **environment: str) -> subprocess.Popen:
    """A process of Python, still at work; its output goes to the end of the file `out`."""
    with open(out, "a") as file:
        return subprocess.Popen([sys.executable, *map(str, args)], cwd=REPO, env=ENVIRONMENT | environment,
                                stdout=file, stderr=file, start_new_session=True)


def wait_until(ready: Callable[[], Any], process: subprocess.Popen, seconds: float = 600) -> None:
    """Wait until ready() is true or the process has ended; an OSError is a no."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            if ready():
                return
        except OSError:
            pass
        time.sleep(0.05)
    assert process.poll() is not None, "waited in vain"


def start_server(out: Path, folder: Path, name: str, *flags: Any) -> tuple[str, subprocess.Popen]:
    """(URL, process) of vLLM's own OpenAI-compatible server, ready to answer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = start_real(
        out, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--served-model-name", name, "--port", port,
        "--dtype", "float32", "--enforce-eager", "--max-num-batched-tokens", 32768, *flags,    # as pop.py does
        VLLM_CPU_KVCACHE_SPACE="2", VLLM_CPU_OMP_THREADS_BIND="nobind")
    wait_until(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200, server)
    return f"http://127.0.0.1:{port}/v1", server
