#include "cpp_models/argon.h"

#include <cmath>
#include <vector>

namespace cpp_models {

namespace {

constexpr int64_t kAtomsPerUnitCell = 4;

/// 4 (r⁻¹² − r⁻⁶) from the squared distance.
template <typename T>
T lennard_jones(const T& attraction) {  // attraction = r⁻⁶
  return 4.0 * (attraction * attraction - attraction);
}

/// Derivative of 4 (r⁻¹² − r⁻⁶) by r.
double lennard_jones_slope(double r) {
  return 4.0 * (-12.0 * std::pow(r, -13) + 6.0 * std::pow(r, -7));
}

}  // namespace

ArgonImpl::ArgonImpl(const ArgonOptions& options)
    : options_(options),
      atoms_(kAtomsPerUnitCell * options.unit_cells * options.unit_cells * options.unit_cells),
      box_edge_(std::cbrt(static_cast<double>(atoms_) / options.density)) {
  TORCH_CHECK(
      box_edge_ >= 2 * options.cutoff,
      "Argon: expected a box of at least two cutoffs (", 2 * options.cutoff, " σ), got ",
      box_edge_, " σ for ", atoms_, " atoms; take more unit cells or a lower density");
  self_pairs_ = register_buffer("self_pairs", torch::eye(atoms_, torch::kBool));
}

ArgonState ArgonImpl::initial_state() const {
  const auto device = self_pairs_.device();
  const auto corner = torch::arange(options_.unit_cells, torch::kDouble);
  const auto basis = torch::tensor(
      {{0.0, 0.0, 0.0}, {0.5, 0.5, 0.0}, {0.5, 0.0, 0.5}, {0.0, 0.5, 0.5}}, torch::kDouble);
  const auto corners = torch::cartesian_prod({corner, corner, corner});
  const auto sites = (corners.unsqueeze(1) + basis.unsqueeze(0)).reshape({atoms_, 3}).t();

  ArgonState state;
  state.positions = (sites * (box_edge_ / static_cast<double>(options_.unit_cells)))
                        .contiguous()
                        .to(device, options_.dtype);
  auto velocities = torch::randn({3, atoms_}, options_.dtype);
  velocities -= velocities.mean(/*dim=*/1, /*keepdim=*/true);
  const double degrees_of_freedom = 3.0 * static_cast<double>(atoms_ - 1);
  const auto temperature = velocities.square().sum() / degrees_of_freedom;
  velocities *= torch::sqrt(options_.temperature / temperature);
  state.velocities = velocities.to(device);
  compute_forces(state);
  return state;
}

ArgonState ArgonImpl::forward(const ArgonState& state) const {
  torch::NoGradGuard no_grad;
  const double half_step = 0.5 * options_.time_step;
  ArgonState next;
  const auto halfway = state.velocities + half_step * state.forces;
  next.positions =
      torch::remainder(state.positions + options_.time_step * halfway, box_edge_);
  compute_forces(next);
  next.velocities = halfway + half_step * next.forces;
  return next;
}

torch::Tensor ArgonImpl::potential_energy(const torch::Tensor& positions) const {
  const double cutoff = options_.cutoff;
  auto separation = positions.unsqueeze(2) - positions.unsqueeze(1);
  // Minimum image: of all periodic copies of a pair, the nearest.
  separation = separation - box_edge_ * torch::round(separation / box_edge_);
  auto distance_squared = separation.square().sum(/*dim=*/0);
  // An atom does not act on itself: put its own image out of range.
  distance_squared = distance_squared.masked_fill(self_pairs_, 4.0 * cutoff * cutoff);

  const double energy_at_cutoff = lennard_jones(std::pow(cutoff, -6));
  const double slope_at_cutoff = lennard_jones_slope(cutoff);
  const auto energy = lennard_jones(distance_squared.pow(-3)) - energy_at_cutoff -
      slope_at_cutoff * (distance_squared.sqrt() - cutoff);
  const auto in_range = distance_squared < cutoff * cutoff;
  return 0.5 * torch::where(in_range, energy, 0.0).sum();  // Each pair was met twice.
}

torch::Tensor ArgonImpl::kinetic_energy(const torch::Tensor& velocities) const {
  return 0.5 * velocities.square().sum();
}

void ArgonImpl::compute_forces(ArgonState& state) const {
  torch::AutoGradMode with_grad(true);
  const auto positions = state.positions.detach().requires_grad_();
  const auto energy = potential_energy(positions);
  state.forces = -torch::autograd::grad({energy}, {positions})[0];
  state.potential_energy = energy.detach();
}

}  // namespace cpp_models
