#include "workloads.h"

#include <ATen/CPUGeneratorImpl.h>

#include <cstdlib>
#include <stdexcept>

#include "cpp_models/argon.h"
#include "cpp_models/dcgan.h"
#include "cpp_models/gpt.h"
#include "cpp_models/lstm_lm.h"
#include "cpp_models/mlp.h"
#include "cpp_models/option_pricer.h"
#include "cpp_models/resnet.h"

namespace bench {

namespace {

namespace F = torch::nn::functional;

constexpr uint64_t kSeed = 0;
constexpr double kLearningRate = 1e-3;
constexpr double kMomentum = 0.9;
constexpr int64_t kMlpBatch = 32;
constexpr int64_t kImageBatch = 16;
constexpr int64_t kImageSize = 32;
constexpr int64_t kGptBatch = 4;
constexpr int64_t kLstmBatch = 16;
constexpr int64_t kLstmLength = 32;
constexpr int64_t kPaths = int64_t{1} << 20;

/// What REPRISE_BENCH_BATCH says, or `usual`: for the models whose batch can be any.
int64_t batch(int64_t usual) {
  const char* const wanted = std::getenv("REPRISE_BENCH_BATCH");
  return wanted != nullptr ? std::atoll(wanted) : usual;
}

struct Example {
  torch::Tensor input;
  torch::Tensor target;  ///< Class of each row of the logits, int64.
};

/// Makes a model and an example for it, from the seed.
template <typename Model>
struct Classification {
  std::function<Model()> model;
  std::function<Example()> example;
};

torch::Tensor disturbed(const torch::Tensor& tensor, torch::Generator& generator) {
  const double unit = tensor.scalar_type() == torch::kDouble ? 0x1p-52 : 0x1p-23;
  const auto error = torch::rand(tensor.sizes(), generator, torch::kDouble) * 4 - 2;
  return (tensor.to(torch::kDouble) * (1 + error * unit)).to(tensor.dtype());
}

torch::Tensor moved(const torch::Tensor& tensor, const Place& where) {
  if (where.disturbance == 0 || !tensor.is_floating_point()) {
    return tensor.to(where.device);
  }
  auto generator = at::make_generator<at::CPUGeneratorImpl>(where.disturbance);
  return disturbed(tensor, generator).to(where.device);
}

/// Moves the parameters and buffers of a module.
void move(torch::nn::Module& module, const Place& where) {
  if (where.disturbance != 0) {
    auto generator = at::make_generator<at::CPUGeneratorImpl>(where.disturbance + 1);
    for (auto& parameter : module.parameters()) {
      parameter.set_data(disturbed(parameter.data(), generator));
    }
  }
  module.to(where.device);
}

torch::Tensor all_gradients(const torch::nn::Module& module) {
  std::vector<torch::Tensor> gradients;
  for (const auto& parameter : module.parameters()) {
    gradients.push_back(parameter.grad().flatten());
  }
  return torch::cat(gradients);
}

const torch::Tensor& moment(const torch::optim::OptimizerParamState& state) {
  if (const auto* const sgd = dynamic_cast<const torch::optim::SGDParamState*>(&state)) {
    return sgd->momentum_buffer();
  }
  return dynamic_cast<const torch::optim::AdamParamState&>(state).exp_avg();
}

torch::Tensor all_moments(torch::optim::Optimizer& optimizer) {
  std::vector<torch::Tensor> moments;
  for (const auto& parameter : optimizer.param_groups().at(0).params()) {
    const auto& state = *optimizer.state().at(parameter.unsafeGetTensorImpl());
    moments.push_back(moment(state).flatten());
  }
  return torch::cat(moments);
}

void set_rate(torch::optim::Optimizer& optimizer, double rate) {
  for (auto& group : optimizer.param_groups()) {
    group.options().set_lr(rate);
  }
}

/// A job that computes `forward` of a module and its input, and keeps nothing else.
template <typename Model, typename Forward>
Job forward_job(
    Model model, const torch::Tensor& input, const Place& where, Forward forward) {
  move(*model, where);
  model->eval();
  const auto on_device = std::make_shared<torch::Tensor>(moved(input, where));
  const auto step = [=]() mutable {
    torch::NoGradGuard no_grad;
    return forward(*model, *on_device);
  };
  return {
      .step = step,
      .state = [] { return std::vector<torch::Tensor>{}; },
      .set_learning_rate = {},
      .optimizers = {},
      .model = model.ptr(),
      .input = on_device};
}

template <typename Model>
Job inference(const Classification<Model>& task, const Place& where) {
  torch::manual_seed(kSeed);
  Model model = task.model();
  return forward_job(
      model, task.example().input, where,
      [](auto& module, const torch::Tensor& input) { return module.forward(input); });
}

template <typename Optimizer, typename Model, typename Options>
Job training(const Classification<Model>& task, const Place& where, const Options& options) {
  torch::manual_seed(kSeed);
  Model model = task.model();
  const auto example = task.example();
  const auto input = moved(example.input, where);
  const auto target = moved(example.target, where);
  move(*model, where);
  const auto optimizer = std::make_shared<Optimizer>(model->parameters(), options);
  const auto step = [=]() mutable {
    const auto logits = model->forward(input);
    const auto loss = F::cross_entropy(logits.flatten(0, -2), target);
    optimizer->zero_grad();
    loss.backward();
    optimizer->step();
    return loss.detach();
  };
  return {
      .step = step,
      .state =
          [=] {
            return std::vector<torch::Tensor>{all_gradients(*model), all_moments(*optimizer)};
          },
      .set_learning_rate = [=](double rate) { set_rate(*optimizer, rate); },
      .optimizers = {optimizer.get()},
      .model = nullptr,
      .input = nullptr};
}

template <typename Model>
void add(
    std::vector<Workload>& rows, const std::string& name, const Classification<Model>& task) {
  rows.push_back({name, "forward", [=](const Place& where) { return inference(task, where); }});
  rows.push_back({name, "train", [=](const Place& where) {
                    return training<torch::optim::Adam>(
                        task, where, torch::optim::AdamOptions(kLearningRate));
                  }});
}

Example random_text(int64_t batch, int64_t length, int64_t vocabulary) {
  return {
      torch::randint(vocabulary, {batch, length}, torch::kLong),
      torch::randint(vocabulary, {batch * length}, torch::kLong)};
}

Classification<cpp_models::Mlp> mlp() {
  const cpp_models::MlpOptions options;
  return {
      [=] { return cpp_models::Mlp(options); },
      [=] {
        return Example{
            torch::randn({batch(kMlpBatch), options.inputs}),
            torch::randint(options.outputs, {batch(kMlpBatch)}, torch::kLong)};
      }};
}

Classification<cpp_models::ResNet> resnet() {
  const cpp_models::ResNetOptions options;
  return {
      [=] { return cpp_models::ResNet(options); },
      [=] {
        return Example{
            torch::randn({batch(kImageBatch), options.channels, kImageSize, kImageSize}),
            torch::randint(options.classes, {batch(kImageBatch)}, torch::kLong)};
      }};
}

Classification<cpp_models::LstmLm> lstm() {
  const cpp_models::LstmLmOptions options;
  return {
      [=] { return cpp_models::LstmLm(options); },
      [=] { return random_text(batch(kLstmBatch), kLstmLength, options.vocabulary); }};
}

Classification<cpp_models::Gpt> gpt(cpp_models::Attention attention) {
  cpp_models::GptOptions options;
  options.attention = attention;
  return {
      [=] { return cpp_models::Gpt(options); },
      [=] { return random_text(batch(kGptBatch), options.context, options.vocabulary); }};
}

Job dcgan_generation(const Place& where) {
  torch::manual_seed(kSeed);
  const cpp_models::DcganOptions options;
  cpp_models::DcganGenerator generator(options);
  return forward_job(
      generator, torch::randn({batch(kImageBatch), options.latent}), where,
      [](auto& module, const torch::Tensor& noise) { return module.forward(noise); });
}

/// A step of the discriminator on real and generated images, then one of the generator.
Job dcgan_training(const Place& where) {
  torch::manual_seed(kSeed);
  const cpp_models::DcganOptions options;
  cpp_models::DcganGenerator generator(options);
  cpp_models::DcganDiscriminator discriminator(options);
  const auto noise = moved(torch::randn({batch(kImageBatch), options.latent}), where);
  const auto images = moved(
      torch::rand({batch(kImageBatch), options.channels, options.image_size, options.image_size}),
      where);
  move(*generator, where);
  move(*discriminator, where);
  const auto adam = torch::optim::AdamOptions(kLearningRate).betas({0.5, 0.999});
  const auto generator_optimizer =
      std::make_shared<torch::optim::Adam>(generator->parameters(), adam);
  const auto discriminator_optimizer =
      std::make_shared<torch::optim::Adam>(discriminator->parameters(), adam);
  const auto verdict_loss = [](const torch::Tensor& logits, bool real) {
    const auto wanted = real ? torch::ones_like(logits) : torch::zeros_like(logits);
    return F::binary_cross_entropy_with_logits(logits, wanted);
  };
  const auto step = [=]() mutable {
    const auto generated = generator->forward(noise);
    discriminator_optimizer->zero_grad();
    const auto discriminator_loss = verdict_loss(discriminator->forward(images), true) +
        verdict_loss(discriminator->forward(generated.detach()), false);
    discriminator_loss.backward();
    discriminator_optimizer->step();

    generator_optimizer->zero_grad();
    const auto generator_loss = verdict_loss(discriminator->forward(generated), true);
    generator_loss.backward();
    generator_optimizer->step();
    return torch::stack({discriminator_loss.detach(), generator_loss.detach()});
  };
  const auto state = [=] {
    return std::vector<torch::Tensor>{
        all_gradients(*generator), all_gradients(*discriminator),
        all_moments(*generator_optimizer), all_moments(*discriminator_optimizer)};
  };
  const auto set_both = [=](double rate) {
    set_rate(*generator_optimizer, rate);
    set_rate(*discriminator_optimizer, rate);
  };
  return {
      .step = step,
      .state = state,
      .set_learning_rate = set_both,
      .optimizers = {generator_optimizer.get(), discriminator_optimizer.get()},
      .model = nullptr,
      .input = nullptr};
}

cpp_models::Argon argon() {
  torch::manual_seed(kSeed);
  return cpp_models::Argon(cpp_models::ArgonOptions{});
}

Job argon_energy(const Place& where) {
  const auto model = argon();
  return forward_job(
      model, model->initial_state().positions, where,
      [](auto& module, const torch::Tensor& positions) {
        return module.potential_energy(positions);
      });
}

Job argon_step(const Place& where) {
  auto model = argon();
  const auto begin = model->initial_state();
  move(*model, where);
  const auto state = std::make_shared<cpp_models::ArgonState>(cpp_models::ArgonState{
      .positions = moved(begin.positions, where),
      .velocities = moved(begin.velocities, where),
      .forces = moved(begin.forces, where),
      .potential_energy = moved(begin.potential_energy, where)});
  const auto step = [=] {
    *state = model->forward(*state);
    return state->potential_energy;
  };
  const auto compared = [=] {
    return std::vector<torch::Tensor>{state->positions, state->velocities, state->forces};
  };
  return {
      .step = step,
      .state = compared,
      .set_learning_rate = {},
      .optimizers = {},
      .model = nullptr,
      .input = nullptr};
}

Job option_price(const Place& where) {
  torch::manual_seed(kSeed);
  cpp_models::OptionPricer pricer(cpp_models::OptionContract{});
  return forward_job(
      pricer, torch::randn({1, kPaths}), where,
      [](auto& module, const torch::Tensor& normals) { return module.forward(normals).mean(); });
}

Job option_greeks(const Place& where) {
  torch::manual_seed(kSeed);
  cpp_models::OptionPricer pricer(cpp_models::OptionContract{});
  move(*pricer, where);
  const auto normals = moved(torch::randn({1, kPaths}), where);
  const auto step = [=] {
    const auto value = pricer->value(normals);
    return torch::stack(
        {value.price, value.standard_error, value.delta, value.vega, value.rho, value.theta});
  };
  return {
      .step = step,
      .state = [] { return std::vector<torch::Tensor>{}; },
      .set_learning_rate = {},
      .optimizers = {},
      .model = nullptr,
      .input = nullptr};
}

}  // namespace

torch::Tensor chain(torch::Tensor x, const torch::Tensor& factor, int ops) {
  for (int op = 0; op < ops; op += 2) {
    x = x * factor;
    x = torch::relu(x);
  }
  return x;
}

const std::vector<Workload>& workloads() {
  static const std::vector<Workload> kWorkloads = [] {
    std::vector<Workload> rows;
    add(rows, "mlp", mlp());
    add(rows, "resnet", resnet());
    add(rows, "lstm", lstm());
    add(rows, "gpt", gpt(cpp_models::Attention::kMatmul));
    add(rows, "gpt_fused", gpt(cpp_models::Attention::kFused));
    rows.push_back({"dcgan", "forward", dcgan_generation});
    rows.push_back({"dcgan", "train", dcgan_training});
    rows.push_back({"argon", "forward", argon_energy, /*has_batches=*/false});
    rows.push_back({"argon", "step", argon_step, /*has_batches=*/false});
    rows.push_back({"option_pricer", "forward", option_price, /*has_batches=*/false});
    rows.push_back({"option_pricer", "greeks", option_greeks, /*has_batches=*/false});
    return rows;
  }();
  return kWorkloads;
}

const Workload& gpt_sgd_training() {
  static const Workload kWorkload{
      "gpt", "train_sgd", [](const Place& where) {
        return training<torch::optim::SGD>(
            gpt(cpp_models::Attention::kMatmul), where,
            torch::optim::SGDOptions(kLearningRate).momentum(kMomentum));
      }};
  return kWorkload;
}

const Workload& workload_named(std::string_view name) {
  for (const auto& workload : workloads()) {
    if (workload.name() == name) {
      return workload;
    }
  }
  if (gpt_sgd_training().name() == name) {
    return gpt_sgd_training();
  }
  throw std::invalid_argument("no workload " + std::string(name));
}

}  // namespace bench
