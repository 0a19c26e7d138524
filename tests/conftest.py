import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from importlib.util import find_spec

import torch
from hypothesis import HealthCheck, settings


def interpret_triton() -> None:
    """Run Triton's kernels on the CPU, in this process only: those that a test starts may want to compile.

    Triton asks the environment when a kernel is defined, and its own are defined when it is imported.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    import triton

    triton.knobs.propagate_env = False
    triton.knobs.runtime.interpret = True
    triton.knobs.propagate_env = True
    del os.environ["TRITON_INTERPRET"]


if not torch.cuda.is_available() and find_spec("triton"):
    interpret_triton()

# One thread: the tensors here are tiny, tests may run side by side, and sums then have one order.
torch.set_num_threads(1)

settings.register_profile(
    "fixed",
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
# Other cases on every run: HYPOTHESIS_PROFILE=search.
settings.register_profile("search", parent=settings.get_profile("fixed"), derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))
