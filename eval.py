"""Did it get better, and would another judge agree?

A rising training reward proves nothing: the judge may be fooled. This asks two models the same prompts, lets another judge
score both, and says how sure the difference is.
    python eval.py --model runs/x/checkpoints/step_000100 --baseline Qwen/Qwen2.5-7B --benchmark healthbench --judge JUDGE
    python eval.py report runs/x                            # report.html: curves, evaluations, the rollouts to read
    python eval.py judge --judge JUDGE --labels FILE        # does a judge agree with given labels?
    python eval.py rejudge runs/* --judge JUDGE             # another judge on the answers to a run's held-out tasks

Answers and verdicts are kept in evals/cache: the same command goes on after an interruption, and a second judge costs no
second sampling. A verdict that cannot be read is left out, together with the other model's, and counted; it is never 0.
The judges' prompts are our own, so scores compare models here, not with published tables; the rules by which verdicts
become scores are the published ones.

Sections: 1 settings, 2 benchmarks, 3 models and judges, 4 statistics, 5 evaluation, 6 judging judges, 7 runs, 8 main.
"""

# ---- 1. settings ----
import argparse
import dataclasses
import hashlib
import json
import os
import random
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec, module_from_spec
from itertools import chain, islice, takewhile
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, HfArgumentParser

import pop
from pop import Completion, Criterion, Group, Messages, ParseError, Question, fail, flag, object_schema


@dataclass
class EvalConfig:
    """Every setting; each field is a flag of the same name."""
    model: str | None = flag(None, "a checkpoint of a run (LoRA or full), a model folder or a hub name")
    baseline: str | None = flag(None, "the model to compare with; default: what the LoRA checkpoint was trained from")
    benchmark: str | None = flag(None, "healthbench[_hard|_consensus], creative_writing, arena_hard[_v0.1], ifeval, writingbench, own")
    judge: str | None = flag(None, "folder or hub name of the judge, or an OpenAI-compatible endpoint (http://host/v1)")
    judge_model: str | None = flag(None, "name of the model behind a --judge that is a URL; key: $OPENAI_API_KEY")
    data: str | None = flag(None, "file or URL in the benchmark's own format; own: prompts, or a held-out corpus as in pop.py")
    references: str | None = flag(None, "arena_hard: file of the answers to compare with; default: the published baseline's")
    limit: int = flag(0, "so many prompts, drawn at random but always the same ones; 0: all")
    seeds: int = flag(1, "answers to each prompt")
    temperature: float | None = flag(None, "of the answers; default: the benchmark's own")
    max_new_tokens: int = flag(2048, "tokens in an answer")
    solver_prompt: bool = flag(False, "ask as in training: worked examples, and only what is between <answer> tags counts")
    domain: str = flag("general", "own: prompts for tasks and rubrics", ("general", "health", "writing"))
    scoring: str = flag("pointwise", "own: as in pop.py", ("pointwise", "expected"))
    labels: str | None = flag(None, "judge: JSONL of {prompt, answer, criterion, points, criteria_met}")
    dtype: str = flag("bfloat16" if torch.cuda.is_available() else "float32", "of all models", ("bfloat16", "float32"))
    max_model_len: int = flag(16384, "tokens of prompt and reply; longer ones are left out and counted")
    out: str = flag("evals", "folder of results and caches")


# ---- 2. benchmarks ----
@dataclass
class Item:
    """One prompt, and what its answers are judged by."""
    id: str
    prompts: list[Messages]              # the conversation; several: one for each of --seeds, in turn
    theme: str = ""                      # results are also given for each theme
    criteria: list[Any] = field(default_factory=list)    # as the benchmark has them
    reference: str = ""                  # own: the document's answer; arena_hard: the published one

    @property
    def conversation(self) -> str:
        return "\n\n".join(turn["content"] if len(self.prompts[0]) == 1 else f"{turn['role']}: {turn['content']}"
                           for turn in self.prompts[0])


Points = list[float]    # what the verdicts on one answer are worth; a model's score is the mean over all of them


def user_turn(text: str) -> list[Messages]:
    return [[dict(role="user", content=text)]]


def question(instruction: str, schema: dict[str, Any], max_tokens: int, parser: Callable[[str], Any], **texts: str) -> Question:
    """Each text in its fence, which it cannot close (pop.fence), then the instruction."""
    fenced = [pop.fence(tag, text) for tag, text in texts.items()]
    system = dict(role="system", content="You grade answers, strictly and fairly.")
    return [system, dict(role="user", content="\n".join([*fenced, instruction]))], schema, max_tokens, parser


def parse_value(text: str, key: str, allowed: Sequence[Any]) -> Any:
    """One field of a JSON reply. Raises ParseError: it is missing, or none of the allowed values (true is not 1)."""
    value = pop.parse_json(text).get(key)
    if pop.compact(value) not in map(pop.compact, allowed):
        raise ParseError(f"bad_{key}")
    return value


# HealthBench (arXiv 2505.08775, openai/simple-evals): points of the criteria that are met / sum of the positive points
def read_healthbench(row: dict[str, Any]) -> Item:
    theme = next((tag[6:] for tag in row["example_tags"] if tag.startswith("theme:")), "")
    return Item(row["prompt_id"], [row["prompt"]], theme, row["rubrics"])


def ask_healthbench(item: Item, answer: str) -> list[Question]:
    instruction = ("The answer is the last reply to the conversation in the task. Does it meet the criterion in the statement? All "
                   "parts of the criterion must be met, but of its examples (\"such as\", \"for instance\") not every one. A criterion "
                   "may describe a fault: it is met if the answer has that fault. Explain in a sentence, then say true or false.")
    schema = object_schema(explanation=300, criteria_met=dict(type="boolean"))
    parser = partial(parse_value, key="criteria_met", allowed=(True, False))
    return [question(instruction, schema, 400, parser, task=item.conversation, answer=answer, statement=c["criterion"])
            for c in item.criteria]


def score_healthbench(item: Item, met: list[bool]) -> Points:
    won = sum(c["points"] for c, m in zip(item.criteria, met, strict=True) if m)
    return [won / sum(c["points"] for c in item.criteria if c["points"] > 0)]    # may be negative; the mean is clipped


# Creative Writing v3 (EQ-bench/creative-writing-bench): grades 0 to 20, those of faults inverted, mean x 5: 0 to 100
QUALITIES = ("Adherence to Instructions", "Believable Character Actions", "Nuanced Characters", "Consistent Voice/Tone of Writing",
             "Imagery and Descriptive Quality", "Elegant Prose", "Emotionally Engaging", "Emotionally Complex", "Coherent",
             "Well-earned Lightness or Darkness", "Sentences Flow Naturally", "Overall Reader Engagement", "Overall Impression")
FAULTS = ("Meandering", "Weak Dialogue", "Tell-Don't-Show", "Unsurprising or Uncreative", "Amateurish", "Purple Prose",
          "Overwrought", "Incongruent Ending Positivity", "Unearned Transformations")


def read_creative_writing(row: dict[str, Any]) -> Item:
    prompts = [user_turn(row["writing_prompt"].replace("<SEED>", modifier))[0] for modifier in row["seed_modifiers"]]
    return Item(row["title"], prompts, row["category"])


def parse_grades(text: str) -> list[int]:
    """The 22 grades, QUALITIES first. Raises ParseError."""
    grades = pop.compact(pop.parse_json(text).get("grades"))
    return [parse_value(grades, name, range(21)) for name in QUALITIES + FAULTS]


def ask_creative_writing(item: Item, answer: str) -> list[Question]:
    instruction = ("Write a short analysis of the answer, a piece of creative writing. Then grade it from 0 (not at all) to 20 on "
                   f"each criterion. For these a low grade is the better one: {', '.join(FAULTS)}.")
    grades = object_schema(**dict.fromkeys(QUALITIES + FAULTS, dict(enum=list(range(21)))))
    return [question(instruction, object_schema(analysis=600, grades=grades), 999, parse_grades, task=item.conversation, answer=answer)]


def score_creative_writing(item: Item, verdicts: list[list[int]]) -> Points:
    good, bad = verdicts[0][:len(QUALITIES)], verdicts[0][len(QUALITIES):]
    return [5 * float(np.mean([*good, *(20 - grade for grade in bad)]))]


# Arena-Hard (arXiv 2406.11939, lmarena/arena-hard-auto): five verdicts against a published answer, in both orders; a clear one
# counts three times; the score is the share of points won
SHARES = {"A>>B": [1.0] * 3, "A>B": [1.0], "A=B": [0.5], "B>A": [0.0], "B>>A": [0.0] * 3}    # A's


def ask_arena_hard(item: Item, answer: str) -> list[Question]:
    instruction = ("first_answer is A, second_answer is B. Think briefly about what a correct, helpful and concise answer to the task "
                   "says. Which of the two is better? Neither order nor length counts. Verdict: A>>B (A is much better), A>B "
                   "(a little), A=B (as good), B>A or B>>A.")
    schema, parser = object_schema(thoughts=600, verdict=dict(enum=list(SHARES))), partial(parse_value, key="verdict", allowed=SHARES)
    return [question(instruction, schema, 700, parser, task=item.conversation, first_answer=first, second_answer=second)
            for first, second in ((item.reference, answer), (answer, item.reference))]


def score_arena_hard(item: Item, verdicts: list[str]) -> Points:
    second, first = verdicts    # where the answer stood
    return [1 - share for share in SHARES[second]] + SHARES[first]


# WritingBench (arXiv 2503.05244, X-PLUG/WritingBench): five criteria of each query, 1 to 10; the score is their mean
def ask_writingbench(item: Item, answer: str) -> list[Question]:
    instruction = "The statement says how to grade one aspect of the answer. Give a short reason, then a score from 1 to 10."
    schema = object_schema(reason=300, score=dict(enum=list(range(1, 11))))
    parser = partial(parse_value, key="score", allowed=range(1, 11))
    return [question(instruction, schema, 400, parser, task=item.conversation, answer=answer, statement=pop.compact(c))
            for c in item.criteria]


# IFEval (arXiv 2311.07911): verified by lm-eval's code, no judge; the score is strict and by prompt
IFEVAL = [f"{level}_level_{kind}_acc" for kind in ("strict", "loose") for level in ("prompt", "inst")]


def load_ifeval() -> Callable[[Item, str], dict[str, Any] | None]:
    """verify(item, answer) -> {IFEVAL's names: bool, or a list of them}, by lm-eval. The package around its verifier is not run:
    that would import far more. nltk's sentence splitter comes out of llama-index-core, else lm-eval downloads it once."""
    if missing := [name for name in ("lm_eval", "nltk", "langdetect", "immutabledict") if not find_spec(name)]:
        fail(f"--benchmark ifeval: needs {', '.join(missing)}, see README")
    for name in ("lm_eval", "lm_eval.tasks"):
        sys.modules.setdefault(name, module_from_spec(find_spec(name)))
    import langdetect
    import nltk
    langdetect.DetectorFactory.seed = 0
    nltk.data.path += [f"{Path(entry, 'llama_index', 'core', '_static', 'nltk_cache')}" for entry in sys.path]
    from lm_eval.tasks.ifeval.utils import process_results

    def verify(item: Item, answer: str) -> dict[str, Any] | None:
        random.seed(0)    # two checks draw a random letter
        with suppress(RecursionError):    # JSON nested a thousand deep: left out
            return process_results(item.criteria[0], [answer])
    return verify


@dataclass
class Benchmark:
    """Where the prompts are (see read_rows), and three functions: how a row becomes an Item, what the judge is asked, what its
    verdicts are worth."""
    source: str
    temperature: float
    read: Callable[[dict[str, Any]], Item]
    ask: Callable[[Item, str], list[Question]] | None = None    # None: pop.py's rubric
    score: Callable[[Item, Any], Points] = lambda item, verdicts: [float(np.mean(verdicts))]
    clip: bool = False    # the mean into [0, 1]


RAW, ARENA = "https://raw.githubusercontent.com/", "hub:lmarena-ai/arena-hard-auto/data/"
HEALTHBENCH = partial(Benchmark, temperature=0.5, read=read_healthbench, ask=ask_healthbench, score=score_healthbench, clip=True)
ARENA_HARD = partial(Benchmark, temperature=0.0, ask=ask_arena_hard, score=score_arena_hard, read=lambda row: Item(
    row["uid"], user_turn(row["prompt"]), row.get("subcategory") or row["category"]))
OPPONENTS = {"arena-hard-v0.1": "v0.1/model_answer/gpt-4-0314", "hard_prompt": "v2.0/model_answer/o3-mini-2025-01-31",
             "creative_writing": "v2.0/model_answer/gemini-2.0-flash-001"}    # of each category: whose published answers
BENCHMARKS = {
    "healthbench": HEALTHBENCH("hub:openai/healthbench/2025-05-07-06-14-12_oss_eval.jsonl"),
    "healthbench_hard": HEALTHBENCH("hub:openai/healthbench/hard_2025-05-08-21-00-10.jsonl"),
    "healthbench_consensus": HEALTHBENCH("hub:openai/healthbench/consensus_2025-05-09-20-00-46.jsonl"),
    "creative_writing": Benchmark(RAW + "EQ-bench/creative-writing-bench/main/data/creative_writing_prompts_v3.json", 0.7,
                                  read_creative_writing, ask_creative_writing, score_creative_writing),
    "arena_hard": ARENA_HARD(ARENA + "arena-hard-v2.0/question.jsonl"),
    "arena_hard_v0.1": ARENA_HARD(ARENA + "arena-hard-v0.1/question.jsonl"),
    "ifeval": Benchmark("hub:google/IFEval/ifeval_input_data.jsonl", 0.0, lambda row: Item(
        str(row["key"]), user_turn(row["prompt"]), criteria=[row]), score=lambda item, v: [float(v[IFEVAL[0]])]),
    "writingbench": Benchmark(RAW + "X-PLUG/WritingBench/main/benchmark_query/benchmark_all.jsonl", 0.7, lambda row: Item(
        str(row["index"]), user_turn(row["query"]), row["domain1"], row["checklist"]), ask_writingbench),
    "own": Benchmark("", 0.7, lambda row: Item(    # prompts; of documents the baseline makes them, see own_items
        fingerprint(row), user_turn(row["prompt"]), "", [Criterion(**c) for c in row.get("rubric", [])], row.get("reference", "")),
        score=lambda item, ratings: [pop.rubric_score(ratings, [c.weight for c in item.criteria])]),
}


def read_rows(source: str, flag_name: str) -> list[dict[str, Any]]:
    """Objects of a JSONL or JSON file: hub:owner/name/file, https://.., or a path. Exits with one line if it cannot be read."""
    import fsspec
    from huggingface_hub import hf_hub_download
    try:
        path = source
        if source.startswith("hub:"):
            owner, name, file = source[4:].split("/", 2)
            path = hf_hub_download(f"{owner}/{name}", file, repo_type="dataset")
        with fsspec.open(path, "rt", encoding="utf-8") as file:
            rows = json.load(file) if source.endswith(".json") else [json.loads(line) for line in file if line.strip()]
    except (OSError, ValueError) as error:
        fail(f"--{flag_name} {source}: cannot be read ({type(error).__name__}: {str(error).strip().splitlines()[0]})")
    return list(rows.values()) if isinstance(rows, dict) else rows


def load_items(cfg: EvalConfig) -> list[Item]:
    """The benchmark's prompts, --limit of them. Exits with one line if a row is not what the benchmark needs."""
    benchmark = BENCHMARKS[cfg.benchmark]
    rows = read_rows(source := cfg.data or benchmark.source, "data")
    try:
        items = [benchmark.read(row) for row in rows]
        if cfg.benchmark.startswith("arena_hard"):
            published = {f"{ARENA}arena-hard-{OPPONENTS[row['category']]}.jsonl" for row in rows}
            answers = chain(*(read_rows(file, "references") for file in ([cfg.references] if cfg.references else sorted(published))))
            replies = {row["uid"]: row["messages"][-1]["content"]["answer"] for row in answers}
            items = [dataclasses.replace(item, reference=replies[item.id]) for item in items]
    except (LookupError, TypeError, AttributeError) as error:
        fail(f"--data {source}: not in the format of {cfg.benchmark} ({type(error).__name__}: {error})")
    return random.Random(0).sample(items, cfg.limit) if 0 < cfg.limit < len(items) else items


# ---- 3. models and judges ----
ENGINE, SETTINGS = None, pop.Config()    # of this process, see start_engine
CHUNK = 512 if torch.cuda.is_available() else 8    # prompts, or answers to judge, between two writes to the cache


class Endpoint:
    """What pop.ask needs of an engine where the judge is behind a URL."""
    signalled, special, defuse = 0, re.compile(pop.OTHER_SPECIAL), pop.Engine.defuse


def fingerprint(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=vars).encode()).hexdigest()[:16]


def identity(model: str) -> str:
    """Changes if the model's files do: a cache of another checkpoint with the same name is not used."""
    files = [p for p in sorted(Path(model).glob("*")) if p.suffix in (".safetensors", ".json", ".jinja") and "trainer" not in p.name]
    states = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return fingerprint(states or [model, AutoConfig.from_pretrained(model)._commit_hash])


def short_name(model: str) -> str:
    """runs/x/checkpoints/step_000100 -> x-step_000100; else the last part of a name."""
    path = Path(model)
    return f"{path.parts[-3]}-{path.name}" if path.parent.name == "checkpoints" else path.name


def adapter(model: str) -> dict[str, Any]:
    """adapter_config.json of a LoRA checkpoint; {} for a whole model."""
    file = Path(model, "adapter_config.json")
    return json.loads(file.read_text()) if file.is_file() else {}


def engine_settings(cfg: EvalConfig, model: str) -> pop.Config:
    """pop.py's settings for an engine with this model, or with what it is an adapter of. Exits with one line if there is none."""
    base = pop.resolve_model(adapter(model).get("base_model_name_or_path", model))
    limit = getattr(AutoConfig.from_pretrained(base).get_text_config(), "max_position_embeddings", cfg.max_model_len)
    return pop.Config(model=base, dtype=cfg.dtype, max_model_len=min(limit, cfg.max_model_len), domain=cfg.domain, scoring=cfg.scoring,
                      max_new_tokens=cfg.max_new_tokens, task_temperature=0.5, num_steps=20 if torch.cuda.is_available() else 1,
                      lora_rank=adapter(model).get("r", 0), lora_alpha=adapter(model).get("lora_alpha"))


def start_engine(settings: pop.Config, model: str) -> None:
    """Make this process' ENGINE. An adapter is merged and checked against the trainer, as after every update in training."""
    global ENGINE, SETTINGS
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()    # it dies with its parent
    SETTINGS, ENGINE = settings, pop.Engine(settings)
    if settings.lora_rank:
        ENGINE.sleep()
        policy = pop.load_policy(settings)
        for name, tensor in load_file(Path(model, "adapter_model.safetensors")).items():
            policy.get_parameter(name.removeprefix("base_model.model.").removesuffix(".weight")).data.copy_(tensor)
        ENGINE.sync_weights(policy, 1)


@contextmanager
def engine_process(cfg: EvalConfig, model: str) -> Iterator[Callable[..., Any]]:
    """Yields call(function, *args): in a process with this model's engine, started by the first call and gone with all its
    memory after the block. A judge behind a URL needs none."""
    global ENGINE, SETTINGS
    if model.startswith("http"):
        ENGINE, SETTINGS = Endpoint(), pop.Config(judge_url=model, judge_model=cfg.judge_model, domain=cfg.domain)
        yield lambda function, *args: function(*args)
    else:
        with ProcessPoolExecutor(1, get_context("spawn"), start_engine, (engine_settings(cfg, model), model)) as pool:
            yield lambda function, *args: pool.submit(function, *args).result()


def cached(name: str, cfg: EvalConfig, keys: list[str], compute: Callable[[list[int]], list[Any]]) -> list[Any]:
    """The value of each key: out of evals/cache/<name>.jsonl, the others from compute(indices), CHUNK at a time and appended at
    once. None, a failure, is not kept. A line that was cut off by a kill is made again."""
    file = Path(cfg.out, "cache", f"{name}.jsonl")
    file.parent.mkdir(parents=True, exist_ok=True)
    known: dict[str, Any] = {}
    for line in file.read_text(encoding="utf-8").split("\n") if file.exists() else []:
        with suppress(ValueError):
            known.update([json.loads(line)])
    missing = [i for i, key in enumerate(keys) if key not in known]
    for start in range(0, len(missing), CHUNK):
        part = missing[start:start + CHUNK]
        values = {keys[i]: value for i, value in zip(part, compute(part), strict=True)}
        with open(file, "a", encoding="utf-8") as out:
            out.writelines(f"\n{json.dumps(row)}" for row in values.items() if row[1] is not None)
        known |= values
        print(f"{name}: {start + len(part)}/{len(missing)}", flush=True)
    return [known[key] for key in keys]


def reply(prompts: list[Messages], params: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """In the engine's process: one completion a prompt."""
    completions = ENGINE.generate([ENGINE.encode(prompt) for prompt in prompts], params, "answers")
    return [dict(text=c.text, tokens=len(c.token_ids), finish_reason=c.finish_reason) for c in completions]


def sample_answers(cfg: EvalConfig, model: str, items: list[Item], call: Callable[..., Any]) -> list[list[dict[str, Any]]]:
    """Answers [item][seed]: {text, tokens, finish_reason, answer}. answer is what is judged; None: the prompt did not fit."""
    prompts, params = [], []
    for item, seed in [(item, seed) for item in items for seed in range(cfg.seeds)]:
        prompt = item.prompts[seed % len(item.prompts)]
        if cfg.solver_prompt:
            *examples, task = pop.chat("solver", cfg, task=prompt[-1]["content"])
            prompt = [*examples, *prompt[:-1], task]
        prompts.append(prompt)
        params.append(dict(temperature=cfg.temperature, max_tokens=cfg.max_new_tokens,
                           seed=random.Random(f"{item.id} {seed}").getrandbits(31)))
    keys = [fingerprint(prompt, p) for prompt, p in zip(prompts, params)]
    replies = cached(f"answers-{short_name(model)}-{identity(model)}", cfg, keys,
                     lambda part: call(reply, [prompts[i] for i in part], [params[i] for i in part]))
    for row in replies:
        text = row["text"].rpartition("</think>")[2].strip()
        row["answer"] = None if row["finish_reason"] == "too_long" else pop.parse_answer(text) if cfg.solver_prompt else text
    return [replies[i:i + cfg.seeds] for i in range(0, len(replies), cfg.seeds)]


def write_tasks(groups: list[Group]) -> list[list[Any]]:
    """In the engine's process: task, reference, rubric for groups with a document or a task; [] where it failed, and is kept."""
    if groups[0].document:
        groups = pop.propose_tasks(ENGINE, [g.document for g in groups], 0, SETTINGS, Counter(), [])
    pop.write_rubrics(ENGINE, groups, 0, SETTINGS, Counter())
    return [[] if g.drop_reason else [g.task, g.reference, [vars(c) for c in g.rubric]] for g in groups]


def own_items(cfg: EvalConfig, call: Callable[..., Any]) -> list[Item]:
    """--data: lines of {prompt, and if there are, reference and rubric}, or else documents. The baseline writes what is missing,
    so that it is the same for every checkpoint and every judge."""
    items = []
    if cfg.data.endswith(".jsonl") and any("prompt" in row for row in read_rows(cfg.data, "data")[:1]):
        items = load_items(cfg)
        groups = [Group("", item.conversation, item.reference) for item in items if not item.criteria]
    else:
        settings = pop.Config(corpus=cfg.data, domain=cfg.domain, num_steps=1, docs_per_step=cfg.limit or 1000)
        corpus = pop.load_corpus(settings)
        groups = [Group(d) for d in pop.corpus_batch(corpus, 0, dataclasses.replace(settings, docs_per_step=len(corpus)))]
    made = cached(f"tasks-{short_name(cfg.baseline)}-{identity(cfg.baseline)}", cfg, [fingerprint(cfg.domain, g) for g in groups],
                  lambda part: call(write_tasks, [groups[i] for i in part]))
    print(f"{cfg.data}: tasks or rubrics written for {len(made) - made.count([])} of {len(made)}")
    return [item for item in items if item.criteria] + [
        Item(fingerprint(row), user_turn(row[0]), "", [Criterion(**c) for c in row[2]], row[1]) for row in made if row]


Unit = tuple[Item, Callable[[Item, str], list[Question]] | None, str]    # item, the benchmark's `ask`, answer


def judge(units: list[Unit]) -> list[list[Any] | None]:
    """In the engine's process: the verdicts on each answer, one a question; by rubric, the ratings. None: one cannot be read."""
    if units[0][1] is None:
        groups = [Group("", item.conversation, item.reference, item.criteria, completions=[
            Completion([], [], pop.fence("answer", answer), "stop")]) for item, _, answer in units]
        pop.score_answers(ENGINE, groups, 0, SETTINGS, Counter())
        zeros = [[] if g.completions[0].answer else [0.0] * len(g.rubric) for g in groups]    # empty: no fault of the judge
        return [g.completions[0].ratings or zero or None for g, zero in zip(groups, zeros)]
    asked = [ask(item, answer) for item, ask, answer in units]
    replies = iter(pop.ask(ENGINE, "judge", list(chain(*asked)), 0, SETTINGS, Counter()))
    verdicts = [list(islice(replies, len(questions))) for questions in asked]
    return [None if any(isinstance(v, ParseError) for v in found) else found for found in verdicts]


def judge_answers(cfg: EvalConfig, units: list[Unit]) -> list[list[Any] | None]:
    """Verdicts of --judge, cached by what it is asked, word for word."""
    keys = [fingerprint(cfg.scoring, item, answer) if ask is None else fingerprint([q[:3] for q in ask(item, answer)])
            for item, ask, answer in units]
    name = fingerprint(cfg.judge, cfg.judge_model) if cfg.judge_model else f"{short_name(cfg.judge)}-{identity(cfg.judge)}"
    with engine_process(cfg, cfg.judge) as call:
        return cached(f"verdicts-{name}", cfg, keys, lambda part: call(judge, [units[i] for i in part]))


# ---- 4. statistics ----
def compare(pairs: list[list[tuple[Points, Points]]], clip: bool = False) -> dict[str, Any]:
    """pairs[item][seed]: points of model and baseline. Their means and the difference, each as value, low, high: 95% intervals
    by a paired bootstrap over items (2,000 draws), since answers to one prompt are not independent. win, tie, loss: answers."""
    totals = np.array([[[sum(chain(*side)), sum(map(len, side))] for side in zip(*seeds)] for seeds in pairs if seeds])    # (n, 2, 2)
    if not len(totals):
        return dict(n=0)

    def means(sample: np.ndarray) -> np.ndarray:    # (n, 2, 2) -> model, baseline, difference
        model, baseline = sample.sum(0)[:, 0] / sample.sum(0)[:, 1]
        return np.array([model, baseline, model - baseline])

    rng = np.random.default_rng(0)
    draws = np.array([means(totals[rng.integers(len(totals), size=len(totals))]) for _ in range(2000)])
    found = np.stack([means(totals), *np.quantile(draws, [0.025, 0.975], axis=0)], axis=1)    # (3, 3)
    model, baseline, difference = np.concatenate([found[:2].clip(0, 1) if clip else found[:2], found[2:]]).tolist()
    signs = Counter(int(np.sign(round(np.mean(a) - np.mean(b), 9))) for a, b in chain(*pairs))
    return dict(n=len(totals), model=model, baseline=baseline, difference=difference, win=signs[1], tie=signs[0], loss=signs[-1])


def length_controlled(points: list[Points], lengths: list[tuple[int, int]]) -> float:
    """Share of points won if both answers were equally long: logistic regression on (a - b) / (a + b) of the lengths, a little
    ridge. (The original subtracts the mean difference of all models that it ranks; here there is one.)"""
    shares = np.array(list(chain(*points)))
    x = np.array([(a - b) / max(1, a + b) for p, (a, b) in zip(points, lengths) for _ in p])
    features, w = np.stack([np.ones_like(x), x], axis=1), np.zeros(2)
    for _ in range(100):    # Newton
        p = 1 / (1 + np.exp(-features @ w))
        hessian = features.T * (p * (1 - p)) @ features + 0.1 * np.eye(2)
        w += np.clip(np.linalg.solve(hessian, features.T @ (shares - p) - 0.1 * w), -1, 1)
    return float(1 / (1 + np.exp(-w[0])))


def agreement(labels: Sequence[bool], verdicts: Sequence[bool]) -> dict[str, Any]:
    """Of a judge with given labels: accuracy, balanced accuracy (mean of both recalls), Cohen's kappa (None: undefined)."""
    y, v = np.array(labels, dtype=bool), np.array(verdicts, dtype=bool)
    if not len(y):
        return dict(n=0)
    recalls = [(v == y)[y == kind].mean() for kind in (True, False) if (y == kind).any()]
    accuracy, chance = (v == y).mean(), y.mean() * v.mean() + (1 - y.mean()) * (1 - v.mean())
    return dict(n=len(y), accuracy=float(accuracy), balanced_accuracy=float(np.mean(recalls)),
                kappa=float((accuracy - chance) / (1 - chance)) if chance < 1 else None)


# ---- 5. evaluation ----
HEADER = "| benchmark | model | baseline | judge | n | score | baseline's | difference [95%] | win/tie/loss | words | left out |"
SIDES = ("model", "baseline")


def evaluate(cfg: EvalConfig) -> dict[str, Any]:
    """Answers of both models and verdicts on both, as one row for each prompt and seed; then write_results."""
    benchmark, start = BENCHMARKS[cfg.benchmark], time.perf_counter()
    verify = load_ifeval() if cfg.benchmark == "ifeval" else None
    with engine_process(cfg, cfg.baseline) as call:
        items = own_items(cfg, call) if cfg.benchmark == "own" else load_items(cfg)
        if not items:
            fail(f"--data {cfg.data}: holds no prompt, or no document that gave a task")
        answers = dict(baseline=sample_answers(cfg, cfg.baseline, items, call))
    with engine_process(cfg, cfg.model) as call:
        answers["model"] = sample_answers(cfg, cfg.model, items, call)
    rows = [dict(item=dataclasses.replace(item, prompts=[item.prompts[seed % len(item.prompts)]]), seed=seed,
                 **{side: answers[side][i][seed] | dict(points=None) for side in SIDES})
            for i, item in enumerate(items) for seed in range(cfg.seeds)]
    given = [(row["item"], row[side]) for side in SIDES for row in rows if row[side]["answer"] is not None]
    units = [(item, benchmark.ask, side["answer"]) for item, side in given]
    verdicts = [verify(item, answer) for item, _, answer in units] if verify else judge_answers(cfg, units)
    for (item, side), found in zip(given, verdicts):
        side |= dict(verdicts=found, points=found and benchmark.score(item, found))
    if cfg.benchmark == "creative_writing":    # the two models' answers side by side
        both = [row for row in rows if None not in [row[side]["answer"] for side in SIDES]]
        duels = [(dataclasses.replace(row["item"], reference=row["baseline"]["answer"]), row["model"]["answer"]) for row in both]
        for row, verdicts in zip(both, judge_answers(cfg, [(item, ask_arena_hard, answer) for item, answer in duels])):
            row["pairwise"] = dict(verdicts=verdicts, points=verdicts and score_arena_hard(row["item"], verdicts))
    return write_results(cfg, rows, time.perf_counter() - start)


def write_results(cfg: EvalConfig, rows: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """results.json: settings, scores, every answer and verdict. Prints the Markdown row."""
    def compared(kept: Callable[[Any], bool] = bool, points: Callable[[dict[str, Any]], Points] = lambda side: side["points"]) -> Any:
        by_item: dict[str, list[tuple[Points, Points]]] = {}
        for row in [row for row in rows if kept(row) and row["model"]["points"] and row["baseline"]["points"]]:
            by_item.setdefault(row["item"].id, []).append((points(row["model"]), points(row["baseline"])))
        return compare(list(by_item.values()), BENCHMARKS[cfg.benchmark].clip)

    result = dict(settings=vars(cfg), seconds=seconds) | compared()
    result["themes"] = {theme: compared(lambda row: row["item"].theme == theme) for theme in sorted({r["item"].theme for r in rows})}
    result["seeds"] = [compared(lambda row: row["seed"] == seed) for seed in range(cfg.seeds)] if cfg.seeds > 1 else []
    result["left_out"] = {side: sum(not row[side]["points"] for row in rows) for side in SIDES}
    result["words"] = {side: float(np.mean([len((row[side]["answer"] or "").split()) for row in rows])) for side in SIDES}
    if cfg.benchmark == "ifeval":
        result["ifeval"] = {key: compared(bool, lambda side: np.atleast_1d(side["verdicts"][key]).tolist()) for key in IFEVAL}
    if cfg.benchmark.startswith("arena_hard"):
        result["length_controlled"] = {side: length_controlled(
            [row[side]["points"] for row in rows if row[side]["points"]],
            [(len(row[side]["answer"]), len(row["item"].reference)) for row in rows if row[side]["points"]]) for side in SIDES}
    if cfg.benchmark == "creative_writing":    # the share of points that the model wins; 0.5 is as good
        result["pairwise"] = compare([[(row["pairwise"]["points"], [0.5])] for row in rows if row.get("pairwise", {}).get("points")])
    judge_name = "lm-eval" if cfg.benchmark == "ifeval" else cfg.judge_model or short_name(cfg.judge)
    numbers = ["{:.3f} [{:.3f}, {:.3f}]".format(*result[key]) if result["n"] else "-" for key in (*SIDES, "difference")]
    kind = cfg.benchmark + f" {cfg.scoring}" * (cfg.benchmark == "own") + " solver_prompt" * cfg.solver_prompt
    cells = [kind, short_name(cfg.model), short_name(cfg.baseline), judge_name, result["n"], *numbers,
             "/".join(str(result.get(key, 0)) for key in ("win", "tie", "loss")),
             " / ".join(f"{result['words'][side]:.0f}" for side in SIDES), " / ".join(str(result["left_out"][side]) for side in SIDES)]
    result["row"] = f"| {' | '.join(map(str, cells))} |"
    file = Path(cfg.out, f"{'-'.join(cells[:4])}-{fingerprint(vars(cfg))[:6]}".replace("/", "_").replace(" ", "-"), "results.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result | dict(rows=rows), default=vars, indent=1), encoding="utf-8")
    print(HEADER, "|---" * len(cells) + "|", result["row"], f"{file}, {seconds:.0f} s", sep="\n")
    return result


# ---- 6. judging judges ----
def judge_judge(cfg: EvalConfig) -> dict[str, Any]:
    """Agreement of --judge with --labels, asked as in HealthBench: in all, and where a met criterion wins or costs points."""
    labels = read_rows(cfg.labels, "labels")
    try:
        units = [(Item("", [row["prompt"]] if isinstance(row["prompt"], list) else user_turn(row["prompt"]), criteria=[row]),
                  ask_healthbench, row["answer"]) for row in labels if row["criterion"]]
        wanted = [(row["points"] > 0, bool(row["criteria_met"])) for row in labels]
    except (LookupError, TypeError) as error:
        fail(f"--labels {cfg.labels}: needs prompt, answer, criterion, points, criteria_met ({type(error).__name__}: {error})")
    found = [(sign, label, verdict[0]) for (sign, label), verdict in zip(wanted, judge_answers(cfg, units)) if verdict]
    kinds = dict(all=found, positive=[row for row in found if row[0]], negative=[row for row in found if not row[0]])
    result = dict(left_out=len(labels) - len(found)) | {
        kind: agreement([label for _, label, _ in kept], [met for _, _, met in kept]) for kind, kept in kinds.items()}
    print(json.dumps(result, indent=1))
    return result


# ---- 7. runs: a second judge, the report ----
STUDENT = (np.nan, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)    # t's 97.5% quantile by degrees of freedom


def interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, ...) -> mean over n and half the width of its 95% interval (Student's t, from n = 10 on that of 10)."""
    return values.mean(0), STUDENT[min(len(values), len(STUDENT)) - 1] * values.std(0, ddof=1) / len(values) ** 0.5


def print_changes(rows: dict[str, np.ndarray]) -> None:
    """A Markdown table of (n, 2) values before and after training, with intervals over n runs, or n tasks of one run."""
    print("| | before | after | change [95%] |\n|---|---|---|---|")
    for title, values in rows.items():
        mean, half = interval(values[:, 1] - values[:, 0])
        before, after = values.mean(0)
        print(f"| {title} | {before:.3f} | {after:.3f} | {mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}] |")


def rejudge(cfg: EvalConfig, runs: Sequence[str]) -> None:
    """The answers to each run's held-out tasks before its first update and after its last, rated by --judge on the run's own
    rubrics; with and without the rule that an unclosed answer scores 0. And without any judge: how many of the golds' words
    (of four letters or more) are in the answer. Prints the changes over runs; of one run, over its tasks."""
    if not runs:
        fail("rejudge: needs the folder of a run")
    asked, units = [], []    # of each answer: (run or task, 0 before or -1 after, closed, score of the run's judge); see Unit
    for run in runs:
        measured = [held for file in sorted(Path(run).glob("rollouts/step_*.jsonl"))
                    if (held := [g for g in read_rows(str(file), "run") if g["drop_reason"] == "held_out"])]
        if len(measured) < 2:
            fail(f"rejudge {run}: holds no two measures of held-out tasks (pop.py --eval_every)")
        for when, g, c in ((when, g, c) for when in (0, -1) for g in measured[when] for c in g["completions"]):
            answer = Completion([], [], c["text"], c["finish_reason"]).answer
            item = Item("", user_turn(g["task"]), criteria=[Criterion(**k) for k in g["rubric"]], reference=g["reference"])
            units.append((item, None, answer or re.sub(r"</?answer>", " ", c["text"]).strip()))
            asked.append((run if len(runs) > 1 else g["task"], when, bool(answer), np.nan if c["score"] is None else c["score"]))
    rows: dict[tuple[str, int], list[list[float]]] = {}
    found = judge_answers(cfg, units)
    for (sample, when, closed, own), (item, _, text), ratings in zip(asked, units, found):
        score = pop.rubric_score(ratings, [k.weight for k in item.criteria]) if ratings else np.nan
        golds, said = (set(re.findall(r"\w{4,}", words.lower())) for words in (" ".join(k.gold for k in item.criteria), text))
        rows.setdefault((sample, when), []).append(
            [own, closed, score if closed else 0.0, score, len(golds & said) / max(1, len(golds)), len(text.split())])
    means = np.array([[np.nanmean(rows[sample, when], axis=0) for when in (0, -1)] for sample in dict.fromkeys(s for s, _ in rows)])
    print(f"{len(units)} answers, {found.count(None)} without a verdict of {short_name(cfg.judge)} ({cfg.scoring})")
    titles = ("reward of the run's judge", "closed", "reward of this judge", "this judge, closed or not", "golds' words", "words")
    print_changes(dict(zip(titles, np.moveaxis(means, 2, 0), strict=True)))


def write_report(run_dir: Path, out: Path) -> Path:
    """report.html in the run folder: curves, evaluations of its checkpoints, and the rollouts to read; one self-contained file.
    Texts are data for the page's script (assets/report.html), never markup."""
    def lines(pattern: str) -> list[tuple[Path, dict[str, Any]]]:    # what follows the last newline is still being written
        return [(path, json.loads(line, parse_constant=lambda _: None)) for path in sorted(run_dir.glob(pattern))
                for line in path.read_text(encoding="utf-8").split("\n")[:-1]]    # null: NaN is no JSON

    if not (run_dir / "config.json").is_file():
        fail(f"report {run_dir}: is not the folder of a run")
    results = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(out.glob("*/results.json"))]
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in [HEADER, *(
        r["row"] for r in results if Path(r["settings"]["model"]).resolve().is_relative_to(run_dir.resolve()))]]
    data = json.dumps(dict(
        name=run_dir.resolve().name, config=json.loads((run_dir / "config.json").read_text(encoding="utf-8")),
        evals=[dict(zip(rows[0], row)) for row in rows[1:]], metrics=[row for _, row in lines("metrics.jsonl")],
        tasks=[row | dict(step=int(path.stem[5:])) for path, row in lines("rollouts/step_*.jsonl")]))
    data = data.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")    # no </script>
    page = (Path(__file__).parent / "assets" / "report.html").read_text(encoding="utf-8")
    (run_dir / "report.html").write_text(page.replace("NONCE", os.urandom(16).hex()).replace("DATA", data), encoding="utf-8")
    return run_dir / "report.html"


# ---- 8. main ----
def check(cfg: EvalConfig, command: str) -> None:
    """Fill in what derives from the rest. Exits with one line on what cannot work, before a model answers anything."""
    benchmark, url = BENCHMARKS.get(cfg.benchmark), (cfg.judge or "").startswith("http")
    cfg.baseline = cfg.baseline or adapter(cfg.model or "").get("base_model_name_or_path")
    cfg.temperature = benchmark.temperature if cfg.temperature is None and benchmark else cfg.temperature
    wrong = [    # where this holds, the flag, what to do
        (not cfg.judge and cfg.benchmark != "ifeval", "judge", "needed: a model, or the URL of an endpoint"),
        (url != bool(cfg.judge_model), "judge_model", "goes with a --judge that is a URL"),
        (command == "judge" and not cfg.labels, "labels", "needed: a JSONL file"),
        (not command and not benchmark, "benchmark", f"needed: one of {', '.join(BENCHMARKS)}"),
        (not command and not cfg.model, "model", "needed: what is to be measured"),
        (not command and not cfg.baseline, "baseline", "needed: the model to compare with"),
        (cfg.benchmark == "own" and not cfg.data, "data", "needed: a file of prompts, or a held-out corpus"),
        (cfg.scoring == "expected" and url, "scoring", "expected reads probabilities: needs a --judge that is a model"),
        (min(cfg.seeds, cfg.max_new_tokens) < 1 or cfg.limit < 0, "seeds, max_new_tokens, limit", "must be above 0 (limit 0: all)"),
        (cfg.seeds > 1 and cfg.temperature == 0, "seeds", "at --temperature 0 all answers to a prompt are the same")]
    for holds, name, why in wrong:
        if holds:
            fail(f"--{name}: {why}")
    for name in ("model", "baseline", "judge"):
        if (model := getattr(cfg, name)) and not model.startswith("http"):
            base = engine_settings(cfg, model).model    # exits if there is none
            setattr(cfg, name, model if adapter(model) else base)
    if url:
        hello = dict(schema=dict(type="object"), max_tokens=9, temperature=0.0, seed=0)
        [found] = pop.ask_endpoint(user_turn("Hello"), [hello], pop.Config(judge_url=cfg.judge, judge_model=cfg.judge_model))
        if found.finish_reason == "endpoint":
            fail(f"--judge {cfg.judge} --judge_model {cfg.judge_model}: {' '.join(found.text.split())}")


def main(argv: Sequence[str]) -> None:
    parser = HfArgumentParser(EvalConfig, usage="python eval.py [report RUN | rejudge RUNS | judge] [--flag value ...]",
                              description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = fail
    command = argv[0] if argv and argv[0] in ("report", "rejudge", "judge") else ""
    paths = list(takewhile(lambda arg: not arg.startswith("--"), argv[1:] if command else []))
    cfg = EvalConfig(**vars(parser.parse_args(argv[len(paths) + bool(command):])))
    if command == "report":
        return print(write_report(Path(*paths), Path(cfg.out)))
    check(cfg, command)
    try:
        judge_judge(cfg) if command == "judge" else rejudge(cfg, paths) if command else evaluate(cfg)
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on", code=1)


if __name__ == "__main__":
    openmp = Path(sys.prefix) / "lib" / "libiomp5.so"    # as pop.py
    if not torch.cuda.is_available() and openmp.exists() and "LD_PRELOAD" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | dict(LD_PRELOAD=str(openmp)))
    main(sys.argv[1:])
