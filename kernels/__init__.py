"""Triton kernels, one file per op; imported by sparsemtl.ops alone."""
