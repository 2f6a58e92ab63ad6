"""Does it learn what the documents know? The experiment of assets/learning.md.

    python -m assets.learning run ARM [flags of pop.py]      # ARM: policy; or changes of it, such as left_out+shuffled
    python -m assets.learning table policy=RUN,RUN shuffled=RUN,RUN JUDGE ..
    python -m assets.learning agreement RUN JUDGE            # of both judges and length, before training
    python -m assets.learning references RUN expected [flags of pop.py]    # does the judge know a right answer?
    python -m assets.learning pairs RUN                      # 20 pairs to read blind, and their key

`table` needs the files that `python eval.py rejudge RUN .. --judge JUDGE` writes into each run; JUDGE
names one with its scoring, such as qwen15-expected. It writes
assets/learning.svg over the first edition's (needs matplotlib).
"""
import json
import random
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas

import pop
from assets.statistics import interval
from eval import held_out_answers, print_table

MEASURES = ("own judge", "this judge", "finished or not", "golds' words", "words", "finished")
HELD_OUT_ANSWERS = 4    # to each held-out task
DECOYS = 3
rate_expected = pop.rate_expected


def leave_out_unfinished(group: pop.Group, cfg: pop.Config, set_advantages: Any) -> None:
    """In training, an answer that is cut off has no score, where pop.py gives it 0."""
    for completion in group.completions:
        if not completion.answer:
            completion.score = None
    set_advantages(group, cfg)


def read_unfinished(completion: pop.Completion, cfg: pop.Config) -> str:
    """An answer that is cut off is judged as far as it goes."""
    return completion.text.rpartition("</think>")[2].strip()


def shuffle(group: pop.Group, cfg: pop.Config, set_advantages: Any) -> None:
    """The control: the group's advantages, handed to its scored answers at random."""
    set_advantages(group, cfg)
    scored = [c for c in group.completions if c.score is not None]
    advantages = [c.advantage for c in scored]
    seed = pop.request_seed(cfg, "shuffled", group.step, group.row)
    random.Random(seed).shuffle(advantages)
    for completion, advantage in zip(scored, advantages, strict=True):
        completion.advantage = advantage


def rate_against_decoys(judge: Any, rows: list[tuple[pop.Group, pop.Completion]],
                        cfg: pop.Config) -> list[list[float] | None]:
    """Ratings (K,) in [0, 2]: 1 + P(the gold is in the answer) - mean P(a decoy is in it).
    Decoys are the first golds of the next three tasks. What makes the judge say Yes to anything is
    taken off, and 1 means that it saw nothing of this task.
    """
    groups = []
    for group, _ in rows:
        if group not in groups:
            groups.append(group)
    with_decoys = {}    # by id: the group with a longer rubric
    for i, group in enumerate(groups):
        others = [groups[(i + k) % len(groups)] for k in range(1, 1 + DECOYS)]
        decoys = [other.rubric[0] for other in others]
        with_decoys[id(group)] = replace(group, rubric=group.rubric + decoys)
    longer = [(with_decoys[id(group)], completion) for group, completion in rows]
    results: list[list[float] | None] = []
    for (group, _), ratings in zip(rows, rate_expected(judge, longer, cfg), strict=True):
        if ratings is not None:
            count = len(group.rubric)
            bias = np.mean(ratings[count:])
            ratings = [1 + (rating - bias) / 2 for rating in ratings[:count]]
        results.append(ratings)
    return results


def rate_by_words(judge: Any, rows: list[tuple[pop.Group, pop.Completion]],
                  cfg: pop.Config) -> list[list[float] | None]:
    """Ratings (K,) in [0, 2] without a model: 2 x the share of the gold's words in the answer."""
    results: list[list[float] | None] = []
    for group, completion in rows:
        answer = long_words(completion.answer)
        golds = [long_words(criterion.gold) for criterion in group.rubric]
        results.append([2 * len(answer & gold) / max(1, len(gold)) for gold in golds])
    return results


def long_words(text: str) -> set[str]:
    return set(re.findall(r"\w{4,}", text.lower()))


def at_equal_length(group: pop.Group, cfg: pop.Config, set_advantages: Any) -> None:
    """What a group's number of words explains of its advantages, linearly, is taken off them."""
    set_advantages(group, cfg)
    scored = [c for c in group.completions if c.score is not None]
    advantages = np.array([c.advantage for c in scored])    # their mean is 0
    words = np.array([float(len(pop.words(c.answer))) for c in scored])
    words -= words.mean()
    slope = (words * advantages).sum() / max((words * words).sum(), 1e-6)
    for completion, rest in zip(scored, advantages - slope * words, strict=True):
        completion.advantage = float(rest)


def fewer_held_out(engine: pop.Engine, groups: list[pop.Group], cfg: pop.Config,
                   sample_answers: Any) -> None:
    """Four answers to a held-out task, however many there are in training: measures take time."""
    if groups and groups[0].step == pop.HELD_OUT:
        cfg = replace(cfg, num_generations=HELD_OUT_ANSWERS)
    sample_answers(engine, groups, cfg)


def ends(run: str, out: str) -> None:
    """A copy of a run's first and last measure, four answers to a task, for `eval.py rejudge`."""
    files = sorted(Path(run, "rollouts").glob("step_*.jsonl"))
    Path(out, "rollouts").mkdir(parents=True)
    for file in (files[0], files[-1]):
        lines = []
        for line in open(file, encoding="utf-8"):
            row = json.loads(line)
            row["completions"] = row["completions"][:HELD_OUT_ANSWERS]
            if row["step"] == pop.HELD_OUT:
                lines.append(json.dumps(row) + "\n")
        Path(out, "rollouts", file.name).write_text("".join(lines), encoding="utf-8")


def change(name: str) -> None:
    """Makes one change to pop.py's loop."""
    if name == "as_is":
        pop.read_answer = read_unfinished
    elif name == "left_out":
        pop.set_advantages = partial(leave_out_unfinished, set_advantages=pop.set_advantages)
    elif name == "decoys":
        pop.rate_expected = rate_against_decoys
    elif name == "words":
        pop.rate_expected = rate_by_words
    elif name == "equal_length":
        pop.set_advantages = partial(at_equal_length, set_advantages=pop.set_advantages)
    elif name == "shuffled":
        pop.set_advantages = partial(shuffle, set_advantages=pop.set_advantages)
    elif name != "policy":
        pop.fail(f"{name}: must be policy, as_is, decoys, words, left_out, equal_length or shuffled")


def select(pool: str, out: str, corpus: str, *left_out: str) -> None:
    """A pool of 24 held-out tasks, and as many whole steps of 4 as there are, without some sources.
    sources: names in the corpus's column "source".
    """
    sources = {}    # by the document's first words
    for line in open(corpus, encoding="utf-8"):
        row = json.loads(line)
        sources[" ".join(row["text"].split()[:12])] = row["source"]
    groups = pop.read_tasks(Path(pool))
    chosen = []
    for group in sorted(groups, key=lambda group: (group.step, group.row)):    # held-out ones first
        source = sources[" ".join(group.document.split()[:12])]
        if group.drop_reason is None and source not in left_out:
            chosen.append(group)
    held_out, training = chosen[:24], chosen[24:]
    training = training[:len(training) // 4 * 4]
    for i, group in enumerate(held_out):
        group.step, group.row = pop.HELD_OUT, i
    for i, group in enumerate(training):
        group.step, group.row = divmod(i, 4)
    Path(out).mkdir(parents=True)
    for name, part in (("held_out", held_out), ("step_000000", training)):
        lines = [pop.GROUP.dump_json(group, exclude={"completions"}) + b"\n" for group in part]
        Path(out, f"{name}.jsonl").write_bytes(b"".join(lines))
    print(f"{len(held_out)} held-out tasks, {len(training) // 4} steps")




def read_measures(runs: list[str], judge: str) -> tuple[list[int], np.ndarray]:
    """Steps, and the mean of each measure: (runs, tasks, steps, MEASURES and at equal length)."""
    values = []
    for run in runs:
        found = json.loads(Path(run, f"rejudge-{judge}.json").read_text())
        answers = np.array(found["answers"], dtype=float)    # (answers, columns)
        column = {name: answers[:, i] for i, name in enumerate(found["columns"])}
        slope = slope_of_length(column, found["steps"][0])
        own = [column[name] for name in MEASURES]
        own.append(column["finished or not"] - slope * column["words"])
        measures = np.stack(own, axis=1)
        tasks = []
        for task in np.unique(column["task"]):
            rows = []
            for step in found["steps"]:
                chosen = (column["task"] == task) & (column["step"] == step)
                rows.append(np.nanmean(measures[chosen], axis=0))
            tasks.append(rows)
        values.append(tasks)
    return found["steps"], np.array(values)


def slope_of_length(column: dict[str, np.ndarray], first: int) -> float:
    """Reward of a word more, within a task, among the answers before training, finished or not."""
    words, rewards = [], []
    for task in np.unique(column["task"]):
        chosen = (column["task"] == task) & (column["step"] == first)
        chosen &= ~np.isnan(column["finished or not"])
        words.append(column["words"][chosen] - column["words"][chosen].mean())
        reward = column["finished or not"][chosen]
        rewards.append(reward - reward.mean())
    x, y = np.concatenate(words), np.concatenate(rewards)
    return float((x * y).sum() / (x * x).sum())


def cell(changes: np.ndarray) -> str:
    """Mean of changes (n,) and its 95% interval."""
    mean, half = interval(changes)
    return f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"


def table(arms: dict[str, list[str]], judges: list[str]) -> None:
    """Prints, for each judge, what changed in each arm and how the first differs from the others."""
    titles = [*MEASURES, "finished or not, at equal length"]
    for judge in judges:
        print(f"\n{judge}")
        rows, changes = [], {}
        for arm, runs in arms.items():
            steps, values = read_measures(runs, judge)    # (runs, tasks, steps, titles)
            change = values[:, :, -1] - values[:, :, 0]    # (runs, tasks, titles)
            changes[arm] = change.mean(axis=0)    # (tasks, titles)
            for i, title in enumerate(titles):
                before, after = values[:, :, [0, -1], i].mean(axis=(0, 1))
                over_runs = cell(change[:, :, i].mean(axis=1)) if len(runs) > 1 else "-"
                rows.append([arm, len(runs), title, f"{before:.3f}", f"{after:.3f}",
                             cell(changes[arm][:, i]), over_runs])
        first, *others = changes
        for other in others:
            for i, title in enumerate(titles):
                gap = changes[first][:, i] - changes[other][:, i]
                rows.append([f"{first} - {other}", "", title, "", "", cell(gap), ""])
        print_table(["arm", "seeds", "measure", "before", "after", "change, 95% over tasks",
                     "95% over seeds"], rows)


def agreement(run: str, judge: str) -> None:
    """Prints the mean rank correlation of answers to one task, before training, over the tasks: of the finished ones,
    because a training judge gives the others 0.
    """
    found = json.loads(Path(run, f"rejudge-{judge}.json").read_text())
    answers = pandas.DataFrame(found["answers"], columns=found["columns"])
    answers = answers[(answers["step"] == found["steps"][0]) & (answers["finished"] == 1)]
    names = ["own judge", "finished or not", "golds' words", "words"]
    correlations = answers.groupby("task")[names].corr("spearman")    # (tasks x names, names)
    mean = correlations.groupby(level=1, sort=False).mean()
    print_table([f"{len(answers)} finished answers", *names],
                [[name, *map("{:.2f}".format, mean.loc[name, names])] for name in names])


def references(run: str, scoring: str, flags: list[str]) -> None:
    """Scores each held-out task's reference, and three finished answers from before training: the judge is --model."""
    cfg = pop.parse_args([*flags, "--scoring", scoring])
    groups = []
    for line in open(Path(run, "rollouts", "step_000000.jsonl"), encoding="utf-8"):
        row = json.loads(line)
        if row["step"] == pop.HELD_OUT and row["drop_reason"] is None:
            texts = [c["text"] for c in row["completions"] if c["finish_reason"] == "stop"]
            group = pop.GROUP.validate_python(row | dict(completions=[]))
            group.completions = [pop.Completion([], answer=text) for text in [group.reference, *texts[:3]]]
            groups.append(group)
    pop.score_answers(pop.Engine(cfg), groups, cfg)
    signs = []
    for group in groups:
        reference, *sampled = [c.score for c in group.completions]
        signs += [np.sign(reference - score) for score in sampled if None not in (reference, score)]
    print("reference above, tied, below:", *[signs.count(sign) for sign in (1, 0, -1)])


def draw(arms: dict[str, list[str]], judges: list[str], out: Path) -> None:
    """Held-out reward by step: the own judge's, then that of each other judge."""
    from matplotlib import pyplot
    panels = [("own judge (trains)", judges[0], MEASURES.index("own judge"))]
    panels += [(judge, judge, MEASURES.index("finished or not")) for judge in judges]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 3), layout="tight")
    for axis, (title, judge, measure) in zip(axes, panels, strict=True):
        for arm, runs in arms.items():
            steps, values = read_measures(runs, judge)
            change = values[..., measure] - values[:, :, :1, measure]    # (runs, tasks, steps)
            mean, half = interval(change.mean(axis=0))
            axis.plot(steps, mean, label=arm)
            axis.fill_between(steps, mean - half, mean + half, alpha=0.2)
        axis.axhline(0, color="gray", linewidth=0.5)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step")
    axes[0].set_ylabel("change of held-out reward")
    axes[0].legend()
    figure.savefig(out)


def pairs(run: str, count: int = 20) -> None:
    """Answers to held-out tasks before and after training, in random order; the key goes to a file."""
    answers = {}    # task row: {step: first answer}
    tasks = {}
    for step, group, completion in held_out_answers(run):
        answers.setdefault(group["row"], {}).setdefault(step, completion["text"])
        tasks[group["row"]] = group["task"]
    rng, key = random.Random(0), {}
    for row in sorted(answers)[:count]:
        sides = ["before", "after"]
        rng.shuffle(sides)
        key[row] = sides
        by_side = dict(before=answers[row][min(answers[row])], after=answers[row][max(answers[row])])
        print(f"\n## {row}. {tasks[row]}")
        for name, side in zip("AB", sides, strict=True):
            print(f"\n{name}: {by_side[side]}")
    Path(run, "pairs_key.json").write_text(json.dumps(key))


def main(argv: list[str]) -> None:
    command, *rest = argv
    if command == "run":
        arm, *flags = rest
        pop.sample_answers = partial(fewer_held_out, sample_answers=pop.sample_answers)
        for name in arm.split("+"):
            change(name)
        pop.main(pop.parse_args(flags))
    elif command == "select":
        select(*rest)
    elif command == "ends":
        ends(*rest)
    elif command == "agreement":
        agreement(*rest)
    elif command == "references":
        references(*rest[:2], rest[2:])
    elif command == "pairs":
        pairs(rest[0])
    else:
        arms = {}
        for word in [word for word in rest if "=" in word]:
            arm, _, runs = word.partition("=")
            arms[arm] = runs.split(",")
        judges = [word for word in rest if "=" not in word]
        table(arms, judges)
        draw(arms, judges, Path(__file__).parent / "learning.svg")


if __name__ == "__main__":
    pop.start_over()
    main(sys.argv[1:])
