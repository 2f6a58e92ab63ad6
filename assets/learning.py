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
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas

import pop
from assets.statistics import interval
from eval import held_out_answers, print_table

MEASURES = ("own judge", "this judge", "finished or not", "golds' words", "words", "finished")


def leave_out_unfinished(group: pop.Group, cfg: pop.Config, set_advantages: Any) -> None:
    """In training, an answer that is cut off has no score, where pop.py gives it 0."""
    for completion in group.completions:
        if not completion.answer:
            completion.score = None
    set_advantages(group, cfg)


def shuffle(group: pop.Group, cfg: pop.Config, set_advantages: Any) -> None:
    """The control: the group's advantages, handed to its scored answers at random."""
    set_advantages(group, cfg)
    scored = [c for c in group.completions if c.score is not None]
    advantages = [c.advantage for c in scored]
    seed = pop.request_seed(cfg, "shuffled", group.step, group.row)
    random.Random(seed).shuffle(advantages)
    for completion, advantage in zip(scored, advantages, strict=True):
        completion.advantage = advantage


CHANGES = dict(shuffled=shuffle, left_out=leave_out_unfinished)


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
        for name in arm.split("+"):
            if name in CHANGES:
                pop.set_advantages = partial(CHANGES[name], set_advantages=pop.set_advantages)
            elif name != "policy":
                pop.fail(f"{name}: must be policy, or of {', '.join(CHANGES)}")
        pop.main(pop.parse_args(flags))
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
