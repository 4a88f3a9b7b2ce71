"""Refuses code that could run what a file contains: pickle and its kin, `torch.load`, numpy's pickles, remote code.

Reads every Python file outside tests/ (tests build hostile files on purpose) as a syntax tree, so that a mention in a
docstring is fine and an alias is not. Prints `path:line: reason`; exits with 1 if there is any.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
_CALLS = {"torch.load", "torch.jit.load", "torch.package", "numpy.load", "np.load"}
_SKIPPED = {"tests", ".venv", "build", "dist", ".git", "node_modules"}


def find_unsafe(source: str, path: str) -> Iterator[str]:
    """Every unsafe spot of one file, as `path:line: reason`."""
    for node in ast.walk(ast.parse(source, path)):
        for reason in _reasons(node):
            yield f"{path}:{getattr(node, 'lineno', 0)}: {reason}"


def _reasons(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (f"imports {name.name}" for name in node.names if name.name.partition(".")[0] in _MODULES)
    elif isinstance(node, ast.ImportFrom):
        module = node.module or ""
        if module.partition(".")[0] in _MODULES:
            yield f"imports from {module}"
        yield from (f"imports {module}.{name.name}" for name in node.names if f"{module}.{name.name}" in _CALLS)
    elif isinstance(node, ast.Attribute) and ast.unparse(node) in _CALLS:
        yield f"uses {ast.unparse(node)}"
    elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
        yield "passes allow_pickle"
    elif isinstance(node, ast.keyword) and node.arg == "trust_remote_code" and not _is_false(node.value):
        yield "passes trust_remote_code other than False"


def _is_false(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is False


def main(root: Path) -> int:
    found: list[str] = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not _SKIPPED.intersection(relative.parts):
            found += find_unsafe(path.read_text(encoding="utf-8"), str(relative))
    print("\n".join(found) if found else "no unsafe loading")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parent.parent))
