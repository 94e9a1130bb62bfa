/// Simulates liquid argon and watches over the conservation of energy.
#include "cpp_models/argon.h"
#include "program.h"

#include <algorithm>
#include <cmath>

namespace {

void run(int argc, char** argv) {
  cpp_models::ArgonOptions options;
  examples::Program program(
      "simulate_argon", "Simulates liquid argon by Lennard-Jones molecular dynamics.", 1000);
  program.option("unit-cells", options.unit_cells, "Edge of the initial lattice: 4 n³ atoms.");
  program.option("density", options.density, "Atoms per σ³ (σ = 0.34 nm).");
  program.option("temperature", options.temperature, "Of the lattice, in ε/k (120 K).");
  program.option("time-step", options.time_step, "In τ (2.15 ps).");
  program.parse(argc, argv);

  cpp_models::Argon argon(options);
  argon->to(program.device());
  const auto atoms = static_cast<double>(argon->atoms());
  std::printf(
      "%.0f atoms in a box of %.3f σ, %.1f ps\n", atoms, argon->box_edge(),
      static_cast<double>(program.steps()) * options.time_step * cpp_models::kArgonPicoseconds);

  auto state = argon->initial_state();
  const auto kinetic_energy = [&] {
    return argon->kinetic_energy(state.velocities).item<double>();
  };
  const double initial_energy = kinetic_energy() + state.potential_energy.item<double>();
  double drift = 0.0;
  double largest_drift = 0.0;
  while (program.next_step()) {
    state = argon->forward(state);
    if (program.log_due()) {
      const double kinetic = kinetic_energy();
      const double energy = kinetic + state.potential_energy.item<double>();
      drift = (energy - initial_energy) / std::abs(initial_energy);
      largest_drift = std::max(largest_drift, std::abs(drift));
      program.log(
          {{"energy_per_atom", energy / atoms},
           {"kelvin", cpp_models::kArgonKelvin * 2.0 / 3.0 * kinetic / (atoms - 1)}});
    }
  }
  program.result("relative_energy_drift", drift);
  program.result("largest_relative_energy_drift", largest_drift);
  program.finish();
}

}  // namespace

int main(int argc, char** argv) {
  return examples::guarded([&] { run(argc, argv); });
}
