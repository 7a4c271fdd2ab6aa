"""What README.md and the pages of the scripts tell to type, and where they link to, is there."""

import dataclasses
import inspect
import re

import pytest
import torch

from conftest import SCRIPTS, load_script
from copies import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "benchmarks").glob("*.md"))]
TEXT = PAGES[0].read_text()


def test_it_is_short():
    assert len(TEXT.splitlines()) <= 170
    assert len(TEXT.encode()) <= 10_240


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere_and_commands_have_options_that_exist(page):
    text = page.read_text()
    for link in re.findall(r"\]\((?!http|#)([^)#]+)", text):
        assert (page.parent / link).exists(), link
    for name, words in re.findall(rf"python ({'|'.join(SCRIPTS)})\.py ([^#`|\n]*)", text):
        known = {f.name.replace("_", "-") for f in dataclasses.fields(load_script(name).Args)}
        for option in re.findall(r"--([a-z-]+)", words):
            assert option.removeprefix("no-") in known, (name, option)


def test_the_difference_shown_is_one_of_the_scripts():
    (shown,) = re.findall("```diff\n(.*?)```", TEXT, re.DOTALL)
    sides = {"<": ROOT / "hop_onestep.py", ">": ROOT / "hop_mcts.py"}
    for line in shown.splitlines():
        if line[0] in sides:
            assert line[2:] in sides[line[0]].read_text().splitlines()


def test_the_pseudo_code_is_that_of_the_script():
    (shown,) = re.findall("```text\n(.*?)```", TEXT, re.DOTALL)
    lines = [line.split("#")[0].strip() for line in shown.splitlines()]
    assert [line for line in lines if line not in load_script("hop_onestep").__doc__] == []


def test_examples_run():
    """Where they are put, the co-player, reward, goal model and planner do what is said."""
    examples = re.findall("```python\n(.*?)```", TEXT, re.DOTALL)
    script = load_script("hop_onestep")
    names = {}
    for example in examples:
        if "class Patient" in example:
            exec(example, names)
    game = script.GridGame("msh-3x3-3p-2h1s")
    generator = torch.Generator().manual_seed(1)
    players = script.CoPlayers(game, [names["Patient"]], 5, 2, generator)
    agent = script.Agent(game, script.Args(plan_update="none", gamma=0.9))
    players.agents[0] = player = script.Player(agent, 5)
    state = game.start(5, generator)
    assert (players.act(state, game.action_mask(state))[players.kind > 0] == script.STAY).all()
    seen = player.infer(state, players)
    chosen = (torch.tensor([0, 3]), torch.tensor([1, 2]))
    (last,) = [text for text in examples if "amin" in text]
    mean = inspect.getsource(script.scores).splitlines()[-1].strip()
    names = dict(vars(script))
    exec(inspect.getsource(script.scores).replace(mean, last), names)
    each = []
    for scores in (script.scores, names["scores"]):
        each.append(scores(agent, state, seen, chosen, generator.manual_seed(2)))
    assert each[1].shape == (2, game.num_actions)
    assert (each[1] < each[0]).any() and (each[1] < each[0] + 1e-6).all()
    assert each[1].std(1).min() > 1e-4
    (reward,) = [text for text in examples if "takers" in text]
    names = {"self": game, "state": state, "wins": torch.zeros(5, 3, 3)}
    names |= {"taken": torch.ones(5, 1, 3), "takers": torch.ones(5, 1, 3)}
    exec(reward, names)
    assert torch.equal(names["reward"], -0.01 * game.alive(state))
    assert reward.splitlines()[0].split("  #")[0] in (ROOT / "hop_onestep.py").read_text()
    (memory,) = [text for text in examples if "memory" in text]
    names = {"tensor": torch.tensor, "memory": torch.ones(5, 3, 2, 4)}
    exec(memory, names)
    assert names["memory"].sum((0, 1, 3)).tolist() == [0.0, 60.0]
