// Python bindings of sparsemtl._C, and nothing else.
#include <pybind11/pybind11.h>

namespace py = pybind11;

PYBIND11_MODULE(_C, m) { m.doc() = "Native kernels of sparsemtl; sparsemtl.ops is the way in."; }
