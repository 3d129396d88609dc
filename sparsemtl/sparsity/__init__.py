"""Thresholds, masks, allocation and the controller that makes sparsity exact."""
