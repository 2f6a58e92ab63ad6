"""Does it learn what the documents know? The experiment of assets/learning.md, step by step.

    python -m assets.learning tasks FILE [flags of pop.py]      # of all documents, by --model
    python -m assets.learning folder FILE OUT STEPS PER_STEP    # 24 are held out
    python -m assets.learning colder OUT [flags]    # answers of the base model, or of --run_dir
    python -m assets.learning gate FILE             # of these: is there something to learn?
    python -m assets.learning run ARM [flags]       # ARM: policy, or shuffled, the control
    python -m assets.learning table FILE ...        # all arms and seeds, and assets/learning.svg
    python -m assets.learning read RUN              # answers before and after

FILE of `gate` and `table` is what `eval.py rejudge RUN --judge OTHER_MODEL` writes for a run, or
for OUT of `colder`; `table` wants it renamed to ARM_SEED.json. The flags are pop.py's, with --tasks
from `folder`.
"""
import json
import random
import sys
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import pop    # before PyTorch, because it loads OpenMP

import numpy as np
import pandas

from eval import interval, print_table

HELD_OUT_TASKS = 24
TEMPERATURES = (1.0, 0.7, 0.4, 0.0)    # 0 is greedy
# Columns of `eval.py rejudge` and what they are called here.
MEASURES = {"own judge": "judge that trains", "finished or not": "other judge",
            "golds' words": "golds' words", "names": "names in golds",
            "words": "words", "finished": "finished"}
EQUAL = "other judge, equal length"    # its score less what length explains of it


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
    times = len(rows) / len(training)
    print(f"{len(held_out)} tasks are held out; {len(training)} are trained on, {times:.1f} times")


def answer_colder(out, cfg):
    """What being surer is worth: the last checkpoint of --run_dir, or the base model, when colder."""
    for name in ("rollouts", "tasks"):
        Path(out, name).mkdir(parents=True)
    engine = pop.Engine(cfg)
    engine.sleep()
    with engine.vllm_context():
        model = pop.load_policy(cfg)
    for newest in sorted(Path(cfg.run_dir).glob("checkpoints/step_*"))[-1:]:
        pop.load_checkpoint(newest, model, pop.make_optimizer(model, cfg))
    held_out = [group for group in pop.read_tasks(Path(cfg.tasks)) if group.step == pop.HELD_OUT]
    for number, temperature in enumerate(TEMPERATURES):
        groups = deepcopy(held_out)
        engine.load_weights(model, "policy")
        pop.sample_answers(engine, groups, replace(cfg, temperature=temperature))
        engine.load_weights(model, "base")
        pop.score_answers(engine, groups, cfg)
        pop.log_step(Path(out), dict(step=number) | pop.held_out_metrics(groups), groups, cfg)
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
    """Mean of values (n,) and half its 95% interval. NaN is left out: a task without names."""
    values = np.asarray(values, dtype=float)
    mean, half = interval(values[~np.isnan(values)])
    return f"{mean:+.3f} ± {half:.3f}"


def gate(file):
    """Of the base model's answers at temperature 1: what is the training judge's pick of a task's
    answers worth, above the task's mean, by measures that do not train? 95% over tasks.
    """
    answers, rows = read_answers(file), []
    answers = answers[answers["step"] == 0]
    for name, title in MEASURES.items():
        worth, correlations = [], []
        for _, task in answers.dropna(subset=["own judge", name]).groupby("task"):
            worth.append(task[name][task["own judge"].idxmax()] - task[name].mean())
            # Spearman's; NaN where all are equal
            correlations.append(task["own judge"].rank().corr(task[name].rank()))
        rows.append([title, cell(worth), cell(correlations)])
    print_table(["by", "best of a task less the mean", "rank correlation within tasks"], rows)


def by_task(files):
    """Mean of each measure: (runs, tasks, steps, measures); and the steps."""
    runs = []
    for file in files:
        answers = read_answers(file)
        answers[EQUAL] = answers["finished or not"] - slope_of_length(answers) * answers["words"]
        means = answers.groupby(["task", "step"])[[*MEASURES, EQUAL]].mean()
        steps = list(means.index.levels[1])
        runs.append(means.to_numpy().reshape(-1, len(steps), len(means.columns)))
    return np.array(runs), steps


def slope_of_length(answers):
    """Other judge's score of a word more, within tasks, among the answers before training."""
    answers = answers[answers["step"] == 0].dropna(subset=["finished or not"])
    columns = answers[["words", "finished or not"]]
    words, scores = (columns - columns.groupby(answers["task"]).transform("mean")).to_numpy().T
    return (words * scores).sum() / (words * words).sum()


def table(arms, base):
    """Changes from the first measure to the last, and what is left of them beside the control and
    the base model's greedy answers. 95% over tasks (of the mean of seeds), and over seeds.
    """
    rows, changes = [], {}
    for arm, files in arms.items():
        values, steps = by_task(files)
        first, last = values[:, :, 0], values[:, :, -1]    # (runs, tasks, measures)
        changes[arm] = last - first
        rows += gap_rows(f"{arm}, step {steps[-1]:.0f} less step 0", last, first)
        if base:
            greedy = by_task([base])[0][:, :, -1]
            rows += gap_rows(f"{arm} less base, greedy", last, greedy)
    for arm, change in changes.items():
        if "shuffled" in changes and arm != "shuffled":
            control = changes["shuffled"].mean(axis=0, keepdims=True)
            rows += gap_rows(f"change of {arm} less that of shuffled", change, control)
    print_table(["what", "measure", "first", "second", "gap, 95% over tasks", "over seeds"], rows)


def gap_rows(title, values, others):
    """Of (runs, tasks, measures); others may be one run."""
    rows, gaps = [], values - others
    for i, name in enumerate([*MEASURES.values(), EQUAL]):
        gap = gaps[:, :, i]
        over_seeds = cell(np.nanmean(gap, axis=1)) if len(gap) > 1 else "-"
        means = [f"{np.nanmean(side[..., i]):.3f}" for side in (values, others)]
        rows.append([title, name, *means, cell(gap.mean(axis=0)), over_seeds])
    return rows


def draw(arms, base, out):
    """Curves: mean of seeds; bars: 95% of the change over tasks; dashed: the base model, greedy."""
    from matplotlib import pyplot
    pyplot.rcParams["svg.fonttype"] = "none"    # text stays text
    figure, axes = pyplot.subplots(2, 3, figsize=(7.5, 5), layout="tight")
    for index, axis in enumerate(axes.flat):
        for i, (arm, files) in enumerate(arms.items()):
            values, steps = by_task(files)
            tasks = values[..., index].mean(axis=0)    # (tasks, steps)
            tasks = tasks[~np.isnan(tasks).any(axis=1)]
            _, half = interval(tasks - tasks[:, :1])
            axis.errorbar(steps, tasks.mean(axis=0), yerr=half, marker="o", capsize=3,
                          color=f"C{i}", label=arm)
        if base:
            greedy = np.nanmean(by_task([base])[0][0, :, -1, index])
            axis.axhline(greedy, color="gray", linestyle="--", label="base, greedy")
        axis.set_title(list(MEASURES.values())[index], fontsize=10)
        axis.set_xlabel("step")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(out)


def read_pairs(run, count=20):
    """First answers to held-out tasks, before and after training."""
    measures = sorted(Path(run, "rollouts").glob("step_*.jsonl"))
    sides = []
    for file in (measures[0], measures[-1]):
        rows = [json.loads(line) for line in open(file, encoding="utf-8")]
        sides.append([row for row in rows if row["step"] == pop.HELD_OUT and row["completions"]])
    for before, after in list(zip(*sides, strict=True))[:count]:
        golds = " | ".join(criterion["gold"] for criterion in before["rubric"])
        print(f"\n## {before['row']}. {before['task']}\ngolds: {golds}")
        for name, row in (("before", before), ("after", after)):
            print(f"{name}: {row['completions'][0]['text'].strip()}")


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
        table(arms, base)
        draw(arms, base, Path(__file__).parent / "learning.svg")
    else:
        first, *flags = rest
        cfg = pop.parse_args(flags)
        cfg.model = pop.find_model(cfg.model)
        dict(tasks=write_tasks, colder=answer_colder, run=train)[command](first, cfg)


if __name__ == "__main__":
    main(*sys.argv[1:])
