"""The global replay buffer and the weight channel, on Redis and in memory."""
