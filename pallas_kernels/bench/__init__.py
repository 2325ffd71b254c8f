"""Benchmarks of the kernels: `python -m pallas_kernels.bench {pairs,memory,time}`."""
