"""Reinforcement learning from human feedback: objectives, rewards, advantages and PPO."""
