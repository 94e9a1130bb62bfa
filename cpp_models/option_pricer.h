/// Monte-Carlo pricing of call options under geometric Brownian motion, with the
/// sensitivities ("Greeks") of the price by differentiating along the paths
/// (Broadie and Glasserman, Management Science 42(2), 1996), and closed formulas
/// to compare with.
#pragma once

#include <torch/torch.h>

#include <cstdint>

namespace cpp_models {

/// What a call pays at maturity: the excess over the strike of
enum class Payoff {
  kEuropean,         ///< the final price,
  kGeometricAsian,   ///< the geometric mean of the prices at the dates,
  kArithmeticAsian,  ///< their arithmetic mean.
};

struct OptionContract {
  Payoff payoff = Payoff::kEuropean;
  int64_t dates = 1;  ///< Equally spaced up to the maturity, which is the last.
  double spot = 100.0;
  double strike = 105.0;
  double rate = 0.03;        ///< Risk-free, continuously compounded, per year.
  double volatility = 0.2;   ///< Per √year.
  double maturity = 1.0;     ///< In years.
};

/// Value of an option and its derivatives, each a 0-dim tensor.
struct Valuation {
  torch::Tensor price;
  torch::Tensor standard_error;  ///< Of `price`; undefined for a closed formula.
  torch::Tensor delta;           ///< ∂ price / ∂ spot
  torch::Tensor vega;            ///< ∂ price / ∂ volatility
  torch::Tensor rho;             ///< ∂ price / ∂ rate
  torch::Tensor theta;           ///< −∂ price / ∂ maturity
};

/// The market's state is held in 0-dim parameters, by which prices are differentiated.
class OptionPricerImpl : public torch::nn::Module {
 public:
  explicit OptionPricerImpl(const OptionContract& contract);

  /// `normals`: independent standard normals [dates, paths], one for each step of a
  /// path. Returns what each path pays, discounted to today, [paths].
  torch::Tensor forward(const torch::Tensor& normals) const;

  /// Price as the mean over the paths, its standard error and its derivatives.
  Valuation value(const torch::Tensor& normals) const;

 private:
  OptionContract contract_;
  torch::Tensor spot_, strike_, rate_, volatility_, maturity_;
};

TORCH_MODULE(OptionPricer);

/// Black and Scholes (1973) for a European call, Kemna and Vorst (1990), in the form
/// for discrete dates, for a geometric Asian one; in double precision on the CPU.
/// Throws c10::Error for an arithmetic Asian call, which has no closed formula.
Valuation closed_formula(const OptionContract& contract);

}  // namespace cpp_models
