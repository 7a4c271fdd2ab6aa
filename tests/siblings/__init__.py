"""Tests of latent_world_model.py, which is of the earlier shape."""
