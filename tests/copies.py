"""Code that scripts share is copied on purpose: what has the same name has the same text in all.

    python tests/copies.py                                       # what differs
    python tests/copies.py --repair hop_onestep                  # copy it where it differs
    python tests/copies.py --repair hop_onestep --into hop_mcts  # ... into one script

A definition is a statement at the top level of a script, or a member of a class, with its
decorators and the comment lines directly above it. Where it is what is new in a script, a comment
above it or in it says so, `# ours: <what differs>`, and it may differ. Above a class, or above its
docstring, that speaks of its head and docstring; its members are compared one by one. A class that
is marked, or has a member that is, may have other members. The docstring of a script and its
imports are not compared.

An experiment is a copy of one script, and is compared with that alone: what it changes says
`# changed: <what differs>`."""

import argparse
import ast
import re
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ["hop_onestep", "hop_mcts", "hop_ppo_gumbel", "latent_world_model"]
EXPERIMENTS = {  # of which script
    "transformer_goals": "hop_onestep",
    "limited_view": "hop_onestep",
    "diffusion_planner": "latent_world_model",
}
MARK = "# ours:"
CHANGED = "# changed:"  # in an experiment


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
    """Where a statement begins, from 0: with its decorators, and comment lines but no banner."""
    first = min(part.lineno for part in [node, *getattr(node, "decorator_list", [])]) - 1
    while first > 0 and re.match(r"\s*# (?!--)", lines[first - 1]):
        first -= 1
    return first


def path_of(name: str) -> Path:
    """The file of a script or experiment."""
    return ROOT / ("benchmarks/experiments" if name in EXPERIMENTS else ".") / f"{name}.py"


def definitions(source: str, mark: str = MARK) -> dict[str, Definition]:
    """The definitions of a script by name. A class is there as `Class`, its head and docstring, and
    its members as `Class.member`. Raises ValueError for a name that is there twice."""
    lines = source.splitlines()
    found = {}

    def add(name: str, start: int, end: int, members: tuple[str, ...] = ()) -> None:
        if name in found:
            raise ValueError(f"{name} is defined twice")
        text = "\n".join(lines[start:end])
        found[name] = Definition(text, start, end, mark in text, members)

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


def differences(sources: dict[str, str], mark: str = MARK) -> list[str]:
    """What breaks the rule in `sources`, text by script: unmarked differences, and idle marks."""
    found = {script: definitions(source, mark) for script, source in sources.items()}
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
            if part.ours and (without(mark, part), part.members) in alike:
                problems.append(f"{name} of {script} is marked as its own, and is not")
    return problems


def without(mark: str, definition: Definition) -> str:
    whole_lines = re.sub(rf"(?m)^ *{mark}.*\n", "", definition.text)
    return re.sub(rf"(?m) *{mark}.*$", "", whole_lines)


def repaired(source: str, target: str, mark: str = MARK) -> str:
    """`target` with the text of `source` in every definition of both that neither marks."""
    theirs = definitions(source, mark)
    lines = target.splitlines()
    for name, definition in reversed(definitions(target, mark).items()):
        if name in theirs and not definition.ours and not theirs[name].ours:
            lines[definition.start : definition.end] = theirs[name].text.splitlines()
    return "\n".join(lines) + "\n"


def all_differences() -> list[str]:
    """Of the scripts, and of each experiment and the script that it is a copy of."""
    sources = {name: path_of(name).read_text() for name in [*SCRIPTS, *EXPERIMENTS]}
    problems = differences({name: sources[name] for name in SCRIPTS})
    for name, base in EXPERIMENTS.items():
        problems += differences({base: sources[base], name: sources[name]}, CHANGED)
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    names = [*SCRIPTS, *EXPERIMENTS]
    parser.add_argument("--repair", choices=SCRIPTS, help="the script to copy from")
    parser.add_argument("--into", choices=names, nargs="*", help="what to copy into (default: all)")
    options = parser.parse_args()
    base = options.repair
    for name in options.into or names:
        if base not in (None, name) and EXPERIMENTS.get(name, base) == base:
            mark = CHANGED if name in EXPERIMENTS else MARK
            source, target = (path_of(one).read_text() for one in (base, name))
            path_of(name).write_text(repaired(source, target, mark))
    problems = all_differences()
    print(*problems, sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
