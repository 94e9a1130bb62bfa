#include "tests/fuzz/compare.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "reprise/reprise.h"
#include "reprise/testing.h"
#include "tests/fuzz/machine.h"

namespace reprise::fuzz {
namespace {

torch::Tensor on_host(const torch::Tensor& tensor) {
  torch::NoGradGuard no_grad;
  return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().clone();
}

std::vector<torch::Tensor> on_host(const std::vector<torch::Tensor>& tensors) {
  std::vector<torch::Tensor> out;
  for (const auto& tensor : tensors) out.push_back(on_host(tensor));
  return out;
}

std::string show(const torch::Tensor& tensor) {
  return c10::str(tensor.flatten().slice(0, 0, 12));
}

/// Bits, but any NaN is any other: what becomes of its payload is not defined.
bool same(const torch::Tensor& a, const torch::Tensor& b) {
  if (a.sizes() != b.sizes() || a.dtype() != b.dtype()) return false;
  if (a.nbytes() == 0 || std::memcmp(a.data_ptr(), b.data_ptr(), a.nbytes()) == 0) return true;
  return (a.is_floating_point() || a.is_complex()) && torch::equal(a.isnan(), b.isnan()) &&
         torch::equal(torch::nan_to_num(torch::view_as_real(a.to(torch::kComplexDouble)), 0, INFINITY, -INFINITY),
                      torch::nan_to_num(torch::view_as_real(b.to(torch::kComplexDouble)), 0, INFINITY, -INFINITY));
}

std::optional<std::string> difference_of_said(const Outcome& lazy, const Outcome& eager) {
  for (size_t k = 0; k < std::max(lazy.said.size(), eager.said.size()); ++k) {
    const std::string l = k < lazy.said.size() ? lazy.said[k] : "(nothing)";
    const std::string e = k < eager.said.size() ? eager.said[k] : "(nothing)";
    if (l != e) return c10::str("lazy says\n    ", l, "\n  where eager says\n    ", e);
  }
  if (lazy.values.size() != eager.values.size()) return "other values are alive";
  return std::nullopt;
}

std::optional<std::string> difference(const Outcome& lazy, const Outcome& eager) {
  if (auto said = difference_of_said(lazy, eager)) return said;
  for (size_t k = 0; k < eager.values.size(); ++k) {
    const auto l = on_host(lazy.values[k]), e = on_host(eager.values[k]);
    if (!same(l, e)) {
      return c10::str(eager.names[k], " differs, lazy:\n", show(l), "\neager:\n", show(e));
    }
  }
  return std::nullopt;
}

/// The largest difference between the two, where both are numbers; infinite where one
/// is not finite and the other differs.
torch::Tensor distance(const torch::Tensor& a, const torch::Tensor& b) {
  const auto wide = [](const torch::Tensor& t) {
    return t.to(t.is_complex() ? torch::kComplexDouble : torch::kDouble);
  };
  const auto x = wide(a), y = wide(b);
  const auto equal = (x == y).logical_or(x.isnan().logical_and(y.isnan()));
  return torch::nan_to_num((x - y).abs(), INFINITY, INFINITY, INFINITY).masked_fill(equal, 0);
}

double unit(torch::Dtype dtype) {
  switch (c10::toRealValueType(dtype)) {
    case torch::kHalf: return 1e-3;
    case torch::kBFloat16: return 8e-3;
    case torch::kDouble: return 1e-12;
    case torch::kFloat: return 1e-6;
    default: return 0;
  }
}

/// Whether a compiled program's value may be what it is: where `eager` runs disturbed
/// give `disturbed`.
bool may_be(const torch::Tensor& lazy, const torch::Tensor& eager,
            const std::vector<torch::Tensor>& disturbed) {
  if (lazy.sizes() != eager.sizes() || lazy.dtype() != eager.dtype()) return false;
  if (eager.numel() == 0) return true;
  double allowed = 0;
  for (const auto& one : disturbed) {
    if (one.sizes() != eager.sizes()) return true;  // even its shape hangs on a rounding
    allowed = std::max(allowed, distance(one, eager).max().item<double>());
  }
  const auto scale = torch::nan_to_num(eager.to(eager.is_complex() ? torch::kComplexDouble : torch::kDouble).abs(), 0, 0, 0);
  const auto limit = scale * (4 * unit(eager.scalar_type())) + 4 * unit(eager.scalar_type()) + 8 * allowed;
  return (distance(lazy, eager) <= limit).all().item<bool>();
}

/// The program's `time`-th time without what would end a segment: a read, an error.
Machine::Settings one_segment(const Program& program, uint32_t time) {
  Machine::Settings settings;
  settings.reads = false;
  settings.returned = 4;
  settings.left_out = Machine(program, backing_device(), settings).step(time).threw;
  return settings;
}

/// The `time`-th time of each, on its first state.
std::vector<Outcome> run_all(const std::vector<Program>& programs, torch::Device device,
                             uint32_t time) {
  std::vector<Outcome> outcomes;
  for (const Program& program : programs) {
    outcomes.push_back(Machine(program, device, one_segment(program, time)).step(time));
  }
  return outcomes;
}

/// What eager gives with noise, `count` times, its values on the host.
std::vector<Outcome> disturbed_runs(const Program& program, uint32_t time, int count, double noise) {
  std::vector<Outcome> runs;
  Machine::Settings settings = one_segment(program, time);
  settings.noise = noise;
  for (int k = 0; k < count; ++k) {
    settings.noise_seed = static_cast<uint64_t>(k + 1);
    runs.push_back(Machine(program, backing_device(), settings).step(time));
    runs.back().values = on_host(runs.back().values);
  }
  return runs;
}

std::optional<std::string> difference_when_compiled(const Program& program, uint32_t time,
                                                    const Outcome& lazy, const Outcome& eager) {
  if (auto said = difference_of_said(lazy, eager)) {
    // A shape that hangs on a rounding, say.
    const auto runs = disturbed_runs(program, time, 64, 8);
    const bool explained = std::any_of(runs.begin(), runs.end(), [&](const Outcome& run) {
      return difference_of_said(run, eager).has_value();
    });
    return explained ? std::nullopt : said;
  }
  const auto l = on_host(lazy.values), e = on_host(eager.values);
  const auto outside = [&](const std::vector<Outcome>& runs) -> std::optional<size_t> {
    for (size_t k = 0; k < e.size(); ++k) {
      std::vector<torch::Tensor> disturbed;
      for (const auto& run : runs) {
        if (run.values.size() != e.size()) return std::nullopt;
        disturbed.push_back(run.values[k]);
      }
      if (!may_be(l[k], e[k], disturbed)) return k;
    }
    return std::nullopt;
  };
  if (!outside({})) return std::nullopt;
  if (!outside(disturbed_runs(program, time, 4, 2))) return std::nullopt;
  // A rare case, a comparison of nearly equal numbers say, may take many runs to show.
  const auto k = outside(disturbed_runs(program, time, 64, 8));
  if (!k) return std::nullopt;
  return c10::str(eager.names[*k], " differs, compiled:\n", show(l[*k]), "\neager:\n", show(e[*k]));
}

/// Whether a rounding may change one of its integers, the sign of a zero seen as an integer
/// say. Reprise does not take such a program on, and need not.
bool rounding_shows_in_integers(const Program& program, uint32_t times) {
  for (uint32_t time = 0; time < times; ++time) {
    const auto eager = on_host(run_all({program}, backing_device(), time)[0].values);
    for (const auto& run : disturbed_runs(program, time, 64, 8)) {
      if (run.values.size() != eager.size()) return true;
      for (size_t k = 0; k < eager.size(); ++k) {
        const bool exact = !eager[k].is_floating_point() && !eager[k].is_complex();
        if (exact && !run.values[k].equal(eager[k])) return true;
      }
    }
  }
  return false;
}

void begin(bool compile) {
  mark_step();
  wait_for_compiles();
  testing::forget_traces();
  options().compile = compile;
  options().compile_after_ops = 1;
  options().demote_slow_programs = false;
  options().dynamic_shapes = !compile;  // loops are cut, and nothing is compiled
}

}  // namespace

namespace {

std::optional<std::string> difference_step_by_step(const Program& program) {
  Machine eager(program, backing_device(), {}), lazy(program, torch::kLazy, {});
  if (program.marked) mark_step();  // the inputs are not part of the first time
  std::vector<Outcome> eagers, lazies;
  for (uint32_t k = 0; k < program.times; ++k) {
    eagers.push_back(eager.step(k));
    lazies.push_back(lazy.step(k));
    if (program.marked) mark_step();
    if (program.read_late) continue;
    if (auto found = difference(lazies[k], eagers[k])) return c10::str("time ", k, ": ", *found);
    eagers[k] = lazies[k] = Outcome();
  }
  for (uint32_t k = 0; k < program.times && program.read_late; ++k) {
    if (auto found = difference(lazies[k], eagers[k])) {
      return c10::str("time ", k, ", read at the end: ", *found);
    }
  }
  return std::nullopt;
}

}  // namespace

void set_up_process() {
  struct Silence : c10::WarningHandler {
    void process(const c10::Warning&) override {}
  };
  static Silence silence;
  c10::WarningUtils::set_warning_handler(&silence);
  torch::set_num_threads(1);
}

std::optional<std::string> difference_when_interpreted(const Program& program) {
  begin(/*compile=*/false);
  if (auto found = difference_step_by_step(program)) return found;
  testing::pause_recording(std::numeric_limits<uint32_t>::max());
  auto found = difference_step_by_step(program);
  testing::pause_recording(0);
  if (found) return "not recorded, " + *found;
  return std::nullopt;
}

Compiled compare_compiled(const std::vector<Program>& programs) {
  begin(/*compile=*/true);
  const bool change = std::any_of(programs.begin(), programs.end(),
                                   [](const Program& program) { return program.changes(); });
  options().dynamic_shapes = change;
  uint32_t times = change ? 4 : 1;
  Compiled result;
  const uint64_t refused = statistics().program_failures;
  std::vector<std::vector<Outcome>> eager;
  for (uint32_t time = 0; time < times; ++time) {
    eager.push_back(run_all(programs, backing_device(), time));
  }
  mark_step();
  // Recorded; verified, which asks for programs; the programs beside the interpreter, and
  // the interpreter disturbed until it is decided; then all are replayed.
  constexpr int kMostRounds = 9;
  std::vector<std::vector<Outcome>> lazy;
  bool replayed = false;
  for (int round = 0; round < kMostRounds && !replayed; ++round) {
    lazy.clear();
    const Statistics before = statistics();
    for (uint32_t time = 0; time < times; ++time) {
      lazy.push_back(run_all(programs, torch::kLazy, time));
      mark_step();
    }
    const Statistics after = statistics();
    replayed = after.segments_replayed > before.segments_replayed &&
               after.segments_interpreted == before.segments_interpreted &&
               after.ops_recorded == before.ops_recorded;
    wait_for_compiles();
  }
  if (!replayed) {
    if (programs.size() == 1) {
      if (statistics().program_failures > refused &&
          !rounding_shows_in_integers(programs[0], times)) {
        result.differences.push_back({0, "its program was refused\n" + explain()});
      } else {
        result.not_compiled.push_back({0, explain()});
      }
      return result;
    }
    // One of them cannot be compiled, or leaves the segment.
    const auto half = static_cast<std::ptrdiff_t>(programs.size() / 2);
    for (const bool second : {false, true}) {
      Compiled part = compare_compiled(
          second ? std::vector<Program>(programs.begin() + half, programs.end())
                 : std::vector<Program>(programs.begin(), programs.begin() + half));
      const auto take = [&](std::vector<Compiled::Finding>& from, std::vector<Compiled::Finding>& to) {
        for (auto& one : from) {
          if (second) one.program += static_cast<size_t>(half);
          to.push_back(std::move(one));
        }
      };
      take(part.differences, result.differences);
      take(part.not_compiled, result.not_compiled);
      result.replayed += part.replayed;
    }
    return result;
  }
  result.replayed = programs.size();
  // Two sizes that were never seen before.
  for (uint32_t more = 0; change && more < 2; ++more) {
    eager.push_back(run_all(programs, backing_device(), times));
    lazy.push_back(run_all(programs, torch::kLazy, times));
    mark_step();
    ++times;
  }
  for (size_t k = 0; k < programs.size(); ++k) {
    for (uint32_t time = 0; time < times; ++time) {
      auto found = difference_when_compiled(programs[k], time, lazy[time][k], eager[time][k]);
      if (!found) continue;
      result.differences.push_back({k, c10::str("time ", time, ": ", *found)});
      break;
    }
  }
  options().compile = false;
  return result;
}

}  // namespace reprise::fuzz
