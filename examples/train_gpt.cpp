/// Trains a small GPT to predict the next character of an English text.
#include "cpp_models/gpt.h"
#include "program.h"
#include "text.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace {

namespace F = torch::nn::functional;

/// Share of the peak learning rate at a step: a linear rise over the first tenth of
/// the run, then half a cosine wave down to a tenth of the peak.
double schedule(int64_t step, int64_t steps) {
  const double progress = static_cast<double>(step) / static_cast<double>(steps);
  constexpr double kWarmup = 0.1, kFinal = 0.1;
  if (progress < kWarmup) {
    return progress / kWarmup;
  }
  const double angle = std::numbers::pi * (progress - kWarmup) / (1 - kWarmup);
  return kFinal + (1 - kFinal) * 0.5 * (1 + std::cos(angle));
}

void set_learning_rate(torch::optim::Optimizer& optimizer, double learning_rate) {
  for (auto& group : optimizer.param_groups()) {
    group.options().set_lr(learning_rate);
  }
}

/// Continues `prompt`, drawing each character from the model's prediction.
std::string generate(
    cpp_models::Gpt& model, const examples::Text& text, const std::string& prompt,
    int64_t length, int64_t context, torch::Device device) {
  torch::NoGradGuard no_grad;
  model->eval();
  std::vector<int64_t> tokens;
  for (const char c : prompt) {
    tokens.push_back(static_cast<int64_t>(text.alphabet.find(c)));
  }
  for (int64_t i = 0; i < length; ++i) {
    const auto seen = std::min(context, static_cast<int64_t>(tokens.size()));
    const auto window = torch::tensor(tokens).slice(/*dim=*/0, -seen).unsqueeze(0);
    const auto logits = model->forward(window.to(device)).select(/*dim=*/1, -1);
    tokens.push_back(torch::softmax(logits, -1).multinomial(1).item<int64_t>());
  }
  std::string continued;
  for (const int64_t token : tokens) {
    continued += text.alphabet[static_cast<size_t>(token)];
  }
  return continued;
}

void run(int argc, char** argv) {
  cpp_models::GptOptions options;
  std::string attention = "matmul";
  int64_t batch = 4;
  int64_t generated = 0;
  double learning_rate = 1e-3;
  double weight_decay = 0.1;
  examples::Program program(
      "train_gpt", "Trains a GPT on the characters of an English text with AdamW.", 400);
  program.option("batch", batch, "Stretches of text in a step.");
  program.option("context", options.context, "Characters in a stretch.");
  program.option("layers", options.layers, "Transformer blocks.");
  program.option("width", options.width, "Channels.");
  program.option("heads", options.heads, "Attention heads.");
  program.option("dropout", options.dropout, "Dropout probability.");
  program.choice(
      "attention", attention, {"matmul", "fused"},
      "Attention written out, or scaled_dot_product_attention.");
  program.option("learning-rate", learning_rate, "AdamW's learning rate at its peak.");
  program.option("weight-decay", weight_decay, "AdamW's weight decay.");
  program.option("generate", generated, "Characters to write at the end.");
  program.parse(argc, argv);

  const auto device = program.device();
  const auto text = examples::load_text(program.data_folder());
  options.vocabulary = text.vocabulary();
  options.attention =
      attention == "fused" ? cpp_models::Attention::kFused : cpp_models::Attention::kMatmul;
  cpp_models::Gpt model(options);
  model->to(device);
  torch::optim::AdamW optimizer(
      model->parameters(),
      torch::optim::AdamWOptions(learning_rate).betas({0.9, 0.95}).weight_decay(weight_decay));

  while (program.next_step()) {
    set_learning_rate(optimizer, learning_rate * schedule(program.step(), program.steps()));
    const auto [inputs, targets] = examples::draw_batch(text, batch, options.context);
    const auto logits = model->forward(inputs.to(device));
    const auto loss =
        F::cross_entropy(logits.flatten(0, 1), targets.to(device).flatten());
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
    if (program.log_due()) {
      program.log({{"loss", loss.item<double>()}});
    }
  }
  program.finish();
  if (generated > 0) {
    const auto continued = generate(model, text, "The ", generated, options.context, device);
    std::printf("%s\n", continued.c_str());
  }
}

}  // namespace

int main(int argc, char** argv) {
  return examples::guarded([&] { run(argc, argv); });
}
