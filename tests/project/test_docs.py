"""That the documents speak of what is there."""

import ast
import inspect
import re
import shlex

import pytest
from accelerate.commands.launch import launch_command_parser
from conftest import REPOSITORY
from transformers import Trainer, TrainerCallback, TrainingArguments

from config import Config, EvaluateConfig
from runtime.options import read_options

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
KOREAN = (REPOSITORY / "README.ko.md").read_text(encoding="utf-8")
REVIEW = (REPOSITORY / "REVIEW.md").read_text(encoding="utf-8")
FROM_TRAINER = (REPOSITORY / "docs" / "FROM_TRAINER.md").read_text(encoding="utf-8")


def definitions(path):
    """{name: lines of code of each function or class in a file}, without docstrings, comments and empty lines."""
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = node.body[0]
            docstring = (
                range(first.lineno, first.end_lineno + 1)
                if ast.get_docstring(node) is not None
                else ()
            )
            code = [
                number
                for number in range(node.lineno, node.end_lineno + 1)
                if number not in docstring
            ]
            found[node.name] = sum(
                not lines[number - 1].strip().startswith("#") and lines[number - 1].strip() != ""
                for number in code
            )
    return found


def test_the_table_of_overrides_counts_the_lines():
    trainer = definitions(REPOSITORY / "tests" / "task" / "trainer_reference.py")
    ours = definitions(REPOSITORY / "evaluate.py")
    page = (REPOSITORY / "docs" / "FROM_TRAINER.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)`, (\d+) \| `(\w+)`, (\d+) \|", page, re.MULTILINE)
    assert [row[0] for row in rows] == list(trainer)[
        list(trainer).index("_maybe_log_save_evaluate") :
    ][:5]
    for override, lines, function, our_lines in rows:
        assert (override, trainer[override], ours[function]) == (
            override,
            int(lines),
            int(our_lines),
        )


def test_links_to_lines_lead_to_the_functions():
    found = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", README)
    assert len(found) >= 2
    for name, file, line in found:
        assert (
            (REPOSITORY / file)
            .read_text(encoding="utf-8")
            .splitlines()[int(line) - 1]
            .startswith(f"def {name}(")
        ), name
    for file in re.findall(r"\]\(([\w/.]+?)(?:#.*?)?\)|src=\"(.*?)\"", README):
        assert (REPOSITORY / (file[0] or file[1])).is_file(), file


def what_a_translation_keeps(text):
    """{part: its content} of a README, whatever language it is in; code in order of the alphabet, since word order differs."""
    block = r"(?:^<!-- [^\n]* -->\n)?^```.*?^```$"  # with its marker
    prose = re.sub(block, "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^(#+) (.*)$", prose, re.MULTILINE)
    # GitHub's anchors are made of the headings' words: a link within the page is compared by the number of its heading.
    anchors = [
        "#" + re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for _, title in headings
    ]
    links = re.findall(r"\]\((.*?)\)|src=\"(.*?)\"", prose)
    return {
        "blocks": re.findall(block, text, re.MULTILINE | re.DOTALL),
        "headings": [level for level, _ in headings],
        "code": sorted(
            " ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)
        ),  # commands, options, files, names
        "links": {
            anchors.index(link) if link.startswith("#") else link or source
            for link, source in links
        },
        "rows of tables": re.findall(
            r"^\||^#", prose, re.MULTILINE
        ),  # the headings tell one table from the next
    }


def test_the_korean_readme_is_in_step():
    ours, korean = what_a_translation_keeps(README), what_a_translation_keeps(KOREAN)
    ours["links"].remove("README.ko.md")
    korean["links"].remove("README.md")
    assert len(ours["blocks"]) >= 7
    for part in ours:
        assert korean[part] == ours[part], part


def names_of_the_program():
    files = [*REPOSITORY.glob("*.py"), *(REPOSITORY / "runtime").glob("*.py")]
    return {name for path in files for name in definitions(path)} | {"prepare", "forward"}


def test_the_review_guide_names_what_exists():
    code, files = names_of_the_program(), (REPOSITORY / "tests").glob("*/test_*.py")
    tests = {name for path in files for name in definitions(path) if name.startswith("test_")}
    questions, *topics = re.split(r"^## (?=[A-Z]\. )", REVIEW, flags=re.MULTILINE)
    known = set()
    for topic in topics:
        rows = [line.split(" | ") for line in topic.splitlines() if re.match(r"\| [A-Z]\d", line)]
        for number, (name, _, _, here, caught) in enumerate(rows, 1):
            assert name == f"| {topic[0]}{number}"
            known.add(name[2:])
            assert set(re.findall(r"`(\w+)`", here)) <= code, here
            caught = set(re.findall(r"`(\w+)`", caught))
            assert caught and caught <= tests, caught
    assert len(known) >= 60 and set(re.findall(r"\b[A-Z]\d+\b", questions)) <= known


def table(part):
    """[(names in the first column, the second column)] of the tables of FROM_TRAINER.md's part."""
    text = FROM_TRAINER.split(f" {part}\n", 1)[1].split("\n##", 1)[0]
    rows = re.findall(r"^\| (`.*?`) \|(.*) \|$", text, re.MULTILINE)
    return [(re.findall(r"`(\w+)`", first), second) for first, second in rows]


def test_each_option_of_trainer_has_its_place():
    parts = ("Same name", "Said by the launch", "All others, and how to have them")
    same, *others = [[name for row, _ in table(part) for name in row] for part in parts]
    fields = TrainingArguments.__dataclass_fields__.keys()
    assert sorted(same) == sorted(fields & Config.__dataclass_fields__.keys())
    assert sorted(sum(others, same)) == sorted(fields)


@pytest.mark.slow
def test_each_override_and_event_has_its_place():
    for names, here in table("Overrides"):
        assert all(hasattr(Trainer, name) for name in names), names
        assert set(re.findall(r"`(\w+)`", here)) - {"losses"} <= names_of_the_program(), here
    arguments = inspect.signature(Trainer._maybe_log_save_evaluate).parameters.keys() - {"self"}
    assert f"{len(arguments)} in 4.52 and in 5." in " ".join(FROM_TRAINER.split())
    rows = table("Callbacks")
    events = [name for name in vars(TrainerCallback) if name.startswith("on_")]
    assert sorted(name for names, _ in rows for name in names) == sorted(events)
    program = "".join((REPOSITORY / name).read_text() for name in ("train.py", "evaluate.py"))
    for names, here in rows:
        lines = [line.split("...")[0] for line in re.findall(r"`([^`]* [^`]*|.*?\(.*?)`", here)]
        assert all(line in program for line in lines[:1] if "updates_per" not in line), names


# ---- commands: those in a block of the README are run, the others validated

DOCUMENTS = [
    REPOSITORY / name
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "train.py",
        "evaluate.py",
        "sample_data.py",
        "config.py",
        "sweep.yaml",
    )
]
DOCUMENTS += [
    *(REPOSITORY / "accelerate_config").iterdir(),
    REPOSITORY / "tests" / "loop" / "kill_test.py",
    REPOSITORY / "README.ko.md",
]
DOCUMENTS += [
    *(REPOSITORY / "docs").glob("*.md"),
    *(REPOSITORY / "tests" / "benchmarks").glob("*.py"),
    *(REPOSITORY / "tools").glob("*.py"),
]


def test_each_block_of_the_readme_is_run():
    runners = [
        (REPOSITORY / path).read_text(encoding="utf-8")
        for path in (
            ".ci/run",
            "tests/project/test_main_job.py",
            "tests/project/test_copies.py",
            "tests/project/test_tasks.py",
        )
    ]
    for marker, block in re.findall(r"(?m)^(.*)\n```bash\n((?:(?!```).*\n)+)", README):
        assert re.fullmatch("<!-- .* -->", marker)
        applied = re.fullmatch(r"git apply docs/(\w+)\.diff\n", block)  # test_tasks.py does so
        what = f'"{applied[1]}"' if applied else marker
        assert any(what in runner for runner in runners), marker


def commands():
    """[(document, words)]: what is in a block, in backquotes, or indented in a comment, and begins with a program."""
    found = []
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        spans = re.findall(r"`([^`\n]+)`", text) if path.suffix == ".md" else []
        indented = re.findall(
            r"^(?:#  |    ) *((?:accelerate|python|sbatch|wandb) [\w\"].*)", text, re.MULTILINE
        )
        printed = re.findall(r"^to .*: +(accelerate .*)", text, re.MULTILINE)  # at the end of a run
        for line in [*re.split(r"\n| && ", "\n".join(blocks)), *spans, *indented, *printed]:
            words = shlex.split(re.sub(r" # .*| +\.\.\.$", "", line).replace(".venv/bin/", ""))
            if len(words) > 1 and words[0] in PROGRAMS:
                found.append((path.name, words))
    return found


def check_files(words):
    for word in words:
        assert (
            not re.search(r"\.(py|yaml|txt|sbatch)$|/run$", word) or (REPOSITORY / word).is_file()
        ), f"there is no {word}"


def check_accelerate(words):
    assert words[0] == "launch"
    words = [word.replace("NAME.yaml", "cpu.yaml") for word in words[1:]]
    script = next((number for number, word in enumerate(words) if word.endswith(".py")), len(words))
    check_files(words[:script])
    launch_command_parser().parse_args([*words[:script], "train.py"])
    check_python(words[script:])


def check_python(words):
    check_files(words[:1])
    kind = {"train.py": Config, "evaluate.py": EvaluateConfig}.get(words[0] if words else "")
    if kind is not None:
        # run.yaml is the reader's to write, and --help ends the program.
        left = [word for word in words[1:] if word not in ("--config", "run.yaml", "--help")]
        read_options(kind, left)
    elif words and words[0].endswith(".py"):
        source = (REPOSITORY / words[0]).read_text(encoding="utf-8")
        assert all(f'"{word}"' in source for word in words if word.startswith("--")), (
            "no such option"
        )


def check_pip(words):
    check_files(words)
    pins = (REPOSITORY / "tests" / "requirements.txt").read_text(encoding="utf-8").split()
    assert words[0] == "install" and all(word in pins for word in words if "==" in word), (
        "another version than in the tests"
    )


PROGRAMS = {
    "accelerate": check_accelerate,
    "python": check_python,
    "python3": check_python,
    "train.py": lambda words: check_python(["train.py", *words]),
    "sbatch": lambda words: check_python(
        ["train.py", *words[1:]]
    ),  # the script itself: test_the_slurm_script
    "pip": check_pip,
    "wandb": check_files,
    "bash": check_files,
    "ruff": check_files,  # test_nothing_to_mend
    "pyrefly": check_files,
    "grep": check_files,  # test_the_places_to_edit_are_marked
}


def test_other_commands_are_accepted(pytestconfig):
    """Their files exist, and accelerate, train.py, or pytest takes their options."""
    found = commands()
    assert {words[0] for _, words in found} == set(PROGRAMS)
    for document, (program, *words) in found:
        try:
            PROGRAMS[program](words)
            for option in words if words[:2] == ["-m", "pytest"] else []:
                if option.startswith("-"):
                    pytestconfig.getoption(option)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{document}: {program} {shlex.join(words)}: {error}") from error
    fields = Config.__dataclass_fields__ | EvaluateConfig.__dataclass_fields__
    for option in re.findall(r"`(--[\w-]+)", README):
        ours = option[2:] in fields or option == "--config"
        assert ours or pytestconfig.getoption(option) is not None
