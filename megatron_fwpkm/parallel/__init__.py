"""Processes, process groups and the provider of parallel layers."""
