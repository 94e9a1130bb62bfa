#include "compiler_bridge/trace_outline.h"

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <bit>

#include "lazy_backend/device.h"
#include "lazy_backend/program_run.h"

namespace reprise {
namespace {

struct MadeResult {
  const Geometry* geometry;
  size_t nbytes;
};

}  // namespace

bool TraceOutline::apply(Program& program, std::vector<int64_t>& values) const {
  std::vector<const Geometry*> arguments;
  std::vector<MadeResult> results;
  for (const StepPtr& step : program.steps) {
    for_each_tensor(step->args, [&](const Arg& arg) { arguments.push_back(&arg.geometry()); });
    for_each_result(step->results, [&](const Result& result) {
      results.push_back({result.geometry.get(), result.nbytes});
    });
  }
  const auto geometry = [&](const Source& source) -> const Geometry& {
    return source.is_result ? *results[source.index].geometry : *arguments[source.index];
  };
  const auto differ = [&](const Same& pair) { return !(geometry(pair.a) == geometry(pair.b)); };
  if (std::any_of(same.begin(), same.end(), differ)) return false;

  std::vector<ProgramInput> scalars;
  uint32_t own = 0;
  for (const Float& each : floats) {
    const Arg& arg = program.steps[each.step]->args[each.argument];
    if (!each.dynamic) {
      if (arg.dynamic || std::bit_cast<uint64_t>(arg.number()) != std::bit_cast<uint64_t>(each.value)) {
        return false;
      }
      continue;
    }
    ProgramInput input;
    input.geometry.dtype = c10::kDouble;
    input.kind = arg.dynamic ? ProgramInput::Kind::kScalar : ProgramInput::Kind::kConstant;
    if (arg.dynamic) {
      input.index = own++;
    } else {
      input.constant = constant_input(arg.number(), backing_device_of(program.device_index));
    }
    scalars.push_back(std::move(input));
  }

  program.writes_inputs = writes_inputs;
  program.inputs.clear();
  program.outputs.clear();
  const auto add = [&](c10::IntArrayRef list) { values.insert(values.end(), list.begin(), list.end()); };
  for (const Input& each : inputs) {
    ProgramInput input{each.kind, each.index, {}, {}};
    if (each.kind == ProgramInput::Kind::kScalar) {
      input = scalars[each.index];
    } else {
      input.geometry = geometry(each.geometry);
    }
    add(input.geometry.sizes());
    add(input.geometry.strides());
    values.push_back(input.geometry.offset);
    program.inputs.push_back(std::move(input));
  }
  for (const Output& each : outputs) {
    const MadeResult& made = results[each.result];
    program.outputs.push_back({each.slot, *made.geometry, made.nbytes});
  }
  for (const Integer& each : integers) {
    const Arg& arg = program.steps[each.step]->args[each.argument];
    switch (arg.kind) {
      case Arg::Kind::kInt: values.push_back(arg.i); break;
      case Arg::Kind::kIntList: add(arg.ints()); break;
      default: values.push_back(arg.constant().toTensor().item<int64_t>()); break;
    }
  }
  return true;
}

}  // namespace reprise
