/// Molecular dynamics of liquid argon: atoms with the Lennard-Jones interaction in
/// a periodic box, forces as the gradient of the potential energy, velocity Verlet.
///
/// Everything is in reduced units: lengths in σ, energies in ε, masses in that of
/// an atom, times in τ = σ √(m/ε), temperatures in ε/k. For argon σ = 0.34 nm and
/// ε/k = 120 K (Rahman, Phys. Rev. 136, A405, 1964), hence τ = 2.15 ps.
#pragma once

#include <torch/torch.h>

#include <cstdint>

namespace cpp_models {

inline constexpr double kArgonKelvin = 120.0;      ///< ε/k, in K.
inline constexpr double kArgonPicoseconds = 2.15;  ///< τ, in ps.

struct ArgonOptions {
  int64_t unit_cells = 4;      ///< Cells of the initial lattice along an edge: 4 n³ atoms.
  double density = 0.8442;     ///< Atoms per σ³; the default is the triple point's.
  double temperature = 1.444;  ///< Of the lattice, in ε/k; melting takes half of it.
  double cutoff = 2.5;         ///< Range of the interaction, in σ.
  double time_step = 0.005;    ///< In τ.
  /// Double precision, since energy is to be conserved over many steps.
  torch::Dtype dtype = torch::kDouble;
};

/// Vectors are [3, atoms]: coordinates first, so that an operation over the atoms
/// runs over contiguous memory.
struct ArgonState {
  torch::Tensor positions;         ///< In [0, box edge), in σ.
  torch::Tensor velocities;        ///< In σ/τ.
  torch::Tensor forces;            ///< In ε/σ.
  torch::Tensor potential_energy;  ///< 0-dim, in ε.
};

class ArgonImpl : public torch::nn::Module {
 public:
  /// Throws c10::Error when the box is narrower than two cutoffs: an atom would
  /// then see another one and its periodic image.
  explicit ArgonImpl(const ArgonOptions& options);

  int64_t atoms() const { return atoms_; }
  double box_edge() const { return box_edge_; }

  /// A face-centred cubic lattice at rest as a whole, with velocities drawn from
  /// the Maxwell distribution and scaled to the wanted temperature.
  ArgonState initial_state() const;

  /// One time step of velocity Verlet (Swope et al., J. Chem. Phys. 76, 637, 1982).
  ArgonState forward(const ArgonState& state) const;

  /// Sum over all pairs within the cutoff, 0-dim, in ε. `positions`: [3, atoms].
  ///
  /// The interaction is 4 (r⁻¹² − r⁻⁶), less a constant and a linear term that
  /// make it and its force zero at the cutoff, without which energy would not be
  /// conserved (Toxvaerd and Dyre, J. Chem. Phys. 134, 081102, 2011).
  torch::Tensor potential_energy(const torch::Tensor& positions) const;

  /// Kinetic energy, 0-dim, in ε.
  torch::Tensor kinetic_energy(const torch::Tensor& velocities) const;

 private:
  void compute_forces(ArgonState& state) const;

  ArgonOptions options_;
  int64_t atoms_;
  double box_edge_;
  torch::Tensor self_pairs_;  ///< bool [atoms, atoms], true on the diagonal.
};

TORCH_MODULE(Argon);

}  // namespace cpp_models
