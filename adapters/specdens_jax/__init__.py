"""Curvature of JAX models. Empty so far; JAX arrays and sparse matrices work in every estimator."""
