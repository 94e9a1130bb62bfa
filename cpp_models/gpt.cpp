#include "cpp_models/gpt.h"

#include <cmath>
#include <limits>

namespace cpp_models {

namespace nn = torch::nn;
namespace F = torch::nn::functional;

namespace {

constexpr double kInitialDeviation = 0.02;  // GPT-2's, for linear and embedding weights.

nn::LayerNorm layer_norm(int64_t width) {
  return nn::LayerNorm(nn::LayerNormOptions({width}));
}

void initialize(nn::Module& module) {
  torch::NoGradGuard no_grad;
  if (auto* linear = module.as<nn::Linear>()) {
    linear->weight.normal_(0.0, kInitialDeviation);
    linear->bias.zero_();
  } else if (auto* embedding = module.as<nn::Embedding>()) {
    embedding->weight.normal_(0.0, kInitialDeviation);
  }
}

}  // namespace

CausalSelfAttentionImpl::CausalSelfAttentionImpl(const GptOptions& options) : options_(options) {
  query_key_value_ =
      register_module("query_key_value", nn::Linear(options.width, 3 * options.width));
  projection_ = register_module("projection", nn::Linear(options.width, options.width));
  if (options.attention == Attention::kMatmul) {
    const auto square = torch::ones({options.context, options.context}, torch::kBool);
    future_ = register_buffer("future", square.triu(/*diagonal=*/1));
  }
}

torch::Tensor CausalSelfAttentionImpl::forward(const torch::Tensor& x) {
  const int64_t batch = x.size(0), time = x.size(1), width = x.size(2);
  const auto heads = [&](const torch::Tensor& channels) {
    return channels.view({batch, time, options_.heads, width / options_.heads}).transpose(1, 2);
  };
  const auto channels = query_key_value_(x).chunk(3, /*dim=*/-1);
  const auto mixed = attend(heads(channels[0]), heads(channels[1]), heads(channels[2]));
  return projection_(mixed.transpose(1, 2).reshape({batch, time, width}));
}

/// `query`, `key`, `value`: [batch, heads, time, width / heads]. Returns the same shape.
torch::Tensor CausalSelfAttentionImpl::attend(
    const torch::Tensor& query, const torch::Tensor& key, const torch::Tensor& value) {
  const double dropout = is_training() ? options_.dropout : 0.0;
  if (options_.attention == Attention::kFused) {
    return torch::scaled_dot_product_attention(
        query, key, value, /*attn_mask=*/{}, dropout, /*is_causal=*/true);
  }
  const int64_t time = query.size(-2);
  const double scale = 1.0 / std::sqrt(static_cast<double>(query.size(-1)));
  const auto mask = future_.slice(/*dim=*/0, 0, time).slice(/*dim=*/1, 0, time);
  auto scores = torch::matmul(query, key.transpose(-2, -1)) * scale;
  scores = scores.masked_fill(mask, -std::numeric_limits<double>::infinity());
  auto weights = torch::softmax(scores, /*dim=*/-1);
  if (dropout > 0) {
    weights = torch::dropout(weights, dropout, /*train=*/true);
  }
  return torch::matmul(weights, value);
}

TransformerBlockImpl::TransformerBlockImpl(const GptOptions& options) {
  attention_norm_ = register_module("attention_norm", layer_norm(options.width));
  attention_ = register_module("attention", CausalSelfAttention(options));
  feed_forward_norm_ = register_module("feed_forward_norm", layer_norm(options.width));
  expand_ = register_module("expand", nn::Linear(options.width, 4 * options.width));
  contract_ = register_module("contract", nn::Linear(4 * options.width, options.width));
  dropout_ = register_module("dropout", nn::Dropout(options.dropout));
}

torch::Tensor TransformerBlockImpl::forward(const torch::Tensor& x) {
  const auto attended = x + dropout_(attention_(attention_norm_(x)));
  const auto hidden = torch::gelu(expand_(feed_forward_norm_(attended)));
  return attended + dropout_(contract_(hidden));
}

GptImpl::GptImpl(const GptOptions& options) : options_(options) {
  TORCH_CHECK(
      options.width % options.heads == 0,
      "Gpt: expected a width that is a multiple of the ", options.heads, " heads, got ",
      options.width);
  token_embedding_ =
      register_module("token_embedding", nn::Embedding(options.vocabulary, options.width));
  position_embedding_ =
      register_module("position_embedding", nn::Embedding(options.context, options.width));
  blocks_ = register_module("blocks", nn::Sequential());
  for (int64_t layer = 0; layer < options.layers; ++layer) {
    blocks_->push_back(TransformerBlock(options));
  }
  norm_ = register_module("norm", layer_norm(options.width));
  apply(initialize);
}

torch::Tensor GptImpl::forward(const torch::Tensor& tokens) {
  const int64_t time = tokens.size(1);
  TORCH_CHECK(
      time <= options_.context,
      "Gpt: expected at most ", options_.context, " tokens in a sequence, got ", time);
  const auto positions = torch::arange(time, tokens.options());
  auto x = token_embedding_(tokens) + position_embedding_(positions);
  x = norm_(blocks_->forward(x));
  return F::linear(x, token_embedding_->weight);
}

}  // namespace cpp_models
