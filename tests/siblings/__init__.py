"""Tests of the scripts of the earlier shape: latent_world_model, hop_ppo_gumbel."""
