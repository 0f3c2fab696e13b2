"""Timings against the rivals, alternately in one run, and what makes tables and plots of them."""
