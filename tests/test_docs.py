"""That the documents speak of what is there."""

import ast
import re

from conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
REVIEW = (REPOSITORY / "REVIEW.md").read_text(encoding="utf-8")


def definitions(path):
    """{name: lines of code of each function or class in a file}, without docstrings, comments and empty lines."""
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = node.body[0]
            docstring = range(first.lineno, first.end_lineno + 1) if ast.get_docstring(node) is not None else ()
            code = [number for number in range(node.lineno, node.end_lineno + 1) if number not in docstring]
            found[node.name] = sum(
                not lines[number - 1].strip().startswith("#") and lines[number - 1].strip() != "" for number in code
            )
    return found


def test_the_table_of_overrides_counts_the_lines():
    trainer = definitions(REPOSITORY / "tests" / "trainer_reference.py")
    ours = definitions(REPOSITORY / "evaluate.py")
    rows = re.findall(r"^\| `(\w+)`, (\d+) \| `(\w+)`, (\d+) \|", README, re.MULTILINE)
    assert [row[0] for row in rows] == list(trainer)[list(trainer).index("_maybe_log_save_evaluate") :][:5]
    for override, lines, function, our_lines in rows:
        assert (override, trainer[override], ours[function]) == (override, int(lines), int(our_lines))


def test_the_review_guide_names_what_exists():
    code = {name for path in REPOSITORY.glob("*.py") for name in definitions(path)}
    tests = {name for path in (REPOSITORY / "tests").glob("test_*.py") for name in definitions(path)}
    rows = [line.split(" | ") for line in REVIEW.splitlines() if re.match(r"\| \d+ \|", line)]
    assert [int(row[0].strip("| ")) for row in rows] == list(range(1, len(rows) + 1))
    for row in rows:
        _, fault, here, caught = row
        for name in re.findall(r"`(\w+)`", here):
            assert name in code | {"prepare", "forward"}, name
        caught = caught.strip("| ")
        assert caught == "by reading" or set(re.findall(r"`(\w+)`", caught)) <= tests, caught
