/// \file
/// The first run of a compiled program: beside the interpreter, on the same inputs.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "lazy_backend/program.h"
#include "lazy_backend/segment.h"

namespace reprise {

/// Runs the segment with `program` and again with the interpreter, whose values the
/// user gets, and compares. Returns why the program must not be used, or nothing.
/// Throws what an op throws.
///
/// Values may differ as far as rounding explains. Where they differ by more than their
/// dtype's tolerance, it is measured how far this segment magnifies roundings: the
/// interpreter runs some times more, on copies, with every value disturbed by units in
/// the last place.
///
/// What both write and return is kept in between in the program's `scratch`, for the
/// most part a file: a training step would otherwise need its parameters' and its
/// optimizer's memory twice more.
std::optional<std::string> check_program(Program& program, Segment& segment);

/// How much memory that takes for a program of these steps with these outputs. The
/// segment's inputs have their backing.
size_t scratch_bytes(const std::vector<StepPtr>& steps, const std::vector<uint32_t>& live,
                     const Segment& segment);

}  // namespace reprise
