"""MLIP: an image tower that works in the frequency domain and merges tokens."""
