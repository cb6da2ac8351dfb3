"""Curvature of JAX models as specdens operators. Empty so far: JAX arrays work in every estimator."""
