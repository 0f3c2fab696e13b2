"""Scripts on the public API, run as modules from the repository's root: `python -m examples.demo`."""
