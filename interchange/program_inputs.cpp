#include "interchange/program_inputs.h"

namespace reprise {
namespace {

std::string text_of(const ProgramInputs::Symbol& symbol) {
  const bool bounded = symbol.most != std::numeric_limits<int64_t>::max();
  return (symbol.name.empty() ? "" : symbol.name + ", ") +
         (bounded ? c10::str(symbol.least, " to ", symbol.most) : c10::str("at least ", symbol.least));
}

std::string place_of(const ProgramInputs::Input& input, size_t index) {
  return c10::str("reprise: input ", index, " (", input.name, ")");
}

}  // namespace

std::vector<std::string> ProgramInputs::names() const {
  std::vector<std::string> out;
  for (const Input& input : inputs) out.push_back(input.name);
  return out;
}

void ProgramInputs::check(const std::vector<at::Tensor>& given) const {
  TORCH_CHECK_VALUE(given.size() == inputs.size(), "reprise: the program takes ", inputs.size(),
                    " tensors, and ", given.size(), " came");
  std::vector<int64_t> sizes(symbols.size(), -1);
  for (size_t k = 0; k < inputs.size(); ++k) {
    const Input& input = inputs[k];
    const at::Tensor& tensor = given[k];
    TORCH_CHECK_VALUE(tensor.defined(), place_of(input, k), " is an undefined tensor");
    if (!input.is_tensor) {
      TORCH_CHECK_VALUE(tensor.numel() == 1 && c10::isIntegralType(tensor.scalar_type(), /*includeBool=*/true),
                        place_of(input, k), " is an integer, and a tensor of ", tensor.scalar_type(), " with ",
                        tensor.numel(), " elements came");
      continue;
    }
    TORCH_CHECK_TYPE(tensor.scalar_type() == input.dtype, place_of(input, k), ": ", input.dtype,
                     " expected, and ", tensor.scalar_type(), " came");
    TORCH_CHECK_VALUE(static_cast<size_t>(tensor.dim()) == input.sizes.size(), place_of(input, k), ": ",
                      input.sizes.size(), " dimensions expected, and ", tensor.dim(), " came");
    for (size_t dim = 0; dim < input.sizes.size(); ++dim) {
      const auto& size = input.sizes[dim];
      if (!size || size->kind() != Expression::Kind::kSymbol) continue;
      const auto index = static_cast<size_t>(size->value());
      const int64_t came = tensor.size(static_cast<int64_t>(dim));
      const Symbol& symbol = symbols[index];
      TORCH_CHECK_VALUE(came >= symbol.least && came <= symbol.most, place_of(input, k), " dimension ", dim, ": ",
                        text_of(symbol), " expected, and ", came, " came");
      if (sizes[index] < 0) sizes[index] = came;
    }
  }
  for (size_t k = 0; k < inputs.size(); ++k) {
    for (size_t dim = 0; dim < inputs[k].sizes.size(); ++dim) {
      const auto& size = inputs[k].sizes[dim];
      if (!size) continue;
      bool known = true;
      size->for_each_symbol([&](uint32_t symbol) { known = known && sizes[symbol] >= 0; });
      const int64_t came = given[k].size(static_cast<int64_t>(dim));
      const int64_t expected = known ? size->evaluate(sizes).value_or(came) : came;
      TORCH_CHECK_VALUE(came == expected, place_of(inputs[k], k), " dimension ", dim, ": ", expected,
                        " expected, and ", came, " came");
    }
  }
}

}  // namespace reprise
