"""Tests of the scripts of the earlier shape: hop_mcts, hop_ppo_gumbel, latent_world_model."""
