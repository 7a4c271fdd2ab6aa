"""Fixtures of the tests of the scripts. A test that asks for `script` runs once for each script, or
for those that it names, `@pytest.mark.only("hop_onestep")`: what scripts share is the same text
(copies.py), so that one of them is enough where the method cannot matter."""

import functools
import importlib
import os
import types

import pytest
import torch
from tqdm import tqdm

from copies import SCRIPTS
from run_tools import main, parsed, refused, run, shake, trust

os.environ["TQDM_DISABLE"] = "1"  # no progress bars in processes
one_script = pytest.mark.only("hop_onestep")
HUNT = "msh-3x3-3p-2h1s"
SMALL = {  # options of a small and short run
    **dict(num_envs=4, num_steps=16, total_timesteps=128, num_minibatches=2, match_episodes=2),
    **dict(hidden_size=16, goal_size=3, moa_capacity=2000),
}
OWN = {  # that only one script has
    "hop_onestep": {"plan_samples": 4},
    "hop_mcts": {"num_simulations": 4, "num_goal_samples": 2},
    "hop_ppo_gumbel": {"goals": 3},
    "latent_world_model": {"plan_samples": 4},
}
# constants in place of the script's own, where those make every small run take long
QUICK = {"latent_world_model": {"MODEL_UPDATES": 2, "MODEL_BATCH": 64}}
PLANNER = {"plan_update", "plan_beta", "plan_until"}  # options of every script with a planner


def pytest_configure(config):
    config.addinivalue_line("markers", "only(*names): the scripts that a test is run for")
    torch.set_num_threads(1)  # the games are small, threads cost more than they bring


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc):
    mark = metafunc.definition.get_closest_marker("only")
    if mark is not None and "script" in metafunc.fixturenames:
        metafunc.definition.add_marker(pytest.mark.parametrize("script", mark.args, indirect=True))


def load_script(name):
    """The script as a module, without progress bars."""
    module = importlib.import_module(name)
    module.tqdm = functools.partial(tqdm, disable=True)
    for constant, value in QUICK.get(name, {}).items():
        setattr(module, constant, value)
    return module


@pytest.fixture(scope="session", params=SCRIPTS)
def script(request):
    return load_script(request.param)


@pytest.fixture(scope="session")
def sibling(script):
    """Another script than `script`: the one before it."""
    return load_script(SCRIPTS[SCRIPTS.index(script.SCRIPT) - 1])


def plans(script):
    """Whether a script has a planner."""
    return hasattr(script.Args, "plan_update")


def small_args(script, **options):
    """Args of a small and short run with these options, less the planner's where there is none."""
    unknown = set() if plans(script) else PLANNER
    options = {name: value for name, value in options.items() if name not in unknown}
    return script.Args(**{**SMALL, **OWN[script.SCRIPT], **options})


@pytest.fixture(scope="session")
def small(script):
    """Makes the Args of a small and short run, with the options given."""
    return functools.partial(small_args, script)


@pytest.fixture(scope="session")
def done(script, small, tmp_path_factory):
    """The folder of a run with a planner, if there is one, that is on, and trusted, at its end."""
    folder = tmp_path_factory.mktemp("done")
    options = {"plan_update": "offset", "plan_until": 1.0, "update_epochs": 1}
    return run(script, small(env_id=HUNT, co_players="self,nh", **options), trust, folder).path


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """Every test is in a folder of its own."""
    monkeypatch.chdir(tmp_path)


def enlivened(agent):
    """The agent, of whose networks each says something."""
    if hasattr(agent, "plan_slope"):
        agent.plan_slope.fill_(0.7)
    return shake(agent)


@pytest.fixture
def lively(script, small):
    """Makes a game and an agent whose every network says something, with the options given."""

    def make(**options):
        args = small(**{"env_id": HUNT, **options})
        game = script.make_game(args, "cpu")
        return game, enlivened(script.Agent(game, script.checked(args, game)))

    return make


@pytest.fixture
def record(script, small, monkeypatch):
    """Plays a run with the options given, from weights that say something. Returns its steps, dicts
    by name of what was known before a step and what `train` stored of it, with the numbers of the
    episode and of the match of each game; and what `watch` saw of each iteration."""

    def play(**options):
        args = small(**{"env_id": HUNT, "horizon": 8, "num_envs": 6, **options})
        act = script.Player.act
        plain = script.Agent
        shown, steps, iterations = [], [], []

        def noting(player, state, mask, seats, co_players):
            seen = {"state": state, "memory": player.memory, "kind": co_players.kind}
            shown.append({**seen, "scripted": co_players.scripted()})
            return act(player, state, mask, seats, co_players)

        def watch(storage, agent, **names):
            episode = torch.zeros(args.num_envs, dtype=torch.int64)
            if steps:
                episode = steps[-1]["episode"] + steps[-1]["ended"]
            for t in range(args.num_steps):
                step = {**shown[len(steps)], **{name: x[t] for name, x in storage.items()}}
                ended = ~step["goes_on"].any(1)
                match = episode // args.match_episodes
                steps.append({**step, "ended": ended, "episode": episode, "match": match})
                episode = episode + ended
            weights = {name: x.clone() for name, x in agent.state_dict().items()}
            seen = {**names, "storage": storage, "agent": agent, "weights": weights}
            iterations.append(types.SimpleNamespace(**seen))

        with monkeypatch.context() as patch:
            patch.setattr(script.Player, "act", noting)
            patch.setattr(script, "Agent", lambda *given: enlivened(plain(*given)))
            script.train(args, watch)
        return steps, iterations

    return play


@pytest.fixture
def typed(script):
    """Makes the Args of a command line: of a text, of words, or of options by name."""
    return functools.partial(parsed, script)


@pytest.fixture
def command(script, monkeypatch, capsys):
    """Runs `main` with a command line, given like that: its status, and what it printed."""
    return functools.partial(main, script, monkeypatch, capsys)


@pytest.fixture
def refuse(script, monkeypatch, capsys):
    """What `main` says when it refuses a command line, given like that."""
    return functools.partial(refused, script, monkeypatch, capsys)
