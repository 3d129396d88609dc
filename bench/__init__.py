"""Benches, one file per op; a number is printed with its machine, baseline and a green check."""
