"""Patch Ranking: keep the image tokens that a learned ranking puts first."""
