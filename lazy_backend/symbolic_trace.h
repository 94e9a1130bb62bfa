/// \file
/// Writes the segment that is being recorded down over symbols as well, and makes of it what
/// other sizes would have recorded.
///
/// A marked tensor (reprise/dynamic.h) says which sizes are symbols. What an op returns for
/// other sizes is asked of `ShapeInference`, at a few *trial values* of the symbols; from
/// these and the sizes at hand follow the expressions that its results' sizes are
/// (`fit`). They are what `sym_sizes()` gives. A wrong guess costs a compile and nothing
/// else: a program over symbols is used where each integer is what its expression says.
#pragma once

#include <ATen/core/ivalue.h>
#include <c10/util/SmallVector.h>

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "lazy_backend/shape_inference.h"
#include "lazy_backend/symbolic_shape.h"
#include "lazy_backend/trace.h"

namespace reprise {

/// A session's own.
class SymbolicTrace {
 public:
  struct Range {
    int64_t least = 0, most = INT64_MAX;
    bool operator==(const Range&) const = default;
  };

  /// Another size than `now` for the symbol that is the `order`-th of a segment: the first
  /// two trials are sizes that have nothing to do with it, and, since a program may need
  /// sizes to be divisible, further ones are multiples. Each symbol goes its own way, since
  /// sizes that are always equal look like one.
  static int64_t trial_size(int64_t now, const Range& range, size_t order, uint32_t trial);
  /// `tokens (2 to 64)`, or the name alone where any size will do.
  static std::string text_of(uint32_t symbol, const Range& range);

  /// A size is a symbol, and is `value` from now on. Throws where the symbol has another
  /// range.
  void mark(uint32_t symbol, int64_t value, Range range);
  Range range_of(uint32_t symbol) const {
    const auto found = symbols_.find(symbol);
    return found == symbols_.end() ? Range() : found->second.range;
  }
  /// A symbol for a size without a name.
  std::string next_name() { return "dim" + std::to_string(unnamed_++); }

  /// A segment begins.
  void begin();

  /// Puts plain numbers in the places of symbolic ones and remembers their expressions, for
  /// the call that comes.
  void take_numbers(std::span<c10::IValue> arguments);

  /// Completes a step that has run: its `symbolic`, and results over symbols in the places
  /// of those on the stack. `arguments` holds the shapes of its tensor arguments, null ones
  /// among them. `like`: a step that is alike, whose expressions are tried first; or null.
  /// `shapes` finds others; null: none are looked for.
  void describe(Step& step, std::span<const SymbolicShapePtr> arguments,
                std::span<c10::IValue> results, const ShapeInference* shapes, const Step* like);

  /// The segment has this step, which was described when it was written down.
  void follow(const Step& step);

  /// A condition on symbols that steers C++ holds, before the step with this number.
  void note_guard(const Expression& condition, size_t step);

  /// Values of the symbols, by number, at which the segment so far is possible as well
  /// (`at_symbols`); empty where that is not known.
  std::vector<std::vector<int64_t>> other_sizes() const;

  /// In words: what is symbolic, the guards, why not all is. Empty for a segment without
  /// symbols.
  std::string text() const;

 private:
  using Expressions = std::vector<Expression>;
  /// Values of all symbols, by number.
  using Values = std::vector<int64_t>;

  static constexpr uint32_t kTrials = 6;
  static constexpr uint32_t kAllTrials = (1u << kTrials) - 1;
  /// From fewer, expressions are guessed wrong.
  static constexpr size_t kFewestTrials = 2;

  struct Symbol {
    int64_t value = 0;
    Range range;
    uint64_t segment = 0;  ///< in which it was marked last
  };
  /// What an op returns at the trials at which it is possible.
  struct Outcome {
    std::vector<Values> members;  ///< the values of the symbols that it depends on
    std::vector<Values> columns;  ///< each number of the results' geometries
    uint32_t possible = 0;
    std::string failure;
    bool enough() const { return members.size() > kFewestTrials; }
  };

  bool describe_arguments(Step& step, std::span<const SymbolicShapePtr> arguments);
  bool take_over(Step& step, const Step& like);
  bool infer_results(Step& step, const ShapeInference& shapes);
  Outcome try_out(const Step& step, const ShapeInference& shapes,
                  std::span<const uint32_t> symbols) const;
  /// As above, with expressions in the places of plain numbers, which libtorch's own
  /// composites compute of `sizes()`; the step's `symbolic` gets what is found.
  Outcome guess_numbers(Step& step, const ShapeInference& shapes,
                        std::span<const uint32_t> symbols) const;
  Values now() const;
  void give_up(const Step& step, std::string why);
  void meet(const Expression& expression);
  void meet(const Step& step);
  bool is_alive(uint32_t number) const { return ((alive_ >> number) & 1) != 0; }
  Values trial(uint32_t number) const;

  std::unordered_map<uint32_t, Symbol> symbols_;
  uint32_t unnamed_ = 0;
  uint64_t segment_ = 1;

  // Of the segment.
  std::vector<uint32_t> met_;  ///< symbols, in the order in which ops met them
  uint32_t alive_ = kAllTrials;  ///< bit k: all ops so far are possible at trial k
  size_t steps_ = 0;
  std::string problem_;
  std::vector<std::string> guards_;

  // Of the call.
  c10::SmallVector<std::pair<uint32_t, Expressions>, 2> numbers_;
};

}  // namespace reprise
