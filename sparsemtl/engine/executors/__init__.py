"""Who runs a graph: the native core with torch's dense kernels beside it, or plain torch."""
