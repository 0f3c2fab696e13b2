"""Timings against the rivals, alternately in one run, and the tables and plots made from them."""
