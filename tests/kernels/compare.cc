#include "tests/kernels/compare.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <sstream>

namespace resa::testing {
namespace {

std::string Cell(size_t i, size_t columns) {
  return "[" + std::to_string(i / columns) + ", " + std::to_string(i % columns) + "]";
}

bool SameClass(double got, double want) {
  if (std::isnan(want)) return std::isnan(got);
  if (std::isinf(want)) return got == want;
  return std::isfinite(got);
}

// Of the 8 significant bits of a bf16, at the greater of the two magnitudes.
double HalfUlp(double got, double want) {
  const double magnitude = std::max({std::abs(got), std::abs(want), 0x1p-126});
  return std::ldexp(1.0, std::ilogb(magnitude) - 8);
}

std::string CompareBeyond(std::span<const float> got, std::span<const double> want, size_t columns,
                          double relative_l2, bool is_bf16) {
  std::ostringstream out;
  if (got.size() != want.size()) {
    out << got.size() << " values, expected " << want.size();
    return out.str();
  }
  double error = 0, norm = 0, worst = -1;
  size_t worst_at = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    if (!SameClass(got[i], want[i])) {
      out << Cell(i, columns) << " is " << got[i] << ", expected " << want[i];
      return out.str();
    }
    if (!std::isfinite(want[i])) continue;
    const double rounding = is_bf16 ? HalfUlp(got[i], want[i]) : 0;
    const double difference = std::max(0.0, std::abs(got[i] - want[i]) - rounding);
    error += difference * difference;
    norm += want[i] * want[i];
    if (difference > worst) {
      worst = difference;
      worst_at = i;
    }
  }
  const double relative = norm > 0 ? std::sqrt(error / norm) : std::sqrt(error);
  if (relative <= relative_l2) return "";
  out << "relative L2 error " << relative << " > " << relative_l2 << "; worst "
      << Cell(worst_at, columns) << " is " << got[worst_at] << ", expected " << want[worst_at];
  return out.str();
}

}  // namespace

std::string Compare(std::span<const float> got, std::span<const double> want, size_t columns,
                    double relative_l2) {
  return CompareBeyond(got, want, columns, relative_l2, /*is_bf16=*/false);
}

std::string CompareStored(std::span<const float> got, std::span<const double> want, size_t columns,
                          kernels::DType stored, double relative_l2) {
  return CompareBeyond(got, want, columns, relative_l2, stored == kernels::DType::kBF16);
}

std::string CompareBits(std::span<const float> got, std::span<const float> want, size_t columns) {
  if (got.size() != want.size()) return "sizes differ";
  for (size_t i = 0; i < got.size(); ++i) {
    if (std::bit_cast<uint32_t>(got[i]) == std::bit_cast<uint32_t>(want[i])) continue;
    std::ostringstream out;
    out.precision(9);
    out << Cell(i, columns) << " is " << got[i] << ", expected the bits of " << want[i];
    return out.str();
  }
  return "";
}

}  // namespace resa::testing
