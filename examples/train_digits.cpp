/// Trains a classifier of handwritten digits and tests it on digits it has not seen.
#include "cpp_models/mlp.h"
#include "cpp_models/resnet.h"
#include "digits.h"
#include "program.h"

namespace {

namespace F = torch::nn::functional;

constexpr int64_t kTestDigits = 360;

struct Settings {
  std::string model = "mlp";
  int64_t batch = 32;
  double learning_rate = 1e-3;
};

template <typename Model>
double accuracy(Model& model, const examples::Digits& digits) {
  torch::NoGradGuard no_grad;
  model->eval();
  const auto predicted = model->forward(digits.images).argmax(/*dim=*/1);
  const double share = predicted.eq(digits.labels).to(torch::kFloat).mean().template item<double>();
  model->train();
  return share;
}

template <typename Model>
void train(examples::Program& program, Model model, const Settings& settings) {
  const auto device = program.device();
  const auto digits = split(examples::load_digits(program.data_folder()), kTestDigits);
  examples::BatchSampler sampler(digits.train.count(), settings.batch);

  model->to(device);
  torch::optim::Adam optimizer(
      model->parameters(), torch::optim::AdamOptions(settings.learning_rate));
  while (program.next_step()) {
    const auto batch = digits.train.select(sampler.next()).to(device);
    const auto loss = F::cross_entropy(model->forward(batch.images), batch.labels);
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
    if (program.log_due()) {
      program.log({{"loss", loss.template item<double>()}});
    }
  }
  program.result("test_accuracy", accuracy(model, digits.test.to(device)));
  program.finish();
}

void run(int argc, char** argv) {
  Settings settings;
  examples::Program program(
      "train_digits", "Trains a classifier of 8×8 handwritten digits with Adam.", 1000);
  program.choice("model", settings.model, {"mlp", "resnet"}, "What to train.");
  program.option("batch", settings.batch, "Digits in a step.");
  program.option("learning-rate", settings.learning_rate, "Adam's learning rate.");
  program.parse(argc, argv);

  if (settings.model == "mlp") {
    cpp_models::MlpOptions options;
    options.inputs = examples::kDigitSize * examples::kDigitSize;
    options.outputs = examples::kDigitClasses;
    train(program, cpp_models::Mlp(options), settings);
  } else {
    cpp_models::ResNetOptions options;
    options.channels = 1;
    options.classes = examples::kDigitClasses;
    options.depth = 8;
    train(program, cpp_models::ResNet(options), settings);
  }
}

}  // namespace

int main(int argc, char** argv) {
  return examples::guarded([&] { run(argc, argv); });
}
