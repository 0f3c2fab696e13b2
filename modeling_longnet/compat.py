"""Private and semi-private library APIs, one section per library.

Each section names the versions it was checked with and what happens without the API.
"""

# Triton, checked with 3.6 and 3.9.
# Without `knobs`: the kernels count as compiled, so the backend refuses CPU tensors.
# Without `gdc_*`: launches do not overlap.
try:
    from triton.knobs import runtime as _triton_runtime

    TRITON_IS_INTERPRETED = bool(_triton_runtime.interpret)
except (ImportError, AttributeError):
    TRITON_IS_INTERPRETED = False
try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:
    gdc_launch_dependents = gdc_wait = None
HAS_TRITON_GDC = gdc_wait is not None
