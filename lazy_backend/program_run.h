/// \file
/// Calls a segment's compiled program.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "lazy_backend/program.h"
#include "lazy_backend/segment.h"

namespace reprise {

/// Runs `program` for `segment`: created storages that are outputs and still held get
/// their backing, written inputs their new contents. Throws what the program throws;
/// inputs may have been written by then.
void run_program(Program& program, Segment& segment);

/// Runs it and returns its outputs, as eager's would lie in memory, and gives them to nobody. `random` is what the segment's random steps
/// drew, in their order; the program may write to it, and to the segment's inputs. Notes
/// in `program.outputs` what `run_program` must copy; throws where the program returns
/// other tensors than were recorded.
std::vector<at::Tensor> try_program(Program& program, Segment& segment,
                                    const std::vector<at::Tensor>& random);

/// A number that does not change, as a program takes a dynamic scalar. It is there at once,
/// whichever stream the program will run on.
at::Tensor constant_input(double number, c10::Device device);
/// As above of several, which are brought there with one copy.
/// `non_blocking`: for what is run on the current stream.
std::vector<at::Tensor> constant_inputs(const ScalarValues& numbers, c10::Device device,
                                        bool non_blocking = false);

/// An output as eager's would lie in memory.
at::Tensor as_recorded(const Program& program, size_t output, const at::Tensor& tensor);

}  // namespace reprise
