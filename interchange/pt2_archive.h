/// \file
/// A `.pt2` file: the zip archive that torch.export and AOTInductor write.
///
/// Layout: torch/export/pt2_archive/constants.py (torch 2.11). `models/NAME.json` is a
/// program of torch.export; `data/aotinductor/NAME/` a package of AOTInductor.
#pragma once

#include <ATen/core/Tensor.h>
#include <caffe2/serialize/inline_container.h>

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace reprise {

class Pt2Archive {
 public:
  /// Throws c10::Error, which names the file, where there is none or it is no whole archive.
  explicit Pt2Archive(std::string path);

  const std::string& path() const { return path_; }
  /// The names of what lies in the folder `models` or `data/aotinductor`, in order.
  std::vector<std::string> exported_programs() const;
  std::vector<std::string> compiled_programs() const;

  const std::vector<std::string>& records() const { return records_; }
  bool has(const std::string& record);
  /// The bytes of a record. Throws c10::Error, which names file and record, without it.
  std::string text(const std::string& record);
  c10::Storage storage(const std::string& record);

  /// Weights of a package that lie beside it, by name; empty where none do. As Python writes
  /// them with `package_constants_on_disk_format="pickle_weights"`.
  std::map<std::string, at::Tensor> weights(const std::string& package);

 private:
  std::string path_;
  std::unique_ptr<caffe2::serialize::PyTorchStreamReader> reader_;
  std::vector<std::string> records_;
};

/// Writes an archive, whole or not at all: the compiled program in `program`, which is called
/// `entry` from then on, and what is in `others`, which may be null, but for one of that name.
/// Beside the program lie `weights`, each once where the same values are there already.
void write_package(const std::string& path, Pt2Archive* others, Pt2Archive& program, const std::string& entry,
                   const std::vector<std::pair<std::string, at::Tensor>>& weights);

}  // namespace reprise
