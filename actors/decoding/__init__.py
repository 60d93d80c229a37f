"""The decoding engine. Speaks token ids only."""
