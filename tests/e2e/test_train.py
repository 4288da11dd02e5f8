"""The whole program on two ranks: supervised tuning, reward model, PPO, report, second run."""
