#include "lazy_backend/program_check.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Dispatch.h>
#include <ATen/ExpandUtils.h>
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <unordered_map>
#include <utility>
#include <vector>

#include "compiler_bridge/artifact_store.h"
#include "lazy_backend/device.h"
#include "lazy_backend/interpreter.h"
#include "lazy_backend/program_run.h"

namespace reprise {
namespace {

/// Host memory for the copies of one check, which the system can write to disk: a file
/// without a name. Ordinary memory where there is no room for one.
class Arena {
 public:
  explicit Arena(size_t nbytes) : size_(nbytes) {
    std::string name = ArtifactStore::get().folder() + "/check-XXXXXX";
    const int file = nbytes == 0 ? -1 : ::mkstemp(name.data());
    if (file < 0) return;
    ::unlink(name.c_str());
    // Without the blocks in advance, a full disk would be a signal later.
    if (::posix_fallocate(file, 0, static_cast<off_t>(nbytes)) == 0) {
      memory_ = ::mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    }
    ::close(file);
  }
  ~Arena() {
    if (memory_ != MAP_FAILED) ::munmap(memory_, size_);
  }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  static size_t needs(size_t nbytes) { return (nbytes + 63) / 64 * 64; }

  /// A copy of a tensor's elements, with its own strides where it is dense. It must not
  /// outlive the arena.
  at::Tensor park(const at::Tensor& tensor) {
    const size_t nbytes = needs(static_cast<size_t>(tensor.numel()) * tensor.itemsize());
    const auto options = at::TensorOptions().dtype(tensor.scalar_type());
    const bool fits = memory_ != MAP_FAILED && used_ + nbytes <= size_ && nbytes > 0;
    if (!fits) return at::empty_like(tensor, options).copy_(tensor);
    const auto strides = tensor.is_non_overlapping_and_dense()
                             ? tensor.strides().vec()
                             : at::infer_dense_strides(tensor.sizes(), tensor.strides());
    at::Tensor copy =
        at::from_blob(static_cast<char*>(memory_) + used_, tensor.sizes(), strides, options);
    used_ += nbytes;
    return copy.copy_(tensor);
  }

 private:
  void* memory_ = MAP_FAILED;
  size_t size_ = 0, used_ = 0;
};

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

/// How two tensors differ. Where both are the same, NaN or infinite, that is 0; where one
/// is not finite and the other another number, infinite.
struct Difference {
  double largest = 0;
  double squares = 0;           ///< of the differences
  double expected_squares = 0;  ///< of the finite numbers of the second
  double changed_squares = 0;   ///< of the second's differences from the third
  double limit_exceeded = 0;    ///< the most that an element is beyond its own limit
};

template <class T>
double number(T x) {
  return static_cast<double>(x);
}

template <class T>
void add_difference(const T* a, const T* b, const T* before, int64_t count, double relative,
                    double absolute, Difference& sum) {
  for (int64_t k = 0; k < count; ++k) {
    const double x = number(a[k]), y = number(b[k]);
    const bool finite = std::isfinite(y);
    if (finite) sum.expected_squares += y * y;
    if (before != nullptr) {
      const double change = y - number(before[k]);
      if (std::isfinite(change)) sum.changed_squares += change * change;
    }
    if (x == y || (std::isnan(x) && std::isnan(y))) continue;
    const double distance = finite && std::isfinite(x) ? std::abs(x - y)
                                                       : std::numeric_limits<double>::infinity();
    sum.largest = std::max(sum.largest, distance);
    sum.squares += distance * distance;
    sum.limit_exceeded = std::max(sum.limit_exceeded, distance - relative * std::abs(y) - absolute);
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
Difference difference(const at::Tensor& actual, const at::Tensor& expected,
                      const at::Tensor& before, double relative = 0, double absolute = 0) {
  const at::Tensor a = plain(actual), b = plain(expected);
  const at::Tensor c = before.defined() ? plain(before) : at::Tensor();
  Difference sum;
  AT_DISPATCH_ALL_TYPES_AND3(c10::kHalf, c10::kBFloat16, c10::kBool, a.scalar_type(), "difference", [&] {
    add_difference(a.const_data_ptr<scalar_t>(), b.const_data_ptr<scalar_t>(),
                   c.defined() ? c.const_data_ptr<scalar_t>() : nullptr, a.numel(), relative,
                   absolute, sum);
  });
  return sum;
}

double largest_distance(const at::Tensor& a, const at::Tensor& b) {
  return difference(a, b, {}).largest;
}

bool close(const at::Tensor& actual, const at::Tensor& expected, const at::Tensor& before,
           double allowed) {
  const Tolerance tolerance = tolerance_of(expected.scalar_type());
  const Difference all = difference(actual, expected, before);
  if (all.largest <= allowed) return true;
  if (!std::isfinite(all.largest)) return false;
  const auto count = static_cast<double>(std::max<int64_t>(expected.numel(), 1));
  if (before.defined() && all.squares <= tolerance.norm * tolerance.norm * all.changed_squares) {
    return true;
  }
  const double absolute = tolerance.elements * std::sqrt(all.expected_squares / count) + allowed;
  return difference(actual, expected, {}, tolerance.elements, absolute).limit_exceeded <= 0;
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
  const at::Tensor finite = at::nan_to_num(tensor.abs(), 0, 0, 0);
  return finite.numel() == 0 ? 0 : finite.max().item<double>();
}

/// Multiplies each element by one plus a few units in the last place.
void disturb(const at::Tensor& tensor, at::Generator& generator) {
  const double unit = unit_of(tensor.scalar_type());
  if (unit == 0 || !tensor.is_non_overlapping_and_dense()) return;
  constexpr int64_t kChunk = 1 << 14;
  const at::Tensor all = flat(tensor);
  for (int64_t at = 0; at < all.numel(); at += kChunk) {
    const at::Tensor chunk = all.slice(0, at, at + kChunk);
    const auto wide = chunk.is_complex() ? c10::kComplexDouble : c10::kDouble;
    const at::Tensor error = at::rand(chunk.sizes(), generator, c10::kDouble);
    chunk.copy_(chunk.cpu().to(wide) * (1 + (error * 2 - 1) * (2 * unit)));
  }
}

/// A value that program and interpreter both make.
struct Value {
  uint32_t slot = 0;
  bool written_input = false;
  Geometry geometry;
  at::Tensor before;  ///< of a written input
  at::Tensor program, interpreter;
  double noise = 0;  ///< how far the interpreter was off when it was disturbed
};

class Check {
 public:
  Check(Program& program, Segment& segment)
      : program_(program), segment_(segment), arena_(bytes_needed(program, segment)) {}

  std::optional<std::string> run() {
    for (const ProgramInput& input : program_.inputs) {
      if (input.kind == ProgramInput::Kind::kSlot) dtypes_[input.index] = input.geometry.dtype;
    }
    for (const at::Tensor& numbers : segment_.random) random_.push_back(arena_.park(numbers));
    const auto problem = run_program_first();
    interpret(program_.steps, segment_);
    if (problem) return problem;
    try {
      return compare();
    } catch (const std::exception& error) {
      return c10::str("it could not be compared with the interpreter: ", error.what());
    }
  }

 private:
  std::optional<std::string> compare() {
    take_interpreters();
    if (!differing(/*with_noise=*/false)) return std::nullopt;
    measure_noise();
    const Value* value = differing(/*with_noise=*/true);
    if (value == nullptr) return std::nullopt;
    return c10::str("its first run differed from the interpreter's: ",
                    value->written_input ? "the written input in slot " : "the output in slot ",
                    value->slot, " (", value->geometry.dtype, value->program.sizes(), ") by ",
                    largest_distance(value->program, value->interpreter), ", where rounding explains ",
                    value->noise);
  }

  static size_t bytes_needed(const Program& program, const Segment& segment) {
    size_t nbytes = 0;
    for (const StepPtr& step : program.steps) {
      for (const uint32_t slot : step->written_inputs) {
        nbytes += 2 * Arena::needs(segment.at(slot)->backing().nbytes());
      }
    }
    for (const ProgramOutput& output : program.outputs) {
      nbytes += Arena::needs(std::max(output.nbytes, output.geometry.nbytes()));
    }
    for (const at::Tensor& numbers : segment.random) nbytes += Arena::needs(numbers.nbytes());
    return nbytes;
  }

  /// Leaves the inputs as they were. Returns why the program cannot run.
  std::optional<std::string> run_program_first() {
    for (const StepPtr& step : program_.steps) {
      for (const uint32_t slot : step->written_inputs) {
        Value value;
        value.slot = slot;
        value.written_input = true;
        value.geometry.dtype = dtype_of(slot);
        value.before = arena_.park(input(slot));
        values_.push_back(std::move(value));
      }
    }
    std::optional<std::string> problem;
    try {
      std::vector<at::Tensor> random;
      for (const at::Tensor& numbers : segment_.random) random.push_back(numbers.clone());
      std::vector<at::Tensor> outputs = try_program(program_, segment_, random);
      for (Value& value : values_) value.program = arena_.park(input(value.slot));
      for (size_t k = 0; k < outputs.size(); ++k) {
        const ProgramOutput& output = program_.outputs[k];
        Value value;
        value.slot = output.slot;
        value.geometry = output.geometry;
        value.program = arena_.park(std::exchange(outputs[k], at::Tensor()));
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
  }

  const Value* differing(bool with_noise) const {
    for (const Value& value : values_) {
      // Beside what disturbed values show there is what an op loses inside, where a
      // softmax of nearly 1 is taken from 1, say: units of the largest number there is.
      const double lost = unit_of(value.geometry.dtype) * largest_;
      const double allowed = with_noise ? 8 * (value.noise + lost) : 0;
      if (!close(value.program, value.interpreter, value.before, allowed)) {
        return &value;
      }
    }
    return nullptr;
  }

  void measure_noise() {
    constexpr uint64_t kRuns = 4;
    for (uint64_t run = 0; run < kRuns; ++run) {
      auto generator = at::make_generator<at::CPUGeneratorImpl>(run);
      std::vector<at::Tensor> copies(segment_.size());
      for (const Value& value : values_) {
        if (value.written_input) copies[value.slot] = input(value.slot).clone().copy_(value.before);
      }
      std::vector<c10::Storage> storages(segment_.size());
      for (uint32_t slot = 0; slot < segment_.size(); ++slot) {
        if (segment_.is_created(slot)) continue;
        if (!copies[slot].defined()) copies[slot] = input(slot).clone();
        disturb(copies[slot], generator);
        storages[slot] = copies[slot].storage();
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
      for (Value& value : values_) {
        const at::Tensor disturbed =
            value.written_input ? elements(storages[value.slot], value.geometry.dtype)
                                : backing_tensor(created.at(value.slot), value.geometry);
        value.noise = std::max(value.noise, largest_distance(disturbed, value.interpreter));
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
  Arena arena_;
  std::unordered_map<uint32_t, c10::ScalarType> dtypes_;  ///< of inputs
  std::vector<at::Tensor> random_;  ///< what the random steps drew
  std::vector<Value> values_;
  double largest_ = 0;  ///< number that a step has made
};

}  // namespace

std::optional<std::string> check_program(Program& program, Segment& segment) {
  return Check(program, segment).run();
}

}  // namespace reprise
