// Sums the replies of several devices into one layer output. Knows nothing of Python.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace wdmoe {

// out[rows[i]] += values[i], or += weights[i] * values[i] where weights is not null, for i = 0, 1, ... in that order.
// out (tokens, hidden), values (n, hidden). Throws std::invalid_argument before anything is written.
inline void add_rows(const float* __restrict values, const std::int32_t* rows, const float* weights, std::size_t n,
                     std::size_t tokens, std::size_t hidden, float* __restrict out) {
    for (std::size_t i = 0; i < n; ++i) {
        if (rows[i] < 0 || static_cast<std::size_t>(rows[i]) >= tokens) {
            throw std::invalid_argument("rows[" + std::to_string(i) + "] is " + std::to_string(rows[i]) + ", there are " +
                                        std::to_string(tokens) + " tokens");
        }
    }
    for (std::size_t i = 0; i < n; ++i) {
        const float* from = values + i * hidden;
        float* to = out + static_cast<std::size_t>(rows[i]) * hidden;
        if (weights == nullptr) {
            for (std::size_t j = 0; j < hidden; ++j) to[j] += from[j];
        } else {
            const float weight = weights[i];
            for (std::size_t j = 0; j < hidden; ++j) to[j] += weight * from[j];
        }
    }
}

// out[t] *= factors[t]
inline void scale_rows(const float* factors, std::size_t tokens, std::size_t hidden, float* __restrict out) {
    for (std::size_t t = 0; t < tokens; ++t) {
        const float factor = factors[t];
        for (std::size_t j = 0; j < hidden; ++j) out[t * hidden + j] *= factor;
    }
}

}  // namespace wdmoe
