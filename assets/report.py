"""report.html of a run, for `python eval.py report RUN`. The page is assets/report.html."""
import json
import os
from pathlib import Path
from typing import Any

from assets.checks import fail


def read_json(text: str) -> Any:
    return json.loads(text, parse_constant=lambda _: None)    # a browser reads no NaN


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Objects of a JSONL file. What follows the last newline is still being written."""
    return [read_json(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


def write_report(run_dir: Path, out: Path) -> Path:
    """report.html in the run folder: curves, evaluations of its checkpoints (in `out`), and the
    rollouts to read; one self-contained file. Texts are data for the script of the page, never
    markup. Exits with one line if run_dir holds no run.
    """
    if not (run_dir / "config.json").is_file():
        fail(f"report {run_dir}: is not the folder of a run")
    config = read_json((run_dir / "config.json").read_text(encoding="utf-8"))
    metrics = read_lines(run_dir / "metrics.jsonl")
    for file in sorted(run_dir.glob("rejudge-*.json")):    # the rewards of another judge
        other = read_json(file.read_text(encoding="utf-8"))
        rewards = dict(zip(other["steps"], other["rewards"], strict=True))
        for row in metrics:
            row[f"eval_reward by {other['judge']}"] = rewards.get(row["step"])
    tasks = []
    for file in sorted(run_dir.glob("rollouts/step_*.jsonl")):
        for group in read_lines(file):
            held_out = group["step"] < 0
            tasks.append(group | dict(step=int(file.stem[5:]), held_out=held_out))
    evals = []
    for file in sorted(out.glob("*/results.json")):
        result = read_json(file.read_text(encoding="utf-8"))
        if Path(result["settings"]["model"]).resolve().is_relative_to(run_dir.resolve()):
            evals.append(result["cells"])

    data = json.dumps(dict(name=run_dir.resolve().name, config=config, metrics=metrics,
                           tasks=tasks, evals=evals))
    for character in "<>&":    # so that no text can end the script element
        data = data.replace(character, f"\\u{ord(character):04x}")
    page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    page = page.replace("NONCE", os.urandom(16).hex()).replace("DATA", data)
    (run_dir / "report.html").write_text(page, encoding="utf-8")
    return run_dir / "report.html"
