/// \file
/// Programs over symbols: traces that differ in integers alone share one.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "lazy_backend/program.h"
#include "symint/general_trace.h"

namespace reprise {

/// A compiled trace over symbols.
struct GeneralProgram {
  GeneralTrace trace;
  std::vector<Expression> guards;  ///< what the compiler took for granted
  std::shared_ptr<Runner> runner;
  std::shared_ptr<SharedProgram> shared = std::make_shared<SharedProgram>();

  /// A guard that does not hold for these symbols, or null.
  const Expression* broken_guard(const std::vector<int64_t>& symbols) const;
};

/// The traces that differ in integers alone. Not thread-safe.
class ProgramFamily {
 public:
  explicit ProgramFamily(SplitTrace like) : like_(std::move(like)) {}

  /// Of a program that is right for a trace with these integers: its runner, and what
  /// the symbols are.
  struct Serving {
    std::shared_ptr<Runner> runner;
    std::shared_ptr<SharedProgram> shared;
    std::string symbols;
    std::vector<int64_t> numbers;  ///< sizes that tell it the numbers
  };
  std::optional<Serving> serving(const std::vector<int64_t>& integers) const;

  /// What the user calls these sites, where they have names.
  void name_sites(const std::vector<SplitTrace::Site>& sites) { like_.sites = sites; }

  /// There is a trace with these integers.
  void note(const std::vector<int64_t>& integers);
  /// A trace over symbols that covers one with these integers, which was noted, where
  /// one is worth a compile. Where there is none, `problem` says why.
  std::optional<GeneralTrace> generalise(const std::vector<int64_t>& integers,
                                         std::string& problem);
  void add(GeneralProgram program);

  /// What makes a trace with these integers another than the one before it:
  /// `input 0 dim 1: 48 was 64`; or than the last program over symbols says.
  std::string differences(const std::vector<int64_t>& integers) const;

 private:
  /// Further guesses are not worth their compiles.
  static constexpr int kMostPrograms = 4;
  /// Traces kept to make guesses of.
  static constexpr size_t kMostMembers = 8;

  SplitTrace like_;
  std::vector<std::vector<int64_t>> members_;
  std::vector<GeneralProgram> programs_;
  int tried_ = 0;
};

/// Not thread-safe.
class ProgramFamilies {
 public:
  /// Beyond `most`, the family that was asked for longest ago is forgotten; those who hold
  /// it keep it.
  explicit ProgramFamilies(size_t most) : most_(most) {}
  /// The family of a trace, made where there is none.
  std::shared_ptr<ProgramFamily> of(const SplitTrace& trace);
  /// As above, null where there is none.
  std::shared_ptr<const ProgramFamily> find(const SplitTrace& trace);

 private:
  struct Known {
    std::shared_ptr<ProgramFamily> family;
    uint64_t used = 0;
  };
  const size_t most_;
  uint64_t uses_ = 0;
  std::unordered_map<std::string, Known> families_;
};

/// The guards beside a package, one a line. Throws where they are missing or no
/// expressions.
std::vector<Expression> read_guards(const std::string& package);

}  // namespace reprise
