#include "cpp_models/lstm_lm.h"

#include <string>

namespace cpp_models {

namespace nn = torch::nn;

LstmCellImpl::LstmCellImpl(int64_t inputs, int64_t hidden) {
  input_gates_ = register_module("input_gates", nn::Linear(inputs, 4 * hidden));
  hidden_gates_ = register_module(
      "hidden_gates", nn::Linear(nn::LinearOptions(hidden, 4 * hidden).bias(false)));
}

LstmState LstmCellImpl::forward(const torch::Tensor& input, const LstmState& state) {
  const auto gates = (input_gates_(input) + hidden_gates_(state.hidden)).chunk(4, /*dim=*/1);
  const auto in = torch::sigmoid(gates[0]);
  const auto forget = torch::sigmoid(gates[1]);
  const auto candidate = torch::tanh(gates[2]);
  const auto out = torch::sigmoid(gates[3]);
  const auto cell = forget * state.cell + in * candidate;
  return {out * torch::tanh(cell), cell};
}

LstmLmImpl::LstmLmImpl(const LstmLmOptions& options) : options_(options) {
  embedding_ =
      register_module("embedding", nn::Embedding(options.vocabulary, options.embedding));
  if (options.fused) {
    lstm_ = register_module(
        "lstm",
        nn::LSTM(nn::LSTMOptions(options.embedding, options.hidden)
                     .num_layers(options.layers)
                     .batch_first(true)));
  } else {
    for (int64_t layer = 0; layer < options.layers; ++layer) {
      const int64_t inputs = layer == 0 ? options.embedding : options.hidden;
      cells_.push_back(
          register_module("cell" + std::to_string(layer), LstmCell(inputs, options.hidden)));
    }
  }
  decoder_ = register_module("decoder", nn::Linear(options.hidden, options.vocabulary));
}

torch::Tensor LstmLmImpl::forward(const torch::Tensor& tokens) {
  const auto embedded = embedding_(tokens);
  return decoder_(lstm_ ? std::get<0>(lstm_(embedded)) : run_cells(embedded));
}

torch::Tensor LstmLmImpl::run_cells(const torch::Tensor& embedded) {
  const auto zeros = torch::zeros({embedded.size(0), options_.hidden}, embedded.options());
  std::vector<LstmState> states(cells_.size(), LstmState{zeros, zeros});
  std::vector<torch::Tensor> outputs;
  for (int64_t time = 0; time < embedded.size(1); ++time) {
    auto activation = embedded.select(/*dim=*/1, time);
    for (size_t layer = 0; layer < cells_.size(); ++layer) {
      states[layer] = cells_[layer](activation, states[layer]);
      activation = states[layer].hidden;
    }
    outputs.push_back(activation);
  }
  return torch::stack(outputs, /*dim=*/1);
}

}  // namespace cpp_models
