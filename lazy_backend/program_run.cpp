#include "lazy_backend/program_run.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>

#include "lazy_backend/below_user_modes.h"
#include "lazy_backend/device.h"
#include "lazy_backend/interpreter.h"

namespace reprise {
namespace {

constexpr auto kNumbers = c10::kDouble;
/// Programs take for granted that their inputs begin at a multiple of 16 bytes.
constexpr int64_t kApart = 2;

/// Brings the dynamic scalars to a GPU, with one copy.
void upload_scalars(Segment& segment, c10::Device device) {
  ScalarTensors& on = segment.scalar_tensors;
  const ScalarValues& values = segment.scalars;
  const auto stream = c10::impl::VirtualGuardImpl(device.type()).getStream(device).id();
  const auto size = static_cast<int64_t>(values.size()) * kApart;
  // A program that still waits on another stream reads what was brought for it.
  if (!on.device.defined() || on.device.size(0) != size || on.device.device() != device || on.stream != stream) {
    on.host = at::empty({size}, at::TensorOptions().dtype(kNumbers)).zero_();
    on.device = at::empty({size}, on.host.options().device(device));
    on.each.clear();
    for (int64_t k = 0; k < size; k += kApart) on.each.push_back(on.device.select(0, k));
    on.values.clear();
  }
  if (on.values == values) return;
  auto* numbers = static_cast<double*>(on.host.mutable_data_ptr());
  for (size_t k = 0; k < values.size(); ++k) numbers[k * kApart] = values[k];
  // From memory that is not pinned: it may be written again when this returns.
  on.device.copy_(on.host, /*non_blocking=*/true);
  on.values = values;
  on.stream = stream;
}

/// Dynamic scalar `k` as a program for the CPU takes it.
at::Tensor scalar_input(Segment& segment, size_t k) {
  auto& tensors = segment.scalar_tensors.each;
  while (tensors.size() <= k) {
    tensors.push_back(at::empty_strided({}, {}, at::TensorOptions().dtype(kNumbers)));
  }
  *static_cast<double*>(tensors[k].mutable_data_ptr()) = segment.scalars[k];
  return tensors[k];
}

/// Throws where the outputs are not those recorded, and notes which must be copied.
void compare_with_record(Program& program, const std::vector<at::Tensor>& inputs,
                         const std::vector<at::Tensor>& outputs) {
  TORCH_CHECK(outputs.size() == program.outputs.size(), "reprise: program ", program.name,
              " returned ", outputs.size(), " outputs where ", program.outputs.size(),
              " were expected");
  const c10::Device device = backing_device_of(program.device_index);
  for (size_t k = 0; k < outputs.size(); ++k) {
    ProgramOutput& expected = program.outputs[k];
    const at::Tensor& output = outputs[k];
    TORCH_CHECK(output.sizes() == expected.geometry.sizes() &&
                    output.scalar_type() == expected.geometry.dtype,
                "reprise: program ", program.name, " returned ", output.dtype(), output.sizes(),
                " where ", expected.geometry.dtype, expected.geometry.sizes(), " was recorded");
    const auto shares = [&](const at::Tensor& other) {
      return other.storage().unsafeGetStorageImpl() == output.storage().unsafeGetStorageImpl() ||
             (output.numel() > 0 && other.storage().data() == output.storage().data());
    };
    expected.copy = output.device() != device || output.strides() != expected.geometry.strides() ||
                    output.storage_offset() != expected.geometry.offset ||
                    output.storage().nbytes() < expected.nbytes ||
                    expected.geometry.conjugate || expected.geometry.negative ||
                    std::any_of(inputs.begin(), inputs.end(), shares) ||
                    std::any_of(outputs.begin(), outputs.begin() + k, shares);
  }
  program.compared_with_record = true;
}

/// The input tensors of a program, over the storages of this run.
class InputTensors {
 public:
  InputTensors(Program& program, const Segment& segment)
      : tensors_(program.input_tensors), no_storage_(program.no_storage) {
    if (C10_UNLIKELY(!no_storage_)) {
      no_storage_ = c10::Storage(c10::Storage::use_byte_size_t(), 0,
                                 c10::DataPtr(nullptr, backing_device_of(program.device_index)));
    }
    tensors_.resize(program.inputs.size());
    for (size_t k = 0; k < program.inputs.size(); ++k) {
      const ProgramInput& input = program.inputs[k];
      if (input.kind == ProgramInput::Kind::kNumber && !tensors_[k].defined()) {
        tensors_[k] = backing_tensor(no_storage_, input.geometry);
      }
      if (input.kind != ProgramInput::Kind::kSlot) continue;
      const c10::Storage& storage = segment.at(input.index)->backing();
      if (C10_UNLIKELY(!tensors_[k].defined())) {
        tensors_[k] = backing_tensor(storage, input.geometry);
      } else {
        tensors_[k].unsafeGetTensorImpl()->set_storage_keep_dtype(storage);
      }
    }
  }
  ~InputTensors() {  // keeps no storage alive
    for (const at::Tensor& tensor : tensors_) {
      if (tensor.defined()) {
        tensor.unsafeGetTensorImpl()->set_storage_keep_dtype(no_storage_);
      }
    }
  }
  InputTensors(const InputTensors&) = delete;
  InputTensors& operator=(const InputTensors&) = delete;
  const at::Tensor& operator[](size_t k) const { return tensors_[k]; }

 private:
  std::vector<at::Tensor>& tensors_;
  c10::Storage& no_storage_;
};

/// The program's inputs, in order.
std::vector<at::Tensor> gather(const Program& program, const InputTensors& slots,
                               Segment& segment, const std::vector<at::Tensor>& random) {
  std::vector<at::Tensor> inputs;
  inputs.reserve(program.inputs.size());
  const c10::Device device = backing_device_of(program.device_index);
  if (!device.is_cpu() && !segment.scalars.empty()) upload_scalars(segment, device);
  size_t next_random = 0;
  for (size_t k = 0; k < program.inputs.size(); ++k) {
    const ProgramInput& input = program.inputs[k];
    switch (input.kind) {
      case ProgramInput::Kind::kSlot:
        inputs.push_back(slots[k]);
        break;
      case ProgramInput::Kind::kScalar:
        inputs.push_back(device.is_cpu() ? scalar_input(segment, input.index)
                                         : segment.scalar_tensors.each[input.index]);
        break;
      case ProgramInput::Kind::kRandom:
        inputs.push_back(random[next_random++]);
        break;
      case ProgramInput::Kind::kNumber:
        inputs.push_back(slots[k]);
        break;
      case ProgramInput::Kind::kConstant:
        inputs.push_back(input.constant);
        break;
    }
  }
  return inputs;
}

}  // namespace

at::Tensor constant_input(double number, c10::Device device) {
  return constant_inputs({number}, device)[0];
}

std::vector<at::Tensor> constant_inputs(const ScalarValues& numbers, c10::Device device, bool non_blocking) {
  const NormalTensors normal_tensors;
  const BelowUserModes below;
  const auto size = static_cast<int64_t>(numbers.size()) * kApart;
  const at::Tensor host = at::zeros({size}, at::TensorOptions().dtype(kNumbers));
  auto* values = static_cast<double*>(host.mutable_data_ptr());
  for (size_t k = 0; k < numbers.size(); ++k) values[k * kApart] = numbers[k];
  const at::Tensor all = host.to(device, kNumbers, non_blocking);
  std::vector<at::Tensor> each;
  each.reserve(numbers.size());
  for (int64_t k = 0; k < size; k += kApart) each.push_back(all.select(0, k));
  return each;
}

at::Tensor as_recorded(const Program& program, size_t k, const at::Tensor& tensor) {
  const ProgramOutput& output = program.outputs[k];
  if (C10_LIKELY(!output.copy)) return tensor;
  return copy_lying_as(output.geometry, output.nbytes, tensor,
                       backing_device_of(program.device_index));
}

void run_program(Program& program, Segment& segment) {
  const InputTensors slots(program, segment);
  std::vector<at::Tensor> inputs = gather(program, slots, segment, segment.random);
  const bool first = !program.compared_with_record;
  const std::vector<at::Tensor> kept = first ? inputs : std::vector<at::Tensor>();
  const std::vector<at::Tensor> outputs = program.runner->run(std::move(inputs));
  if (C10_UNLIKELY(first)) compare_with_record(program, kept, outputs);
  for (size_t k = 0; k < outputs.size(); ++k) {
    const ProgramOutput& output = program.outputs[k];
    if (auto lazy = segment.lock(output.slot)) {
      lazy->set_backing(as_recorded(program, k, outputs[k]).storage());
    }
  }
  // What a random step has created is the storage that the program was given.
  size_t next_random = 0;
  for (const ProgramInput& input : program.inputs) {
    if (input.kind != ProgramInput::Kind::kRandom) continue;
    const at::Tensor& numbers = segment.random[next_random++];
    const Step& step = *program.steps[input.index];
    if (step.randomness != Randomness::kCreates) continue;
    if (auto lazy = segment.lock(step.results[0].slot)) lazy->set_backing(numbers.storage());
  }
}

std::vector<at::Tensor> try_program(Program& program, Segment& segment,
                                    const std::vector<at::Tensor>& random) {
  const InputTensors slots(program, segment);
  std::vector<at::Tensor> inputs = gather(program, slots, segment, random);
  const std::vector<at::Tensor> kept = inputs;
  std::vector<at::Tensor> outputs = program.runner->run(std::move(inputs));
  compare_with_record(program, kept, outputs);
  for (size_t k = 0; k < outputs.size(); ++k) {
    outputs[k] = as_recorded(program, k, outputs[k]);
  }
  return outputs;
}

}  // namespace reprise
