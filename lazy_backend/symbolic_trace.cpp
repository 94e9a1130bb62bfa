#include "lazy_backend/symbolic_trace.h"

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <map>

#include "lazy_backend/storage.h"
#include "symint/general_trace.h"
#include "symint/symbolic_number.h"
#include "symint/symbols.h"

namespace reprise {
namespace {

/// Calls `visit(IValue&, Result&)` for each tensor result over a storage.
template <class Visit>
void for_each_value(std::vector<Result>& results, std::span<c10::IValue> values,
                    const Visit& visit) {
  for (size_t k = 0; k < results.size(); ++k) {
    Result& result = results[k];
    if (result.kind == Result::Kind::kNew || result.kind == Result::Kind::kAlias) {
      visit(values[k], result);
    } else if (result.kind == Result::Kind::kList) {
      std::vector<Result> items = *result.list;
      std::vector<c10::IValue> tensors(values[k].toListRef().begin(), values[k].toListRef().end());
      for_each_value(items, tensors, visit);
      c10::List<at::Tensor> list;
      for (const c10::IValue& tensor : tensors) list.push_back(tensor.toTensor());
      values[k] = std::move(list);
      result.list = std::make_shared<const std::vector<Result>>(std::move(items));
    }
  }
}

/// Whether lists among the results are as long as those among the values.
bool same_lengths(const std::vector<Result>& results, std::span<const c10::IValue> values) {
  if (results.size() != values.size()) return false;
  for (size_t k = 0; k < results.size(); ++k) {
    if (results[k].kind != Result::Kind::kList) continue;
    const auto& items = *results[k].list;
    if (!values[k].isList() || values[k].toListRef().size() != items.size()) return false;
    const auto tensors = values[k].toListRef();
    if (!same_lengths(items, {tensors.begin(), tensors.end()})) return false;
  }
  return true;
}

/// A step's arguments on the `meta` device.
class MetaArguments {
 public:
  torch::jit::Stack of(const Step& step) {
    torch::jit::Stack stack;
    for (const Arg& arg : step.args) stack.push_back(value(arg));
    return stack;
  }

 private:
  at::Tensor tensor(const Arg& arg) {
    const Geometry& geometry = arg.geometry();
    auto& storage = storages_[arg.slot];
    if (!storage) {
      storage = meta_storage(geometry.nbytes());
    } else if (storage.nbytes() < geometry.nbytes()) {
      storage.set_nbytes(geometry.nbytes());
    }
    c10::DispatchKeySet keys(c10::DispatchKey::Meta);
    if (geometry.conjugate) keys = keys.add(c10::DispatchKey::Conjugate);
    if (geometry.negative) keys = keys.add(c10::DispatchKey::Negative);
    auto impl = c10::make_intrusive<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(storage),
                                                     keys,
                                                     c10::scalarTypeToTypeMeta(geometry.dtype));
    impl->set_sizes_and_strides(geometry.sizes(), geometry.strides(), geometry.offset);
    return at::Tensor(std::move(impl));
  }

  c10::IValue value(const Arg& arg) {
    switch (arg.kind) {
      case Arg::Kind::kNone: return {};
      case Arg::Kind::kUndefined: return at::Tensor();
      case Arg::Kind::kTensor: return tensor(arg);
      case Arg::Kind::kInt: return arg.i;
      case Arg::Kind::kBool: return arg.b;
      case Arg::Kind::kDouble: return arg.d;
      case Arg::Kind::kIntList: return arg.boxed_ints();
      case Arg::Kind::kDevice: return c10::Device(c10::kMeta);
      case Arg::Kind::kNumber:
      case Arg::Kind::kConstant: return arg.constant();
      case Arg::Kind::kList: {
        const auto is_none = [](const Arg& item) { return item.kind == Arg::Kind::kNone; };
        if (std::any_of(arg.list().begin(), arg.list().end(), is_none)) {
          c10::List<std::optional<at::Tensor>> list;
          for (const Arg& item : arg.list()) {
            list.push_back(value(item).to<std::optional<at::Tensor>>());
          }
          return list;
        }
        c10::List<at::Tensor> list;
        for (const Arg& item : arg.list()) list.push_back(value(item).toTensor());
        return list;
      }
      case Arg::Kind::kOpaque: break;
    }
    TORCH_CHECK(false, "reprise: an argument of ", "an unknown kind");
  }

  std::map<uint32_t, c10::Storage> storages_;
};

bool is_plain(const std::vector<Expression>& expressions) {
  return std::all_of(expressions.begin(), expressions.end(), [](const Expression& e) {
    return e.kind() == Expression::Kind::kConstant;
  });
}

std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')); }

}  // namespace

void SymbolicTrace::mark(uint32_t symbol, int64_t value, Range range) {
  Symbol& known = symbols_[symbol];
  TORCH_CHECK_VALUE(known.segment != segment_ || known.range == range, "reprise: the size '",
                    symbol_name(symbol), "' is ", range.least, " to ", range.most,
                    " here and was ", known.range.least, " to ", known.range.most,
                    " before in this step: give two sizes two names");
  known = {value, range, segment_};
}

void SymbolicTrace::begin() {
  unnamed_ = 0;
  steps_ = 0;
  if (C10_LIKELY(symbols_.empty())) return;
  ++segment_;
  met_.clear();
  alive_ = kAllTrials;
  problem_.clear();
  guards_.clear();
}

void SymbolicTrace::take_numbers(std::span<c10::IValue> arguments) {
  numbers_.clear();
  const auto expression = [](const c10::SymInt& number) {
    const SymbolicNumber* own = SymbolicNumber::of(number);
    return own != nullptr ? own->expression()
                          : Expression::constant(SymbolicNumber::value_of(number));
  };
  for (uint32_t k = 0; k < arguments.size(); ++k) {
    c10::IValue& value = arguments[k];
    if (value.isSymInt()) {
      const c10::SymInt number = value.toSymInt();
      numbers_.emplace_back(k, Expressions{expression(number)});
      value = SymbolicNumber::value_of(number);
    } else if (value.isSymIntList()) {
      Expressions all;
      std::vector<int64_t> numbers;
      for (const c10::SymInt& number : value.toSymIntVector()) {
        all.push_back(expression(number));
        numbers.push_back(SymbolicNumber::value_of(number));
      }
      numbers_.emplace_back(k, std::move(all));
      value = std::move(numbers);
    } else if (value.isSymFloat()) {
      value = value.toSymFloat().guard_float(__FILE__, __LINE__);
    } else if (value.isSymBool()) {
      value = value.toSymBool().guard_bool(__FILE__, __LINE__);
    }
  }
}

void SymbolicTrace::meet(const Expression& expression) {
  expression.for_each_symbol([&](uint32_t symbol) {
    if (std::find(met_.begin(), met_.end(), symbol) == met_.end()) met_.push_back(symbol);
  });
}

int64_t SymbolicTrace::trial_size(int64_t now, const Range& range, size_t order, uint32_t trial) {
  const auto k = static_cast<int64_t>(order);
  int64_t size = 0;
  switch (trial) {
    case 0: size = now + 1 + 2 * k; break;
    case 1: size = 2 * now + 3 + k; break;
    default: size = now * (2 + (k + static_cast<int64_t>(trial)) % 4); break;
  }
  const int64_t least = std::max<int64_t>(range.least, 2);
  if (size > range.most && range.most > least) size = least + size % (range.most - least + 1);
  return std::max(std::min(size, range.most), least);
}

SymbolicTrace::Values SymbolicTrace::trial(uint32_t number) const {
  Values values;
  for (size_t order = 0; order < met_.size(); ++order) {
    const uint32_t symbol = met_[order];
    const auto found = symbols_.find(symbol);
    const Symbol known = found == symbols_.end() ? Symbol() : found->second;
    if (values.size() <= symbol) values.resize(symbol + 1, 0);
    values[symbol] = trial_size(known.value, known.range, order, number);
  }
  return values;
}

bool SymbolicTrace::describe_arguments(Step& step, std::span<const SymbolicShapePtr> arguments) {
  const auto depends = [](const SymbolicShapePtr& shape) { return shape != nullptr && shape->is_symbolic(); };
  if (numbers_.empty() && std::none_of(arguments.begin(), arguments.end(), depends)) return false;
  auto symbolic = std::make_shared<SymbolicStep>();
  for (const SymbolicShapePtr& shape : arguments) {
    symbolic->arguments.push_back(depends(shape) ? shape->expressions() : Expressions());
  }
  symbolic->numbers.resize(step.args.size());
  for (const auto& [k, expressions] : numbers_) {
    if (!is_plain(expressions)) symbolic->numbers[k] = expressions;
  }
  step.symbolic = symbolic;
  return true;
}

bool SymbolicTrace::take_over(Step& step, const Step& like) {
  if (like.symbolic == nullptr) return false;
  const SymbolicStep &own = *step.symbolic, &other = *like.symbolic;
  if (own.arguments != other.arguments) return false;
  // Numbers that are plain here may have been guessed there.
  for (size_t k = 0; k < own.numbers.size(); ++k) {
    if (!own.numbers[k].empty() && own.numbers[k] != other.numbers[k]) return false;
  }
  const auto before = std::exchange(step.symbolic, like.symbolic);
  meet(step);
  const auto here = at_symbols(step, now());
  if (here != nullptr && here->same(step, /*floats_may_differ=*/true)) return true;
  step.symbolic = before;
  return false;
}

void SymbolicTrace::meet(const Step& step) {
  for (const auto* all : {&step.symbolic->arguments, &step.symbolic->numbers}) {
    for (const Expressions& each : *all) {
      for (const Expression& expression : each) meet(expression);
    }
  }
}

SymbolicTrace::Values SymbolicTrace::now() const {
  Values values(1);
  for (const uint32_t symbol : met_) {
    if (values.size() <= symbol) values.resize(symbol + 1, 0);
    const auto found = symbols_.find(symbol);
    if (found != symbols_.end()) values[symbol] = found->second.value;
  }
  return values;
}

SymbolicTrace::Outcome SymbolicTrace::try_out(const Step& step, const ShapeInference& shapes,
                                              std::span<const uint32_t> symbols) const {
  Outcome out;
  out.failure = "it is not known what it returns for other sizes";
  const auto take = [&](const Values& values, const std::vector<Geometry>& geometries) {
    out.members.emplace_back();
    for (const uint32_t symbol : symbols) out.members.back().push_back(values[symbol]);
    size_t column = 0;
    for (const Geometry& geometry : geometries) {
      for (size_t k = 0; k <= geometry.dims.size(); ++k, ++column) {
        if (out.columns.size() <= column) out.columns.emplace_back();
        out.columns[column].push_back(k < geometry.dims.size() ? geometry.dims[k] : geometry.offset);
      }
    }
  };
  std::vector<Geometry> recorded;
  for_each_result(step.results, [&](const Result& r) { recorded.push_back(*r.geometry); });
  take(now(), recorded);
  for (uint32_t number = 0; number < kTrials; ++number) {
    if (!is_alive(number)) continue;
    const Values values = trial(number);
    const auto elsewhere = at_symbols(step, values);
    if (elsewhere == nullptr) continue;
    std::vector<Geometry> made;
    try {
      torch::jit::Stack stack = MetaArguments().of(*elsewhere);
      if (!shapes.infer(step, stack)) break;
      if (!same_lengths(step.results, stack)) continue;  // another program
      std::vector<Result> results = step.results;
      for_each_value(results, stack, [&](const c10::IValue& value, Result&) {
        made.emplace_back(*value.toTensor().unsafeGetTensorImpl());
      });
    } catch (const c10::Error& error) {
      out.failure = first_line(error.what_without_backtrace());  // a backtrace takes longest
      continue;
    } catch (const std::exception& error) {
      out.failure = first_line(error.what());
      continue;
    }
    const bool alike = std::equal(
        made.begin(), made.end(), recorded.begin(), recorded.end(),
        [](const Geometry& a, const Geometry& b) { return a.rank == b.rank; });
    if (!alike) continue;
    out.possible |= 1u << number;
    take(values, made);
  }
  return out;
}

SymbolicTrace::Outcome SymbolicTrace::guess_numbers(Step& step, const ShapeInference& shapes,
                                                    std::span<const uint32_t> symbols) const {
  // Symbols, sizes of the arguments that depend on some, and products of neighbours.
  Expressions pool;
  for (const uint32_t symbol : symbols) pool.push_back(Expression::symbol(symbol));
  const Values here = now();
  for (const Expressions& each : step.symbolic->arguments) {
    const size_t rank = each.size() / 2;
    for (size_t first = 0; first < rank; ++first) {
      Expression product = each[first];
      for (size_t last = first;;) {
        if (!is_plain({product})) pool.push_back(product);
        if (++last == rank) break;
        product = Expression::of(Expression::Kind::kMultiply, {product, each[last]});
      }
    }
  }
  // The plain numbers that could be one of these, and which.
  struct Place {
    size_t argument, index;
    Expressions candidates;  ///< the number itself is the last one
    size_t chosen = 0;
  };
  std::vector<Place> places;
  for (size_t k = 0; k < step.args.size(); ++k) {
    const Arg& arg = step.args[k];
    if (arg.kind != Arg::Kind::kInt && arg.kind != Arg::Kind::kIntList) continue;
    if (!step.symbolic->numbers[k].empty() || !is_amount(step.op.schema().arguments()[k])) continue;
    const auto numbers = arg.kind == Arg::Kind::kInt ? c10::IntArrayRef(&arg.i, 1) : arg.ints();
    for (size_t index = 0; index < numbers.size(); ++index) {
      Place place{k, index, {}};
      for (const Expression& candidate : pool) {
        const bool known = std::find(place.candidates.begin(), place.candidates.end(), candidate) !=
                           place.candidates.end();
        if (!known && candidate.evaluate(here) == numbers[index]) {
          place.candidates.push_back(candidate);
        }
      }
      if (place.candidates.empty()) continue;
      place.candidates.push_back(Expression::constant(numbers[index]));
      places.push_back(std::move(place));
    }
  }
  // All of them at first, and fewer and fewer from the last one on.
  constexpr int kMostGuesses = 48;
  Outcome outcome;
  const std::shared_ptr<const SymbolicStep> before = step.symbolic;
  for (int guess = 0; guess < kMostGuesses && !places.empty(); ++guess) {
    auto symbolic = std::make_shared<SymbolicStep>(*before);
    for (const Place& place : places) {
      Expressions& numbers = symbolic->numbers[place.argument];
      const Arg& arg = step.args[place.argument];
      if (numbers.empty()) {
        const auto plain = arg.kind == Arg::Kind::kInt ? c10::IntArrayRef(&arg.i, 1) : arg.ints();
        for (const int64_t number : plain) numbers.push_back(Expression::constant(number));
      }
      numbers[place.index] = place.candidates[place.chosen];
    }
    step.symbolic = std::move(symbolic);
    outcome = try_out(step, shapes, symbols);
    if (outcome.enough()) return outcome;
    size_t k = places.size();  // batch and length come first, and are the likelier to change
    while (k > 0 && ++places[k - 1].chosen == places[k - 1].candidates.size()) {
      places[--k].chosen = 0;
    }
    if (k == 0) break;
  }
  step.symbolic = before;
  return outcome;
}

bool SymbolicTrace::infer_results(Step& step, const ShapeInference& shapes) {
  // What the results' numbers are made of: symbols, and sizes that follow from them.
  std::vector<uint32_t> used;
  Expressions sizes;
  constexpr size_t kMostSizes = 4;
  const auto look = [&](const std::vector<Expressions>& all) {
    for (const Expressions& each : all) {
      for (const Expression& expression : each) {
        meet(expression);
        expression.for_each_symbol([&](uint32_t symbol) {
          if (std::find(used.begin(), used.end(), symbol) == used.end()) used.push_back(symbol);
        });
        const bool simple = expression.kind() == Expression::Kind::kConstant ||
                            expression.kind() == Expression::Kind::kSymbol;
        const bool known = std::find(sizes.begin(), sizes.end(), expression) != sizes.end();
        if (!simple && !known && sizes.size() < kMostSizes) {
          sizes.push_back(expression);
        }
      }
    }
  };
  look(step.symbolic->arguments);
  look(step.symbolic->numbers);

  // A symbol has one value in a segment.
  if (const auto here = at_symbols(step, now()); here == nullptr || !here->same(step, false)) {
    give_up(step, "a size is another here than in an earlier op of the step; give it another name");
    return false;
  }
  Outcome outcome = try_out(step, shapes, used);
  if (!outcome.enough()) {
    Outcome guessed = guess_numbers(step, shapes, used);
    if (!guessed.enough()) {
      give_up(step, outcome.failure);
      return false;
    }
    outcome = std::move(guessed);
  }
  alive_ &= outcome.possible;
  const std::vector<Values>& members = outcome.members;
  const std::vector<Values>& columns = outcome.columns;
  auto symbolic = std::make_shared<SymbolicStep>(*step.symbolic);

  constexpr size_t kAnyConstants = 8;
  Expressions local_sizes;  // over the used symbols, numbered as they are in `members`
  std::vector<uint32_t> numbering;
  for (uint32_t k = 0; k < used.size(); ++k) {
    if (numbering.size() <= used[k]) numbering.resize(used[k] + 1, 0);
    numbering[used[k]] = k;
  }
  for (const Expression& size : sizes) {
    Expression local = size.with_symbols(numbering);
    const auto has_value = [&](const Values& member) { return local.evaluate(member).has_value(); };
    if (std::all_of(members.begin(), members.end(), has_value)) local_sizes.push_back(std::move(local));
  }
  size_t column = 0;
  bool complete = true;
  for_each_result(step.results, [&](const Result& result) {
    Expressions expressions;
    for (size_t k = 0; k <= result.geometry->dims.size(); ++k, ++column) {
      const auto found = fit(members, columns[column], kAnyConstants, local_sizes);
      complete = complete && found.has_value();
      if (found) expressions.push_back(found->with_symbols(used));
    }
    symbolic->results.push_back(is_plain(expressions) ? Expressions() : std::move(expressions));
  });
  if (!complete) {
    give_up(step, "no expression gives the sizes of what it returns");
    return false;
  }
  symbolic->possible = alive_;
  step.symbolic = std::move(symbolic);
  return true;
}

void SymbolicTrace::follow(const Step& step) {
  ++steps_;
  if (step.symbolic == nullptr) return;
  meet(step);
  alive_ &= step.symbolic->possible;
}

void SymbolicTrace::describe(Step& step, std::span<const SymbolicShapePtr> arguments,
                             std::span<c10::IValue> results, const ShapeInference* shapes,
                             const Step* like) {
  const bool depends = describe_arguments(step, arguments);
  numbers_.clear();
  const bool described = depends && problem_.empty() &&
                         ((like != nullptr && take_over(step, *like)) ||
                          (shapes != nullptr && infer_results(step, *shapes)));
  if (!described) step.symbolic = nullptr;
  follow(step);
  if (!described) return;
  size_t next = 0;
  for_each_value(step.results, results, [&](c10::IValue& value, Result& result) {
    const Expressions& expressions = step.symbolic->results[next++];
    if (expressions.empty()) return;
    result.symbolic = std::make_shared<const SymbolicShape>(expressions, *result.geometry);
    value = with_shape(value.toTensor(), result.symbolic);
  });
}

void SymbolicTrace::give_up(const Step& step, std::string why) {
  std::string names;
  for (const uint32_t symbol : met_) names += (names.empty() ? "" : ", ") + symbol_name(symbol);
  problem_ = names + (met_.size() == 1 ? " is" : " are") + " fixed by " +
             c10::str(step.op.operator_name()) + ", op " + std::to_string(steps_) + ": " + why;
}

void SymbolicTrace::note_guard(const Expression& condition, size_t step) {
  constexpr size_t kMostGuards = 32;
  std::string text = condition.named_text();
  const auto known = [&](const std::string& guard) { return guard.starts_with(text + ","); };
  if (guards_.size() >= kMostGuards || std::any_of(guards_.begin(), guards_.end(), known)) return;
  guards_.push_back(text + ", asked before op " + std::to_string(step));
}

std::vector<std::vector<int64_t>> SymbolicTrace::other_sizes() const {
  constexpr size_t kExamples = 3;
  std::vector<Values> all;
  if (met_.empty() || !problem_.empty()) return all;
  for (uint32_t number = 0; number < kTrials && all.size() < kExamples; ++number) {
    if (is_alive(number)) all.push_back(trial(number));
  }
  return all;
}

std::string SymbolicTrace::text_of(uint32_t symbol, const Range& range) {
  if (range == Range()) return symbol_name(symbol);
  return symbol_name(symbol) + " (" + std::to_string(range.least) + " to " +
         (range.most == INT64_MAX ? "any" : std::to_string(range.most)) + ")";
}

std::string SymbolicTrace::text() const {
  if (met_.empty() && guards_.empty() && problem_.empty()) return "";
  std::string out;
  if (!problem_.empty()) {
    out = problem_;
  } else {
    for (const uint32_t symbol : met_) {
      out += (out.empty() ? "symbolic: " : ", ") + text_of(symbol, range_of(symbol));
    }
  }
  for (const std::string& guard : guards_) out += "\nguard: " + guard;
  return out;
}

}  // namespace reprise
