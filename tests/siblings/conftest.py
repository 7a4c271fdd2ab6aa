"""Fixtures of the tests of the scripts of the earlier shape.

A test that asks for `script` runs on latent_world_model.py alone: what it tests is the same text in all of them,
which test_copies.py holds. What is about others names them: `@pytest.mark.scripts("hop_ppo_gumbel", ..)`, on the
test or, as `pytestmark`, on its module.
"""

import dataclasses

import pytest
import torch

from conftest import ROOT, load_script

__all__ = ["ROOT", "SCRIPTS", "SMALL", "load_script"]
SCRIPTS = ["latent_world_model", "hop_ppo_gumbel"]


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "scripts(*names): the scripts that a test is about; without it, latent_world_model"
    )


def pytest_generate_tests(metafunc):
    asked = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if "script" in metafunc.fixturenames and "script, name" not in asked:
        mark = metafunc.definition.get_closest_marker("scripts")
        names = mark.args if mark is not None else SCRIPTS[:1]
        metafunc.parametrize("script", names, indirect=True, scope="session")


@pytest.fixture(scope="session")
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
    "model_updates": 4,
    "model_batch": 64,
}


@pytest.fixture(scope="session")
def small(script):
    """Makes the resolved Args of a small and short run, with the options given, a planner's only where there is one."""
    names = {field.name for field in dataclasses.fields(script.Args)}
    default = {name: value for name, value in SMALL.items() if name in names}

    def make(**options):
        options = {k: v for k, v in options.items() if k in names or not k.startswith("plan_")}
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
