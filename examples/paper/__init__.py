"""Dense, window, sparse and dilated attention in one model: `python -m examples.paper.run`."""
