"""Is there something to learn? Run this before training; each setting takes minutes.

    python assets/gate.py tasks FILE N [flags of pop.py]     # N tasks with rubrics, written by --model
    python assets/gate.py answers FILE OUT [flags]           # --model answers them, and rates its answers as "own"
    python assets/gate.py judge OUT NAME [flags]             # --model rates them, too, as NAME
    python assets/gate.py table OUT ...

The training judge picks the best of a task's answers. How much better than the average is its pick, according to a
judge that does not train, and by the share of the golds' words? If it is no better, training on this judge can teach
nothing: the table's intervals (95% over tasks) must be clear of 0.
"""
import json
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import pop    # before PyTorch: it loads OpenMP

import numpy as np
import pandas

from eval import interval

DECOYS = 3    # first golds of the tasks that come next
KINDS = dict(    # P(Yes) to a task's golds and to decoys -> score of each gold, in [0, 1]
    raw=lambda own, decoys: own,
    decoys=lambda own, decoys: (1 + own - decoys.mean()) / 2,
    logits=lambda own, decoys: 1 / (1 + np.exp(logit(decoys).mean() - logit(own))),
)


def logit(p):
    p = np.clip(p, 1e-6, 1 - 1e-6)
    return np.log(p / (1 - p))


def long_words(text):
    return set(re.findall(r"\w{4,}", text.lower()))


def words_of_golds(group, text):
    """Share of the golds' words (of four letters or more, not in the task) that a text has; NaN if there are none."""
    golds = set().union(*[long_words(criterion["gold"]) for criterion in group["rubric"]])
    golds -= long_words(group["task"])
    return len(long_words(text) & golds) / len(golds) if golds else float("nan")


def write_tasks(file, count, engine, cfg):
    cfg.docs_per_step, cfg.num_steps = int(count), 1
    documents = pop.load_corpus(cfg)[:int(count)]
    groups = [pop.Group(document, step=0, row=row) for row, document in enumerate(documents)]
    pop.propose_tasks(engine, groups, cfg, [])
    pop.write_rubrics(engine, groups, cfg)
    Path(file).write_bytes(b"".join(pop.GROUP.dump_json(group) + b"\n" for group in pop.kept(groups)))


def answer(file, engine, cfg):
    groups = pop.kept([pop.GROUP.validate_json(line) for line in open(file)])
    pop.sample_answers(engine, groups, cfg)
    rows = []
    for group in pop.kept(groups):
        answers = [dict(text=c.text.strip(), finished=c.answer != "") for c in group.completions]
        rubric = [criterion.model_dump() for criterion in group.rubric]
        rows.append(dict(task=group.task, reference=group.reference, rubric=rubric, answers=answers))
    return rows


def judge(groups, name, engine):
    """answer["judges"][name] = [P(Yes) to own golds, P(Yes) to decoys] for each answer."""
    requests, places = [], []
    for i, group in enumerate(groups):
        own = [criterion["gold"] for criterion in group["rubric"]]
        decoys = [groups[(i + k) % len(groups)]["rubric"][0]["gold"] for k in range(1, 1 + DECOYS)]
        for answer in group["answers"]:
            answer.setdefault("judges", {})[name] = found = [[], []]
            for kind, golds in enumerate((own, decoys)):
                for gold in golds:
                    prompt = pop.yes_no_prompt(answer["text"], gold)
                    requests.append(pop.Request(prompt, max_tokens=1, yes_no=True, parse=pop.parse_yes_no))
                    places.append(found[kind])
    start = time.time()
    for place, rating in zip(places, pop.ask(engine, "judge", requests), strict=True):
        place.append(float("nan") if rating is None else rating[0] / 2)
    print(f"{name}: {len(requests)} questions in {time.time() - start:.0f} s", flush=True)


def scores(group, name, kind):
    """(answers,) scores of a judge; NaN where it gave no verdict."""
    weights = np.array([criterion["weight"] for criterion in group["rubric"]], dtype=float)
    found = []
    for answer in group["answers"]:
        own, decoys = (np.array(part) for part in answer["judges"][name])
        found.append((KINDS[kind](own, decoys) * weights).sum() / weights.sum())
    return np.array(found)


def rank_correlation(x, y):
    """Spearman's; NaN where all values of one are equal."""
    a, b = (pandas.Series(values).rank().to_numpy() for values in (x, y))
    return np.corrcoef(a, b)[0, 1] if a.std() and b.std() else np.nan


def with_interval(values):
    values = np.array([value for value in values if not np.isnan(value)])
    if len(values) < 2:
        return "-"
    mean, half = interval(values)
    return f"{mean:+.3f} ± {half:.3f}"


def table(file):
    """For each training judge: what the best answer is worth by other measures, and rank correlations in tasks."""
    groups = json.loads(Path(file).read_text())
    every = [answer for group in groups for answer in group["answers"]]
    words = np.mean([len(answer["text"].split()) for answer in every])
    print(f"\n{file}: {len(groups)} tasks x {len(groups[0]['answers'])} answers, "
          f"{np.mean([answer['finished'] for answer in every]):.0%} finished, {words:.1f} words\n")
    judges = list(every[0]["judges"])
    print("| training judge | spread | measure | judge's pick less the mean | rank correlation |")
    print("|---|---|---|---|---|")
    for name in judges:
        for kind in KINDS:
            rows = {}
            spread = []
            for group in groups:
                own = scores(group, name, kind)
                if np.isnan(own).any():
                    continue
                spread.append(own.std())
                texts = [answer["text"] for answer in group["answers"]]
                measures = {"golds' words": [words_of_golds(group, text) for text in texts],
                            "length in words": [len(text.split()) for text in texts]}
                for other in judges:
                    if other != name:
                        measures |= {f"{other}, {k}": scores(group, other, k) for k in ("raw", "decoys")}
                for measure, values in measures.items():
                    values = np.array(values, dtype=float)
                    best, ranks = rows.setdefault(measure, ([], []))
                    best.append(values[own.argmax()] - values.mean())
                    ranks.append(rank_correlation(own, values))
            for measure, (best, ranks) in rows.items():
                print(f"| {name}, {kind} | {np.mean(spread):.3f} | {measure} | {with_interval(best)} "
                      f"| {with_interval(ranks)} |")


def main(command, first, *rest):
    if command == "table":
        for file in (first, *rest):
            table(file)
        return
    second, *flags = rest
    cfg = pop.parse_args(flags)
    cfg.model = pop.find_model(cfg.model)
    engine = pop.Engine(cfg)
    if command == "tasks":
        write_tasks(first, second, engine, cfg)
    elif command == "answers":
        groups, out = answer(first, engine, cfg), second
        judge(groups, "own", engine)
        Path(out).write_text(json.dumps(groups))
    elif command == "judge":
        groups = json.loads(Path(first).read_text())
        judge(groups, second, engine)
        Path(first).write_text(json.dumps(groups))
    engine.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
