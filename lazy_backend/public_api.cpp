/// \file
/// The functions of include/reprise/ that concern sessions.
#include "compiler_bridge/compile_queue.h"
#include "lazy_backend/compiled_function.h"
#include "lazy_backend/device.h"
#include "lazy_backend/ir.h"
#include "lazy_backend/session.h"
#include "reprise/device.h"
#include "reprise/explain.h"
#include "reprise/testing.h"

#include <ATen/Context.h>
#include <c10/core/impl/VirtualGuardImpl.h>

namespace reprise {

void mark_step() { Session::current().mark_step("mark_step()"); }

void sync() {
  mark_step();
  const c10::Device device = backing_device_of(-1);
  if (!device.is_cpu()) c10::impl::VirtualGuardImpl(device.type()).synchronizeDevice(device.index());
}

void wait_for_compiles() { CompileQueue::get().wait_until_idle(); }

std::string explain() {
  std::string out;
  for (Session* session : Session::all()) session->explain(out);
  explain_functions(out);
  return out;
}

namespace testing {
void discard_segment() { Session::current().discard(); }
void forget_traces() { Session::current().forget(); }
void pause_recording(uint64_t ops) { Session::current().pause(ops); }
}  // namespace testing

}  // namespace reprise
