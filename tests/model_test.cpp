// The models of the zoo, small: a forward pass and some training steps of each.
#include "cpp_models/argon.h"
#include "cpp_models/dcgan.h"
#include "cpp_models/gpt.h"
#include "cpp_models/lstm_lm.h"
#include "cpp_models/mlp.h"
#include "cpp_models/option_pricer.h"
#include "cpp_models/resnet.h"
#include "tests/three_ways.h"

namespace reprise::test {
namespace {

namespace F = torch::nn::functional;
using Models = Lazy;

/// Ways are compared by gradients and outputs. The rate is small, so that a
/// difference in rounding does not grow from step to step.
template <class Model>
void expect_model(const std::function<Model()>& make, const torch::Tensor& input,
                  const torch::Tensor& target, double tolerance = 100) {
  const auto program = [&](bool train) {
    return [=](torch::Device device) -> Step {
      Model model = make();
      model->to(device);
      const auto x = input.to(device), y = target.to(device);
      auto optimizer = std::make_shared<torch::optim::SGD>(
          model->parameters(), torch::optim::SGDOptions(1e-4).momentum(0.9));
      return [=](int) mutable -> Tensors {
        if (!train) {
          torch::NoGradGuard no_grad;
          model->eval();
          return {model->forward(x)};
        }
        optimizer->zero_grad();
        const auto loss = F::cross_entropy(model->forward(x).flatten(0, -2), y);
        loss.backward();
        optimizer->step();
        return joined({loss}, joined(gradients_of(*model), state_of(*model)));
      };
    };
  };
  {
    SCOPED_TRACE("forward");
    expect_eager_three_ways(program(false), {.tolerance = tolerance});
  }
  {
    SCOPED_TRACE("training");
    expect_eager_three_ways(program(true), {.repeats_at = 2, .tolerance = tolerance});
  }
}

torch::Tensor classes(int64_t count, int64_t most) {
  return torch::randint(most, {count}, torch::kLong);
}

TEST_F(Models, Mlp) {
  expect_model<cpp_models::Mlp>(
      [] {
        return cpp_models::Mlp(cpp_models::MlpOptions{
            .inputs = 12, .hidden = {16, 16}, .outputs = 4, .dropout = 0.25});
      },
      torch::randn({5, 12}), classes(5, 4));
}

TEST_F(Models, ResNet) {
  expect_model<cpp_models::ResNet>(
      [] {
        return cpp_models::ResNet(
            cpp_models::ResNetOptions{.channels = 3, .classes = 4, .depth = 8, .width = 4});
      },
      torch::randn({4, 3, 8, 8}), classes(4, 4));
}

TEST_F(Models, LstmOfCells) {
  expect_model<cpp_models::LstmLm>(
      [] {
        return cpp_models::LstmLm(
            cpp_models::LstmLmOptions{.vocabulary = 9, .embedding = 6, .hidden = 8, .layers = 2});
      },
      torch::randint(9, {2, 4}, torch::kLong), classes(8, 9));
}

TEST_F(Models, LstmOfTheLibrary) {
  expect_model<cpp_models::LstmLm>(
      [] {
        return cpp_models::LstmLm(cpp_models::LstmLmOptions{
            .vocabulary = 9, .embedding = 6, .hidden = 8, .layers = 1, .fused = true});
      },
      torch::randint(9, {2, 4}, torch::kLong), classes(8, 9));
}

cpp_models::GptOptions small_gpt(cpp_models::Attention attention) {
  return {.vocabulary = 11, .context = 8, .width = 16, .heads = 2, .layers = 2, .dropout = 0.1,
          .attention = attention};
}

TEST_F(Models, GptWithWrittenOutAttention) {
  expect_model<cpp_models::Gpt>(
      [] { return cpp_models::Gpt(small_gpt(cpp_models::Attention::kMatmul)); },
      torch::randint(11, {2, 8}, torch::kLong), classes(16, 11));
}

TEST_F(Models, GptWithFusedAttention) {
  expect_model<cpp_models::Gpt>(
      [] { return cpp_models::Gpt(small_gpt(cpp_models::Attention::kFused)); },
      torch::randint(11, {2, 8}, torch::kLong), classes(16, 11));
}

TEST_F(Models, Dcgan) {
  const cpp_models::DcganOptions options{.image_size = 8, .channels = 1, .latent = 6, .width = 4};
  expect_eager_three_ways(
      [&](torch::Device device) -> Step {
        cpp_models::DcganGenerator generator(options);
        cpp_models::DcganDiscriminator critic(options);
        generator->to(device);
        critic->to(device);
        const auto noise = random(device, {4, 6});
        return [=](int) mutable -> Tensors {
          generator->zero_grad();
          critic->zero_grad();
          const auto images = generator->forward(noise);
          const auto loss = critic->forward(images).square().mean();
          loss.backward();
          return joined({images, loss},
                        joined(gradients_of(*generator), gradients_of(*critic)));
        };
      },
      {.repeats_at = 2, .tolerance = 100});
}

TEST_F(Models, Argon) {
  expect_eager_three_ways(
      [](torch::Device device) -> Step {
        cpp_models::Argon model(cpp_models::ArgonOptions{.unit_cells = 2, .cutoff = 1.6});
        model->to(device);
        auto state = std::make_shared<cpp_models::ArgonState>(model->initial_state());
        return [=](int) mutable -> Tensors {
          *state = model->forward(*state);
          return {state->positions, state->velocities, state->forces, state->potential_energy,
                  model->kinetic_energy(state->velocities)};
        };
      },
      {.tolerance = 10});
}

TEST_F(Models, OptionPricer) {
  for (const auto payoff : {cpp_models::Payoff::kEuropean, cpp_models::Payoff::kGeometricAsian}) {
    expect_eager_three_ways(
        [=](torch::Device device) -> Step {
          cpp_models::OptionPricer pricer(
              cpp_models::OptionContract{.payoff = payoff, .dates = 3});
          pricer->to(device);
          return [=](int) mutable -> Tensors {
            const auto value = pricer->value(torch::randn({3, 500}, device));
            return {value.price, value.standard_error, value.delta,
                    value.vega,  value.rho,            value.theta};
          };
        },
        {.tolerance = 100});
  }
}

}  // namespace
}  // namespace reprise::test
