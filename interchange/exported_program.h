/// \file
/// A program that `torch.export.save` has written, read and run without Python.
///
/// Its graph is a line of ops of the dispatcher, so it runs on any device, records gradients,
/// and is captured on the lazy device like the C++ that would call the same ops. The format:
/// torch/_export/serde/schema.py, torch 2.11 (schema 8.x).
#pragma once

#include "interchange/loaded_program.h"
#include "interchange/pt2_archive.h"

namespace reprise {

/// Immutable once its weights are taken; safe to run from several threads at once.
class ExportedProgram final : public detail::LoadedProgram {
 public:
  /// Throws c10::Error, which names the file and what in it cannot be run: another schema, an
  /// op that is not registered, a higher-order op that is not known.
  ExportedProgram(Pt2Archive& archive, const std::string& name);
  ~ExportedProgram() override;

  /// Tensors that were one in Python are one here.
  std::vector<Weight> take_weights() override;
  const std::vector<std::string>& input_names() const override;
  /// `training`: in place of what the ops' own flags said when the program was exported.
  /// Throws c10::Error, which names input and dimension, for what does not fit.
  std::vector<at::Tensor> run(const std::vector<at::Tensor>& weights,
                              const std::vector<at::Tensor>& inputs,
                              std::optional<bool> training) override;

  struct Parts;

 private:
  std::unique_ptr<Parts> parts_;
};

}  // namespace reprise
