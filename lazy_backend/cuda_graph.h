/// \file
/// A program's launches as one: a CUDA graph.
#pragma once

#include <c10/core/Device.h>

#include <memory>
#include <vector>

#include "lazy_backend/program.h"

namespace reprise {

/// Runs `program`, and captures what it launches once it has run a few times. `written` says
/// of each input whether the program writes it. Returns `program` itself for a device without
/// graphs, and where the option `cuda_graphs` is off.
///
/// Inputs that come at the same address each time, parameters, are used in place; others are
/// copied to where the graph reads them. Models that share a program have a graph each, up to
/// four. Outputs lie in the graph's memory, and whoever still holds one when the graph runs
/// again has it moved to memory of its own before. What cannot be captured goes on as it is;
/// `about()` says why.
///
/// Calls may come from several threads: those that find the graph in use run the program, and so
/// do all while somebody holds a result, which another thread may be about to read.
std::shared_ptr<Runner> with_cuda_graph(std::shared_ptr<Runner> program, c10::Device device,
                                        std::vector<bool> written);

}  // namespace reprise
