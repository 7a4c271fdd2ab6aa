"""Code that scripts share is copied on purpose: what has the same name has the same text in all.

    python tests/copies.py                                       # what differs
    python tests/copies.py --repair hop_onestep                  # copy it where it differs
    python tests/copies.py --repair hop_onestep --into hop_mcts  # ... into one script

A definition is a statement at the top level of a script, or a member of a class, with its
decorators and the comment lines directly above it. Where it is what is new in a script, a comment
above it or in it says so, `# ours: <what differs>`, and it may differ. Above a class, or above its
docstring, that speaks of its head and docstring; its members are compared one by one. A class that
is marked, or has a member that is, may have other members. The docstring of a script and its
imports are not compared."""

import argparse
import ast
import re
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ["hop_onestep", "hop_mcts", "hop_ppo_gumbel", "latent_world_model"]
MARK = "# ours:"


class Definition(NamedTuple):
    text: str  # with the comment lines above it
    start: int  # its first line, from 0
    end: int  # the line after it
    ours: bool  # it may differ
    members: tuple[str, ...]  # of a class


def name_of(node: ast.stmt) -> str:
    """What a statement defines; of one that defines nothing, its first line."""
    if isinstance(node, ast.Assign):
        return ", ".join(ast.unparse(target) for target in node.targets)
    if isinstance(node, ast.AnnAssign | ast.AugAssign):
        return ast.unparse(node.target) + "+" * isinstance(node, ast.AugAssign)
    return getattr(node, "name", None) or ast.unparse(node).splitlines()[0]


def first_line(node: ast.stmt, lines: list[str]) -> int:
    """Where the text of a statement begins, from 0: with its decorators, and the comment lines
    above. A banner is none of them."""
    decorators = getattr(node, "decorator_list", [])
    first = min(part.lineno for part in [node, *decorators]) - 1
    while first > 0 and re.match(r"\s*# (?!--)", lines[first - 1]):
        first -= 1
    return first


def definitions(source: str) -> dict[str, Definition]:
    """The definitions of a script by name. A class is there as `Class`, its head and docstring, and
    its members as `Class.member`. Raises ValueError for a name that is there twice."""
    lines = source.splitlines()
    found = {}

    def add(name: str, start: int, end: int, members: tuple[str, ...] = ()) -> None:
        if name in found:
            raise ValueError(f"{name} is defined twice")
        text = "\n".join(lines[start:end])
        found[name] = Definition(text, start, end, MARK in text, members)

    for node in ast.parse(source).body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if docstring or isinstance(node, ast.Import | ast.ImportFrom):
            continue
        start = first_line(node, lines)
        if not isinstance(node, ast.ClassDef):
            add(name_of(node), start, node.end_lineno)
            continue
        body = node.body
        head = first_line(body[0], lines)
        if ast.get_docstring(node) is not None:
            head = body[0].end_lineno
            body = body[1:]
        members = tuple(name_of(member) for member in body)
        add(node.name, start, head, members)
        for member in body:
            add(f"{node.name}.{name_of(member)}", first_line(member, lines), member.end_lineno)
    return found


def differences(sources: dict[str, str]) -> list[str]:
    """What breaks the rule in `sources`, text by script, a line each: texts that differ without a
    mark, and marks that mark nothing."""
    found = {script: definitions(source) for script, source in sources.items()}
    problems = []
    for name in dict.fromkeys(name for parts in found.values() for name in parts):
        having = {script: parts[name] for script, parts in found.items() if name in parts}
        shared = {script: part for script, part in having.items() if not part.ours}
        if len({part.text for part in shared.values()}) > 1:
            problems.append(f"{name} differs: {', '.join(shared)}")
        members = {
            part.members
            for script, part in shared.items()
            if not any(found[script][f"{name}.{member}"].ours for member in part.members)
        }
        if len(members) > 1:
            problems.append(f"{name} has other members: {', '.join(shared)}")
        for script, part in having.items():
            alike = [(other.text, other.members) for other in shared.values()]
            if part.ours and (without_mark(part), part.members) in alike:
                problems.append(f"{name} of {script} is marked as its own, and is not")
    return problems


def without_mark(definition: Definition) -> str:
    whole_lines = re.sub(rf"(?m)^ *{MARK}.*\n", "", definition.text)
    return re.sub(rf"(?m) *{MARK}.*$", "", whole_lines)


def repaired(source: str, target: str) -> str:
    """`target` with the text of `source` in every definition of both that neither marks."""
    theirs = definitions(source)
    lines = target.splitlines()
    for name, definition in reversed(definitions(target).items()):
        if name in theirs and not definition.ours and not theirs[name].ours:
            lines[definition.start : definition.end] = theirs[name].text.splitlines()
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repair", choices=SCRIPTS, help="the script to copy from")
    parser.add_argument(
        "--into", choices=SCRIPTS, nargs="*", help="the scripts to copy into (default: all others)"
    )
    options = parser.parse_args()
    sources = {name: (ROOT / f"{name}.py").read_text() for name in SCRIPTS}
    if options.repair:
        for name in options.into or SCRIPTS:
            if name != options.repair:
                sources[name] = repaired(sources[options.repair], sources[name])
                (ROOT / f"{name}.py").write_text(sources[name])
    problems = differences(sources)
    print(*problems, sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
