// The Python face of the core: one module, one binding file for each part of it.
#include "bindings.hpp"

NB_MODULE(_native, module) {
  module.doc() = "overspill's native core: the host update, and what the SSD tier needs.";
  nb::set_leak_warnings(false);  // threads of a session that was left open hold what they work with until the process ends
  bind_update(module);
  bind_storage(module);
}
