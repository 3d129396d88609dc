"""Who runs a graph: plain torch, or the native core where it is faster."""
