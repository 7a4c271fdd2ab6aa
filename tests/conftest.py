"""Fixtures of all tests. Every test that asks for `script` runs once for each script of the repository."""

import functools
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["hop_mcts", "hop_onestep", "hop_ppo_gumbel", "latent_world_model"]
SCRIPTS = [name for name in NAMES if (ROOT / f"{name}.py").is_file()]


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than a few seconds (deselect with -m 'not slow')")
    if not SCRIPTS:  # an empty parameter list would skip everything and look green
        raise pytest.UsageError(f"none of {', '.join(NAMES)} is in {ROOT}")
    torch.set_num_threads(1)  # the games are small, threads cost more than they bring


@functools.cache
def load_script(name):
    """The script as a module, imported once by its path."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session", params=SCRIPTS)
def script(request):
    return load_script(request.param)
