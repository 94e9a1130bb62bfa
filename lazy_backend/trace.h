/// \file
/// What is written down of a program: steps over slots.
///
/// A *slot* is a storage, numbered in the order in which the segment meets it.
/// Slots are external (an input of the segment) or created by a step. A *step*
/// is one call of an op below autograd: the op, its arguments, its results. The
/// program stays imperative: mutation and aliasing are written down as they
/// happen. Steps are immutable once written; they are shared between the trace
/// tree and what is being compiled from it.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>
#include <c10/core/ScalarType.h>
#include <c10/util/SmallVector.h>

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "symint/expression.h"

namespace reprise {

class SymbolicShape;

/// How a tensor lies over its storage. Sizes, strides and offset in elements.
struct Geometry {
  /// Sizes, then strides.
  c10::SmallVector<int64_t, 8> dims;
  int64_t offset = 0;
  uint32_t rank = 0;
  /// Bit k: the size of dimension k was marked as static. Equality knows nothing of it.
  uint32_t fixed = 0;
  c10::ScalarType dtype = c10::ScalarType::Undefined;
  bool conjugate = false;
  bool negative = false;

  Geometry() = default;
  explicit Geometry(const c10::TensorImpl& tensor);

  c10::IntArrayRef sizes() const { return {dims.data(), rank}; }
  c10::IntArrayRef strides() const { return {dims.data() + rank, rank}; }
  bool matches(const c10::TensorImpl& tensor) const;
  bool operator==(const Geometry&) const;

  /// The bytes of the smallest storage that holds such a tensor.
  size_t nbytes() const;

  /// The same but for integers: rank, dtype, bits, and which dimension has the larger
  /// stride. Sizes that were marked as static are the same too.
  bool lies_like(const Geometry& other) const;
};

/// The same, perhaps as the one object of several places: a trace has few geometries, and what
/// verification reads of it should stay in the caches.
std::shared_ptr<const Geometry> shared_geometry(Geometry geometry);

/// An argument as recorded.
struct Arg {
  enum class Kind : uint8_t {
    kNone,
    kUndefined, ///< an undefined tensor
    kTensor,    ///< a lazy tensor: `slot` and `geometry()`
    kInt,       ///< also dtype, layout and memory format, which are ints when boxed
    kBool,
    kDouble,    ///< in a `float` or `Scalar` argument
    kNumber,    ///< a 0-dim CPU tensor: `constant()`, and `d` where it is a float64 one
    kList,      ///< a list of arguments
    kIntList,
    kDevice,    ///< a device, always mapped to the backing device when run
    kConstant,  ///< anything else that can be compared: `constant()`
    kOpaque,    ///< what cannot be compared (a generator, a stream): never matches
  };

  Kind kind = Kind::kNone;
  /// kTensor: the segment meets this slot here for the first time.
  bool first_use = false;
  /// kDouble and kNumber: any value will do; the value is an input of the program.
  bool dynamic = false;
  /// kDouble: what the op casts it to (`OpPolicy::cast_argument`), so that an integer or a
  /// Boolean of its value does the same; otherwise `Undefined`.
  c10::ScalarType cast = c10::ScalarType::Undefined;
  uint32_t slot = 0;
  union {
    int64_t i = 0;
    double d;
    bool b;
  };

  /// Whether it is kDouble, or kNumber with a float64 tensor.
  bool is_float() const;
  /// Of kDouble and kNumber, the value when it was recorded.
  double number() const;
  const Geometry& geometry() const { return *static_cast<const Geometry*>(data_.get()); }
  const c10::IValue& constant() const { return *static_cast<const c10::IValue*>(data_.get()); }
  const std::vector<Arg>& list() const {
    return *static_cast<const std::vector<Arg>*>(data_.get());
  }
  c10::IntArrayRef ints() const { return static_cast<const Ints*>(data_.get())->values; }
  const c10::IValue& boxed_ints() const { return static_cast<const Ints*>(data_.get())->boxed; }

  void set_geometry(Geometry geometry) {
    data_ = shared_geometry(std::move(geometry));
  }
  void set_constant(c10::IValue value) {
    data_ = std::make_shared<const c10::IValue>(std::move(value));
  }
  void set_list(std::vector<Arg> list) {
    data_ = std::make_shared<const std::vector<Arg>>(std::move(list));
  }
  void set_ints(std::vector<int64_t> ints, c10::IValue boxed) {
    data_ = std::make_shared<const Ints>(Ints{std::move(ints), std::move(boxed)});
  }

  /// Equal, or equal but for the values of floats when `floats_may_differ`.
  bool same(const Arg& other, bool floats_may_differ) const;
  /// As above, integers apart: those of geometries too.
  bool alike(const Arg& other, bool floats_may_differ) const;

 private:
  struct Ints {
    std::vector<int64_t> values;
    c10::IValue boxed;  // the same, ready for the stack
  };
  std::shared_ptr<const void> data_;  // what `kind` says
};

/// A result as recorded.
struct Result {
  enum class Kind : uint8_t {
    kNone,      ///< an undefined tensor
    kNew,       ///< a tensor over a storage that the step created
    kAlias,     ///< a tensor over a storage that was there before
    kArgument,  ///< the same tensor as argument `arg` (in-place and out ops)
    kList,
    kConstant,  ///< a number that the op returns beside tensors
  };
  Kind kind = Kind::kNone;
  uint32_t slot = 0;
  /// kArgument: which; kAlias: the argument whose storage it is, or -1.
  int32_t arg = -1;
  size_t nbytes = 0;  ///< kNew: of the storage
  c10::DeviceIndex device_index = 0;
  std::shared_ptr<const Geometry> geometry;
  /// Null where its sizes are plain numbers.
  std::shared_ptr<const SymbolicShape> symbolic;
  std::shared_ptr<const std::vector<Result>> list;
  c10::IValue constant;

  bool same(const Result& other) const;
  /// Equal but for integers.
  bool alike(const Result& other) const;
};

/// What a step's integers are over the symbols of marked sizes (reprise/dynamic.h).
struct SymbolicStep {
  /// Of each tensor argument and each tensor result, as `for_each_tensor` and
  /// `for_each_result` count them: sizes, strides, offset. Empty: they are constants.
  std::vector<std::vector<Expression>> arguments, results;
  /// Of each argument that is an integer or a list of them. Empty: constants.
  std::vector<std::vector<Expression>> numbers;
  /// Bit k: the op is possible at trial k (`SymbolicTrace`).
  uint32_t possible = 0;
};

/// How a step's random numbers can be made before its program runs.
enum class Randomness : uint8_t {
  kNone,
  kFills,    ///< overwrites argument 0 with numbers that depend on its geometry only
  kCreates,  ///< makes a tensor that depends on its arguments' geometry only
};

struct Step {
  c10::OperatorHandle op;
  std::vector<Arg> args;
  std::vector<Result> results;
  /// Slots that this step meets first: inputs in argument order, then created
  /// ones in result order.
  uint32_t first_slot = 0;
  uint32_t slot_count = 0;
  /// External slots that it writes.
  c10::SmallVector<uint32_t, 2> written_inputs;
  /// All slots that it writes.
  c10::SmallVector<uint32_t, 2> written;
  c10::DeviceIndex device_index = 0;
  Randomness randomness = Randomness::kNone;
  /// More than one of its results is an argument again.
  bool returns_arguments = false;
  /// Only makes views: nothing to run.
  bool only_aliases = false;
  /// Storages alive before this step, counted from the segment's start.
  int32_t live_before = 0;
  bool grad_mode = false;
  /// Its floats are never made inputs of a program.
  bool constant_floats = false;
  /// The geometries of its results were inferred: it was not run when it was written down.
  bool inferred = false;
  /// Null where nothing in it depends on a symbol.
  std::shared_ptr<const SymbolicStep> symbolic;

  explicit Step(c10::OperatorHandle handle) : op(handle) {}

  /// Does the same on the same slots.
  bool same(const Step& other, bool floats_may_differ) const;
  /// As above, but for integers: does the same to tensors of other sizes.
  bool alike(const Step& other, bool floats_may_differ) const;
  /// Of that, what is known before it has run.
  bool takes_alike(const Step& other, bool floats_may_differ) const;
};
using StepPtr = std::shared_ptr<const Step>;

/// Whether argument `k` can be a float that changes from call to call: a number
/// of any kind, not one that the schema declares as `float`, by which the
/// compiler chooses its code.
bool may_be_dynamic(const Step& step, size_t k);

/// Whether an integer argument is a size, a position or a count: not the name of a
/// dimension, nor a dtype, a layout or a memory format, which are integers when boxed.
bool is_amount(const c10::Argument& declared);

/// Whether tensors of `dtype` can be filled with `number`: eager throws where they cannot. Of
/// integers, all that pass are the same as floats. False for dtypes of which that is not known.
bool can_hold(c10::ScalarType dtype, double number);
bool can_hold(c10::ScalarType dtype, int64_t number);

/// `step` with those floats made dynamic that are others in `other`, a step that is alike but
/// for floats. Null where one of them cannot be.
std::shared_ptr<Step> with_dynamic_floats(const Step& step, const Step& other);

/// `step` as it is where symbol k is `symbols[k]`; null where an expression has no value
/// there, or a negative one.
std::shared_ptr<Step> at_symbols(const Step& step, std::span<const int64_t> symbols);

/// `step` with those floats dynamic that are so in `like`, which is alike but for floats.
StepPtr taking_dynamic_floats(StepPtr step, const Step& like);

/// Calls `visit(const Arg&)` for every tensor argument, those in lists included.
template <class Visit>
void for_each_tensor(const std::vector<Arg>& args, const Visit& visit) {
  for (const Arg& arg : args) {
    if (arg.kind == Arg::Kind::kTensor) visit(arg);
    if (arg.kind == Arg::Kind::kList) for_each_tensor(arg.list(), visit);
  }
}
/// Calls `visit(const Result&)` for every tensor result of a kind with a slot.
template <class Visit>
void for_each_result(const std::vector<Result>& results, const Visit& visit) {
  for (const Result& result : results) {
    if (result.kind == Result::Kind::kNew || result.kind == Result::Kind::kAlias) visit(result);
    if (result.kind == Result::Kind::kList) for_each_result(*result.list, visit);
  }
}

/// As many, each alike to its counterpart.
bool alike(std::span<const StepPtr> a, std::span<const StepPtr> b, bool floats_may_differ);

/// These steps but for views that none of them takes: a view is only metadata, and of a run of
/// them, as long as a loop that will go through it, few may be used here.
std::vector<StepPtr> without_unused_views(std::span<const StepPtr> steps);

/// The values of the dynamic scalars in the order of their places in the trace.
using ScalarValues = std::vector<double>;

}  // namespace reprise
