"""The vocabulary every part shares. Imports nothing else of ours."""
