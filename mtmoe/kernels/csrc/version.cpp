// The torch that the extension was compiled for: another one's tensors may look different in memory.

#include <torch/library.h>
#include <torch/version.h>

TORCH_LIBRARY_FRAGMENT(mtmoe, m) {
  m.def("compiled_for() -> str", [] { return std::string(TORCH_VERSION); });
}
