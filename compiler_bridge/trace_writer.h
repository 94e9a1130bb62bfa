/// \file
/// Writes a segment down for the compiler (docs/trace_format.md), and works out
/// where the program's inputs come from and where its outputs go.
#pragma once

#include <string>

#include "lazy_backend/program.h"

namespace reprise {

struct TraceOutline;

/// Sets `inputs`, `outputs` and `writes_inputs` of `program` from its `steps` and
/// `live`, and returns the trace as JSON. Canonical: equal segments give equal
/// text. Throws where a step cannot be written down. `outline`, where it is wanted, is
/// an empty one.
std::string write_trace(Program& program, TraceOutline* outline = nullptr);

}  // namespace reprise
