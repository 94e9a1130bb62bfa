#include "lazy_backend/program_check.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ExpandUtils.h>
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <unordered_map>
#include <utility>
#include <vector>

#include "compiler_bridge/artifact_store.h"
#include "lazy_backend/device.h"
#include "lazy_backend/interpreter.h"
#include "lazy_backend/program_run.h"

namespace reprise {
namespace {

constexpr int64_t kChunk = 1 << 16;  // elements that are compared at once
constexpr size_t kWorthAFile = 1 << 20;

/// Host memory that the system can write to disk; undefined where there is no room.
at::Tensor file_memory(size_t nbytes) {
  std::string name = ArtifactStore::get().folder() + "/check-XXXXXX";
  const int file = ::mkstemp(name.data());
  if (file < 0) return {};
  ::unlink(name.c_str());
  void* memory = MAP_FAILED;
  // Without the blocks in advance, a full disk would be a signal later.
  if (::posix_fallocate(file, 0, static_cast<off_t>(nbytes)) == 0) {
    memory = ::mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  }
  ::close(file);
  if (memory == MAP_FAILED) return {};
  return at::from_blob(
      memory, {static_cast<int64_t>(nbytes)}, [nbytes](void* m) { ::munmap(m, nbytes); },
      at::TensorOptions().dtype(c10::kByte));
}

/// A copy of a tensor in host memory, with the same geometry where its elements are dense.
at::Tensor park(const at::Tensor& tensor) {
  const size_t nbytes = static_cast<size_t>(tensor.numel()) * tensor.itemsize();
  at::Tensor memory = nbytes < kWorthAFile ? at::Tensor() : file_memory(nbytes);
  const auto options = tensor.options().device(c10::kCPU);
  at::Tensor copy;
  if (memory.defined()) {
    copy = at::empty({0}, options).set_(memory.storage(), 0, tensor.sizes(),
                                        tensor.is_non_overlapping_and_dense()
                                            ? tensor.strides()
                                            : at::IntArrayRef(at::infer_dense_strides(
                                                  tensor.sizes(), tensor.strides())));
  } else {
    copy = at::empty_like(tensor, options);
  }
  return copy.copy_(tensor);
}

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
  const at::Tensor plain = tensor.resolve_conj().resolve_neg();
  return plain.is_non_overlapping_and_dense()
             ? plain.as_strided({plain.numel()}, {1}, plain.storage_offset())
             : plain.reshape({-1});
}

at::Tensor wide(const at::Tensor& chunk) {
  return chunk.to(at::TensorOptions().device(c10::kCPU).dtype(
      chunk.is_complex() ? c10::kComplexDouble : c10::kDouble));
}

/// Calls `visit(a, b)` with pieces of both, as wide numbers on the host.
template <class Visit>
void for_each_chunk(const at::Tensor& a, const at::Tensor& b, const Visit& visit) {
  const at::Tensor x = flat(a), y = flat(b);
  for (int64_t at = 0; at < x.numel(); at += kChunk) {
    visit(wide(x.slice(0, at, at + kChunk)), wide(y.slice(0, at, at + kChunk)));
  }
}

/// |a - b|; 0 where both are the same, infinite where one is no finite number.
at::Tensor distance(const at::Tensor& a, const at::Tensor& b) {
  const auto same = (a == b).logical_or(a.isnan().logical_and(b.isnan()));
  return at::nan_to_num((a - b).abs(), INFINITY, INFINITY).masked_fill(same, 0);
}

double largest_distance(const at::Tensor& a, const at::Tensor& b) {
  double largest = 0;
  for_each_chunk(a, b, [&](const at::Tensor& x, const at::Tensor& y) {
    largest = std::max(largest, distance(x, y).max().item<double>());
  });
  return largest;
}

/// What a few hundred roundings make of a number of this dtype, relative to it.
double tolerance_of(c10::ScalarType dtype) {
  switch (c10::toRealValueType(dtype)) {
    case c10::kDouble:
      return 1e-9;
    case c10::kFloat:
      return 1e-4;
    case c10::kHalf:
      return 1e-2;
    default:
      return c10::isFloatingType(c10::toRealValueType(dtype)) ? 5e-2 : 0;
  }
}

/// Every element of `actual` is within `tolerance` of itself and of the root mean square
/// of all, and of `allowed` beyond.
bool close(const at::Tensor& actual, const at::Tensor& expected, double tolerance, double allowed) {
  double squares = 0;
  for_each_chunk(expected, expected, [&](const at::Tensor& x, const at::Tensor&) {
    squares += at::nan_to_num(x.abs(), 0, 0, 0).square().sum().item<double>();
  });
  const double scale =
      std::sqrt(squares / static_cast<double>(std::max<int64_t>(expected.numel(), 1)));
  bool all = true;
  for_each_chunk(actual, expected, [&](const at::Tensor& x, const at::Tensor& y) {
    const auto limit = at::nan_to_num(y.abs(), 0, 0, 0) * tolerance + (tolerance * scale + allowed);
    all = all && (distance(x, y) <= limit).all().item<bool>();
  });
  return all;
}

/// The distance from 1 to the next number; 0 where there are no fractions.
double unit_of(c10::ScalarType dtype) {
  switch (c10::toRealValueType(dtype)) {
    case c10::kDouble:
      return 0x1p-52;
    case c10::kFloat:
      return 0x1p-23;
    case c10::kHalf:
      return 0x1p-10;
    case c10::kBFloat16:
      return 0x1p-7;
    default:
      return 0;
  }
}

double largest_of(const at::Tensor& tensor) {
  double largest = 0;
  for_each_chunk(tensor, tensor, [&](const at::Tensor& x, const at::Tensor&) {
    largest = std::max(largest, at::nan_to_num(x.abs(), 0, 0, 0).max().item<double>());
  });
  return largest;
}

/// Multiplies each element by one plus a few units in the last place.
void disturb(const at::Tensor& tensor, at::Generator& generator) {
  const double unit = unit_of(tensor.scalar_type());
  if (unit == 0) return;
  if (!tensor.is_non_overlapping_and_dense()) return;
  const at::Tensor all = flat(tensor);
  for (int64_t at = 0; at < all.numel(); at += kChunk) {
    const at::Tensor chunk = all.slice(0, at, at + kChunk);
    const at::Tensor error = at::rand(chunk.sizes(), generator, c10::kDouble);
    chunk.copy_(wide(chunk) * (1 + (error * 2 - 1) * (2 * unit)));
  }
}

/// A value that program and interpreter both make.
struct Value {
  uint32_t slot = 0;
  bool written_input = false;
  Geometry geometry;
  at::Tensor before;  ///< of a written input
  at::Tensor program, interpreter;
};

class Check {
 public:
  Check(Program& program, Segment& segment) : program_(program), segment_(segment) {}

  std::optional<std::string> run() {
    for (const ProgramInput& input : program_.inputs) {
      if (input.kind == ProgramInput::Kind::kSlot) dtypes_[input.index] = input.geometry.dtype;
    }
    for (const at::Tensor& numbers : segment_.random) random_.push_back(park(numbers));
    const auto problem = run_program_first();
    interpret(program_.steps, segment_);
    if (problem) return problem;
    take_interpreters();
    if (!differing(/*with_noise=*/false)) return std::nullopt;
    measure_noise();
    const Value* value = differing(/*with_noise=*/true);
    if (value == nullptr) return std::nullopt;
    const auto place = static_cast<size_t>(value - values_.data());
    return c10::str("its first run differed from the interpreter's: ",
                    value->written_input ? "the written input in slot " : "the output in slot ",
                    value->slot, " (", value->geometry.dtype, value->program.sizes(), ") by ",
                    largest_distance(value->program, value->interpreter), ", where rounding explains ",
                    noise_[place]);
  }

 private:
  /// Leaves the inputs as they were. Returns why the program cannot run.
  std::optional<std::string> run_program_first() {
    for (const StepPtr& step : program_.steps) {
      for (const uint32_t slot : step->written_inputs) {
        Value value;
        value.slot = slot;
        value.written_input = true;
        value.geometry.dtype = dtype_of(slot);
        value.before = park(input(slot));
        values_.push_back(std::move(value));
      }
    }
    std::optional<std::string> problem;
    try {
      std::vector<at::Tensor> random;
      for (const at::Tensor& numbers : segment_.random) random.push_back(numbers.clone());
      std::vector<at::Tensor> outputs = try_program(program_, segment_, random);
      for (Value& value : values_) value.program = park(input(value.slot));
      for (size_t k = 0; k < outputs.size(); ++k) {
        const ProgramOutput& output = program_.outputs[k];
        Value value;
        value.slot = output.slot;
        value.geometry = output.geometry;
        value.program = park(std::exchange(outputs[k], at::Tensor()));
        values_.push_back(std::move(value));
      }
    } catch (const std::exception& error) {
      problem = error.what();
    }
    for (const Value& value : values_) {
      if (value.written_input) input(value.slot).copy_(value.before);
    }
    return problem;
  }

  void take_interpreters() {
    std::vector<Value> held;
    for (Value& value : values_) {
      if (value.written_input) {
        value.interpreter = input(value.slot);
      } else if (const auto lazy = segment_.lock(value.slot)) {
        value.interpreter = backing_tensor(lazy->backing(), value.geometry);
      } else {
        continue;
      }
      held.push_back(std::move(value));
    }
    values_ = std::move(held);
    noise_.assign(values_.size(), 0);
  }

  const Value* differing(bool with_noise) const {
    for (size_t k = 0; k < values_.size(); ++k) {
      const Value& value = values_[k];
      // Beside what disturbed values show there is what an op loses inside, where a
      // softmax of nearly 1 is taken from 1, say: units of the largest number there is.
      const double lost = unit_of(value.geometry.dtype) * largest_;
      const double allowed = with_noise ? 8 * (noise_[k] + lost) : 0;
      if (!close(value.program, value.interpreter, tolerance_of(value.geometry.dtype), allowed)) {
        return &value;
      }
    }
    return nullptr;
  }

  void measure_noise() {
    constexpr uint64_t kRuns = 4;
    for (uint64_t run = 0; run < kRuns; ++run) {
      auto generator = at::make_generator<at::CPUGeneratorImpl>(run);
      std::vector<c10::Storage> storages(segment_.size());
      for (uint32_t slot = 0; slot < segment_.size(); ++slot) {
        if (segment_.is_created(slot)) continue;
        at::Tensor copy = input(slot).clone();
        for (const Value& value : values_) {
          if (value.written_input && value.slot == slot) copy.copy_(value.before);
        }
        disturb(copy, generator);
        storages[slot] = copy.storage();
      }
      std::vector<at::Tensor> random;
      for (const at::Tensor& numbers : random_) {
        random.push_back(numbers.to(backing_device_of(program_.device_index), numbers.scalar_type(),
                                    /*non_blocking=*/false, /*copy=*/true));
      }
      std::unordered_map<uint32_t, c10::Storage> created;
      run_steps(program_.steps, segment_, storages, random,
                [&](uint32_t slot, const at::Tensor& tensor) {
                  if (run == 0 && unit_of(tensor.scalar_type()) != 0) {
                    largest_ = std::max(largest_, largest_of(tensor));
                  }
                  disturb(tensor, generator);
                  created[slot] = tensor.storage();
                });
      for (size_t k = 0; k < values_.size(); ++k) {
        const Value& value = values_[k];
        const at::Tensor disturbed =
            value.written_input ? elements(storages[value.slot], value.geometry.dtype)
                                : backing_tensor(created.at(value.slot), value.geometry);
        noise_[k] = std::max(noise_[k], largest_distance(disturbed, value.interpreter));
      }
    }
  }

  c10::ScalarType dtype_of(uint32_t slot) const {
    const auto found = dtypes_.find(slot);
    const c10::ScalarType dtype = found == dtypes_.end() ? c10::kByte : found->second;
    const bool whole = segment_.at(slot)->backing().nbytes() % c10::elementSize(dtype) == 0;
    return whole && !c10::isQIntType(dtype) ? dtype : c10::kByte;
  }
  /// The whole of an input's storage.
  at::Tensor input(uint32_t slot) const {
    return elements(segment_.at(slot)->backing(), dtype_of(slot));
  }

  Program& program_;
  Segment& segment_;
  std::unordered_map<uint32_t, c10::ScalarType> dtypes_;  ///< of inputs
  std::vector<at::Tensor> random_;  ///< what the random steps drew
  std::vector<Value> values_;
  double largest_ = 0;         ///< number that a step has made
  std::vector<double> noise_;  ///< of each value: how far disturbed runs were off
};

}  // namespace

std::optional<std::string> check_program(Program& program, Segment& segment) {
  return Check(program, segment).run();
}

}  // namespace reprise
