"""Benchmarks: a training step's share outside the model, and a stack of layers beside PyTorch's."""
