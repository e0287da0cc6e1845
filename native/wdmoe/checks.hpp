// What counts as a usable number. Knows nothing of Python.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

namespace wdmoe {

// Sums, squares and quotients of values within these bounds can neither overflow nor vanish.
inline constexpr double kLargest = 1e100;
inline constexpr double kSmallestPositive = 1e-100;

// Index of the first value outside [low, kLargest] (NaN is outside), or n where all are inside.
inline std::size_t first_outside(const double* values, std::size_t n, double low) {
    constexpr std::size_t block = 64;  // no early exit within a block: this is what lets it vectorise
    for (std::size_t start = 0; start < n; start += block) {
        const std::size_t end = n - start < block ? n : start + block;
        std::int64_t outside = 0;
        for (std::size_t i = start; i < end; ++i) {
            outside |= static_cast<std::int64_t>(!((values[i] >= low) & (values[i] <= kLargest)));
        }
        if (outside == 0) continue;
        for (std::size_t i = start; i < end; ++i) {
            if (!(values[i] >= low && values[i] <= kLargest)) return i;
        }
    }
    return n;
}

// Whether no value is NaN or infinite: those are the numbers whose exponent bits are all ones.
inline bool all_finite(const float* values, std::size_t n) {
    constexpr std::uint32_t exponent = 0x7f800000u;
    constexpr std::size_t block = 4096;
    for (std::size_t start = 0; start < n; start += block) {
        const std::size_t end = n - start < block ? n : start + block;
        std::uint32_t found = 0;
        for (std::size_t i = start; i < end; ++i) {
            found |= static_cast<std::uint32_t>((std::bit_cast<std::uint32_t>(values[i]) & exponent) == exponent);
        }
        if (found != 0) return false;
    }
    return true;
}

}  // namespace wdmoe
