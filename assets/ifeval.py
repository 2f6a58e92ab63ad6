"""IFEval's checks (arXiv 2311.07911) by the code of lm-eval (EleutherAI), for eval.py.

Exits with one line if a package is missing, see README. The packages around the verifier are put in
place but not run: they would import far more. nltk's sentence splitter comes out of
llama-index-core; without that package lm-eval downloads it once.
"""
import random
import sys
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from typing import Any

import numpy as np

from assets.checks import fail

packages = ("lm_eval", "nltk", "langdetect", "immutabledict")
missing = [name for name in packages if not find_spec(name)]
if missing:
    fail(f"--benchmark ifeval: needs {', '.join(missing)}, see README")

import langdetect
import nltk

for name in ("lm_eval", "lm_eval.tasks"):
    sys.modules.setdefault(name, module_from_spec(find_spec(name)))
langdetect.DetectorFactory.seed = 0
for folder in sys.path:
    nltk.data.path.append(str(Path(folder, "llama_index", "core", "_static", "nltk_cache")))

from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT
from lm_eval.tasks.ifeval.utils import process_results


def check(row: dict[str, Any]) -> None:
    """Raises ValueError if no answer to this line could be verified."""
    unknown = set(row["instruction_id_list"]) - set(INSTRUCTION_DICT)
    if unknown:
        raise ValueError(f"instruction_id_list: {', '.join(sorted(unknown))}: unknown")
    if len(row["kwargs"]) != len(row["instruction_id_list"]):
        raise ValueError("kwargs: needs one entry for each instruction")
    try:
        verify(row, "A text.")
    except Exception as error:    # whatever lm-eval's code does with wrong arguments
        raise ValueError(f"kwargs: {type(error).__name__}: {error}") from None


def verify(row: dict[str, Any], answer: str) -> dict[str, list[float]] | None:
    """row: a line of IFEval's file -> {prompt_level_strict_acc: [1.0 if all is followed, else 0.0],
    inst_level_strict_acc: a number for each instruction, and the two loose ones}.
    An entry of kwargs may be None. None for an answer that cannot be checked, such as JSON nested a
    thousand deep.
    """
    row = row | dict(kwargs=[arguments or {} for arguments in row["kwargs"]])
    random.seed(0)    # two checks draw a random letter
    try:
        found = process_results(row, [answer])
    except RecursionError:
        return None
    return {key: np.atleast_1d(value).astype(float).tolist() for key, value in found.items()}
