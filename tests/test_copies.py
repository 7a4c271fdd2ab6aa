"""What scripts share is the same text in all of them (copies.py), and each stands alone."""

import ast
import sys

import pytest

import copies
from copies import CHANGED, MARK, ROOT, SCRIPTS, definitions, differences, repaired

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


class Size(Base):
    rows: int


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
CHANGES = {  # new text, and the definition that has it
    "COUNT += 1": ("COUNT += 2", "COUNT+"),
    "# how many": ("# the number", "COUNT"),
    "2 * x": ("3 * x", "double"),
    "@cache\n": ("", "double"),
    "rows: int": ("rows: float", "Size.rows"),
    "Plays.": ("Acts.", "Player"),
    "# group": ("# kind", "Player.name"),
    "@property": ("@cached_property", "Player.act"),
    "    main()": ("    run()", "if __name__ == '__main__':"),
}


def changed(*pairs: tuple[str, str]) -> str:
    text = PLAIN
    for old, new in pairs:
        assert text.count(old) == 1
        text = text.replace(old, new)
    return text


def test_shared_definitions_are_the_same_text():
    found = {path.stem for path in (ROOT / "benchmarks" / "experiments").glob("*.py")}
    assert set(copies.EXPERIMENTS) == found
    assert copies.all_differences() == []


@pytest.mark.parametrize("name", copies.EXPERIMENTS)
def test_an_experiment_changes_little_and_marks_what_is_new(name):
    paths = [copies.path_of(one) for one in (copies.EXPERIMENTS[name], name)]
    base, copy = (path.read_text() for path in paths)
    known, found = (definitions(source, CHANGED) for source in (base, copy))
    assert [part for part in found if part not in known and not found[part].ours] == []
    lines, theirs = (source.splitlines() for source in (base, copy))
    assert 0 < len(set(theirs) - set(lines)) < 0.25 * len(lines)


def test_an_experiment_has_marks_of_its_own():
    """Those of the script that it is a copy of do not excuse it."""
    base = changed(("return 2 * x", f"return 2 * x  {MARK} doubles"))
    copy = base.replace("2 * x", "3 * x")
    assert differences({"a": base, "b": copy}, CHANGED) == ["double differs: a, b"]
    marked = copy.replace("@cache", f"{CHANGED} triples\n@cache")
    assert differences({"a": base, "b": marked}, CHANGED) == []
    assert repaired(base, copy, CHANGED) == base
    assert repaired(base, marked, CHANGED) == marked


@pytest.mark.parametrize("old", CHANGES)
def test_a_change_is_found_and_repaired(old):
    new, name = CHANGES[old]
    other = changed((old, new))
    assert differences({"a": PLAIN, "b": other, "c": PLAIN}) == [f"{name} differs: a, b, c"]
    assert repaired(PLAIN, other) == PLAIN


def test_what_is_marked_may_differ_and_is_not_repaired():
    """Above a definition, in it, or behind a line; a class apart from its members."""
    own = changed(
        ("@cache", f"{MARK} triples\n@cache"),
        ("2 * x", "3 * x"),
        ("return 1", f"return 2  {MARK} acts twice"),
        ("class Player(Base)", f"{MARK} no base\nclass Player"),
    )
    assert differences({"a": PLAIN, "b": own}) == []
    assert repaired(PLAIN, own) == own
    assert repaired(own, PLAIN) == PLAIN
    own = own.replace(f"  {MARK} acts twice", "")
    assert differences({"a": PLAIN, "b": own}) == ["Player.act differs: a, b"]
    idle = changed(("    return 2 * x", f"    return 2 * x  {MARK} nothing"))
    assert differences({"a": PLAIN, "b": idle}) == ["double of b is marked as its own, and is not"]
    more = changed(("return 1\n", "return 1\n\n    def rest(self):\n        return 0\n"))
    assert differences({"a": PLAIN, "b": more}) == ["Player has other members: a, b"]
    more = more.replace("return 0", f"return 0  {MARK} rests")
    assert differences({"a": PLAIN, "b": more}) == []


def test_command_line(tmp_path, monkeypatch, capsys):
    """It tells what differs, with status 1, and repairs the file."""
    monkeypatch.setattr(copies, "ROOT", tmp_path)
    monkeypatch.setattr(copies, "SCRIPTS", ["a", "b"])
    monkeypatch.setattr(copies, "EXPERIMENTS", {})
    (tmp_path / "a.py").write_text(PLAIN)
    (tmp_path / "b.py").write_text(changed(("2 * x", "3 * x")))
    monkeypatch.setattr(sys, "argv", ["copies.py"])
    assert copies.main() == 1
    assert capsys.readouterr().out.strip() == "double differs: a, b"
    monkeypatch.setattr(sys, "argv", "copies.py --repair a --into b".split())
    assert copies.main() == 0
    assert (tmp_path / "b.py").read_text() == (tmp_path / "a.py").read_text() == PLAIN


@pytest.mark.parametrize("name", [*SCRIPTS, *copies.EXPERIMENTS])
def test_a_script_stands_alone(name):
    """It imports no module of the repository, and its main is one line."""
    source = copies.path_of(name).read_text()
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.partition(".")[0])
    modules = set()
    for pattern in ("*.py", "benchmarks/**/*.py", "tests/**/*.py"):
        modules |= {path.stem for path in ROOT.glob(pattern)}
    assert "torch" in imported and set(SCRIPTS) <= modules
    assert not imported & modules
    assert source.endswith('\n\nif __name__ == "__main__":\n    main()\n')
