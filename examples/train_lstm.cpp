/// Trains an LSTM to predict the next character of an English text.
#include "cpp_models/lstm_lm.h"
#include "program.h"
#include "text.h"

namespace {

namespace F = torch::nn::functional;

void run(int argc, char** argv) {
  cpp_models::LstmLmOptions options;
  int64_t batch = 16;
  int64_t length = 32;
  double learning_rate = 3e-3;
  examples::Program program(
      "train_lstm", "Trains an LSTM on the characters of an English text with Adam.", 400);
  program.option("batch", batch, "Stretches of text in a step.");
  program.option("length", length, "Characters in a stretch, each a time step of the LSTM.");
  program.option("hidden", options.hidden, "Channels of the LSTM.");
  program.option("layers", options.layers, "LSTM layers.");
  program.option("fused", options.fused, "Use torch::nn::LSTM in place of cells written out.");
  program.option("learning-rate", learning_rate, "Adam's learning rate.");
  program.parse(argc, argv);

  const auto device = program.device();
  const auto text = examples::load_text(program.data_folder());
  options.vocabulary = text.vocabulary();
  cpp_models::LstmLm model(options);
  model->to(device);
  torch::optim::Adam optimizer(model->parameters(), torch::optim::AdamOptions(learning_rate));

  while (program.next_step()) {
    const auto [inputs, targets] = examples::draw_batch(text, batch, length);
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
}

}  // namespace

int main(int argc, char** argv) {
  return examples::guarded([&] { run(argc, argv); });
}
