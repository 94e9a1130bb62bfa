#include "lazy_backend/executor.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/record_function.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <chrono>
#include <optional>
#include <utility>

#include "compiler_bridge/compile_queue.h"
#include "lazy_backend/device.h"
#include "lazy_backend/interpreter.h"
#include "lazy_backend/log.h"
#include "lazy_backend/metrics.h"
#include "reprise/options.h"

namespace reprise {
namespace {

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

std::vector<uint32_t> live_slots(const Segment& segment) {
  std::vector<uint32_t> live;
  for (uint32_t slot = 0; slot < segment.size(); ++slot) {
    if (segment.is_created(slot) && segment.is_alive(slot)) live.push_back(slot);
  }
  return live;
}

/// Every live slot is an output of the program, or is made beside it.
bool covers(const Program& program, const Segment& segment) {
  size_t next = 0;
  for (uint32_t slot = 0; slot < segment.size(); ++slot) {
    if (!segment.is_created(slot) || !segment.is_alive(slot)) continue;
    while (next < program.live.size() && program.live[next] < slot) ++next;
    if (next == program.live.size() || program.live[next] != slot) return false;
  }
  return true;
}

/// Dynamic scalar `k` as a program takes it.
at::Tensor scalar_input(Segment& segment, size_t k) {
  auto& tensors = segment.scalar_tensors;
  while (tensors.size() <= k) {
    tensors.push_back(at::empty_strided({}, {}, at::TensorOptions().dtype(c10::kDouble)));
  }
  *static_cast<double*>(tensors[k].mutable_data_ptr()) = segment.scalars[k];
  return tensors[k];
}

void check_first_outputs(Program& program, const std::vector<at::Tensor>& inputs,
                         const std::vector<at::Tensor>& outputs) {
  TORCH_CHECK(outputs.size() == program.outputs.size(), "reprise: program ", program.name,
              " returned ", outputs.size(), " outputs where ", program.outputs.size(),
              " were expected");
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
    expected.copy = output.strides() != expected.geometry.strides() ||
                    output.storage_offset() != expected.geometry.offset ||
                    output.storage().nbytes() < expected.nbytes ||
                    expected.geometry.conjugate || expected.geometry.negative ||
                    std::any_of(inputs.begin(), inputs.end(), shares) ||
                    std::any_of(outputs.begin(), outputs.begin() + k, shares);
  }
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

void run_program(Program& program, Segment& segment, bool first) {
  const InputTensors slots(program, segment);
  std::vector<at::Tensor> inputs;
  inputs.reserve(program.inputs.size());
  std::vector<std::pair<uint32_t, c10::Storage>> random;
  size_t next_random = 0;
  for (size_t k = 0; k < program.inputs.size(); ++k) {
    const ProgramInput& input = program.inputs[k];
    switch (input.kind) {
      case ProgramInput::Kind::kSlot:
        inputs.push_back(slots[k]);
        break;
      case ProgramInput::Kind::kScalar:
        inputs.push_back(scalar_input(segment, input.index));
        break;
      case ProgramInput::Kind::kRandom: {
        const Step& step = *program.steps[input.index];
        inputs.push_back(segment.random[next_random++]);
        if (step.randomness == Randomness::kCreates) {
          random.emplace_back(step.results[0].slot, inputs.back().storage());
        }
        break;
      }
    }
  }
  std::vector<at::Tensor> kept;
  if (first) kept = inputs;
  const std::vector<at::Tensor> outputs = program.runner->run(std::move(inputs));
  if (C10_UNLIKELY(first)) check_first_outputs(program, kept, outputs);
  for (size_t k = 0; k < outputs.size(); ++k) {
    const ProgramOutput& output = program.outputs[k];
    auto lazy = segment.lock(output.slot);
    if (!lazy) continue;
    if (C10_LIKELY(!output.copy)) {
      lazy->set_backing(outputs[k].storage());
    } else {
      at::Tensor copy = empty_tensor(output.geometry, output.nbytes, outputs[k].device());
      copy.copy_(outputs[k]);
      lazy->set_backing(copy.storage());
    }
  }
  for (auto& [slot, storage] : random) {
    if (auto lazy = segment.lock(slot)) lazy->set_backing(std::move(storage));
  }
}

/// What a program's written inputs held before its first run.
class Snapshot {
 public:
  Snapshot(const Program& program, const Segment& segment) {
    for (const StepPtr& step : program.steps) {
      for (const uint32_t slot : step->written_inputs) {
        const c10::Storage& storage = segment.at(slot)->backing();
        Geometry bytes;
        bytes.rank = 1;
        bytes.dims = {static_cast<int64_t>(storage.nbytes()), 1};
        bytes.dtype = c10::kByte;
        at::Tensor tensor = backing_tensor(storage, bytes);
        saved_.emplace_back(tensor, tensor.clone());
      }
    }
  }
  void restore() const {
    for (const auto& [tensor, copy] : saved_) tensor.copy_(copy);
  }

 private:
  std::vector<std::pair<at::Tensor, at::Tensor>> saved_;
};

void poison(Segment& segment, const std::exception_ptr& error) {
  for (uint32_t slot = 0; slot < segment.size(); ++slot) {
    if (!segment.is_created(slot)) continue;
    if (auto lazy = segment.lock(slot); lazy && !lazy->backing()) lazy->set_error(error);
  }
}

/// A program pays when the verified ops that it would have saved are many.
bool worth_a_compile(const SegmentEnd& end) {
  return static_cast<int64_t>(end.interpreted * end.steps.size()) >=
         options().compile_after_ops;
}

void request_program(SegmentEnd& end, const Segment& segment) {
  auto program = std::make_shared<Program>();
  program->name = end.name;
  program->steps = end.steps;
  program->live = live_slots(segment);
  if (end.program != nullptr) {
    // Other tensors are alive than were before: one program serves both. The
    // one there is goes on serving until then.
    std::vector<uint32_t> both;
    std::set_union(program->live.begin(), program->live.end(), end.program->live.begin(),
                   end.program->live.end(), std::back_inserter(both));
    program->live = std::move(both);
  }
  for (const StepPtr& step : end.steps) program->device_index = step->device_index;
  (end.program == nullptr ? end.program : end.wider) = program;
  metrics().programs_requested.add(1);
  CompileQueue::get().push(std::move(program));
}

void demote_if_slower(SegmentEnd& end) {
  const Contest& contest = end.contest;
  if (!contest.program_lost()) return;
  end.program->problem = c10::str(
      "demoted: lost ", contest.pairs_lost(), " of ", contest.pairs(),
      " turns against the interpreter, the last with ", contest.last_program_seconds() * 1e6,
      " us to ", contest.last_interpreter_seconds() * 1e6, " us");
  end.program->state = Program::State::kDemoted;
  metrics().programs_demoted.add(1);
  REPRISE_LOG(1, end.name, " ", end.program->problem);
}

}  // namespace

SegmentEnd& end_of(Node& node) {
  if (!node.end) {
    node.end = std::make_unique<SegmentEnd>();
    static std::atomic<uint64_t> next{1};
    node.end->name = c10::str("segment-", next.fetch_add(1));
    node.end->replay_range = "reprise::replay " + node.end->name;
    node.end->interpret_range = "reprise::interpret " + node.end->name;
  }
  return *node.end;
}

void launch(Node& node, Segment& segment) {
  SegmentEnd& end = end_of(node);
  if (end.steps.empty()) end.steps = TraceTree::path(&node);

  // Backing tensors are plain ones whatever mode the user is in.
  c10::InferenceMode normal_tensors(false);
  at::AutoDispatchBelowADInplaceOrView below_autograd;

  if (end.wider != nullptr && end.wider->state != Program::State::kQueued) {
    if (end.wider->state == Program::State::kReady) end.serve(end.wider);
    end.wider = nullptr;
  }
  Program* program = end.program.get();
  const bool ready = program != nullptr && program->state == Program::State::kReady;
  const bool timing = ready && options().demote_slow_programs && !end.contest.decided();
  if (ready && covers(*program, segment)) {
    if (!timing || end.contest.next() == Contest::Runner::kProgram) {
      RECORD_FUNCTION(end.replay_range, std::vector<c10::IValue>());
      const auto start = timing ? Clock::now() : Clock::time_point();
      const bool first = !std::exchange(end.program_has_run, true);
      // A program that cannot run shows it the first time.
      std::optional<Snapshot> before;
      if (first && program->writes_inputs) before.emplace(*program, segment);
      try {
        run_program(*program, segment, first);
        ++end.replayed;
        metrics().segments_replayed.add(1);
        if (timing) end.contest.program_took(seconds_since(start));
        return;
      } catch (const std::exception& error) {
        program->problem = error.what();
        program->state = Program::State::kFailed;
        metrics().program_failures.add(1);
        TORCH_WARN("reprise: the program of ", end.name, " failed and is not used any more: ",
                   error.what());
        if (before) {
          before->restore();
        } else if (program->writes_inputs) {
          // It may have changed some of them already: running the steps again
          // could apply an update twice.
          poison(segment, std::current_exception());
          throw;
        }
      }
    }
  }

  {
    RECORD_FUNCTION(end.interpret_range, std::vector<c10::IValue>());
    const auto start = timing ? Clock::now() : Clock::time_point();
    interpret(end.steps, segment);
    ++end.interpreted;
    metrics().segments_interpreted.add(1);
    if (timing && program->state == Program::State::kReady) {  // it may just have failed
      end.contest.interpreter_took(seconds_since(start));
      demote_if_slower(end);
    }
  }
  if (!options().compile || !worth_a_compile(end)) return;
  const bool none = end.program == nullptr;
  const bool other_outputs = !none && end.wider == nullptr &&
                             end.program->state == Program::State::kReady &&
                             !covers(*end.program, segment);
  if (none || other_outputs) request_program(end, segment);
}

}  // namespace reprise
