#include "lazy_backend/trace.h"

#include "lazy_backend/mix_hash.h"
#include "lazy_backend/schema_type.h"

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <compare>
#include <cstring>
#include <limits>

namespace reprise {

Geometry::Geometry(const c10::TensorImpl& tensor)
    : offset(tensor.storage_offset()),
      rank(static_cast<uint32_t>(tensor.dim())),
      dtype(tensor.dtype().toScalarType()),
      conjugate(tensor.is_conj()),
      negative(tensor.is_neg()) {
  dims.reserve(2 * rank);
  dims.append(tensor.sizes().begin(), tensor.sizes().end());
  dims.append(tensor.strides().begin(), tensor.strides().end());
}

bool Geometry::matches(const c10::TensorImpl& tensor) const {
  const auto sizes = tensor.sizes();
  if (sizes.size() != rank || tensor.storage_offset() != offset ||
      tensor.dtype().toScalarType() != dtype) {
    return false;
  }
  const auto strides = tensor.strides();
  const int64_t* recorded = dims.data();
  for (uint32_t k = 0; k < rank; ++k) {
    if (recorded[k] != sizes[k] || recorded[rank + k] != strides[k]) return false;
  }
  const auto keys = tensor.key_set();
  return keys.has(c10::DispatchKey::Conjugate) == conjugate &&
         keys.has(c10::DispatchKey::Negative) == negative;
}

bool Geometry::operator==(const Geometry& other) const {
  return rank == other.rank && dims == other.dims && offset == other.offset &&
         dtype == other.dtype && conjugate == other.conjugate && negative == other.negative;
}

std::shared_ptr<const Geometry> shared_geometry(Geometry geometry) {
  // The last ones, by their hash. Steps may still be made when the thread's objects are gone.
  constexpr size_t kPlaces = 1024;
  thread_local bool gone = false;
  struct Known {
    std::vector<std::shared_ptr<const Geometry>> places{kPlaces};
    ~Known() { gone = true; }
  };
  thread_local Known known;
  if (C10_UNLIKELY(gone)) return std::make_shared<const Geometry>(std::move(geometry));
  uint64_t hash = static_cast<uint64_t>(geometry.offset) << 8 | static_cast<uint64_t>(geometry.dtype);
  for (const int64_t dim : geometry.dims) hash = mix_hash(hash, static_cast<uint64_t>(dim));
  auto& place = known.places[hash % kPlaces];
  if (place == nullptr || !(*place == geometry) || place->fixed != geometry.fixed) {
    place = std::make_shared<const Geometry>(std::move(geometry));
  }
  return place;
}

size_t Geometry::nbytes() const {
  int64_t last = offset;
  for (uint32_t k = 0; k < rank; ++k) {
    if (dims[k] == 0) return 0;
    last += (dims[k] - 1) * dims[rank + k];
  }
  return static_cast<size_t>(last + 1) * c10::elementSize(dtype);
}

bool Geometry::lies_like(const Geometry& other) const {
  if (rank != other.rank || dtype != other.dtype || conjugate != other.conjugate ||
      negative != other.negative || fixed != other.fixed) {
    return false;
  }
  for (uint32_t k = 0; k < rank && fixed != 0; ++k) {
    if (((fixed >> k) & 1) != 0 && dims[k] != other.dims[k]) return false;
  }
  // The stride of a dimension of one element is arbitrary.
  const auto counts = [&](uint32_t k) { return dims[k] > 1 && other.dims[k] > 1; };
  for (uint32_t a = 0; a < rank; ++a) {
    if (!counts(a)) continue;
    for (uint32_t b = a + 1; b < rank; ++b) {
      if (!counts(b)) continue;
      const auto order = dims[rank + a] <=> dims[rank + b];
      if (order != other.dims[rank + a] <=> other.dims[rank + b]) return false;
    }
  }
  return true;
}

namespace {

bool same_bits(double a, double b) {
  return std::bit_cast<uint64_t>(a) == std::bit_cast<uint64_t>(b);
}

/// Compares constants of the kinds that `Arg::kConstant` holds. Only tensors of
/// no dimension are among them, compared by bytes.
bool same_constant(const c10::IValue& a, const c10::IValue& b) {
  if (a.isTensor()) {
    if (!b.isTensor()) return false;
    const at::Tensor &x = a.toTensor(), &y = b.toTensor();
    return x.dtype() == y.dtype() &&
           x.unsafeGetTensorImpl()->is_wrapped_number() ==
               y.unsafeGetTensorImpl()->is_wrapped_number() &&
           std::memcmp(x.const_data_ptr(), y.const_data_ptr(), x.itemsize()) == 0;
  }
  if (a.isDouble()) return b.isDouble() && same_bits(a.toDouble(), b.toDouble());
  if (a.isDoubleList()) {
    if (!b.isDoubleList()) return false;
    const auto x = a.toDoubleVector(), y = b.toDoubleVector();
    return x.size() == y.size() &&
           (x.empty() || std::memcmp(x.data(), y.data(), x.size() * sizeof(double)) == 0);
  }
  if (a.isList()) {
    if (!b.isList()) return false;
    const auto x = a.toListRef(), y = b.toListRef();
    if (x.size() != y.size()) return false;
    for (size_t k = 0; k < x.size(); ++k) {
      if (!same_constant(x[k], y[k])) return false;
    }
    return true;
  }
  if (a.tagKind() != b.tagKind()) return false;
  return a == b;
}

}  // namespace

bool Arg::is_float() const {
  return kind == Kind::kDouble ||
         (kind == Kind::kNumber && constant().toTensor().scalar_type() == c10::kDouble);
}

double Arg::number() const {
  return kind == Kind::kNumber ? constant().toTensor().item<double>() : d;
}

bool Arg::same(const Arg& other, bool floats_may_differ) const {
  if (kind != other.kind) return false;
  switch (kind) {
    case Kind::kNone:
    case Kind::kUndefined:
      return true;
    case Kind::kTensor:
      return slot == other.slot && first_use == other.first_use &&
             geometry() == other.geometry();
    case Kind::kInt:
      return i == other.i;
    case Kind::kBool:
      return b == other.b;
    case Kind::kDouble:
      return dynamic || other.dynamic || floats_may_differ || same_bits(d, other.d);
    case Kind::kNumber: {
      const at::Tensor &x = constant().toTensor(), &y = other.constant().toTensor();
      if (x.scalar_type() == c10::kDouble && y.scalar_type() == c10::kDouble &&
          x.unsafeGetTensorImpl()->is_wrapped_number() ==
              y.unsafeGetTensorImpl()->is_wrapped_number() &&
          (dynamic || other.dynamic || floats_may_differ)) {
        return true;
      }
      return same_constant(constant(), other.constant());
    }
    case Kind::kList: {
      if (list().size() != other.list().size()) return false;
      for (size_t k = 0; k < list().size(); ++k) {
        if (!list()[k].same(other.list()[k], floats_may_differ)) return false;
      }
      return true;
    }
    case Kind::kIntList:
      return ints() == other.ints();
    case Kind::kDevice:
    case Kind::kConstant:
      return same_constant(constant(), other.constant());
    case Kind::kOpaque:
      return false;
  }
  return false;
}

bool Arg::alike(const Arg& other, bool floats_may_differ) const {
  if (kind != other.kind) return false;
  switch (kind) {
    case Kind::kTensor:
      return slot == other.slot && first_use == other.first_use &&
             geometry().lies_like(other.geometry());
    case Kind::kInt:
      return true;
    case Kind::kNumber: {
      const at::Tensor &x = constant().toTensor(), &y = other.constant().toTensor();
      const auto is_integer = [](const at::Tensor& t) {
        return t.scalar_type() == c10::kLong && t.unsafeGetTensorImpl()->is_wrapped_number();
      };
      return (is_integer(x) && is_integer(y)) || same(other, floats_may_differ);
    }
    case Kind::kIntList:
      return ints().size() == other.ints().size();
    case Kind::kList:
      return std::equal(list().begin(), list().end(), other.list().begin(), other.list().end(),
                        [&](const Arg& a, const Arg& b) { return a.alike(b, floats_may_differ); });
    default:
      return same(other, floats_may_differ);
  }
}

bool Result::alike(const Result& other) const {
  if (kind != other.kind || slot != other.slot || arg != other.arg) return false;
  if ((geometry == nullptr) != (other.geometry == nullptr)) return false;
  if (geometry && !geometry->lies_like(*other.geometry)) return false;
  if (kind == Kind::kConstant) return same_constant(constant, other.constant);
  return kind != Kind::kList ||
         std::equal(list->begin(), list->end(), other.list->begin(), other.list->end(),
                    [](const Result& a, const Result& b) { return a.alike(b); });
}

bool Result::same(const Result& other) const {
  if (kind != other.kind || slot != other.slot || arg != other.arg || nbytes != other.nbytes) {
    return false;
  }
  if ((geometry == nullptr) != (other.geometry == nullptr)) return false;
  if (geometry && !(*geometry == *other.geometry)) return false;
  if (kind == Kind::kConstant) return same_constant(constant, other.constant);
  if (kind == Kind::kList) {
    if (list->size() != other.list->size()) return false;
    for (size_t k = 0; k < list->size(); ++k) {
      if (!(*list)[k].same((*other.list)[k])) return false;
    }
  }
  return true;
}

bool may_be_dynamic(const Step& step, size_t k) {
  const Arg& arg = step.args[k];
  if (step.constant_floats) return false;
  if (arg.kind == Arg::Kind::kNumber) return true;
  if (arg.kind != Arg::Kind::kDouble) return false;
  const auto type = without_optional(step.op.schema().arguments()[k].type());
  return type->kind() == c10::TypeKind::NumberType;
}

namespace {

template <class T>
bool within(double number) {
  return number >= static_cast<double>(std::numeric_limits<T>::lowest()) &&
         number <= static_cast<double>(std::numeric_limits<T>::max());
}

}  // namespace

bool can_hold(c10::ScalarType dtype, double number) {
  switch (dtype) {
    case c10::ScalarType::Bool: return true;
    case c10::ScalarType::Byte: return within<uint8_t>(number);
    case c10::ScalarType::Char: return within<int8_t>(number);
    case c10::ScalarType::Short: return within<int16_t>(number);
    case c10::ScalarType::Int: return within<int32_t>(number);
    // The largest of them is no float64.
    case c10::ScalarType::Long: return number >= -0x1p63 && number < 0x1p63;
    case c10::ScalarType::Half: return !std::isfinite(number) || within<c10::Half>(number);
    case c10::ScalarType::BFloat16: return !std::isfinite(number) || within<c10::BFloat16>(number);
    case c10::ScalarType::Float: return !std::isfinite(number) || within<float>(number);
    case c10::ScalarType::Double: return true;
    default: return false;
  }
}

bool can_hold(c10::ScalarType dtype, int64_t number) {
  constexpr int64_t kMost = int64_t{1} << std::numeric_limits<double>::digits;
  return number >= -kMost && number <= kMost && can_hold(dtype, static_cast<double>(number));
}

bool is_amount(const c10::Argument& declared) {
  if (declared.name().starts_with("dim")) return false;
  auto type = without_optional(declared.real_type());
  if (const auto list = type->cast<c10::ListType>()) type = list->getElementType();
  const auto kind = type->kind();
  return kind == c10::TypeKind::IntType || kind == c10::TypeKind::SymIntType ||
         kind == c10::TypeKind::NumberType;
}

bool Step::takes_alike(const Step& other, bool floats_may_differ) const {
  if (op != other.op || args.size() != other.args.size() || first_slot != other.first_slot ||
      device_index != other.device_index) {
    return false;
  }
  for (size_t k = 0; k < args.size(); ++k) {
    if (!args[k].alike(other.args[k], floats_may_differ)) return false;
    const bool integers = args[k].kind == Arg::Kind::kInt || args[k].kind == Arg::Kind::kIntList;
    if (integers && !args[k].same(other.args[k], false) &&
        !is_amount(op.schema().arguments()[k])) {
      return false;
    }
  }
  return true;
}

bool Step::alike(const Step& other, bool floats_may_differ) const {
  return slot_count == other.slot_count && takes_alike(other, floats_may_differ) &&
         std::equal(results.begin(), results.end(), other.results.begin(), other.results.end(),
                    [](const Result& a, const Result& b) { return a.alike(b); });
}

std::shared_ptr<Step> with_dynamic_floats(const Step& step, const Step& other) {
  auto general = std::make_shared<Step>(step);
  for (size_t k = 0; k < step.args.size(); ++k) {
    if (step.args[k].alike(other.args[k], /*floats_may_differ=*/false)) continue;
    if (!may_be_dynamic(step, k)) return nullptr;  // within a list, say
    general->args[k].dynamic = true;
  }
  return general;
}

namespace {

/// Puts the values of expressions in the places of a step's integers.
class Evaluation {
 public:
  explicit Evaluation(std::span<const int64_t> symbols) : symbols_(symbols) {}

  bool complete() const { return complete_; }

  Geometry geometry(const Geometry& now, const std::vector<Expression>& expressions) {
    Geometry out = now;
    for (size_t k = 0; k < expressions.size(); ++k) {
      (k < out.dims.size() ? out.dims[k] : out.offset) = value(expressions[k], /*least=*/0);
    }
    return out;
  }

  void numbers(Arg& arg, const std::vector<Expression>& expressions) {
    if (expressions.empty()) return;
    if (arg.kind == Arg::Kind::kInt) {
      arg.i = value(expressions[0], INT64_MIN);
    } else if (arg.kind == Arg::Kind::kIntList) {
      std::vector<int64_t> ints;
      for (const Expression& each : expressions) ints.push_back(value(each, INT64_MIN));
      c10::IValue boxed(ints);
      arg.set_ints(std::move(ints), std::move(boxed));
    } else {
      complete_ = false;
    }
  }

  void tensors(std::vector<Arg>& args, const std::vector<std::vector<Expression>>& expressions,
               size_t& next) {
    for (Arg& arg : args) {
      if (arg.kind == Arg::Kind::kTensor) {
        const auto& own = expressions[next++];
        if (!own.empty()) arg.set_geometry(geometry(arg.geometry(), own));
      } else if (arg.kind == Arg::Kind::kList) {
        std::vector<Arg> items = arg.list();
        tensors(items, expressions, next);
        arg.set_list(std::move(items));
      }
    }
  }

  void results(std::vector<Result>& all, const std::vector<std::vector<Expression>>& expressions,
               size_t& next) {
    for (Result& result : all) {
      if (result.kind == Result::Kind::kNew || result.kind == Result::Kind::kAlias) {
        const auto& own = expressions[next++];
        result.symbolic = nullptr;
        if (own.empty()) continue;
        result.geometry = shared_geometry(geometry(*result.geometry, own));
        if (result.kind == Result::Kind::kNew) result.nbytes = result.geometry->nbytes();
      } else if (result.kind == Result::Kind::kList) {
        auto items = std::make_shared<std::vector<Result>>(*result.list);
        results(*items, expressions, next);
        result.list = std::move(items);
      }
    }
  }

 private:
  int64_t value(const Expression& expression, int64_t least) {
    const auto found = expression.evaluate(symbols_);
    complete_ = complete_ && found.has_value() && *found >= least;
    return found.value_or(0);
  }

  const std::span<const int64_t> symbols_;
  bool complete_ = true;
};

}  // namespace

std::shared_ptr<Step> at_symbols(const Step& step, std::span<const int64_t> symbols) {
  auto out = std::make_shared<Step>(step);
  out->symbolic = nullptr;
  if (step.symbolic == nullptr) return out;
  Evaluation evaluation(symbols);
  for (size_t k = 0; k < step.symbolic->numbers.size(); ++k) {
    evaluation.numbers(out->args[k], step.symbolic->numbers[k]);
  }
  size_t next = 0;
  evaluation.tensors(out->args, step.symbolic->arguments, next);
  next = 0;
  if (!step.symbolic->results.empty()) {
    evaluation.results(out->results, step.symbolic->results, next);
  }
  return evaluation.complete() ? out : nullptr;
}

StepPtr taking_dynamic_floats(StepPtr step, const Step& like) {
  std::shared_ptr<Step> changed;
  for (size_t k = 0; k < like.args.size(); ++k) {
    if (!like.args[k].dynamic || step->args[k].dynamic) continue;
    if (!changed) changed = std::make_shared<Step>(*step);
    changed->args[k].dynamic = true;
  }
  if (changed) return changed;
  return step;
}

bool alike(std::span<const StepPtr> a, std::span<const StepPtr> b, bool floats_may_differ) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [&](const StepPtr& x, const StepPtr& y) {
    return x->alike(*y, floats_may_differ);
  });
}

std::vector<StepPtr> without_unused_views(std::span<const StepPtr> steps) {
  const auto is_view = [](const StepPtr& step) { return step->only_aliases && step->slot_count == 0; };
  if (std::none_of(steps.begin(), steps.end(), is_view)) return {steps.begin(), steps.end()};
  uint32_t slots = 0;
  for (const StepPtr& step : steps) slots = std::max(slots, step->first_slot + step->slot_count);
  std::vector<c10::SmallVector<const Geometry*, 2>> used(slots);
  const auto is_used = [&](uint32_t slot, const Geometry& geometry) {
    return std::any_of(used[slot].begin(), used[slot].end(), [&](const Geometry* other) {
      return other == &geometry || *other == geometry;
    });
  };
  std::vector<StepPtr> kept;
  kept.reserve(steps.size());
  for (size_t k = steps.size(); k-- > 0;) {
    const Step& step = *steps[k];
    // One that is the first to meet a storage gives it its number.
    bool wanted = !is_view(steps[k]);
    if (!wanted) {
      const auto is_argument = [&](const Result& result) {  // `detach`
        bool found = false;
        for_each_tensor(step.args, [&](const Arg& arg) {
          found = found || (arg.slot == result.slot && arg.geometry() == *result.geometry);
        });
        return found;
      };
      for_each_result(step.results, [&](const Result& result) {
        wanted = wanted || (is_used(result.slot, *result.geometry) && !is_argument(result));
      });
      if (!wanted) continue;
      // An earlier view that is the same is for those before this one.
      for_each_result(step.results, [&](const Result& result) {
        auto& all = used[result.slot];
        const auto is_it = [&](const Geometry* other) { return *other == *result.geometry; };
        all.erase(std::remove_if(all.begin(), all.end(), is_it), all.end());
      });
    }
    for_each_tensor(step.args, [&](const Arg& arg) {
      if (!is_used(arg.slot, arg.geometry())) used[arg.slot].push_back(&arg.geometry());
    });
    kept.push_back(steps[k]);
  }
  std::reverse(kept.begin(), kept.end());
  return kept;
}

bool Step::same(const Step& other, bool floats_may_differ) const {
  if (op != other.op || args.size() != other.args.size() ||
      results.size() != other.results.size() || first_slot != other.first_slot ||
      slot_count != other.slot_count || device_index != other.device_index) {
    return false;
  }
  for (size_t k = 0; k < args.size(); ++k) {
    if (!args[k].same(other.args[k], floats_may_differ)) return false;
  }
  for (size_t k = 0; k < results.size(); ++k) {
    if (!results[k].same(other.results[k])) return false;
  }
  return true;
}

}  // namespace reprise
