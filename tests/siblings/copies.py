"""Code that the siblings share is copied on purpose: what has the same name has the same text in all of them.

    python tests/siblings/copies.py                                                    # what differs, lines kept
    python tests/siblings/copies.py --repair latent_world_model                        # copy what differs elsewhere
    python tests/siblings/copies.py --repair latent_world_model --into hop_ppo_gumbel  # ... into one of them

A definition is a statement at the top level of a script, or in the body of a class, a method or a field. Where it is a
script's own method, a comment line above it says so, `# method: <what differs>`; then it may differ. A class with such
members, or with other members than elsewhere, says so as well. The text of a definition includes its decorators, and
the comment lines directly above it.
"""

import argparse
import ast
import difflib
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["latent_world_model", "hop_ppo_gumbel"]
BASE = NAMES[0]  # its lines are what siblings keep
MARK = "# method:"


class Definition(NamedTuple):
    text: str  # without its mark
    mark: str  # the line of the mark, or nothing
    start: int  # first line of the text, from 0, with the mark if there is one
    end: int  # line after the text


def names_of(node: ast.stmt) -> list[str]:
    """The names that a statement defines."""
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return [leaf.id for target in targets for leaf in ast.walk(target) if isinstance(leaf, ast.Name)]
    return [node.name] if hasattr(node, "name") else [ast.unparse(node).splitlines()[0]]


def definitions(source: str) -> dict[str, Definition]:
    """The definitions of a script by name; those of classes as `Class.member`, `Class` itself being head and docstring.
    The script's docstring and its imports are left out: they say what it is, and what it needs."""
    lines, found = source.splitlines(), {}

    def add(name: str, first: int, end: int) -> None:
        while lines[first - 1].lstrip().startswith("# ") and not lines[first - 1].lstrip().startswith("# ---"):
            first -= 1
        above = next((k for k in range(first, end) if lines[k].lstrip().startswith(MARK)), None)
        text = [line for k, line in enumerate(lines[first:end], first) if k != above]
        assert name not in found, f"{name} is defined twice"
        found[name] = Definition("\n".join(text), lines[above] if above is not None else "", first, end)

    def walk(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
            end = node.end_lineno
            if isinstance(node, ast.ClassDef):
                described = ast.get_docstring(node) is not None
                add(prefix + node.name, first, node.body[0].end_lineno if described else node.lineno)
                walk(node.body[described:], f"{prefix}{node.name}.")
            else:
                add(prefix + ",".join(names_of(node)), first, end)

    tree = ast.parse(source)
    walk([n for n in tree.body[1:] if not isinstance(n, ast.Import | ast.ImportFrom)], "")
    return found


def differences(sources: dict[str, str]) -> list[str]:
    """What breaks the rule in `sources` (text by script name), a line each: definitions without a mark that differ, and
    marks on a text that does not."""
    found, problems = {script: definitions(source) for script, source in sources.items()}, []
    for name in dict.fromkeys(name for definitions_of in found.values() for name in definitions_of):
        having = {script: d[name] for script, d in found.items() if name in d}
        plain = {script: d.text for script, d in having.items() if not d.mark}
        if len(set(plain.values())) > 1:
            problems.append(f"{name} differs: {', '.join(plain)}")
        inside = {s: {k: bool(d.mark) for k, d in found[s].items() if k.startswith(f"{name}.")} for s in having}
        alike = [list(inside[script]) for script in plain]  # the members of a class that has no mark
        for script, definition in having.items():
            own = any(inside[script].values()) or list(inside[script]) not in alike
            if definition.mark and definition.text in plain.values() and not own:
                problems.append(f"{name} of {script} is marked as its own, and is not")
            if not definition.mark and (any(inside[script].values()) or alike[0] != list(inside[script])):
                problems.append(f"{name} of {script} has members of its own, and no mark")
    return problems


def repaired(source: str, target: str) -> str:
    """`target` with the text of `source` in every definition of both that neither marks as its own."""
    theirs, lines = definitions(source), target.splitlines()
    for name, definition in sorted(definitions(target).items(), key=lambda item: -item[1].start):
        if name in theirs and not definition.mark and not theirs[name].mark:
            lines[definition.start : definition.end] = theirs[name].text.splitlines()
    return "\n".join(lines) + "\n"


def lines_kept(base: str, sibling: str) -> float:
    """Share of the lines of `base` that recur in `sibling`, in order; empty lines left out."""
    a, b = ([line for line in text.splitlines() if line.strip()] for text in (base, sibling))
    return sum(block.size for block in difflib.SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks()) / len(
        a
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = [name for name in NAMES if (ROOT / f"{name}.py").is_file()]
    parser.add_argument("--repair", choices=here, help="the script to copy from")
    parser.add_argument("--into", choices=here, nargs="*", help="the scripts to copy into (default: all others)")
    options = parser.parse_args()
    sources = {name: (ROOT / f"{name}.py").read_text() for name in here}
    for name in (options.into or here) if options.repair else []:
        if name != options.repair:
            sources[name] = repaired(sources[options.repair], sources[name])
            (ROOT / f"{name}.py").write_text(sources[name])
    problems = differences(sources)
    print("\n".join(problems))
    for name in here:
        kept = lines_kept(sources[BASE], sources[name])
        print(f"{name}.py: {len(sources[name].splitlines())} lines, keeps {kept:.0%} of {BASE}.py")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
