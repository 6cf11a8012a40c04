"""GPTQ onto ggml's grids: the solver, the descent after it, and the choice among methods.

solver         error feedback, row by row           descent    over codes and scales
select         methods compete on held-out inputs   inputs     what is known of them
kernels_cpu, kernels_cuda   the same on numba and on Triton    donors   rows made elsewhere
errors         what errors.json says
"""
