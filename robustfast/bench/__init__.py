"""``robustfast bench``: the kernels against plain PyTorch, interleaved in one run, beside the machine's ceilings."""
