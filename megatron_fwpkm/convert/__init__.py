"""The paper's official code: its configurations, the names of its weights, and reference cases made with it."""
