"""Reward models that are no heads on the frozen LLM, behind one protocol."""
