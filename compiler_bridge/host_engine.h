/// \file
/// Whose engine runs the host program's backward passes.
#pragma once

namespace reprise {

/// While one lives, what the calling thread imports does not change the engine.
///
/// `import torch` makes Python's engine the one that C++ programs get as well
/// (torch/csrc/autograd/python_engine.cpp, torch 2.11). Its threads want the GIL, which a
/// compile holds for seconds. Works where this library is found before libtorch, as it is by
/// programs that are linked with it; elsewhere guest.py undoes it afterwards.
class KeepEngine {
 public:
  KeepEngine();
  ~KeepEngine();
  KeepEngine(const KeepEngine&) = delete;
  KeepEngine& operator=(const KeepEngine&) = delete;
};

}  // namespace reprise
