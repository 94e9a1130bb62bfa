#include "lazy_backend/program_check.h"

#include <ATen/Context.h>
#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "lazy_backend/device.h"
#include "lazy_backend/differences.h"
#include "lazy_backend/interpreter.h"
#include "lazy_backend/program_run.h"
#include "lazy_backend/scratch.h"

namespace reprise {
namespace {

/// All bytes of a storage, as elements of `dtype`.
at::Tensor elements(const c10::Storage& storage, c10::ScalarType dtype) {
  Geometry all;
  all.rank = 1;
  all.dims = {static_cast<int64_t>(storage.nbytes() / c10::elementSize(dtype)), 1};
  all.dtype = dtype;
  return backing_tensor(storage, all);
}

/// The elements in one dimension, without a copy where they are dense.
at::Tensor flat(const at::Tensor& tensor) {
  const bool dense = tensor.is_non_overlapping_and_dense();
  const at::Tensor plain = tensor.resolve_conj().resolve_neg();
  return dense
             ? plain.as_strided({plain.numel()}, {1}, plain.storage_offset())
             : plain.reshape({-1});
}

/// A value is right where each element is within `elements` of the interpreter's and of
/// the root mean square of all. What a step has written is right as well where all
/// differences, taken together, are within `norm` of what the step has changed: an
/// optimizer may turn a gradient of nothing but rounding into a step of either sign.
struct Tolerance {
  double elements = 0, norm = 0;
};

/// What some hundred roundings make of numbers of this dtype.
Tolerance tolerance_of(c10::ScalarType dtype) {
  switch (c10::toRealValueType(dtype)) {
    case c10::kDouble:
      return {1e-9, 1e-5};
    case c10::kFloat:
      return {1e-4, 2e-2};
    case c10::kHalf:
      return {1e-2, 5e-2};
    default:
      if (c10::isFloatingType(c10::toRealValueType(dtype))) return {5e-2, 1e-1};
      return {};
  }
}

/// The elements on the host in one dimension, complex numbers as two.
at::Tensor plain(const at::Tensor& tensor) {
  at::Tensor host = flat(tensor).to(at::TensorOptions().device(c10::kCPU));
  if (host.is_complex()) return at::view_as_real(host).reshape({-1});
  const c10::ScalarType dtype = host.scalar_type();
  const bool counted = c10::isIntegralType(dtype, /*includeBool=*/true) ||
                       dtype == c10::kFloat || dtype == c10::kDouble || dtype == c10::kHalf ||
                       dtype == c10::kBFloat16;
  return counted && !c10::isBarebonesUnsignedType(dtype) ? host : host.view(c10::kByte);
}

/// `before` may be undefined. `relative` and `absolute` make an element's own limit.
Differences differences(const at::Tensor& actual, const at::Tensor& expected,
                        const at::Tensor& before, double relative = 0, double absolute = 0) {
  const at::Tensor a = plain(actual), b = plain(expected);
  const at::Tensor c = before.defined() ? plain(before) : b;  // as if nothing had changed
  Differences sum;
  AT_DISPATCH_ALL_TYPES_AND3(c10::kHalf, c10::kBFloat16, c10::kBool, a.scalar_type(), "differences", [&] {
    add_differences(a.const_data_ptr<scalar_t>(), b.const_data_ptr<scalar_t>(),
                    c.const_data_ptr<scalar_t>(), a.numel(), relative, absolute, sum);
  });
  return sum;
}

double largest_distance(const at::Tensor& a, const at::Tensor& b) {
  return differences(a, b, {}).largest;
}

bool close(const at::Tensor& actual, const at::Tensor& expected, const at::Tensor& before,
           double allowed) {
  const Tolerance tolerance = tolerance_of(expected.scalar_type());
  const Differences all = differences(actual, expected, before);
  if (all.largest <= allowed) return true;
  if (!std::isfinite(all.largest)) return false;
  const auto count = static_cast<double>(std::max<int64_t>(expected.numel(), 1));
  if (before.defined() && all.squares <= tolerance.norm * tolerance.norm * all.changed_squares) {
    return true;
  }
  const double absolute = tolerance.elements * std::sqrt(all.expected_squares / count) + allowed;
  return all.largest <= absolute ||
         differences(actual, expected, {}, tolerance.elements, absolute).limit_exceeded <= 0;
}

/// Matrix products and convolutions may round their factors to TF32.
bool rounds_to_tf32(const std::vector<StepPtr>& steps, c10::Device device) {
  if (!device.is_cuda()) return false;
  const auto rounds = [](at::Float32Op op) {
    return at::globalContext().float32Precision(at::Float32Backend::CUDA, op) ==
           at::Float32Precision::TF32;
  };
  return std::any_of(steps.begin(), steps.end(), [&](const StepPtr& step) {
    const std::string_view name = step->op.schema().name();
    if (name.find("_rnn") != std::string_view::npos) return rounds(at::Float32Op::RNN);
    if (name.find("conv") != std::string_view::npos) return rounds(at::Float32Op::CONV);
    return name.find("mm") != std::string_view::npos && rounds(at::Float32Op::MATMUL);
  });
}

/// The distance from 1 to the next number; 0 where there are no fractions.
double unit_of(c10::ScalarType dtype, bool tf32) {
  switch (c10::toRealValueType(dtype)) {
    case c10::kDouble:
      return 0x1p-52;
    case c10::kFloat:
      return tf32 ? 0x1p-10 : 0x1p-23;
    case c10::kHalf:
      return 0x1p-10;
    case c10::kBFloat16:
      return 0x1p-7;
    default:
      return 0;
  }
}

/// Visits the elements in pieces, so that what is made of them takes little memory.
template <class Visit>
void for_each_piece(const at::Tensor& tensor, const Visit& visit) {
  constexpr int64_t kPiece = 1 << 14;
  const at::Tensor all = flat(tensor);
  for (int64_t at = 0; at < all.numel(); at += kPiece) visit(all.slice(0, at, at + kPiece));
}

/// What it makes is whatever lay in the memory: no magnitude is to be taken from it.
bool leaves_uninitialized(const Step& step) {
  const std::string_view name = step.op.schema().name();
  return name.starts_with("aten::empty") || name.starts_with("aten::new_empty");
}

/// Multiplies each element by one plus a few units in the last place. Returns the largest
/// magnitude that was there.
double disturb(const at::Tensor& tensor, double unit, uint32_t seed) {
  if (unit == 0 || !tensor.is_non_overlapping_and_dense()) return 0;
  double largest = 0;
  for_each_piece(tensor, [&](const at::Tensor& piece) {
    const at::Tensor host = piece.cpu();
    const at::Tensor numbers = host.is_complex() ? at::view_as_real(host).view({-1}) : host;
    AT_DISPATCH_FLOATING_TYPES_AND2(c10::kHalf, c10::kBFloat16, numbers.scalar_type(), "disturb", [&] {
      largest = std::max(largest, reprise::disturb(numbers.mutable_data_ptr<scalar_t>(),
                                                   numbers.numel(), unit, seed++));
    });
    if (!piece.is_cpu()) piece.copy_(host);
  });
  return largest;
}

}  // namespace

/// A value that program and interpreter both make.
struct ProgramCheck::Value {
  uint32_t slot = 0;
  bool written_input = false;
  Geometry geometry;
  at::Tensor before;  ///< of a written input
  at::Tensor program, interpreter;
  double noise = 0;  ///< how far the interpreter was off when it was disturbed
};

ProgramCheck::ProgramCheck(Program& program, Segment& segment)
    : program_(program),
      tf32_(rounds_to_tf32(program.steps, backing_device_of(program.device_index))),
      scratch_(std::move(program.scratch)) {
  const size_t nbytes = scratch_bytes(program.steps, program.live, segment);
  if (!scratch_ || scratch_->nbytes() < nbytes) scratch_ = std::make_shared<Scratch>(nbytes);
  for (const ProgramInput& input : program_.inputs) {
    if (input.kind == ProgramInput::Kind::kSlot) dtypes_[input.index] = input.geometry.dtype;
  }
  for (const at::Tensor& numbers : segment.random) random_.push_back(scratch_->park(numbers));
  const bool ran = run_program_first(segment);
  interpret(program_.steps, segment);
  if (!ran) return;
  try {
    take_interpreters(segment);
    if (differing(/*with_noise=*/false) == nullptr) {
      decide("");
    } else {
      keep(segment);
    }
  } catch (const std::exception& error) {
    give_up(error);
  }
}

ProgramCheck::~ProgramCheck() = default;

void ProgramCheck::run_disturbed() {
  constexpr int kRuns = 4;
  try {
    measure_noise();
    const Value* value = differing(/*with_noise=*/true);
    if (value == nullptr) {
      decide("");
    } else if (++runs_ == kRuns) {
      decide(c10::str("its first run differed from the interpreter's: ",
                      value->written_input ? "the written input in slot " : "the output in slot ",
                      value->slot, " (", value->geometry.dtype, value->program.sizes(), ") by ",
                      largest_distance(value->program, value->interpreter),
                      ", where rounding explains ", value->noise));
    }
  } catch (const std::exception& error) {
    give_up(error);
  }
}

void ProgramCheck::decide(std::string problem) {
  decided_ = true;
  problem_ = std::move(problem);
}

void ProgramCheck::give_up(const std::exception& error) {
  decide(c10::str("it could not be compared with the interpreter: ", error.what()));
}

/// Leaves the inputs as they were. Returns whether the program can run.
bool ProgramCheck::run_program_first(Segment& segment) {
  for (const StepPtr& step : program_.steps) {
    for (const uint32_t slot : step->written_inputs) {
      Value value;
      value.slot = slot;
      value.written_input = true;
      value.geometry.dtype = dtype_of(slot, segment);
      value.before = scratch_->park(input(slot, segment));
      values_.push_back(std::move(value));
    }
  }
  try {
    std::vector<at::Tensor> outputs = try_program(program_, segment, segment.random);
    for (Value& value : values_) value.program = scratch_->park(input(value.slot, segment));
    for (size_t k = 0; k < outputs.size(); ++k) {
      const ProgramOutput& output = program_.outputs[k];
      Value value;
      value.slot = output.slot;
      value.geometry = output.geometry;
      value.program = scratch_->park(std::exchange(outputs[k], at::Tensor()));
      values_.push_back(std::move(value));
    }
  } catch (const std::exception& error) {
    decide(error.what());
  }
  for (const Value& value : values_) {
    if (value.written_input) input(value.slot, segment).copy_(value.before);
  }
  for (size_t k = 0; k < random_.size(); ++k) segment.random[k].copy_(random_[k]);
  return !decided_;
}

void ProgramCheck::take_interpreters(const Segment& segment) {
  std::vector<Value> held;
  for (Value& value : values_) {
    if (value.written_input) {
      value.interpreter = input(value.slot, segment);
    } else if (const auto lazy = segment.lock(value.slot)) {
      value.interpreter = backing_tensor(lazy->backing(), value.geometry);
    } else {
      continue;
    }
    held.push_back(std::move(value));
  }
  values_ = std::move(held);
}

const ProgramCheck::Value* ProgramCheck::differing(bool with_noise) const {
  for (const Value& value : values_) {
    // Beside what disturbed values show there is what an op loses inside, where a
    // softmax of nearly 1 is taken from 1, say: units of the largest number there is.
    const double lost = unit_of(value.geometry.dtype, tf32_) * largest_;
    const double allowed = with_noise ? 8 * (value.noise + lost) : 0;
    if (!close(value.program, value.interpreter, value.before, allowed)) return &value;
  }
  return nullptr;
}

/// Copies what the disturbed runs need of the segment, which the user goes on to change.
void ProgramCheck::keep(const Segment& segment) {
  const uint32_t slots = segment.size();
  size_t nbytes = 0;
  for (const Value& value : values_) nbytes += Scratch::needs(value.interpreter.nbytes());
  inputs_.resize(slots);
  for (const Value& value : values_) {
    if (value.written_input) inputs_[value.slot] = value.before;
  }
  for (uint32_t slot = 0; slot < slots; ++slot) {
    if (segment.is_created(slot)) continue;
    const size_t size = Scratch::needs(segment.at(slot)->backing().nbytes());
    working_bytes_ += size;
    if (!inputs_[slot].defined()) nbytes += size;
  }
  kept_ = std::make_unique<Scratch>(nbytes);
  for (uint32_t slot = 0; slot < slots; ++slot) {
    if (!segment.is_created(slot) && !inputs_[slot].defined()) {
      inputs_[slot] = kept_->park(input(slot, segment));
    }
  }
  for (Value& value : values_) value.interpreter = kept_->park(value.interpreter);
  scalars_ = segment.scalars;
}

void ProgramCheck::measure_noise() {
  constexpr uint32_t kApart = 1 << 20;  // more than a tensor has pieces
  const c10::Device device = backing_device_of(program_.device_index);
  std::unordered_map<uint32_t, c10::Storage> results;
  for (const Value& value : values_) {
    if (!value.written_input) results[value.slot] = {};
  }
  Scratch scratch(working_bytes_);
  std::vector<c10::Storage> storages(inputs_.size());
  for (size_t slot = 0; slot < inputs_.size(); ++slot) {
    if (!inputs_[slot].defined()) continue;
    const at::Tensor copy = scratch.park(inputs_[slot]).to(device);
    disturb(copy, unit_of(copy.scalar_type(), tf32_), seed_ += kApart);
    storages[slot] = copy.storage();
  }
  std::vector<at::Tensor> random;
  for (const at::Tensor& numbers : random_) {
    random.push_back(numbers.to(device, numbers.scalar_type(), /*non_blocking=*/false,
                                /*copy=*/true));
  }
  const auto disturb_made = [&](const Step& step, uint32_t, const at::Tensor& tensor) {
    if (leaves_uninitialized(step)) return;
    const double unit = unit_of(tensor.scalar_type(), tf32_);
    largest_ = std::max(largest_, disturb(tensor, unit, seed_ += kApart));
  };
  run_steps(program_.steps, scalars_, storages, random,
            [&](const Step& step, uint32_t slot, const at::Tensor& tensor) {
              disturb_made(step, slot, tensor);
              if (const auto wanted = results.find(slot); wanted != results.end()) {
                wanted->second = tensor.storage();
              }
            },
            disturb_made);
  for (Value& value : values_) {
    const at::Tensor disturbed = value.written_input
                                     ? elements(storages[value.slot], value.geometry.dtype)
                                     : backing_tensor(results.at(value.slot), value.geometry);
    value.noise = std::max(value.noise, largest_distance(disturbed, value.interpreter));
  }
}

c10::ScalarType ProgramCheck::dtype_of(uint32_t slot, const Segment& segment) const {
  const auto found = dtypes_.find(slot);
  const c10::ScalarType dtype = found == dtypes_.end() ? c10::kByte : found->second;
  const bool whole = segment.at(slot)->backing().nbytes() % c10::elementSize(dtype) == 0;
  return whole && !c10::isQIntType(dtype) ? dtype : c10::kByte;
}

/// The whole of an input's storage.
at::Tensor ProgramCheck::input(uint32_t slot, const Segment& segment) const {
  return elements(segment.at(slot)->backing(), dtype_of(slot, segment));
}

size_t scratch_bytes(const std::vector<StepPtr>& steps, const std::vector<uint32_t>& live,
                     const Segment& segment) {
  size_t nbytes = 0;
  for (const StepPtr& step : steps) {
    for (const uint32_t slot : step->written_inputs) {
      nbytes += 2 * Scratch::needs(segment.at(slot)->backing().nbytes());
    }
    if (step->randomness != Randomness::kNone) {  // what it draws: see `draw`
      nbytes += Scratch::needs(step->args[0].kind == Arg::Kind::kTensor
                                   ? step->args[0].geometry().nbytes()
                                   : step->results[0].nbytes);
    }
  }
  for (const uint32_t slot : live) {
    if (const auto lazy = segment.lock(slot)) nbytes += Scratch::needs(lazy->nbytes());
  }
  return nbytes;
}

}  // namespace reprise
