"""Inference: a finished model in, a faster and smaller one out."""
