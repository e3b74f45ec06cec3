#ifndef RESA_TESTS_KERNELS_COMPARE_H_
#define RESA_TESTS_KERNELS_COMPARE_H_

// Compares what a kernel wrote with a float64 reference.

#include <cstddef>
#include <span>
#include <string>

#include "kernels/tensor.h"

namespace resa::testing {

// Empty when `got` is as good as `want`: NaN and infinities at the same places, and the relative
// error |got - want|_2 / |want|_2 within `relative_l2`. Otherwise what is wrong, with the worst
// cell as [row, column] for `columns` columns.
std::string Compare(std::span<const float> got, std::span<const double> want, size_t columns,
                    double relative_l2);

// The same for what was rounded to `stored` as it was written. A cell of bf16 may be half a unit in
// the last place off for that alone: only what goes beyond counts as error, so the bound is that of
// the arithmetic, whatever the type.
std::string CompareStored(std::span<const float> got, std::span<const double> want, size_t columns,
                          kernels::DType stored, double relative_l2);

// Empty when both hold the same bits; otherwise the first cell that differs.
std::string CompareBits(std::span<const float> got, std::span<const float> want, size_t columns);

}  // namespace resa::testing

#endif  // RESA_TESTS_KERNELS_COMPARE_H_
