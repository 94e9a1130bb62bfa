/// \file
/// Traces that differ in integers alone, as one trace over symbols.
///
/// Works on what the compiler is given (docs/trace_format.md), and needs no libtorch.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "symint/expression.h"

namespace reprise {

/// A trace taken apart: its integers, and all else.
struct SplitTrace {
  struct Site {
    enum class Kind : uint8_t { kSize, kStride, kOffset, kArgument };
    Kind kind = Kind::kArgument;
    uint32_t input = 0;  ///< of sizes, strides and offsets
    uint32_t dim = 0;    ///< of sizes and strides
    std::string name = {};  ///< that the user gave it, if any
  };
  /// The text before each integer, and after the last one. Equal for traces that differ in
  /// integers alone.
  std::vector<std::string> pieces;
  std::vector<Site> sites;
  std::vector<int64_t> integers;

  explicit SplitTrace(std::string_view trace);
  /// What names those that can share a program.
  std::string skeleton() const;
};

/// `input 0 (tokens) dim 1`, or `integer 12 of the trace`, which is the site's own number.
std::string place(const SplitTrace::Site& site, size_t number);

/// A trace in which some sizes of inputs are symbols, and other integers expressions over
/// them or symbols of their own. Immutable.
class GeneralTrace {
 public:
  /// Made of traces of one skeleton, whose integers are given; the last one's are the
  /// hints. Nothing where no symbols and expressions explain them all.
  ///
  /// A size that differs is a symbol, unless an expression of the symbols before it fits all
  /// members, with two more of them than it has constants: a symbol too many costs little.
  /// Members with a size of 0 or 1 in such a place are left out: these are special to
  /// broadcasting, and get programs of their own.
  ///
  /// Another integer that differs and that no expression explains (a position in a cache,
  /// or how an input lies in a storage of which it is a part) is a *number*, and becomes a
  /// symbol too: the program is told by one more input.
  ///
  /// Where nothing is made, `problem` says why if it is not null.
  static std::optional<GeneralTrace> make(const SplitTrace& like,
                                          std::span<const std::vector<int64_t>> members,
                                          std::string* problem = nullptr);

  /// The symbols' values for a trace with these integers; nothing where it is none of this
  /// kind: another value than an expression gives, or a symbol below 2.
  std::optional<std::vector<int64_t>> symbols_of(std::span<const int64_t> integers) const;

  /// Where a trace is no member: `integer 12 of the trace: (* s0 s1) gives 32, it is 44`.
  std::string mismatch(std::span<const int64_t> integers) const;

  /// For the compiler.
  const std::string& text() const { return text_; }
  size_t symbol_count() const { return symbols_.size(); }
  /// The symbols that are numbers: the last ones. What symbol k stands for is
  /// `symbols[k] - kNumberOffset`.
  size_t number_count() const { return numbers_; }
  /// A number is told by a size, and sizes of 0 and 1 are special.
  static constexpr int64_t kNumberOffset = 2;
  /// `tokens = 48 (input 0 dim 1), s1 = 4 (input 3 dim 0)`: the symbols' values, and where
  /// each is read.
  std::string symbols_text(std::span<const int64_t> symbols) const;
  /// What each symbol is called: as the user has named it, or `s0`.
  std::vector<std::string> names() const;

 private:
  GeneralTrace() = default;
  std::string text_;
  std::vector<size_t> symbols_;  ///< the site that defines each
  size_t numbers_ = 0;
  int64_t symbol(std::span<const int64_t> integers, size_t k) const;
  std::vector<SplitTrace::Site> sites_;
  std::vector<Expression> expressions_;  ///< each once
  std::vector<uint32_t> expected_;       ///< at each site, among `expressions_`
};

/// An expression over symbols whose values in each member are `symbols[member]`, which
/// gives `values[member]`; the simplest there is. With `most_constants`, only those whose
/// constants are not more. `sizes`, expressions that have a value in each member, count as
/// symbols do.
std::optional<Expression> fit(std::span<const std::vector<int64_t>> symbols,
                              std::span<const int64_t> values, size_t most_constants,
                              std::span<const Expression> sizes = {});

}  // namespace reprise
