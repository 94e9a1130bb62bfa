/// Long short-term memory language model (Hochreiter and Schmidhuber, 1997, with
/// the forget gate of Gers et al., 2000): embedding, LSTM layers, linear decoder.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <vector>

namespace cpp_models {

struct LstmLmOptions {
  int64_t vocabulary = 96;
  int64_t embedding = 128;
  int64_t hidden = 128;
  int64_t layers = 1;
  /// False: cells written out, one time step after another. True: torch::nn::LSTM.
  bool fused = false;
};

/// Hidden and cell state of one layer, each [batch, hidden].
struct LstmState {
  torch::Tensor hidden;
  torch::Tensor cell;
};

/// One layer's cell, with the equations and gate order of torch::nn::LSTMCell:
///   i, f, o = σ(W x + U h + b),  g = tanh(W x + U h + b),
///   c' = f ⊙ c + i ⊙ g,  h' = o ⊙ tanh(c').
class LstmCellImpl : public torch::nn::Module {
 public:
  LstmCellImpl(int64_t inputs, int64_t hidden);

  /// `input`: [batch, inputs].
  LstmState forward(const torch::Tensor& input, const LstmState& state);

 private:
  torch::nn::Linear input_gates_{nullptr}, hidden_gates_{nullptr};
};

TORCH_MODULE(LstmCell);

class LstmLmImpl : public torch::nn::Module {
 public:
  explicit LstmLmImpl(const LstmLmOptions& options);

  /// `tokens`: int64 [batch, time], each in [0, vocabulary). The state starts at
  /// zero. Returns logits [batch, time, vocabulary] of each next token.
  torch::Tensor forward(const torch::Tensor& tokens);

 private:
  torch::Tensor run_cells(const torch::Tensor& embedded);

  LstmLmOptions options_;
  torch::nn::Embedding embedding_{nullptr};
  std::vector<LstmCell> cells_;
  torch::nn::LSTM lstm_{nullptr};
  torch::nn::Linear decoder_{nullptr};
};

TORCH_MODULE(LstmLm);

}  // namespace cpp_models
