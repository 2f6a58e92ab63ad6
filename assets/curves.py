"""Several runs that differ in --seed as one picture and one table: each panel's mean over the runs, its 95% interval, the runs.

    python -m assets.curves assets/runs/seed*.jsonl    # from the folder of pop.py; any runs/*/metrics.jsonl

Writes assets/learning.svg. Prints the change from the first point (of training: the first quarter of the steps) to the last.
"""
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eval import interval, print_changes

PANELS = {    # title: what of a line of metrics.jsonl, and what that is divided by
    "held-out reward": ["eval_reward"], "held-out answers that are closed": ["eval_closed"],
    "held-out reward of the closed ones": ["eval_reward", "eval_closed"],
    "training reward": ["reward_mean"], "tokens in a training answer": ["answer_tokens"]}


def points(steps: Sequence[int], values: Sequence[float], low: float, high: float, last: int) -> str:
    return " ".join(f"{150 * step / last:.1f},{100 * (high - v) / (high - low):.1f}" for step, v in zip(steps, values, strict=True))


def main(files: Sequence[str], out: Path) -> None:
    if len(files) < 2:
        raise SystemExit("curves: needs the metrics.jsonl of two runs or more that differ in --seed")
    runs = [{m["step"]: m for m in map(json.loads, Path(file).read_text(encoding="utf-8").splitlines())} for file in files]
    panels, changes = [], {}
    for i, (title, keys) in enumerate(PANELS.items()):
        steps = [step for step in sorted(runs[0]) if all(key in run.get(step, {}) for run in runs for key in keys)]
        if len(steps) < 2:
            raise SystemExit(f"curves: no two steps with {title} in all runs")
        found = np.array([[[run[step][key] for key in keys] for step in steps] for run in runs])    # (runs, steps, keys)
        values = found[..., 0] / found[..., 1] if len(keys) > 1 else found[..., 0]
        mean, half = interval(values)
        ends = max(1, len(steps) // 4)
        changes[title] = np.stack([values[:, :ends].mean(1), values[:, -ends:].mean(1)], axis=1)
        scale = (min((mean - half).min(), values.min()), max((mean + half).max(), values.max()) + 1e-9, steps[-1])
        band = points(steps, mean + half, *scale) + " " + points(steps[::-1], (mean - half)[::-1], *scale)
        thin = "".join(f'<polyline points="{points(steps, run, *scale)}" fill="none" stroke="#999" stroke-width=".7"/>' for run in values)
        panels.append(f"""<g transform="translate({45 + 205 * i} 30)"><text x="75" y="-12" text-anchor="middle">{title}</text>
<path d="M0 0V100H150" fill="none" stroke="#888"/><text x="-4" y="8" text-anchor="end">{scale[1]:.2f}</text>
<text x="-4" y="100" text-anchor="end">{scale[0]:.2f}</text><text x="150" y="114" text-anchor="end">{steps[-1]} steps</text>
<polygon points="{band}" fill="#2a6fbb" opacity=".2"/>
{thin}
<polyline points="{points(steps, mean, *scale)}" fill="none" stroke="#2a6fbb" stroke-width="2"/></g>""")
    print_changes(changes)
    head = ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1035 155" font-family="sans-serif" font-size="10">\n'
            '<rect width="1035" height="155" fill="#fff"/>')
    out.write_text("\n".join([head, *panels, "</svg>\n"]), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:], Path(__file__).parent / "learning.svg")
