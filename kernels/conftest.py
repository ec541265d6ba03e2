"""Without Triton, pytest leaves its kernels' modules out of the search for doctests."""

import importlib.util

collect_ignore_glob = (
    [] if importlib.util.find_spec("triton") else ["*/cuda_triton.py", "*/tuning.py"]
)
