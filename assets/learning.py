"""Does it learn what the documents know? The experiment of assets/learning.md, step by step.

    python -m assets.learning tasks FILE [flags of pop.py]      # tasks with rubrics of all documents, by --model
    python -m assets.learning folder FILE OUT STEPS PER_STEP    # 24 are held out, the others are gone through in turn
    python -m assets.learning base OUT [flags]                  # the base model's held-out answers, also colder ones
    python -m assets.learning gate FILE                         # of these: is there something to learn?
    python -m assets.learning run ARM [flags]                   # ARM: policy, or shuffled, the control
    python -m assets.learning table FILE ...                    # all arms and seeds, and assets/learning.svg
    python -m assets.learning read RUN                          # answers before and after, and a key

FILE of `gate` and `table` is what `eval.py rejudge RUN --judge OTHER_MODEL` writes for a run, or for OUT of `base`;
`table` wants it renamed to ARM_SEED.json. Flags of pop.py must have --tasks from `folder`.
"""
import json
import random
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pop    # before PyTorch, because it loads OpenMP

import numpy as np
import pandas

from eval import interval, print_table

HELD_OUT_TASKS = 24
TEMPERATURES = (1.0, 0.7, 0.4, 0.0)    # of the base model; 0 is greedy
MEASURES = {"own judge": "judge that trains", "finished or not": "other judge", "golds' words": "golds' words",
            "finished": "finished", "words": "words"}


def write_tasks(file, cfg):
    documents = pop.load_corpus(cfg)
    groups = [pop.Group(document, step=0, row=row) for row, document in enumerate(documents)]
    engine = pop.Engine(cfg)
    pop.propose_tasks(engine, groups, cfg, [])
    pop.write_rubrics(engine, groups, cfg)
    write_groups(Path(file), pop.kept(groups))
    engine.close()


def write_groups(path, groups):
    lines = [pop.GROUP.dump_json(group, exclude={"completions"}) + b"\n" for group in groups]
    path.write_bytes(b"".join(lines))


def write_folder(file, out, steps, per_step):
    """A folder for --tasks: the tasks that are not held out come up again and again."""
    groups = [pop.GROUP.validate_json(line) for line in open(file, encoding="utf-8")]
    held_out, training = groups[:HELD_OUT_TASKS], groups[HELD_OUT_TASKS:]
    for row, group in enumerate(held_out):
        group.step, group.row = pop.HELD_OUT, row
    rows = []
    for i in range(int(steps) * int(per_step)):
        step, row = divmod(i, int(per_step))
        rows.append(replace(training[i % len(training)], step=step, row=row))
    Path(out).mkdir(parents=True)
    write_groups(Path(out, "held_out.jsonl"), held_out)
    write_groups(Path(out, "training.jsonl"), rows)
    print(f"{len(held_out)} tasks are held out; {len(training)} are trained on, {len(rows) / len(training):.1f} times")


def answer_colder(out, cfg):
    """What training could gain by being surer alone: measures as in a run, with a temperature in place of a step."""
    for name in ("rollouts", "tasks"):
        Path(out, name).mkdir(parents=True)
    engine = pop.Engine(cfg)
    held_out = [group for group in pop.read_tasks(Path(cfg.tasks)) if group.step == pop.HELD_OUT]
    for number, temperature in enumerate(TEMPERATURES):
        cfg.temperature = temperature
        pop.sample_answers(engine, held_out, cfg)
        pop.score_answers(engine, held_out, cfg)
        pop.log_step(Path(out), dict(step=number) | pop.held_out_metrics(held_out), held_out, cfg)
    engine.close()


def shuffle(group, cfg, set_advantages):
    """The control: the group's advantages, handed to its scored answers at random."""
    set_advantages(group, cfg)
    scored = [c for c in group.completions if c.score is not None]
    advantages = [c.advantage for c in scored]
    seed = pop.request_seed(cfg, "shuffled", group.step, group.row)
    random.Random(seed).shuffle(advantages)
    for completion, advantage in zip(scored, advantages, strict=True):
        completion.advantage = advantage


def train(arm, cfg):
    if arm not in ("policy", "shuffled"):
        pop.fail(f"{arm}: must be policy or shuffled")
    if arm == "shuffled":
        pop.set_advantages = partial(shuffle, set_advantages=pop.set_advantages)
    pop.main(cfg)


def read_answers(file):
    """One row for each held-out answer: run's step, task, and the columns of `eval.py rejudge`."""
    found = json.loads(Path(file).read_text(encoding="utf-8"))
    return pandas.DataFrame(found["answers"], columns=found["columns"])


def cell(values):
    """Mean of values (n,) and half its 95% interval."""
    mean, half = interval(np.asarray(values, dtype=float))
    return f"{mean:+.3f} ± {half:.3f}"


def gate(file):
    """Of the base model's answers at temperature 1: what is the training judge's pick of a task's answers worth, above
    the task's mean, by measures that do not train? Rank correlations within tasks. 95% over tasks.
    """
    answers = read_answers(file)
    tasks = answers[answers["step"] == 0].groupby("task")
    rows = []
    for name, title in MEASURES.items():
        worth, correlations = [], []
        for _, task in tasks:
            task = task.dropna(subset=["own judge", name])
            worth.append(task[name][task["own judge"].idxmax()] - task[name].mean())
            correlations.append(task["own judge"].rank().corr(task[name].rank()))    # Spearman's; NaN: all equal
        correlations = np.array(correlations)
        rows.append([title, cell(worth), cell(correlations[~np.isnan(correlations)])])
    print_table(["by", "best of a task less the mean", "rank correlation with the training judge"], rows)


def by_task(files):
    """Mean of each measure: (runs, tasks, steps, measures); and the steps."""
    runs = []
    for file in files:
        means = read_answers(file).groupby(["task", "step"])[list(MEASURES)].mean()
        steps = list(means.index.levels[1])
        runs.append(means.to_numpy().reshape(-1, len(steps), len(MEASURES)))
    return np.array(runs), steps


def slope_of_length(file):
    """Other judge's score of a word more, within tasks, among the answers before training."""
    answers = read_answers(file)
    answers = answers[answers["step"] == 0].dropna(subset=["finished or not"])
    columns = answers[["words", "finished or not"]]
    words, scores = (columns - columns.groupby(answers["task"]).transform("mean")).to_numpy().T
    return (words * scores).sum() / (words * words).sum()


def table(arms):
    """Changes from the first measure to the last: intervals over tasks (the mean of seeds), and over seeds."""
    rows, changes = [], {}
    for arm, files in arms.items():
        values, steps = by_task(files)
        # one more measure: the other judge's score less what length explains of it
        slope = slope_of_length(files[0])
        equal = values[..., 1:2] - slope * values[..., 4:5]
        values = np.concatenate([values, equal], axis=-1)
        changes[arm] = values[:, :, -1] - values[:, :, 0]    # (runs, tasks, measures)
        before, after = values[:, :, 0].mean(axis=(0, 1)), values[:, :, -1].mean(axis=(0, 1))
        for i, title in enumerate([*MEASURES.values(), "other judge, equal length"]):
            rows.append([f"{arm}, {steps[-1]:.0f} steps", title, f"{before[i]:.3f}", f"{after[i]:.3f}",
                         *cells(changes[arm][:, :, i])])
    for arm, change in changes.items():
        if "shuffled" in changes and arm != "shuffled":
            gap = change.mean(axis=0, keepdims=True) - changes["shuffled"].mean(axis=0, keepdims=True)
            for i, title in enumerate([*MEASURES.values(), "other judge, equal length"]):
                rows.append([f"{arm} less shuffled", title, "", "", *cells(gap[:, :, i])])
    print_table(["arm", "measure", "before", "after", "change, 95% over tasks", "over seeds"], rows)


def cells(change):
    """Of changes (runs, tasks)."""
    over_seeds = cell(change.mean(axis=1)) if len(change) > 1 else "-"
    return cell(change.mean(axis=0)), over_seeds


def draw(arms, base, out):
    """Curves of the arms (mean of seeds; bars: 95% of the change over tasks); dashed: the base model, greedy."""
    from matplotlib import pyplot
    pyplot.rcParams["svg.fonttype"] = "none"    # text stays text
    figure, axes = pyplot.subplots(1, 4, figsize=(11, 3), layout="tight")
    for axis, index in zip(axes, (0, 1, 2, 4), strict=True):
        for i, (arm, files) in enumerate(arms.items()):
            values, steps = by_task(files)
            tasks = values[..., index].mean(axis=0)    # (tasks, steps)
            _, half = interval(tasks - tasks[:, :1])
            axis.errorbar(steps, tasks.mean(axis=0), yerr=half, marker="o", capsize=3, color=f"C{i}", label=arm)
        if base:
            values, _ = by_task([base])
            axis.axhline(values[0, :, -1, index].mean(), color="gray", linestyle="--", label="base, greedy")
        axis.set_title(list(MEASURES.values())[index], fontsize=10)
        axis.set_xlabel("step")
    axes[0].legend(fontsize=8)
    figure.savefig(out)


def read_pairs(run, count=20):
    """First answers to held-out tasks before and after training, in random order; the key goes to a file."""
    measures = sorted(Path(run, "rollouts").glob("step_*.jsonl"))
    sides = []
    for file in (measures[0], measures[-1]):
        rows = [json.loads(line) for line in open(file, encoding="utf-8")]
        sides.append([row for row in rows if row["step"] == pop.HELD_OUT and row["completions"]])
    rng, key = random.Random(0), []
    for before, after in list(zip(*sides, strict=True))[:count]:
        golds = " | ".join(criterion["gold"] for criterion in before["rubric"])
        print(f"\n## {before['row']}. {before['task']}\ngolds: {golds}")
        pair = [("before", before), ("after", after)]
        rng.shuffle(pair)
        for name, (_, row) in zip("AB", pair, strict=True):
            print(f"{name}: {row['completions'][0]['text'].strip()}")
        key.append([row["row"] for _, row in pair[:1]] + [side for side, _ in pair])
    Path(run, "pairs_key.json").write_text(json.dumps(key))


def main(command, *rest):
    if command == "folder":
        write_folder(*rest)
    elif command == "gate":
        gate(*rest)
    elif command == "read":
        read_pairs(*rest)
    elif command == "table":
        arms = {}
        for file in rest:
            arms.setdefault(Path(file).stem.rpartition("_")[0], []).append(file)
        base = arms.pop("base", [None])[0]
        table(arms)
        draw(arms, base, Path(__file__).parent / "learning.svg")
    else:
        first, *flags = rest
        cfg = pop.parse_args(flags)
        cfg.model = pop.find_model(cfg.model)
        dict(tasks=write_tasks, base=answer_colder, run=train)[command](first, cfg)


if __name__ == "__main__":
    main(*sys.argv[1:])
