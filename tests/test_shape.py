"""Size and density of the scripts: what a reader has to take in.

Tokens are those of Python without comments, docstrings, newlines and indentation, so that folding
two statements into one line saves none. A line of code is one with a token."""

import ast
import difflib
import io
import tokenize

import pytest

from copies import ROOT, SCRIPTS

BUDGETS = {  # lines, which may only be lowered, and tokens, at most
    "hop_onestep": (1_739, 15_500),
    "hop_mcts": (1_913, 17_500),
    "hop_ppo_gumbel": (1_700, 16_500),
    "latent_world_model": (1_943, 17_690),  # 17,500 is the aim
}
CHANGED = {  # lines that `diff` removes or adds to the first script, and hunks, at most
    "hop_mcts": (350, 30),
    "hop_ppo_gumbel": (380, 35),
    "latent_world_model": (400, 35),
}
LIMITS = {"tokens a line": 12.5, "wide lines": 25, "options": 55}  # of every script
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE}
LAYOUT |= {tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def shape_of(text: str) -> dict[str, float]:
    """Lines, tokens, tokens a line of code, lines above 100 characters, and options (of `Args`)."""
    tree = ast.parse(text)
    documented = set()
    for one in ast.walk(tree):
        if isinstance(one, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(one):
            documented |= set(range(one.body[0].lineno, one.body[0].end_lineno + 1))
    count = 0
    code = set()  # numbers of lines
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in LAYOUT and token.start[0] not in documented:
            count += 1
            code |= set(range(token.start[0], token.end[0] + 1))
    args = [node.body for node in tree.body if getattr(node, "name", "") == "Args"]
    lines = text.splitlines()
    return {
        "lines": len(lines),
        "tokens": count,
        "tokens a line": count / max(1, len(code)),
        "wide lines": sum(len(line) > 100 for line in lines),
        "options": sum(isinstance(field, ast.AnnAssign) for field in sum(args, [])),
    }


def changed(base: str, other: str) -> tuple[int, int]:
    """Lines removed and added between two texts, and in how many hunks."""
    lines = [text.splitlines() for text in (base, other)]
    codes = difflib.SequenceMatcher(None, *lines, autojunk=False).get_opcodes()
    hunks = [places for kind, *places in codes if kind != "equal"]
    return sum(end - start + last - first for start, end, first, last in hunks), len(hunks)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_within_its_budget(name):
    shape = shape_of((ROOT / f"{name}.py").read_text())
    lines, tokens = BUDGETS[name]
    budget = {"lines": lines, "tokens": tokens, **LIMITS}
    assert shape["options"] > 40 and shape["lines"] > 1000  # a whole script
    assert {measure: x for measure, x in shape.items() if x > budget[measure]} == {}


@pytest.mark.parametrize("name", CHANGED)
def test_a_script_differs_from_the_first_by_its_method(name):
    count, hunks = changed(*((ROOT / f"{one}.py").read_text() for one in (SCRIPTS[0], name)))
    most, most_hunks = CHANGED[name]
    assert 0 < count <= most and 0 < hunks <= most_hunks
