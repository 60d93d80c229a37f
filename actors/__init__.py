"""Rollout actors: the frozen LLM, decoding with accept and reject, reward heads, evaluation."""
