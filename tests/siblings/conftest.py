"""Fixtures of the tests of latent_world_model.py, which is of the earlier shape: their `script`."""

import pytest
import torch

from conftest import ROOT, load_script

__all__ = ["ROOT", "SMALL", "load_script"]


@pytest.fixture(scope="session")
def script():
    return load_script("latent_world_model")


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
    """Makes the resolved Args of a small and short run, with the options given."""

    def make(**options):
        return script.resolved(script.Args(**{**SMALL, **options}))

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
