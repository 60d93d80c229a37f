"""Soft actor-critic on transitions from the replay buffer."""
