"""LLMs whose weights were trained, by TRL: what the paper compares the agent with (Table 2)."""
