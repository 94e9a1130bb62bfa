#include "compiler_bridge/host_engine.h"

#include <dlfcn.h>
#include <torch/csrc/autograd/engine.h>

namespace reprise {
namespace {
thread_local bool keeps_engine = false;
}

KeepEngine::KeepEngine() { keeps_engine = true; }
KeepEngine::~KeepEngine() { keeps_engine = false; }

}  // namespace reprise

namespace torch::autograd {

/// In the place of libtorch's function of this name, which it calls but for `KeepEngine`.
void set_default_engine_stub(EngineStub stub) {
  if (reprise::keeps_engine) return;
  constexpr const char* kName = "_ZN5torch8autograd23set_default_engine_stubEPFRNS0_6EngineEvE";
  if (auto* next = ::dlsym(RTLD_NEXT, kName)) reinterpret_cast<void (*)(EngineStub)>(next)(stub);
}

}  // namespace torch::autograd
