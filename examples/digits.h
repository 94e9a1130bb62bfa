/// The handwritten digits that tools/export_digits.py writes at set-up.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <string>

namespace examples {

inline constexpr int64_t kDigitSize = 8;  ///< Height and width of an image, in pixels.
inline constexpr int64_t kDigitClasses = 10;

struct Digits {
  torch::Tensor images;  ///< float [count, 1, 8, 8] in [0, 1].
  torch::Tensor labels;  ///< int64 [count], 0 to 9.

  int64_t count() const { return labels.size(0); }
  Digits select(const torch::Tensor& indices) const;
  Digits to(torch::Device device) const;
};

struct DigitsSplit {
  Digits train;
  Digits test;
};

/// Reads both IDX files of `folder` (their format is in the script). Throws
/// c10::Error when a file is missing or is not what its header says.
Digits load_digits(const std::string& folder);

/// Shuffles the digits, always in the same way, and sets `test_count` apart.
DigitsSplit split(const Digits& digits, int64_t test_count);

/// Draws batches of examples: each once in an epoch, in a new order every epoch. What
/// does not fill a batch at the end of an epoch is left out.
class BatchSampler {
 public:
  /// Throws c10::Error when a batch is empty or has more than `count` examples.
  BatchSampler(int64_t count, int64_t batch);

  /// Returns the indices of the next batch, int64 [batch].
  torch::Tensor next();

 private:
  int64_t batch_;
  int64_t position_ = 0;
  torch::Tensor order_;
};

}  // namespace examples
