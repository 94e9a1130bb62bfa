/// \file
/// Behind reprise/compile.h: what is known of a function, and its replay.
#pragma once

#include <string>

namespace reprise {

/// A line or two for each compiled function that exists.
void explain_functions(std::string& out);

}  // namespace reprise
