"""Kernels for block diffusion. Imports jax, and nothing of llada2_jax."""
