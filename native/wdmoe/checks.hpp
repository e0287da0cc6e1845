// What counts as a usable number. Knows nothing of Python.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace wdmoe {

// Sums, squares and quotients of values within these bounds can neither overflow nor vanish.
inline constexpr double kLargest = 1e100;
inline constexpr double kSmallestPositive = 1e-100;

// Index of the first value outside [low, kLargest] (NaN is outside), or n where all are inside.
inline std::size_t first_outside(const double* values, std::size_t n, double low) {
    // Vectors by hand (a GCC and Clang extension): compilers leave the plain loop scalar, at twice the time.
    typedef double Pair __attribute__((vector_size(16)));
    typedef std::int64_t Mask __attribute__((vector_size(16)));
    constexpr std::size_t block = 16;
    std::size_t start = 0;
    for (; n - start >= block; start += block) {
        Mask inside = {-1, -1};
        for (std::size_t i = start; i < start + block; i += 2) {
            Pair pair;
            std::memcpy(&pair, values + i, sizeof pair);
            inside &= (pair >= low) & (pair <= kLargest);
        }
        if ((inside[0] & inside[1]) == 0) break;
    }
    for (; start < n; ++start) {
        if (!(values[start] >= low && values[start] <= kLargest)) return start;
    }
    return n;
}

// Whether no value is NaN or infinite: those are the numbers whose exponent bits are all ones.
inline bool all_finite(const float* values, std::size_t n) {
    typedef std::uint32_t Quad __attribute__((vector_size(16)));
    typedef std::int32_t Mask __attribute__((vector_size(16)));
    constexpr std::uint32_t exponent = 0x7f800000u;
    constexpr std::size_t block = 32;
    std::size_t start = 0;
    for (; n - start >= block; start += block) {
        Mask found = {0, 0, 0, 0};
        for (std::size_t i = start; i < start + block; i += 4) {
            Quad bits;
            std::memcpy(&bits, values + i, sizeof bits);
            found |= (bits & exponent) == exponent;
        }
        if ((found[0] | found[1] | found[2] | found[3]) != 0) return false;
    }
    for (; start < n; ++start) {
        if ((std::bit_cast<std::uint32_t>(values[start]) & exponent) == exponent) return false;
    }
    return true;
}

}  // namespace wdmoe
