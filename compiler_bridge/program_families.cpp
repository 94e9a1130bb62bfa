#include "compiler_bridge/program_families.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <fstream>

namespace reprise {

const Expression* GeneralProgram::broken_guard(
    const std::vector<int64_t>& symbols) const {
  const auto broken = std::find_if(guards.begin(), guards.end(), [&](const Expression& guard) {
    return guard.evaluate(symbols).value_or(0) == 0;
  });
  return broken == guards.end() ? nullptr : &*broken;
}

std::optional<ProgramFamily::Serving> ProgramFamily::serving(
    const std::vector<int64_t>& integers) const {
  for (auto program = programs_.rbegin(); program != programs_.rend(); ++program) {
    if (program->shared->wrong) continue;
    const auto symbols = program->trace.symbols_of(integers);
    if (!symbols || program->broken_guard(*symbols) != nullptr) continue;
    const auto numbers = static_cast<std::ptrdiff_t>(program->trace.number_count());
    return Serving{program->runner, program->shared, program->trace.symbols_text(*symbols),
                   {symbols->end() - numbers, symbols->end()}};
  }
  return std::nullopt;
}

void ProgramFamily::add(GeneralProgram program) {
  std::string& text = program.shared->guards;
  const std::vector<std::string> names = program.trace.names();
  for (const Expression& guard : program.guards) {
    text += (text.empty() ? "" : ", ") + guard.named_text(names);
  }
  programs_.push_back(std::move(program));
}

void ProgramFamily::note(const std::vector<int64_t>& integers) {
  if (std::find(members_.begin(), members_.end(), integers) != members_.end()) return;
  if (members_.size() == kMostMembers) members_.erase(members_.begin());
  members_.push_back(integers);
}

std::optional<GeneralTrace> ProgramFamily::generalise(
    const std::vector<int64_t>& integers, std::string& problem) {
  problem.clear();
  if (members_.size() < 2) return std::nullopt;  // the first size
  if (tried_ == kMostPrograms) {
    problem = c10::str("no more than ", kMostPrograms, " programs over symbols are tried");
    return std::nullopt;
  }
  auto general = GeneralTrace::make(like_, members_, &problem);
  if (general && !general->symbols_of(integers)) {
    problem = "sizes of 0 and 1 have programs of their own";
    return std::nullopt;
  }
  if (general) ++tried_;
  return general;
}

std::string ProgramFamily::differences(const std::vector<int64_t>& integers) const {
  if (!programs_.empty()) {
    const GeneralProgram& last = programs_.back();
    const auto symbols = last.trace.symbols_of(integers);
    if (!symbols) return last.trace.mismatch(integers);
    if (const Expression* guard = last.broken_guard(*symbols)) {
      return "the program over symbols holds where " + guard->named_text(last.trace.names());
    }
  }
  const auto other = std::find_if(members_.rbegin(), members_.rend(),
                                  [&](const auto& member) { return member != integers; });
  if (other == members_.rend()) return "";
  std::string text, elsewhere;
  for (size_t k = 0; k < like_.sites.size(); ++k) {
    if (integers[k] == (*other)[k]) continue;
    const bool size = like_.sites[k].kind == SplitTrace::Site::Kind::kSize;
    std::string& what = size ? text : elsewhere;
    if (!size && !what.empty()) continue;
    what += c10::str(what.empty() ? "" : ", ", place(like_.sites[k], k), ": ", integers[k],
                     " was ", (*other)[k]);
  }
  return text.empty() ? elsewhere : text;
}

std::shared_ptr<ProgramFamily> ProgramFamilies::of(const SplitTrace& trace) {
  Known& known = families_[trace.skeleton()];
  known.used = ++uses_;
  if (known.family == nullptr) known.family = std::make_shared<ProgramFamily>(trace);
  const auto family = known.family;
  if (families_.size() > most_) {
    families_.erase(std::min_element(families_.begin(), families_.end(), [](const auto& a, const auto& b) {
      return a.second.used < b.second.used;
    }));
  }
  return family;
}

std::shared_ptr<const ProgramFamily> ProgramFamilies::find(const SplitTrace& trace) {
  const auto found = families_.find(trace.skeleton());
  if (found == families_.end()) return nullptr;
  found->second.used = ++uses_;
  return found->second.family;
}

std::vector<Expression> read_guards(const std::string& package) {
  std::ifstream in(package + ".guards");
  TORCH_CHECK(in.good(), "its guards are missing");
  std::vector<Expression> guards;
  for (std::string line; std::getline(in, line);) guards.push_back(Expression::parse(line));
  return guards;
}

}  // namespace reprise
