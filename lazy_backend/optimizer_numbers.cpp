#include "lazy_backend/optimizer_numbers.h"

#include <torch/optim.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <typeinfo>
#include <unordered_map>

#include "lazy_backend/storage.h"

namespace reprise {
namespace {

namespace optim = torch::optim;
using Kind = OptimizerNumber::Kind;

constexpr double kNone = std::numeric_limits<double>::quiet_NaN();

/// In place of a count that a group's parameters do not share.
constexpr int64_t kUneven = -1;

/// By `OptimizerNumber::Kind`; `kNone` where there is no such number.
struct Values {
  double update = kNone, decay = kNone, root = kNone;

  double of(Kind kind) const {
    return kind == Kind::kUpdate ? update : kind == Kind::kDecay ? decay : root;
  }
};

using Tensors = std::vector<std::pair<const char*, at::Tensor>>;

/// What there is to know of a class of optimizers.
struct Rule {
  const std::type_info& type;
  /// What a parameter's `step`th step computes.
  Values (*values)(const optim::OptimizerOptions& options, int64_t step);
  bool (*same)(const optim::OptimizerOptions& a, const optim::OptimizerOptions& b);
  /// Steps that a parameter has taken; null where the class does not count them.
  int64_t& (*steps)(optim::OptimizerParamState& state);
  /// Of a number that changes from step to step; null where none does.
  std::optional<CountedNumber> (*formula)(const optim::OptimizerOptions& options, Kind kind, uint32_t group);
  /// The tensors of a parameter's state.
  Tensors (*tensors)(const optim::OptimizerParamState& state);
};

template <class Options>
bool same(const optim::OptimizerOptions& a, const optim::OptimizerOptions& b) {
  return static_cast<const Options&>(a) == static_cast<const Options&>(b);
}

template <class State>
int64_t& steps(optim::OptimizerParamState& state) {
  return static_cast<State&>(state).step();
}

Values of_rate_alone(const optim::OptimizerOptions& options, int64_t) {
  return {.update = -options.get_lr()};
}

template <class Options>
Values of_adam(const optim::OptimizerOptions& any, int64_t step) {
  const auto& options = static_cast<const Options&>(any);
  const auto [beta1, beta2] = options.betas();
  const double correction1 = 1 - std::pow(beta1, step), correction2 = 1 - std::pow(beta2, step);
  const double size = options.lr() / correction1;
  return {.update = -size,
          .decay = std::is_same_v<Options, optim::AdamWOptions>
                       ? 1 - options.lr() * options.weight_decay()
                       : kNone,
          .root = std::sqrt(correction2)};
}

Values of_adagrad(const optim::OptimizerOptions& any, int64_t step) {
  const auto& options = static_cast<const optim::AdagradOptions&>(any);
  const double rate =
      options.lr() / (1 + static_cast<double>(step - 1) * options.lr_decay());
  return {.update = -rate};
}

template <class Options>
std::optional<CountedNumber> adam_formula(const optim::OptimizerOptions& any, Kind kind, uint32_t group) {
  const auto& options = static_cast<const Options&>(any);
  const auto [beta1, beta2] = options.betas();
  if (kind == Kind::kUpdate) return CountedNumber{CountedNumber::Kind::kCorrected, beta1, options.lr(), group};
  if (kind == Kind::kRoot) return CountedNumber{CountedNumber::Kind::kRoot, beta2, 0, group};
  return std::nullopt;
}

std::optional<CountedNumber> adagrad_formula(const optim::OptimizerOptions& any, Kind kind, uint32_t group) {
  const auto& options = static_cast<const optim::AdagradOptions&>(any);
  if (kind != Kind::kUpdate || options.lr_decay() == 0) return std::nullopt;
  return CountedNumber{CountedNumber::Kind::kDecayed, options.lr_decay(), options.lr(), group};
}

Tensors sgd_tensors(const optim::OptimizerParamState& any) {
  const auto& state = static_cast<const optim::SGDParamState&>(any);
  return {{"momentum_buffer", state.momentum_buffer()}};
}
template <class State>
Tensors adam_tensors(const optim::OptimizerParamState& any) {
  const auto& state = static_cast<const State&>(any);
  return {{"exp_avg", state.exp_avg()}, {"exp_avg_sq", state.exp_avg_sq()}, {"max_exp_avg_sq", state.max_exp_avg_sq()}};
}
Tensors adagrad_tensors(const optim::OptimizerParamState& any) {
  return {{"sum", static_cast<const optim::AdagradParamState&>(any).sum()}};
}
Tensors rmsprop_tensors(const optim::OptimizerParamState& any) {
  const auto& state = static_cast<const optim::RMSpropParamState&>(any);
  return {{"square_avg", state.square_avg()}, {"momentum_buffer", state.momentum_buffer()}, {"grad_avg", state.grad_avg()}};
}

const Rule* rule_of(const optim::Optimizer& optimizer) {
  static const std::array rules{
      Rule{typeid(optim::SGD), of_rate_alone, same<optim::SGDOptions>, nullptr, nullptr,
           sgd_tensors},
      Rule{typeid(optim::Adam), of_adam<optim::AdamOptions>, same<optim::AdamOptions>,
           steps<optim::AdamParamState>, adam_formula<optim::AdamOptions>,
           adam_tensors<optim::AdamParamState>},
      Rule{typeid(optim::AdamW), of_adam<optim::AdamWOptions>, same<optim::AdamWOptions>,
           steps<optim::AdamWParamState>, adam_formula<optim::AdamWOptions>,
           adam_tensors<optim::AdamWParamState>},
      Rule{typeid(optim::Adagrad), of_adagrad, same<optim::AdagradOptions>,
           steps<optim::AdagradParamState>, adagrad_formula, adagrad_tensors},
      Rule{typeid(optim::RMSprop), of_rate_alone, same<optim::RMSpropOptions>,
           steps<optim::RMSpropParamState>, nullptr, rmsprop_tensors},
  };
  // Not a class derived of one: that may compute otherwise.
  const auto found = std::find_if(rules.begin(), rules.end(), [&](const Rule& rule) {
    return rule.type == typeid(optimizer);
  });
  return found == rules.end() ? nullptr : &*found;
}

/// Of a parameter; null where it has none yet, or its class does not count.
int64_t* counter(optim::Optimizer& optimizer, const Rule& rule, const c10::TensorImpl* parameter) {
  if (rule.steps == nullptr) return nullptr;
  auto& states = optimizer.state();
  const auto found = states.find(const_cast<c10::TensorImpl*>(parameter));
  return found == states.end() ? nullptr : &rule.steps(*found->second);
}

/// That the group's parameters which step have all taken; nothing where they differ.
std::optional<int64_t> common(const std::vector<int64_t>& steps, const std::vector<uint32_t>& stepped) {
  if (stepped.empty()) return 0;
  const int64_t first = steps[stepped.front()];
  const bool all = std::all_of(stepped.begin(), stepped.end(), [&](uint32_t k) { return steps[k] == first; });
  return all ? std::optional(first) : std::nullopt;
}

}  // namespace

std::vector<at::Tensor> parameters_of(const OptimizerPtrs& optimizers) {
  std::vector<at::Tensor> all;
  for (const optim::Optimizer* optimizer : optimizers) {
    for (const auto& group : optimizer->param_groups()) {
      all.insert(all.end(), group.params().begin(), group.params().end());
    }
  }
  return all;
}

OptimizerState state_of(const OptimizerPtrs& optimizers) {
  OptimizerState state;
  for (optim::Optimizer* optimizer : optimizers) {
    const Rule* rule = rule_of(*optimizer);
    for (const auto& group : optimizer->param_groups()) {
      OptimizerState::Group& now = state.groups.emplace_back();
      now.optimizer = optimizer;
      now.options = group.options().clone();
      for (const at::Tensor& parameter : group.params()) {
        now.parameters.push_back(parameter.unsafeGetTensorImpl());
        const int64_t* count =
            rule != nullptr ? counter(*optimizer, *rule, now.parameters.back()) : nullptr;
        now.steps.push_back(count != nullptr ? *count : 0);
      }
    }
  }
  return state;
}

namespace {

/// What one step of each optimizer computed in a traced run.
class StepNumbers {
 public:
  /// `problem` says where the run is more than one step of each.
  StepNumbers(const FunctionTrace& run, const OptimizerState& before, const OptimizerState& after,
              std::string& problem)
      : run_(run) {
    bool same_groups = before.groups.size() == after.groups.size();
    for (uint32_t g = 0; same_groups && g < after.groups.size(); ++g) {
      const auto& was = before.groups[g];
      const auto& is = after.groups[g];
      const Rule* rule = rule_of(*is.optimizer);
      if (rule == nullptr) {
        problem = c10::str("an optimizer of it (", c10::demangle(typeid(*is.optimizer).name()),
                           ") is of no class whose numbers are known");
        return;
      }
      same_groups = was.optimizer == is.optimizer && was.parameters == is.parameters;
      if (!same_groups) break;
      if (!rule->same(*was.options, *is.options)) {
        problem = "it changes an optimizer's options, which is for between its calls";
        return;
      }
      auto& stepped = stepped_.emplace_back();
      for (uint32_t k = 0; k < is.parameters.size(); ++k) {
        if (is.steps[k] == was.steps[k] + 1) stepped.push_back(k);
        if (is.steps[k] < was.steps[k] || is.steps[k] > was.steps[k] + 1) {
          problem = "an optimizer of it takes several steps, or is given another state";
          return;
        }
        if (is.parameters[k]->device().is_lazy()) group_of_[lazy_storage(is.parameters[k])] = g;
      }
      const bool counts = rule->steps != nullptr;
      const auto taken = common(is.steps, stepped);
      const bool known = taken && !(counts && stepped.empty());
      values_.push_back(known ? rule->values(*is.options, *taken) : Values());
      counts_.push_back(!taken ? kUneven : known ? *taken : 0);
    }
    if (!same_groups) problem = "it changes an optimizer's parameters";
  }

  /// What `number` is, which step `k` of the run takes.
  std::optional<OptimizerNumber> find(size_t k, double number) const {
    const Step& op = *run_.steps[k];
    // What a parameter takes belongs to its group.
    for (const uint32_t slot : op.written) {
      const auto group = slot < run_.inputs.size() ? group_of_.find(run_.inputs[slot].get()) : group_of_.end();
      if (group == group_of_.end()) continue;
      for (const Kind kind : {Kind::kUpdate, Kind::kDecay}) {
        if (values_[group->second].of(kind) == number) return OptimizerNumber{kind, group->second};
      }
      return std::nullopt;
    }
    // Of other numbers, the root is what a root is divided by: it becomes 1 in the end, which
    // many are.
    if (k == 0 || op.op.schema().name() != "aten::div" || run_.steps[k - 1]->op.schema().name() != "aten::sqrt") {
      return std::nullopt;
    }
    // Groups with the same root now have the same for ever: options and counters are watched.
    for (uint32_t g = 0; g < values_.size(); ++g) {
      if (values_[g].root == number) return OptimizerNumber{Kind::kRoot, g};
    }
    return std::nullopt;
  }

  std::vector<std::vector<uint32_t>>& stepped() { return stepped_; }
  std::vector<int64_t>& counts() { return counts_; }

 private:
  const FunctionTrace& run_;
  std::unordered_map<const LazyStorage*, uint32_t> group_of_;
  std::vector<Values> values_;                  ///< by group
  std::vector<std::vector<uint32_t>> stepped_;  ///< by group
  std::vector<int64_t> counts_;                 ///< by group
};

}  // namespace

OptimizerStep step_of(const FunctionTrace& run, const OptimizerState& before, OptimizerState after,
                      std::string& problem) {
  OptimizerStep step;
  StepNumbers numbers(run, before, after, problem);
  if (!problem.empty()) return step;
  step.stepped = std::move(numbers.stepped());
  step.any_rate.resize(after.groups.size());
  for (size_t k = 0; k < run.steps.size(); ++k) {
    for (const Arg& arg : run.steps[k]->args) {
      if (!arg.dynamic || step.numbers.size() == run.scalars.size()) continue;
      step.numbers.push_back(numbers.find(k, run.scalars[step.numbers.size()]));
    }
  }
  step.numbers.resize(run.scalars.size());
  for (const auto& number : step.numbers) {
    if (number && std::find(step.distinct.begin(), step.distinct.end(), *number) == step.distinct.end()) {
      step.distinct.push_back(*number);
    }
  }
  step.after = std::move(after);
  return step;
}

CountedNumbers counted_numbers(const FunctionTrace& run, const OptimizerState& before,
                               const OptimizerState& after, std::string& problem) {
  CountedNumbers out;
  StepNumbers numbers(run, before, after, problem);
  for (size_t g = 0; problem.empty() && g < numbers.counts().size(); ++g) {
    if (numbers.counts()[g] == kUneven) problem = "parameters of one group have taken different numbers of steps";
  }
  if (!problem.empty()) return out;
  for (size_t k = 0; k < run.steps.size(); ++k) {
    const Step& op = *run.steps[k];
    for (size_t a = 0; a < op.args.size(); ++a) {
      if (!op.args[a].is_float() || !may_be_dynamic(op, a)) continue;
      const auto number = numbers.find(k, op.args[a].number());
      if (!number) continue;
      const auto& group = after.groups[number->group];
      const Rule& rule = *rule_of(*group.optimizer);
      if (rule.formula == nullptr) continue;
      if (const auto formula = rule.formula(*group.options, number->kind, number->group)) {
        out.places.push_back({k, a, *formula});
      }
    }
  }
  out.counts = std::move(numbers.counts());
  return out;
}

bool take_over_rates(OptimizerStep& step, const OptimizerStep& earlier) {
  if (step.any_rate.size() != earlier.any_rate.size()) return false;
  bool another = false;
  for (size_t g = 0; g < step.any_rate.size(); ++g) {
    const bool differs =
        step.after.groups[g].options->get_lr() != earlier.after.groups[g].options->get_lr();
    step.any_rate[g] = earlier.any_rate[g] || differs;
    another = another || differs;
  }
  return another;
}

std::optional<std::vector<double>> next_numbers(const OptimizerStep& step) {
  std::vector<Values> values;
  values.reserve(step.after.groups.size());
  size_t index = 0;
  const optim::Optimizer* last = nullptr;
  for (size_t g = 0; g < step.after.groups.size(); ++g) {
    const OptimizerState::Group& learned = step.after.groups[g];
    optim::Optimizer& optimizer = *learned.optimizer;
    index = &optimizer == last ? index + 1 : 0;
    last = &optimizer;
    const auto& groups = optimizer.param_groups();
    const bool ends = g + 1 == step.after.groups.size() || step.after.groups[g + 1].optimizer != &optimizer;
    if (index >= groups.size() || (ends && index + 1 != groups.size())) return std::nullopt;
    const auto& group = groups[index];
    const Rule& rule = *rule_of(optimizer);
    const optim::OptimizerOptions& options = group.options();
    if (options.get_lr() == learned.options->get_lr()) {
      if (!rule.same(options, *learned.options)) return std::nullopt;
    } else {
      const auto with_rate = learned.options->clone();
      with_rate->set_lr(options.get_lr());
      if (!step.any_rate[g] || !rule.same(options, *with_rate)) return std::nullopt;
    }
    if (!std::equal(group.params().begin(), group.params().end(), learned.parameters.begin(),
                    learned.parameters.end(), [](const at::Tensor& parameter, const c10::TensorImpl* impl) {
                      return parameter.unsafeGetTensorImpl() == impl;
                    })) {
      return std::nullopt;
    }
    int64_t taken = -1;
    for (const uint32_t k : step.stepped[g]) {
      const int64_t* count = counter(optimizer, rule, learned.parameters[k]);
      // A state that was loaded or cleared is for the function itself.
      if (count == nullptr || *count < learned.steps[k] || (taken >= 0 && taken != *count)) return std::nullopt;
      taken = *count;
    }
    values.push_back(rule.values(options, std::max<int64_t>(taken, 0) + 1));
  }
  std::vector<double> numbers;
  for (const OptimizerNumber& number : step.distinct) numbers.push_back(values[number.group].of(number.kind));
  return numbers;
}

void count_step(const OptimizerStep& step) {
  for (size_t g = 0; g < step.after.groups.size(); ++g) {
    const OptimizerState::Group& group = step.after.groups[g];
    const Rule& rule = *rule_of(*group.optimizer);
    for (const uint32_t k : step.stepped[g]) ++*counter(*group.optimizer, rule, group.parameters[k]);
  }
}

void restore_counts(const OptimizerState& state) {
  for (const OptimizerState::Group& group : state.groups) {
    const Rule* rule = rule_of(*group.optimizer);
    if (rule == nullptr) continue;
    for (size_t k = 0; k < group.parameters.size(); ++k) {
      if (int64_t* count = counter(*group.optimizer, *rule, group.parameters[k])) *count = group.steps[k];
    }
  }
}

std::vector<std::pair<std::string, at::Tensor>> named_state(
    const OptimizerPtrs& optimizers, const std::vector<std::pair<std::string, at::Tensor>>& named) {
  std::vector<std::pair<std::string, at::Tensor>> out;
  for (const optim::Optimizer* optimizer : optimizers) {
    const Rule* rule = rule_of(*optimizer);
    if (rule == nullptr) continue;
    for (const auto& [name, parameter] : named) {
      const auto state = optimizer->state().find(parameter.unsafeGetTensorImpl());
      if (state == optimizer->state().end()) continue;
      for (const auto& [what, tensor] : rule->tensors(*state->second)) {
        if (tensor.defined()) out.emplace_back(c10::str(name, "_", what), tensor);
      }
    }
  }
  return out;
}

}  // namespace reprise
