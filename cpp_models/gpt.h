/// Generative pre-trained transformer: a decoder-only transformer with layer
/// normalisation before each sublayer and tied input and output embeddings, after
/// Radford et al., "Language Models are Unsupervised Multitask Learners" (GPT-2, 2019).
#pragma once

#include <torch/torch.h>

#include <cstdint>

namespace cpp_models {

enum class Attention {
  kMatmul,  ///< softmax(q kᵀ / √d + mask) v, written out.
  kFused,   ///< torch::scaled_dot_product_attention.
};

struct GptOptions {
  int64_t vocabulary = 96;
  int64_t context = 64;  ///< Longest sequence, in tokens.
  int64_t width = 128;   ///< Channels of the residual stream; a multiple of `heads`.
  int64_t heads = 4;
  int64_t layers = 4;
  double dropout = 0.0;
  Attention attention = Attention::kMatmul;
};

/// Multi-head self-attention in which a position sees itself and those before it.
class CausalSelfAttentionImpl : public torch::nn::Module {
 public:
  explicit CausalSelfAttentionImpl(const GptOptions& options);

  /// `x`: [batch, time, width]. Returns the same shape.
  torch::Tensor forward(const torch::Tensor& x);

 private:
  torch::Tensor attend(
      const torch::Tensor& query, const torch::Tensor& key, const torch::Tensor& value);

  GptOptions options_;
  torch::nn::Linear query_key_value_{nullptr}, projection_{nullptr};
  torch::Tensor future_;  ///< bool [context, context], true where key comes after query.
};

TORCH_MODULE(CausalSelfAttention);

/// x + attention(norm(x)), then x + feed_forward(norm(x)).
class TransformerBlockImpl : public torch::nn::Module {
 public:
  explicit TransformerBlockImpl(const GptOptions& options);

  /// `x`: [batch, time, width]. Returns the same shape.
  torch::Tensor forward(const torch::Tensor& x);

 private:
  torch::nn::LayerNorm attention_norm_{nullptr}, feed_forward_norm_{nullptr};
  CausalSelfAttention attention_{nullptr};
  torch::nn::Linear expand_{nullptr}, contract_{nullptr};
  torch::nn::Dropout dropout_{nullptr};
};

TORCH_MODULE(TransformerBlock);

class GptImpl : public torch::nn::Module {
 public:
  /// Throws c10::Error unless `width` is a multiple of `heads`.
  explicit GptImpl(const GptOptions& options);

  /// `tokens`: int64 [batch, time], time ≤ context, each in [0, vocabulary).
  /// Returns logits [batch, time, vocabulary] of each next token.
  torch::Tensor forward(const torch::Tensor& tokens);

 private:
  GptOptions options_;
  torch::nn::Embedding token_embedding_{nullptr}, position_embedding_{nullptr};
  torch::nn::Sequential blocks_{nullptr};
  torch::nn::LayerNorm norm_{nullptr};
};

TORCH_MODULE(Gpt);

}  // namespace cpp_models
