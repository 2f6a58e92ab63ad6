"""Does it learn what the documents know? The experiment of assets/learning.md.

    python -m assets.learning select POOL OUT CORPUS GHR GARD    # tasks without some sources' documents
    python -m assets.learning run ARM [flags of pop.py]    # ARM: policy; or changes of it, such as as_is+shuffled
    python -m assets.learning ends RUN OUT                 # first and last measure, for `eval.py rejudge OUT`
    python -m assets.learning table assets/runs/*.json     # and assets/learning.svg (needs matplotlib)
    python -m assets.learning agreement FILE               # of judges and length, before training
    python -m assets.learning references RUN [flags of pop.py]    # does the judge (--model) know a right answer?
    python -m assets.learning others RUN [flags of pop.py]    # does it say Yes to what is not there?
    python -m assets.learning turned RUN [flags of pop.py]    # does each step of this size make answers longer?
    python -m assets.learning pairs RUN                    # 20 pairs to read blind, and their key

FILE and assets/runs/ARM_SEED.json are what `eval.py rejudge` writes into the folder of a run.
"""
import json
import math
import random
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch

import pop
from eval import held_out_answers, interval, print_table

# Columns of rejudge's table; the second judge's is of answers as they are, finished or not.
# The arm `larger_judge` is as_is with --judge_url; its second judge is the 0.5B model.
MEASURES = ("own judge", "finished or not", "golds' words", "words")
TITLES = ("own judge", "second judge", "golds' words", "words", "second, equal length")
HELD_OUT_ANSWERS = 4    # to each held-out task
DECOYS = 3
rate = pop.rate
Answers = list[tuple[str, list[pop.Criterion], str]]    # (task, rubric, text), see pop.rate


def leave_out_unfinished(group: pop.Group, cfg: pop.Config, set_advantages: Any) -> None:
    """In training, an answer that is cut off has no score, where pop.py gives it 0."""
    for completion in group.completions:
        if not completion.answer:
            completion.score = None
    set_advantages(group, cfg)


def lowest_for_unfinished(group: pop.Group, cfg: pop.Config, set_advantages: Any) -> None:
    """In training, an answer that is cut off has the lowest score of those in its group that are not."""
    scores = [c.score for c in group.completions if c.answer and c.score is not None]
    for completion in group.completions:
        if not completion.answer:
            completion.score = min(scores, default=None)
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


def rate_against_decoys(judge: Any, answers: Answers, cfg: pop.Config,
                        *failures: Any) -> list[list[float] | None]:
    """Ratings (K,) in [0, 2]: 1 + P(the gold is in the answer) - mean P(a decoy is in it).
    Decoys are the first golds of the next three tasks of the call, which needs at least four. What
    makes the judge say Yes to anything is taken off: at 1 it saw nothing of the task's own.
    """
    rubrics = {task: rubric for task, rubric, _ in answers}
    tasks = list(rubrics)
    with_decoys = {}
    for i, task in enumerate(tasks):
        others = [tasks[(i + k) % len(tasks)] for k in range(1, 1 + DECOYS)]
        with_decoys[task] = rubrics[task] + [rubrics[other][0] for other in others]
    longer = [(task, with_decoys[task], text) for task, _, text in answers]
    results = []
    for (_, rubric, _), ratings in zip(answers, rate(judge, longer, cfg, *failures), strict=True):
        if ratings is not None:
            own, decoys = ratings[:len(rubric)], ratings[len(rubric):]
            ratings = [1 + (rating - float(np.mean(decoys))) / 2 for rating in own]
        results.append(ratings)
    return results


def rate_by_words(judge: Any, answers: Answers, cfg: pop.Config,
                  *failures: Any) -> list[list[float]]:
    """Ratings (K,) in [0, 2] without a model: 2 x the share of the gold's words in the answer."""
    results = []
    for _, rubric, text in answers:
        answer = long_words(text)
        golds = [long_words(criterion.gold) for criterion in rubric]
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


def measures(run: str) -> dict[str, list[dict[str, Any]]]:
    """Of the files in which a run measured: name -> rows of its held-out tasks."""
    found = {}
    for file in sorted(Path(run, "rollouts").glob("step_*.jsonl")):
        rows = [json.loads(line) for line in open(file, encoding="utf-8")]
        held_out = [row for row in rows if row["step"] == pop.HELD_OUT]
        if held_out:
            found[file.name] = held_out
    return found


def ends(run: str, out: str) -> None:
    """A copy of a run's first and last measure, four answers to a task, for `eval.py rejudge`."""
    found = measures(run)
    Path(out, "rollouts").mkdir(parents=True)
    for name in (min(found), max(found)):
        lines = []
        for row in found[name]:
            row["completions"] = row["completions"][:HELD_OUT_ANSWERS]
            lines.append(json.dumps(row) + "\n")
        Path(out, "rollouts", name).write_text("".join(lines), encoding="utf-8")


def change(name: str) -> None:
    """Makes one change to pop.py's loop."""
    if name == "as_is":
        pop.read_answer = read_unfinished
    elif name == "left_out":
        pop.set_advantages = partial(leave_out_unfinished, set_advantages=pop.set_advantages)
    elif name == "lowest":
        pop.set_advantages = partial(lowest_for_unfinished, set_advantages=pop.set_advantages)
    elif name == "decoys":
        pop.rate = rate_against_decoys
    elif name == "words":
        pop.rate = rate_by_words
    elif name == "equal_length":
        pop.set_advantages = partial(at_equal_length, set_advantages=pop.set_advantages)
    elif name == "shuffled":
        pop.set_advantages = partial(shuffle, set_advantages=pop.set_advantages)
    elif name != "policy":
        pop.fail(f"{name}: must be policy, as_is, decoys, words, left_out, lowest, equal_length or shuffled")


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


def read_measures(files: list[str]) -> tuple[list[int], np.ndarray]:
    """Steps, and the mean of each measure: (runs, tasks, steps, MEASURES and at equal length)."""
    values = []
    for file in files:
        found = json.loads(Path(file).read_text())
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


def table(arms: dict[str, list[str]]) -> None:
    """Prints what changed in each arm, and how an arm differs from its control."""
    rows, changes = [], {}
    for arm, files in arms.items():
        steps, values = read_measures(files)    # (runs, tasks, steps, TITLES)
        changes[arm] = values[:, :, -1] - values[:, :, 0]    # (runs, tasks, TITLES)
        ends = values[:, :, [0, -1]].mean(axis=(0, 1))    # (2, TITLES)
        for title, change, (before, after) in zip(TITLES, intervals(changes[arm]), ends.T, strict=True):
            rows.append([f"{arm}, {steps[-1]} steps", len(files), title, f"{before:.3f}", f"{after:.3f}", *change])
    for arm in arms:
        if f"{arm}+shuffled" in arms:
            gaps = changes[arm] - changes[f"{arm}+shuffled"]    # of the same seeds
            for title, gap in zip(TITLES, intervals(gaps), strict=True):
                rows.append([f"{arm} less its control", len(gaps), title, "", "", *gap])
    print_table(["arm", "seeds", "measure", "before", "after", "change, 95% over tasks", "95% over seeds"], rows)


def intervals(changes: np.ndarray) -> list[tuple[str, str]]:
    """(runs, tasks, TITLES) -> for each of TITLES the mean change and its intervals over tasks, and over runs."""
    cells = []
    for change in np.moveaxis(changes, 2, 0):    # (runs, tasks)
        over_seeds = cell(change.mean(axis=1)).partition(" ")[2] if len(change) > 1 else "-"    # the mean is known
        cells.append((cell(change.mean(axis=0)), over_seeds))
    return cells


def agreement(file: str) -> None:
    """Of the answers before training, prints rank correlations within a task (the mean over tasks), and how far
    the best answer to a task by one measure lies above the task's mean by another (the first one if there are ties).
    """
    found = json.loads(Path(file).read_text())
    answers = pandas.DataFrame(found["answers"], columns=found["columns"])
    answers = answers[(answers["step"] == found["steps"][0]) & (answers["finished"] == 1)]
    names = ["own judge", "finished or not", "golds' words", "words"]
    correlations = answers.groupby("task")[names].corr("spearman")    # (tasks x names, names)
    mean = correlations.groupby(level=1, sort=False).mean()
    print_table([f"{len(answers)} answers that count as finished", *names],
                [[name, *map("{:.2f}".format, mean.loc[name, names])] for name in names])
    tasks, rows = answers.dropna(subset=names).groupby("task"), []
    for name in names:
        best = answers.loc[tasks[name].idxmax()].set_index("task")
        rows.append([name, *[cell((best[other] - tasks[other].mean()).to_numpy()) for other in names]])
    print_table(["best of a task by", *names], rows)


def tasks_and_answers(rows: list[dict[str, Any]], cut_off: bool) -> tuple[list[pop.Group], list[list[str]]]:
    """Of one measure. cut_off: with the answers that did not finish."""
    groups, answers = [], []
    for row in rows:
        if row["drop_reason"] is None:
            groups.append(pop.GROUP.validate_python(row | dict(completions=[])))
            answers.append([c["text"] for c in row["completions"] if cut_off or c["finish_reason"] == "stop"])
    return groups, answers


def scores(judge: Any, groups: list[pop.Group], answers: list[list[str]], cfg: pop.Config) -> list[list[float]]:
    """Of each task's answers; NaN where there is no verdict."""
    for group, texts in zip(groups, answers, strict=True):
        group.completions = [pop.Completion([], answer=text) for text in texts]
    pop.score_answers(judge, groups, cfg)
    return [[math.nan if c.score is None else c.score for c in group.completions] for group in groups]


def references(run: str, flags: list[str]) -> None:
    """Each held-out task's reference against three finished answers from before training."""
    cfg = pop.parse_args(flags)
    groups, answers = tasks_and_answers(measures(run)["step_000000.jsonl"], cut_off=False)
    answers = [[group.reference, *texts[:3]] for group, texts in zip(groups, answers, strict=True)]
    signs = []
    for reference, *sampled in scores(pop.Engine(cfg), groups, answers, cfg):
        signs += [np.sign(reference - score) for score in sampled]
    print("reference above, tied, below:", *[signs.count(sign) for sign in (1, 0, -1)])


def others(run: str, flags: list[str]) -> None:
    """The answers of the first and last measure, as the run scored them (it must be of an as_is arm), and by three
    golds of other tasks.
    """
    cfg = pop.parse_args(flags)
    if cfg.judge_url:
        judge = pop.Endpoint(cfg.judge_url, cfg.judge_model)
    else:
        judge = pop.Engine(cfg)
    means, correlations, found = [], [], measures(run)
    for name in (min(found), max(found)):
        groups, answers = tasks_and_answers(found[name], cut_off=True)
        kept = [row["completions"] for row in found[name] if row["drop_reason"] is None]
        own = np.array([[c["score"] for c in completions] for completions in kept], dtype=float)
        rubrics = [group.rubric for group in groups]
        for i, group in enumerate(groups):
            golds = [rubrics[(i + k) % len(groups)][0] for k in (5, 11, 17)]
            group.rubric = [criterion.model_copy(update=dict(weight=1)) for criterion in golds]
        other = np.array(scores(judge, groups, answers, cfg))
        means.append(np.stack([own, other, own - other]).mean(axis=2))    # (3, tasks)
        both = np.stack([own, other], axis=2)    # (tasks, answers, 2)
        within = [pandas.DataFrame(task).corr("spearman").loc[0, 1] for task in both]
        correlations.append(f"{np.nanmean(within):.2f}")
    rows = []
    titles = ("own golds", "golds of other tasks", "difference")
    for title, before, after in zip(titles, means[0], means[-1], strict=True):
        rows.append([title, f"{before.mean():.3f}", f"{after.mean():.3f}", cell(after - before)])
    rows.append(["rank correlation of the two within a task", *correlations, ""])
    print_table(["P(Yes) for", "before", "after", "change, 95% over tasks"], rows)


def turned(run: str, flags: list[str]) -> None:
    """Words of held-out answers by a run's last policy; with its way from the base model turned round (B -> -B); and as
    far away in a random direction.
    """
    cfg = replace(pop.parse_args(flags), num_generations=HELD_OUT_ANSWERS)
    engine = pop.Engine(cfg)
    with engine.building():
        model = pop.load_policy(cfg)
    pop.load_checkpoint(Path(run), model, pop.make_optimizer(model, cfg))
    matrices = [p for name, p in model.named_parameters() if name.endswith("lora_B")]
    size = torch.cat([p.flatten() for p in matrices]).square().mean().sqrt()
    torch.manual_seed(0)
    for title in ("as trained", "turned round", "random signs"):
        with torch.no_grad():
            for p in matrices:
                if title == "turned round":
                    p.neg_()
                elif title == "random signs":
                    p.copy_(size * torch.randn_like(p).sign())
        groups, _ = tasks_and_answers(measures(run)["step_000000.jsonl"], cut_off=True)
        engine.load_weights(model, "policy")
        pop.sample_answers(engine, groups, cfg)
        print(title, np.mean([len(pop.words(c.text)) for group in groups for c in group.completions]))


def draw(arms: dict[str, list[str]], out: Path) -> None:
    """Change of the held-out reward from the first measure to the last, by the judge that trains and by the other."""
    from matplotlib import pyplot
    pyplot.rcParams["svg.fonttype"] = "none"    # text stays text
    figure, axes = pyplot.subplots(1, 2, figsize=(8, 0.8 + 0.35 * len(arms)), sharex=True, sharey=True,
                                   layout="tight")
    for axis, title, measure in zip(axes, ("judge that trains", "judge that does not"), (0, 1), strict=True):
        for i, (arm, files) in enumerate(arms.items()):
            _, values = read_measures(files)
            change = values[:, :, -1, measure] - values[:, :, 0, measure]    # (runs, tasks)
            mean, half = interval(change.mean(axis=0))
            axis.errorbar(mean, -i, xerr=half, fmt="o", capsize=3, color=f"C{i}")
        axis.axvline(0, color="gray", linewidth=0.5)
        axis.set_title(f"change of held-out reward, {title}", fontsize=9)
    axes[0].set_ylim(0.6 - len(arms), 0.4)
    axes[0].set_yticks([-i for i in range(len(arms))], list(arms))
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
        references(rest[0], rest[1:])
    elif command == "others":
        others(rest[0], rest[1:])
    elif command == "turned":
        turned(rest[0], rest[1:])
    elif command == "pairs":
        pairs(rest[0])
    else:
        arms = {}
        for file in rest:
            arms.setdefault(Path(file).stem.rpartition("_")[0], []).append(file)
        table(arms)
        draw(arms, Path(__file__).parent / "learning.svg")


if __name__ == "__main__":
    main(sys.argv[1:])
