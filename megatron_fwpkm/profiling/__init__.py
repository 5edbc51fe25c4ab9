"""Measuring: what a run moves, how long it takes, where memory goes."""
