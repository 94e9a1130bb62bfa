#include "interchange/step_counters.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "lazy_backend/json_text.h"

namespace reprise {
namespace {

using Json = nlohmann::ordered_json;  // the order of a trace's keys is part of its text

Json value(size_t number) { return {{"value", number}}; }
Json integer(int64_t number) { return {{"int", number}}; }
Json real(double number) { return {{"float", float_text(number)}}; }

/// Writes the steps that compute numbers, and names their results.
class Steps {
 public:
  explicit Steps(size_t first_result) : next_(first_result) {}

  void count_up(size_t counter) {
    add("add_", "Scalar", {value(counter), integer(1), integer(1)}, nullptr);
  }

  /// The value that is the number, `counter` being counted up.
  size_t compute(const CountedNumber& number, size_t counter) {
    switch (number.kind) {
      case CountedNumber::Kind::kRoot:
        return make("sqrt", "", {value(correction(number.base, counter))});
      case CountedNumber::Kind::kCorrected:
        return over(-number.rate, correction(number.base, counter));
      case CountedNumber::Kind::kDecayed: break;
    }
    const size_t before = make("sub", "Scalar", {value(counter), integer(1), integer(1)});
    const size_t decay = make("mul", "Scalar", {value(before), real(number.base)});
    return over(-number.rate, make("add", "Scalar", {value(decay), integer(1), integer(1)}));
  }

  Json take() { return std::move(steps_); }

 private:
  size_t correction(double base, size_t counter) {
    const size_t power = make("pow", "Scalar", {real(base), value(counter)});
    return make("rsub", "Scalar", {value(power), integer(1), integer(1)});
  }
  size_t over(double dividend, size_t divisor) {
    return make("mul", "Scalar", {value(make("reciprocal", "", {value(divisor)})), real(dividend)});
  }
  size_t make(const std::string& op, const char* overload, const std::vector<Json>& args) {
    add(op, overload, args, value(next_));
    return next_++;
  }
  void add(const std::string& op, const char* overload, const std::vector<Json>& args,
           const Json& result) {
    steps_.push_back({{"op", "aten::" + op}, {"overload", overload}, {"args", args},
                      {"results", std::vector<Json>{result}}});
  }

  size_t next_;
  Json steps_ = Json::array();
};

/// Above all values that are there.
size_t first_free_value(const Json& trace) {
  size_t next = trace.at("inputs").size();
  const auto see = [&](const auto& self, const Json& result) -> void {
    if (!result.is_object()) return;
    if (result.contains("list")) {
      for (const Json& each : result.at("list")) self(self, each);
    } else {
      next = std::max(next, result.at("value").get<size_t>() + 1);
    }
  };
  for (const Json& step : trace.at("steps")) {
    for (const Json& result : step.at("results")) see(see, result);
  }
  return next;
}

}  // namespace

std::pair<std::string, std::vector<StepCounter>> with_step_counters(const std::string& trace,
                                                                    const CountedNumbers& numbers) {
  if (numbers.places.empty()) return {trace, {}};
  Json json = Json::parse(trace);
  const size_t scalars = json.at("inputs").size() - numbers.places.size();
  Steps steps(first_free_value(json));
  std::vector<StepCounter> counters;
  std::vector<std::pair<CountedNumber, size_t>> computed;
  std::vector<size_t> value_of;  // by scalar
  json.at("inputs").erase(json.at("inputs").begin() + static_cast<std::ptrdiff_t>(scalars), json.at("inputs").end());
  for (const auto& [step, argument, number] : numbers.places) {
    auto known = std::find_if(computed.begin(), computed.end(), [&](const auto& each) { return each.first == number; });
    if (known == computed.end()) {
      auto counter = std::find_if(counters.begin(), counters.end(), [&](const StepCounter& each) { return each.group == number.group; });
      if (counter == counters.end()) {
        counter = counters.insert(counter, {number.group, static_cast<double>(numbers.counts[number.group])});
        json.at("inputs").push_back({{"kind", "tensor"}, {"dtype", "float64"}, {"sizes", Json::array()},
                                     {"strides", Json::array()}, {"offset", 0}});
        steps.count_up(json.at("inputs").size() - 1);
      }
      const size_t input = scalars + static_cast<size_t>(counter - counters.begin());
      known = computed.insert(known, {number, steps.compute(number, input)});
    }
    value_of.push_back(known->second);
  }
  Json all = steps.take();
  for (Json& step : json.at("steps")) {
    for (Json& argument : step.at("args")) {
      if (!argument.is_object() || !argument.contains("scalar")) continue;
      argument = {{"number", value_of[argument.at("scalar").get<size_t>() - scalars]}};
    }
    all.push_back(std::move(step));
  }
  json.at("steps") = std::move(all);
  return {json.dump(), std::move(counters)};
}

}  // namespace reprise
