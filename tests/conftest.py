import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from hypothesis import HealthCheck, settings

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
