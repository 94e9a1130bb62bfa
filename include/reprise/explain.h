/// \file
/// What Reprise made of the program, in words.
#pragma once

#include <string>

#include "reprise/export_macros.h"

namespace reprise {

/// The segments of every thread: ops, how often each ran and how, why it ended,
/// what was compiled, what failed and why. Takes each session's lock in turn.
REPRISE_API std::string explain();

/// The calling thread's traces as lazy-tensor-core nodes.
REPRISE_API std::string dump_text();
REPRISE_API std::string dump_dot();

}  // namespace reprise
