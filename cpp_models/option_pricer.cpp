#include "cpp_models/option_pricer.h"

#include <cmath>

namespace cpp_models {

namespace {

/// Fills in the derivatives of `valuation.price` by the market's state.
void differentiate(
    Valuation& valuation, const torch::Tensor& spot, const torch::Tensor& volatility,
    const torch::Tensor& rate, const torch::Tensor& maturity) {
  const auto gradients =
      torch::autograd::grad({valuation.price}, {spot, volatility, rate, maturity});
  valuation.price = valuation.price.detach();
  valuation.delta = gradients[0];
  valuation.vega = gradients[1];
  valuation.rho = gradients[2];
  valuation.theta = -gradients[3];
}

}  // namespace

OptionPricerImpl::OptionPricerImpl(const OptionContract& contract) : contract_(contract) {
  TORCH_CHECK(
      contract.dates >= 1, "OptionPricer: expected at least one date, got ", contract.dates);
  const auto parameter = [this](const char* name, double value) {
    return register_parameter(name, torch::full({}, value));
  };
  spot_ = parameter("spot", contract.spot);
  strike_ = parameter("strike", contract.strike);
  rate_ = parameter("rate", contract.rate);
  volatility_ = parameter("volatility", contract.volatility);
  maturity_ = parameter("maturity", contract.maturity);
}

torch::Tensor OptionPricerImpl::forward(const torch::Tensor& normals) const {
  TORCH_CHECK(
      normals.dim() == 2 && normals.size(0) == contract_.dates,
      "OptionPricer: expected normals of shape [", contract_.dates, ", paths], got ",
      normals.sizes());
  const auto interval = maturity_ / contract_.dates;
  const auto drift = (rate_ - 0.5 * volatility_ * volatility_) * interval;
  const auto log_returns = drift + volatility_ * torch::sqrt(interval) * normals;

  torch::Tensor underlying;
  switch (contract_.payoff) {
    case Payoff::kEuropean:
      underlying = spot_ * torch::exp(log_returns.sum(/*dim=*/0));
      break;
    case Payoff::kGeometricAsian:
      underlying = spot_ * torch::exp(log_returns.cumsum(/*dim=*/0).mean(/*dim=*/0));
      break;
    case Payoff::kArithmeticAsian:
      underlying = (spot_ * torch::exp(log_returns.cumsum(/*dim=*/0))).mean(/*dim=*/0);
      break;
  }
  return torch::exp(-rate_ * maturity_) * torch::relu(underlying - strike_);
}

Valuation OptionPricerImpl::value(const torch::Tensor& normals) const {
  const auto payoffs = forward(normals);
  Valuation valuation;
  valuation.price = payoffs.mean();
  valuation.standard_error =
      payoffs.detach().std() / std::sqrt(static_cast<double>(payoffs.numel()));
  differentiate(valuation, spot_, volatility_, rate_, maturity_);
  return valuation;
}

Valuation closed_formula(const OptionContract& contract) {
  TORCH_CHECK(
      contract.payoff != Payoff::kArithmeticAsian,
      "closed_formula: expected a European or geometric Asian call; an arithmetic Asian "
      "call has no closed formula");
  const auto parameter = [](double value) {
    return torch::full({}, value, torch::dtype(torch::kDouble).requires_grad(true));
  };
  const auto spot = parameter(contract.spot);
  const auto rate = parameter(contract.rate);
  const auto volatility = parameter(contract.volatility);
  const auto maturity = parameter(contract.maturity);

  // The logarithm of what the strike is compared with is normal. For the geometric
  // mean over n dates its mean and variance are those of the final price times
  // (n + 1) / 2n and (n + 1)(2n + 1) / 6n².
  const auto n = static_cast<double>(contract.dates);
  const bool asian = contract.payoff == Payoff::kGeometricAsian;
  const double mean_share = asian ? (n + 1) / (2 * n) : 1.0;
  const double variance_share = asian ? (n + 1) * (2 * n + 1) / (6 * n * n) : 1.0;
  const auto mean = torch::log(spot) +
      mean_share * (rate - 0.5 * volatility * volatility) * maturity;
  const auto variance = variance_share * volatility * volatility * maturity;

  const auto d2 = (mean - std::log(contract.strike)) / torch::sqrt(variance);
  const auto d1 = d2 + torch::sqrt(variance);
  Valuation valuation;
  valuation.price = torch::exp(-rate * maturity) *
      (torch::exp(mean + 0.5 * variance) * torch::special::ndtr(d1) -
       contract.strike * torch::special::ndtr(d2));
  differentiate(valuation, spot, volatility, rate, maturity);
  return valuation;
}

}  // namespace cpp_models
