/// Prices a call option and its Greeks by Monte Carlo, against the closed formula.
#include "cpp_models/option_pricer.h"
#include "program.h"

#include <cmath>

namespace {

using cpp_models::Payoff;
using cpp_models::Valuation;

constexpr const char* kQuantities[] = {"price", "delta", "vega", "rho", "theta"};

/// The quantities in the order above, double [5].
torch::Tensor quantities(const Valuation& value) {
  return torch::stack({value.price, value.delta, value.vega, value.rho, value.theta})
      .to(torch::kDouble);
}

/// Mean over the batches, and the mean's standard error, of quantities that every
/// batch estimates independently.
struct Estimate {
  torch::Tensor sum;
  torch::Tensor sum_of_squares;

  void add(const torch::Tensor& values) {
    sum = sum.defined() ? sum + values : values;
    sum_of_squares =
        sum_of_squares.defined() ? sum_of_squares + values * values : values * values;
  }
  torch::Tensor mean(int64_t batches) const {
    return sum.cpu() / batches;
  }
  torch::Tensor standard_error(int64_t batches) const {
    const auto variance = sum_of_squares.cpu() / batches - mean(batches).square();
    return (variance.clamp_min(0) / (batches - 1)).sqrt();
  }
};

void print_comparison(
    examples::Program& program, const torch::Tensor& mean, const torch::Tensor& standard_error,
    const cpp_models::OptionContract& contract) {
  const bool has_formula = contract.payoff != Payoff::kArithmeticAsian;
  const auto exact =
      has_formula ? quantities(cpp_models::closed_formula(contract)) : torch::Tensor();
  for (int64_t i = 0; i < mean.size(0); ++i) {
    const double estimate = mean[i].item<double>();
    const double error = standard_error[i].item<double>();
    program.result(kQuantities[i], estimate);
    std::printf("  standard error %.3g", error);
    if (has_formula) {
      const double truth = exact[i].item<double>();
      std::printf(
          ", closed formula %.9g, off by %+.2f standard errors", truth, (estimate - truth) / error);
    }
    std::printf("\n");
  }
}

void run(int argc, char** argv) {
  cpp_models::OptionContract contract;
  std::string payoff = "european";
  int64_t paths = int64_t{1} << 20;
  examples::Program program(
      "price_options", "Prices a call option and its Greeks by Monte Carlo, a batch a step.", 100);
  program.choice(
      "payoff", payoff, {"european", "geometric-asian", "arithmetic-asian"},
      "What is compared with the strike: the last price or a mean of the prices.");
  program.option("paths", paths, "Paths in a batch.");
  program.option("dates", contract.dates, "Dates that the prices are averaged over.");
  program.option("spot", contract.spot, "Price of the underlying today.");
  program.option("strike", contract.strike, "Strike.");
  program.option("rate", contract.rate, "Risk-free rate per year.");
  program.option("volatility", contract.volatility, "Volatility per square root of a year.");
  program.option("maturity", contract.maturity, "Years until maturity.");
  program.parse(argc, argv);
  if (payoff != "european") {
    contract.payoff =
        payoff == "geometric-asian" ? Payoff::kGeometricAsian : Payoff::kArithmeticAsian;
  }
  TORCH_CHECK(program.steps() > 1, "--steps: expected at least 2 batches, to compare them");

  const auto device = program.device();
  cpp_models::OptionPricer pricer(contract);
  pricer->to(device);
  Estimate estimate;
  while (program.next_step()) {
    const auto normals = torch::randn({contract.dates, paths}, torch::device(device));
    const auto value = pricer->value(normals);
    estimate.add(quantities(value));
    if (program.log_due()) {
      program.log(
          {{"price", estimate.mean(program.step())[0].item<double>()},
           {"standard_error",
            value.standard_error.item<double>() /
                std::sqrt(static_cast<double>(program.step()))}});
    }
  }
  print_comparison(
      program, estimate.mean(program.steps()), estimate.standard_error(program.steps()), contract);
  program.finish();
}

}  // namespace

int main(int argc, char** argv) {
  return examples::guarded([&] { run(argc, argv); });
}
