"""Checkpoints of any layout: what is in them, how they are written and read, and what becomes of damaged ones."""
