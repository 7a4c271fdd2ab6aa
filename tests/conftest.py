"""Fixtures of the tests of the scripts. A test that asks for `script` runs once for each script."""

import functools
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["hop_onestep", "hop_mcts", "hop_ppo_gumbel", "latent_world_model"]
SCRIPTS = ["hop_onestep"]  # of the present shape; a sibling that is rebuilt is added here

SMALL = {  # options of a small and short run
    "num_envs": 4,
    "num_steps": 16,
    "total_timesteps": 128,
    "num_minibatches": 2,
    "hidden_size": 16,
    "goal_size": 3,
    "moa_capacity": 2000,
    "match_episodes": 2,
    "plan_samples": 4,
}


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than a few seconds")
    torch.set_num_threads(1)  # the games are small, threads cost more than they bring


@functools.cache
def load_script(name):
    """The script as a module, imported once by its path."""
    specification = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="session", params=SCRIPTS)
def script(request):
    return load_script(request.param)


@pytest.fixture(scope="session")
def small(script):
    """Makes the Args of a small and short run, with the options given."""

    def make(**options):
        return script.Args(**{**SMALL, **options})

    return make
