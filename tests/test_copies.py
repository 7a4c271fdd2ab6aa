"""What scripts share is the same text in all of them (copies.py), and each stands alone."""

import ast
import subprocess
import sys

import pytest

import copies
from conftest import ROOT, SCRIPTS
from copies import MARK, definitions, differences, repaired

SOURCES = {name: (ROOT / f"{name}.py").read_text() for name in SCRIPTS}
PLAIN = '''"""One."""

import os

# how many
COUNT = 1
COUNT += 1


# ----------
# Functions
# ----------
@cache
def double(x):
    return 2 * x


class Player(Base):
    """Plays."""

    # group
    name: str = "a"  # its name

    @property
    def act(self):
        return 1


if __name__ == "__main__":
    main()
'''


def changed(*pairs: tuple[str, str]) -> str:
    text = PLAIN
    for old, new in pairs:
        assert text.count(old) == 1
        text = text.replace(old, new)
    return text


def test_all_scripts_of_the_shape_are_compared():
    assert copies.SCRIPTS == SCRIPTS


def test_shared_definitions_are_the_same_text():
    assert differences(SOURCES) == []


def test_definitions_are_found():
    found = definitions(PLAIN)
    names = ["COUNT", "COUNT+", "double", "Player", "Player.name", "Player.act"]
    assert list(found) == [*names, "if __name__ == '__main__':"]
    assert found["COUNT"].text == "# how many\nCOUNT = 1"
    assert found["double"].text == "@cache\ndef double(x):\n    return 2 * x"
    assert found["Player"].text == 'class Player(Base):\n    """Plays."""'
    assert found["Player"].members == ("name", "act")
    assert found["Player.name"].text == '    # group\n    name: str = "a"  # its name'
    assert found["Player.act"].text.startswith("    @property\n")


@pytest.mark.parametrize("name", SCRIPTS)
def test_definitions_of_a_script_are_found(name):
    """Every line of code but imports and the docstring is in one of them."""
    lines = SOURCES[name].splitlines()
    covered = set()
    for definition in definitions(SOURCES[name]).values():
        covered |= set(range(definition.start, definition.end))
    for node in ast.parse(SOURCES[name]).body:
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Expr):
            covered |= set(range(node.lineno - 1, node.end_lineno))
    left = [line for k, line in enumerate(lines) if k not in covered and line.strip()]
    assert all(line.startswith("#") for line in left), left


CHANGES = {
    "COUNT = 1": ("COUNT = 2", "COUNT"),
    "COUNT += 1": ("COUNT += 2", "COUNT+"),
    "# how many": ("# the number", "COUNT"),
    "2 * x": ("3 * x", "double"),
    "@cache\n": ("", "double"),
    "(Base)": ("", "Player"),
    "Plays.": ("Acts.", "Player"),
    "# group": ("# kind", "Player.name"),
    "# its name": ("# name", "Player.name"),
    "@property": ("@cached_property", "Player.act"),
    "return 1": ("return 2", "Player.act"),
    "    main()": ("    run()", "if __name__ == '__main__':"),
}


@pytest.mark.parametrize("old", CHANGES)
def test_a_change_is_found_and_repaired(old):
    new, name = CHANGES[old]
    other = changed((old, new))
    assert differences({"a": PLAIN, "b": other, "c": PLAIN}) == [f"{name} differs: a, b, c"]
    assert repaired(PLAIN, other) == PLAIN


def test_what_is_marked_may_differ_and_is_not_repaired():
    own = changed(
        ("@cache", f"{MARK} triples\n@cache"),
        ("2 * x", "3 * x"),
        ("    @property", f"    {MARK} acts twice\n    @property"),
        ("return 1", "return 2"),
        ("class Player(Base)", f"{MARK} no base\nclass Player"),
    )
    assert differences({"a": PLAIN, "b": own}) == []
    assert repaired(PLAIN, own) == own
    assert repaired(own, PLAIN) == PLAIN
    other = own.replace("3 * x", "4 * x")
    assert differences({"a": own, "b": other}) == []


def test_a_mark_inside_a_definition_marks_it():
    inside = changed(("    return 2 * x", f"    {MARK} triples\n    return 3 * x"))
    assert differences({"a": PLAIN, "b": inside}) == []
    behind = changed(("    return 2 * x", f"    return 3 * x  {MARK} triples"))
    assert differences({"a": PLAIN, "b": behind}) == []
    idle = changed(("    return 2 * x", f"    return 2 * x  {MARK} nothing"))
    assert differences({"a": PLAIN, "b": idle}) == ["double of b is marked as its own, and is not"]


def test_marks_of_a_class_and_of_its_members_are_apart():
    own = changed(("class Player(Base)", f"{MARK} no base\nclass Player"), ("return 1", "return 2"))
    assert differences({"a": PLAIN, "b": own}) == ["Player.act differs: a, b"]


def test_a_class_with_other_members_is_marked():
    more = changed(("return 1\n", "return 1\n\n    def rest(self):\n        return 0\n"))
    assert differences({"a": PLAIN, "b": more}) == ["Player has other members: a, b"]
    marked = more.replace("class Player", f"{MARK} rests\nclass Player")
    assert differences({"a": PLAIN, "b": marked}) == []
    member = more.replace("return 0", f"return 0  {MARK} rests")
    assert differences({"a": PLAIN, "b": member}) == []


@pytest.mark.parametrize("line", ["COUNT = 1", "@cache", "class Player", '    name: str = "a"'])
def test_a_mark_on_the_shared_text_is_found(line):
    marked = changed((line, f"{MARK} nothing\n{line}"))
    (problem,) = differences({"a": PLAIN, "b": marked})
    assert problem.endswith("of b is marked as its own, and is not")


def test_new_and_missing_definitions_are_no_difference():
    other = changed(("double", "triple"), ("@cache\n", ""))
    assert differences({"a": PLAIN, "b": other}) == []
    assert repaired(PLAIN, other) == other


def test_a_name_that_is_defined_twice_is_refused():
    with pytest.raises(ValueError, match="double is defined twice"):
        definitions(PLAIN + "\n\ndef double(x):\n    return x\n")


def test_command_line(tmp_path):
    """It tells what differs, with status 1, and repairs the file."""
    program = (ROOT / "tests" / "copies.py").read_text()
    (tmp_path / "tests").mkdir()
    names = f"SCRIPTS = {SCRIPTS}".replace("'", '"')
    assert names in program
    program = program.replace(names, 'SCRIPTS = ["a", "b"]')
    (tmp_path / "tests" / "copies.py").write_text(program)
    (tmp_path / "a.py").write_text(PLAIN)
    (tmp_path / "b.py").write_text(changed(("2 * x", "3 * x")))

    def run(*words: str) -> tuple[int, str]:
        command = [sys.executable, tmp_path / "tests" / "copies.py", *words]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.returncode, done.stdout.strip()

    assert run() == (1, "double differs: a, b")
    assert run("--repair", "a", "--into", "b") == (0, "")
    assert (tmp_path / "b.py").read_text() == (tmp_path / "a.py").read_text() == PLAIN


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_stands_alone(name):
    """It imports no module of the repository, and its main is one line."""
    imported = set()
    for node in ast.walk(ast.parse(SOURCES[name])):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.partition(".")[0])
    modules = set()
    for pattern in ("*.py", "benchmarks/*.py", "tests/**/*.py"):
        modules |= {path.stem for path in ROOT.glob(pattern)}
    assert "torch" in imported and set(SCRIPTS) <= modules
    assert not imported & modules
    assert SOURCES[name].endswith('\n\nif __name__ == "__main__":\n    main()\n')
