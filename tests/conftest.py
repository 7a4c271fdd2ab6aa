"""Fixtures of the tests of the scripts. A test that asks for `script` runs once for each script, or
for those that it names, `@pytest.mark.only("hop_onestep")`: what scripts share is the same text
(copies.py), so that one of them is enough where the method cannot matter."""

import functools
import importlib
import os
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

os.environ["TQDM_DISABLE"] = "1"  # no progress bars in processes
ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ["hop_onestep", "hop_mcts", "hop_ppo_gumbel", "latent_world_model"]

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
    config.addinivalue_line("markers", "slow: takes more than a few seconds")
    torch.set_num_threads(1)  # the games are small, threads cost more than they bring


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc):
    mark = metafunc.definition.get_closest_marker("only")
    if mark is not None and "script" in metafunc.fixturenames:
        names = pytest.mark.parametrize("script", mark.args, indirect=True)
        metafunc.definition.add_marker(names)


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
