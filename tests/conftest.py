"""Fixtures of all tests. Every test that asks for `script` runs once for each script of the repository."""

import dataclasses
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


SMALL = {
    "num_envs": 4,
    "num_steps": 16,
    "total_timesteps": 128,
    "hidden_size": 16,
    "moa_hidden_size": 8,
    "goal_size": 3,
    "moa_matches": 4,
    "moa_capacity": 50,
    "match_episodes": 2,
    "plan_samples": 4,
    "transition_minibatches": 2,
    "num_simulations": 4,
    "num_goal_samples": 2,
    "model_updates": 4,
    "model_batch": 64,
}


@pytest.fixture(scope="session")
def small(script):
    """Makes the resolved Args of a small and short run, with the options given, a planner's only where there is one."""
    names = {field.name for field in dataclasses.fields(script.Args)}
    default = {name: value for name, value in SMALL.items() if name in names}

    def make(**options):
        options = {k: v for k, v in options.items() if k in names or not k.startswith(("plan_", "transition"))}
        return script.resolved(script.Args(**{**default, **options}))

    return make


def shake(module, seed):
    """Gives all parameters normal values of a fan-in's scale, so that no output is nearly zero; returns the module."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.copy_(noise / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 0.1 * noise)
    return module


@pytest.fixture(scope="session")
def lively(script, small):
    """Makes an agent whose every network says something, with the options given."""

    def make(seed=0, **options):
        args = small(**options)
        return shake(script.Agent(script.GridGame(args.env_id), args), seed)

    return make
