"""Keeps pop.py and eval.py readable: python .ci/shape.py    (exits with 1 where a file is over a limit)

nodes: expressions and statements a code line; the models of this field have 4 to 6. comments: share of
lines that are comments on their own line or docstrings. comprehensions: in 100 code lines.
"""
import ast
import sys
from pathlib import Path

LIMITS = {
    "pop.py": dict(lines=1600, columns=100, nodes=7.0, comments=0.16, comprehensions=6, main=120),
    "eval.py": dict(lines=800, columns=100, nodes=8.0, comments=0.12, comprehensions=8, main=120),
}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def measure(text: str) -> dict[str, float]:
    tree, lines = ast.parse(text), text.splitlines()
    nodes = list(ast.walk(tree))
    documented = set()
    for node in nodes:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            documented |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    for number, line in enumerate(lines, start=1):
        if line.lstrip().startswith("#"):
            documented.add(number)
    code = sum(1 for number, line in enumerate(lines, 1) if line.strip() and number not in documented)
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    return dict(
        lines=len(lines), columns=max(map(len, lines)), comments=len(documented) / len(lines),
        nodes=sum(isinstance(node, ast.expr | ast.stmt) for node in nodes) / code,
        comprehensions=100 * sum(isinstance(node, COMPREHENSIONS) for node in nodes) / code,
        main=max(f.end_lineno - f.lineno + 1 for f in functions if f.name == "main"),
        function=max(f.end_lineno - f.lineno + 1 for f in functions if f.name != "main"))


def main() -> None:
    over = []
    for name, limits in LIMITS.items():
        found = measure(Path(__file__).parent.parent.joinpath(name).read_text(encoding="utf-8"))
        print(name, *(f"{key} {value:.3g}" for key, value in found.items()))
        for key, limit in (limits | dict(function=60)).items():
            if found[key] < limit if key == "comments" else found[key] > limit:
                over.append(f"{name}: {key} {found[key]:.3g}, limit {limit}")
    # An empty text is an error to sys.exit, too, so that it is called only where something is over.
    if over:
        sys.exit("\n".join(over))


if __name__ == "__main__":
    main()
