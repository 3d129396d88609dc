"""Figures of a run: data in, matplotlib Figure out."""
