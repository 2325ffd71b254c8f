"""Measuring models: likelihood, and later benchmark suites."""
