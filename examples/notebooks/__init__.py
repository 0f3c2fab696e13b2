"""Notebooks, and `run.py`, which runs them again."""
