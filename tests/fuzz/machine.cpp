#include "tests/fuzz/machine.h"

#include <ATen/CPUGeneratorImpl.h>

#include <algorithm>
#include <cctype>
#include <limits>

#include "reprise/reprise.h"
#include "tests/fuzz/helpers.h"
#include "tests/fuzz/ops.h"

namespace reprise::fuzz {
namespace {

constexpr size_t kMostValues = 24;

double parameter_s(const Instruction& instruction) { return (instruction.s % 17 - 8) / 4.0; }

/// The first line of an error, without the device's name and that of the node which made a
/// tensor: a view whose base was written is made anew by `as_strided` on other devices, and by
/// the view itself on the lazy one (`c10::Device::supports_as_strided`, torch 2.11).
std::string first_line(const std::exception& error) {
  // `what()` of libtorch's own would look up the names of the functions on the stack.
  const auto* own = dynamic_cast<const c10::Error*>(&error);
  std::string line = own != nullptr ? own->what_without_backtrace() : error.what();
  line = line.substr(0, line.find('\n'));
  if (const size_t at = line.find(", which is output "); at != std::string::npos) line.erase(at);
  for (const char* name : {"lazy.", "Lazy", "lazy:0", "lazy", "cuda.", "CUDA", "cuda:0", "cuda", "CPU", "cpu"}) {
    for (size_t at; (at = line.find(name)) != std::string::npos;) {
      line.erase(at, std::char_traits<char>::length(name));
    }
  }
  return line;
}

/// The expression with operands in place of their names.
std::string spell(const char* text, const std::vector<std::pair<char, std::string>>& operands) {
  std::string out;
  const std::string source = text;
  const auto in_word = [](char c) { return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_'; };
  for (size_t k = 0; k < source.size(); ++k) {
    const bool alone = (k == 0 || !in_word(source[k - 1])) &&
                       (k + 1 == source.size() || !in_word(source[k + 1]));
    const std::string* replacement = nullptr;
    if (alone) {
      for (const auto& [name, value] : operands) {
        if (name == source[k]) replacement = &value;
      }
    }
    replacement != nullptr ? out += *replacement : out += source[k];
  }
  return out;
}

std::string describe(const torch::Tensor& tensor) {
  return c10::str(tensor.dtype(), tensor.sizes(), tensor.strides(), "+", tensor.storage_offset(),
                  tensor.requires_grad() ? " requires grad" : "", tensor.is_leaf() ? "" : " made",
                  tensor.is_conj() ? " conj" : "", tensor.is_neg() ? " neg" : "");
}

}  // namespace

Machine::Machine(const Program& program, torch::Device device, Settings settings)
    : program_(program), device_(device), settings_(std::move(settings)), noise_(settings_.noise_seed) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(program.seed);
  const auto numbers = [&](torch::IntArrayRef sizes) { return torch::randn(sizes, generator); };
  const auto input = [&](const char* name, const torch::Tensor& host) {
    state_.push_back({host.to(device_), name});
    disturb(state_.back().tensor);
  };
  input("x", numbers({3, 4}));
  input("y", numbers({12}));
  input("z", numbers({2, 3}).to(torch::kDouble));
  input("k", (numbers({4}) * 3).to(torch::kLong));
}

const Machine::Value& Machine::pick(uint8_t operand) const {
  return values_[values_.size() - 1 - operand % values_.size()];
}

void Machine::disturb(const torch::Tensor& tensor) {
  if (settings_.noise == 0 || !tensor.defined() || tensor.numel() == 0) return;
  if (!tensor.is_floating_point() && !tensor.is_complex()) return;
  double ulp = std::numeric_limits<float>::epsilon();
  switch (c10::toRealValueType(tensor.scalar_type())) {
    case torch::kDouble: ulp = std::numeric_limits<double>::epsilon(); break;
    case torch::kHalf: ulp = 0x1p-10; break;
    case torch::kBFloat16: ulp = 0x1p-7; break;
    default: break;
  }
  torch::NoGradGuard no_grad;
  // Without the version counter: autograd must not see it.
  torch::Tensor bare = tensor.variable_data();
  std::uniform_real_distribution<double> error(-settings_.noise * ulp, settings_.noise * ulp);
  std::vector<double> factors(static_cast<size_t>(bare.numel()));
  for (double& factor : factors) factor = 1 + error(noise_);
  auto wide = torch::from_blob(factors.data(), bare.sizes(), torch::kDouble);
  try {
    // Of a zero the sign is what rounding decides.
    wide = torch::where(bare == 0, torch::sign(wide - 1), wide);
    bare.copy_(bare.to(bare.is_complex() ? torch::kComplexDouble : torch::kDouble) * wide);
  } catch (const std::exception&) {
    // Its elements overlap.
  }
}

void Machine::keep(torch::Tensor tensor, std::string name) {
  if (values_.size() >= kMostValues) values_.erase(values_.begin() + static_cast<std::ptrdiff_t>(state_.size()));
  values_.push_back({std::move(tensor), std::move(name)});
}

/// Of two dimensions that change apart, with numbers of the program's own.
torch::Tensor Machine::sized_input(uint32_t k) const {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(program_.seed + k);
  return torch::randn({3 + k % 3 * 2, 4 + k % 2}, generator).to(device_);
}

void Machine::run(const Instruction& instruction, uint32_t k, Outcome& outcome) {
  const Op& op = ops()[instruction.op % ops().size()];
  const size_t number = count_++;
  if (std::exchange(skip_, false)) return;
  if (std::binary_search(settings_.left_out.begin(), settings_.left_out.end(), number)) return;
  const Value a = pick(instruction.a), b = pick(instruction.b), c = pick(instruction.c);
  const uint32_t shift = program_.numbers_change ? k : 0;
  const Operands operands{a.tensor, b.tensor, c.tensor, (instruction.i + shift) % 8,
                          instruction.j % 8, parameter_s(instruction) + 0.25 * shift};
  const std::string made = c10::str("v", next_name_);
  const auto list = [&](const std::string& before, const std::string& after) {
    if (!settings_.list) return;
    settings_.list(before +
                   spell(op.text, {{'a', a.name}, {'b', b.name}, {'c', c.name},
                                   {'i', std::to_string(operands.i)},
                                   {'j', std::to_string(operands.j)},
                                   {'s', c10::str(operands.s)}}) +
                   after);
  };
  try {
    switch (op.kind) {
      case Op::Kind::kTensor: {
        auto result = small(op.tensor(operands));
        list("auto " + made + " = small(", ");");
        disturb(result);
        keep(std::move(result), made);
        ++next_name_;
        break;
      }
      case Op::Kind::kTensors: {
        auto results = op.tensors(operands);
        list("auto " + made + " = ", ";");
        for (size_t k = 0; k < results.size() && k < 3; ++k) {
          disturb(results[k]);
          keep(results[k], c10::str(made, "[", k, "]"));
        }
        ++next_name_;
        break;
      }
      case Op::Kind::kDo:
        list("", ";");
        op.act(operands);
        disturb(a.tensor);
        break;
      case Op::Kind::kRead:
        if (!settings_.reads) break;
        list("read(", ");");
        outcome.said.push_back(op.read(operands));
        break;
      case Op::Kind::kDrop: {
        if (values_.size() <= 1) break;
        const size_t at = values_.size() - 1 - instruction.a % values_.size();
        if (settings_.list) settings_.list("drop(" + values_[at].name + ");");
        values_.erase(values_.begin() + static_cast<std::ptrdiff_t>(at));
        break;
      }
      case Op::Kind::kBranch: {
        if (!settings_.reads) break;
        if (settings_.list) settings_.list("if (floating(" + a.name + ").sum().item<double>() > 0)  // the next line is left out otherwise");
        skip_ = !(floating(a.tensor).sum().item<double>() > 0);
        break;
      }
      case Op::Kind::kMark:
        if (!settings_.reads) break;
        if (settings_.list) settings_.list("reprise::mark_step();");
        if (device_.is_lazy()) mark_step();
        break;
    }
  } catch (const std::exception& error) {
    if (op.kind != Op::Kind::kDo) list("", ";  // throws");
    outcome.said.push_back(first_line(error));
    outcome.threw.push_back(number);
  }
}

Outcome Machine::step(uint32_t k) {
  Outcome outcome;
  torch::manual_seed(program_.seed + k);
  std::optional<torch::NoGradGuard> no_grad;
  if (program_.no_grad) no_grad.emplace();
  values_ = state_;
  if (program_.sizes_change) {
    values_.push_back({sized_input(k), "n"});
    disturb(values_.back().tensor);
  }
  next_name_ = 0;
  skip_ = false;
  count_ = 0;
  const bool other = (program_.others >> k & 1) != 0;
  const size_t until = other ? std::min<size_t>(program_.turn, program_.code.size()) : program_.code.size();
  const size_t loop_end = std::min<size_t>(program_.loop_begin + program_.loop_length, until);
  const uint32_t loop_times = program_.loop_times_at(k);
  uint32_t turns = 1;
  for (size_t n = 0; n < until; ++n) {
    run(program_.code[n], k, outcome);
    if (n + 1 == loop_end && program_.loop_length > 0 && turns++ < loop_times) {
      n = program_.loop_begin - size_t{1};
    }
  }
  if (other) {
    for (const Instruction& instruction : program_.other) run(instruction, k, outcome);
  }
  const auto give = [&](const Value& value) {
    outcome.said.push_back(describe(value.tensor));
    outcome.values.push_back(value.tensor);
    outcome.names.push_back(value.name);
    const auto& gradient = value.tensor.is_leaf() ? value.tensor.grad() : torch::Tensor();
    if (gradient.defined()) {
      outcome.said.push_back(describe(gradient));
      outcome.values.push_back(gradient);
      outcome.names.push_back(value.name + ".grad()");
    }
  };
  for (const Value& value : state_) give(value);
  const size_t first = values_.size() > settings_.returned ? values_.size() - settings_.returned : 0;
  for (size_t n = first; n < values_.size(); ++n) give(values_[n]);
  // State goes on without its history, as a training loop's does.
  torch::NoGradGuard no_history;
  for (Value& value : state_) {
    if (!value.tensor.is_leaf()) value.tensor = value.tensor.detach();
  }
  values_.clear();
  return outcome;
}

std::string to_cpp(const Program& program) {
  std::string out = c10::str("// ", program.times, " times, ",
                             program.marked ? "marked" : "not marked",
                             program.read_late ? ", values read at the end" : "",
                             program.no_grad ? ", without autograd" : "",
                             program.sizes_change ? ", n of another size each time" : "",
                             program.numbers_change ? ", other numbers each time" : "",
                             program.loop_changes && program.loop_length > 0
                                 ? c10::str(", ", program.loop_length, " instructions from the ",
                                            program.loop_begin, "-th on in a loop of other length "
                                            "each time, the first shown")
                                 : "",
                             "; seed ", program.seed, "\n");
  for (const bool other : {false, true}) {
    if (other && program.others == 0) break;
    Program one = program;
    one.others = other ? 1 : 0;
    Machine::Settings settings;
    settings.list = [&](const std::string& line) { out += "  " + line + "\n"; };
    out += other ? c10::str("the other way (times", [&] {
      std::string times;
      for (uint32_t k = 0; k < program.times; ++k) {
        if ((program.others >> k & 1) != 0) times += c10::str(" ", k);
      }
      return times;
    }(), "):\n") : "step(x, y, z, k):\n";
    Machine(one, torch::kCPU, settings).step(0);
  }
  return out;
}

}  // namespace reprise::fuzz
