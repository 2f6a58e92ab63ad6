"""Runs that differ in --seed as one picture and one table: mean, its 95% interval, each run.

    python -m assets.curves runs/*/metrics.jsonl    # from the folder of pop.py

Writes assets/learning.svg and prints the change from the first point (of training: the first
quarter of the steps) to the last. Needs matplotlib, which is not in requirements.txt.
"""
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eval import interval, print_table

PANELS = {    # title: a key of metrics.jsonl, and what it is divided by
    "held-out reward": ("eval_reward", None),
    "held-out answers that are finished": ("eval_finished", None),
    "held-out reward of the finished ones": ("eval_reward", "eval_finished"),
    "training reward": ("reward_mean", None),
    "tokens in a training answer": ("answer_tokens", None),
}


def read_run(file: str) -> dict[int, dict[str, float]]:
    text = Path(file).read_text().replace('closed"', 'finished"')    # as older runs call them
    return {row["step"]: row for row in map(json.loads, text.splitlines())}


def main(files: Sequence[str], out: Path) -> None:
    from matplotlib import pyplot
    if len(files) < 2:
        raise SystemExit("curves: needs the metrics.jsonl of two runs or more")
    runs = [read_run(file) for file in files]
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(4 * len(PANELS), 3), layout="tight")
    table = []
    for axis, (title, (key, divisor)) in zip(axes, PANELS.items(), strict=True):
        steps = [step for step in runs[0] if all(key in run.get(step, {}) for run in runs)]
        if len(steps) < 2:
            raise SystemExit(f"curves: no two steps with {title} in all runs")
        values = np.array([[run[step][key] for step in steps] for run in runs])    # (runs, steps)
        if divisor:
            values /= np.array([[run[step][divisor] for step in steps] for run in runs])
        mean, half = interval(values)
        axis.set_title(title, fontsize=9)
        axis.plot(steps, values.T, color="gray", linewidth=0.7)
        axis.plot(steps, mean, color="tab:blue", linewidth=2)
        axis.fill_between(steps, mean - half, mean + half, color="tab:blue", alpha=0.2)
        ends = max(1, len(steps) // 4)
        before, after = values[:, :ends].mean(axis=1), values[:, -ends:].mean(axis=1)
        change, half = interval(after - before)
        table.append([title, f"{before.mean():.3f}", f"{after.mean():.3f}",
                      f"{change:+.3f} [{change - half:+.3f}, {change + half:+.3f}]"])
    print_table(["", "before", "after", "change [95%]"], table)
    figure.savefig(out)


if __name__ == "__main__":
    main(sys.argv[1:], Path(__file__).parent / "learning.svg")
