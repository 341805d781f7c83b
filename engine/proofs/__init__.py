"""What shows that the engine computes what it should: references, replays, checks for users."""
