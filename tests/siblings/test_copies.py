"""Shared code is the same text in all scripts, and siblings can be compared line by line."""

import ast
import re

import pytest

from siblings.conftest import ROOT, SCRIPTS
from siblings.copies import BASE, MARK, definitions, differences, lines_kept, repaired

PROJECT = [*ROOT.glob("*.py"), *ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/*.py")]
SOURCES = {name: (ROOT / f"{name}.py").read_text() for name in SCRIPTS}
OLD = '''"""One."""
import os

# how many
COUNT = 1


@cache
def double(x):
    return 2 * x


class Player:
    """Plays."""

    # group
    name: str = "a"  # its name

    def act(self):
        return 1
'''


def test_shared_definitions_are_the_same_text():
    assert differences(SOURCES) == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_stand_alone(name):
    """A script imports no sibling and no module of the repository, and its main is one line."""
    imported = set()
    for node in ast.walk(ast.parse(SOURCES[name])):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module)
    assert not {module.partition(".")[0] for module in imported} & {path.stem for path in PROJECT}
    assert SOURCES[name].endswith('\n\nif __name__ == "__main__":\n    main()\n')


def test_sections_are_the_same_everywhere():
    banner = re.compile(r"# -{100,}\n# (.+)\n# -{100,}\n")
    sections = {name: banner.findall(source) for name, source in SOURCES.items()}
    assert len(sections[BASE]) > 8
    for name in SCRIPTS:
        assert sections[name] == sections[BASE]


def test_definitions_are_found():
    found = definitions(OLD)
    names = ["COUNT", "double", "Player", "Player.name", "Player.act"]
    assert list(found) == names
    assert found["COUNT"].text == "# how many\nCOUNT = 1"
    assert found["double"].text.startswith("@cache\n")
    assert found["Player"].text == 'class Player:\n    """Plays."""'
    assert found["Player.name"].text == '    # group\n    name: str = "a"  # its name'
    assert len(definitions(SOURCES[BASE])) > 200


CHANGES = [("COUNT = 1", "COUNT = 2", "COUNT"), ("2 * x", "3 * x", "double"), ("@cache\n", "", "double")]
CHANGES += [("# its name", "# name", "Player.name"), ("return 1", "return 2", "Player.act")]
CHANGES += [("Player:", "Player(Base):", "Player"), ("Plays.", "Acts.", "Player"), ("# group", "# g", "Player.name")]


@pytest.mark.parametrize(("old", "new", "name"), CHANGES)
def test_a_change_is_found_and_repaired(old, new, name):
    changed = OLD.replace(old, new)
    assert differences({"a": OLD, "b": changed, "c": OLD}) == [f"{name} differs: a, b, c"]
    assert repaired(OLD, changed) == OLD


def test_what_a_script_calls_its_own_may_differ_and_stays():
    own = OLD.replace(
        "    def act(self):\n        return 1", f"    {MARK} acts twice\n    def act(self):\n        return 2"
    )
    own = own.replace("@cache", f"{MARK} triples\n@cache").replace("2 * x", "3 * x")
    own = own.replace("class Player", f"{MARK} acts\nclass Player")
    assert differences({"a": OLD, "b": own}) == []
    assert repaired(OLD, own) == own
    assert repaired(own, OLD) == OLD
    other = own.replace("return 2", "return 3")
    assert differences({"a": own, "b": other}) == []


def test_a_class_with_members_of_its_own_is_marked():
    marked = OLD.replace(
        "    def act(self):\n        return 1", f"    {MARK} acts twice\n    def act(self):\n        return 2"
    )
    more = OLD + "\n    def rest(self):\n        return 0\n"
    for own in (marked, more):
        assert differences({"a": OLD, "b": own}) == ["Player of b has members of its own, and no mark"]
        assert differences({"a": OLD, "b": own.replace("class Player", f"{MARK} its own\nclass Player")}) == []
    idle = OLD.replace("class Player", f"{MARK} nothing\nclass Player")
    assert differences({"a": OLD, "b": idle}) == ["Player of b is marked as its own, and is not"]


def test_a_mark_on_the_shared_text_is_found():
    own = OLD.replace("@cache", f"{MARK} nothing\n@cache")
    assert differences({"a": OLD, "b": own}) == ["double of b is marked as its own, and is not"]


def test_new_and_missing_definitions_are_no_difference():
    assert differences({"a": OLD, "b": OLD.replace("double", "triple")}) == []
    assert repaired(OLD, "\n".join(OLD.splitlines()[:-3]) + "\n") == "\n".join(OLD.splitlines()[:-3]) + "\n"


def test_lines_kept():
    assert lines_kept("a\nb\n\nc\nd\n", "a\nb\nx\nd\n") == 0.75
    assert lines_kept("a\nb\n", "a\ny\nz\nb\n") == 1.0
