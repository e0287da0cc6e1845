// Whether a device's answer has the size that its experts' answers have. Knows nothing of Python.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace wdmoe {

enum class Oddity : int { none = 0, not_finite = 1, too_small = 2, too_large = 3 };

struct OddRow {
    Oddity kind;
    std::size_t row;
};

// Sum of squares in eight lanes, of which the compiler makes vectors. Not finite exactly where a value is not: the
// square of the largest float is far below the largest double.
inline double sum_of_squares(const float* values, std::size_t n) {
    double lanes[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    std::size_t start = 0;
    for (; n - start >= 8; start += 8) {
        for (std::size_t j = 0; j < 8; ++j) {
            const double value = values[start + j];
            lanes[j] += value * value;
        }
    }
    for (std::size_t j = 0; start + j < n; ++j) {
        const double value = values[start + j];
        lanes[j] += value * value;
    }
    double sum = 0;
    for (double lane : lanes) sum += lane;
    return sum;
}

// The first row of partial (tokens, hidden) whose norm no honest device would give, in this order of judgement: a value
// that is not finite, anywhere; then a norm out of bounds.
//
// Row t is the sum of weights[i] * output over the pairs i with rows[i] == t; pairs of experts[e] follow each other,
// counts[e] of them. An output of expert e has a norm within [low[e], high[e]]. So the sum has at most that of all
// |weight| * high. Outputs of different experts point anywhere, so the least is taken as if they were orthogonal, times
// least_share: two that cancel each other are honest, and odd.
//
// Throws std::invalid_argument where an index is out of range or the counts do not add up to pairs.
inline OddRow odd_row(const float* partial, std::size_t tokens, std::size_t hidden, const std::int32_t* experts,
                      const std::int32_t* counts, std::size_t n_counts, const std::int32_t* rows, const float* weights,
                      std::size_t pairs, const double* low, const double* high, std::size_t n_experts,
                      double least_share) {
    std::vector<double> most(tokens, 0.0), least(tokens, 0.0);
    std::size_t pair = 0;
    for (std::size_t i = 0; i < n_counts; ++i) {
        if (experts[i] < 0 || static_cast<std::size_t>(experts[i]) >= n_experts) {
            throw std::invalid_argument("there is no expert " + std::to_string(experts[i]) + " of " +
                                        std::to_string(n_experts));
        }
        if (counts[i] < 0 || static_cast<std::size_t>(counts[i]) > pairs - pair) {
            throw std::invalid_argument("counts must add up to the " + std::to_string(pairs) + " rows");
        }
        for (const std::size_t end = pair + static_cast<std::size_t>(counts[i]); pair < end; ++pair) {
            if (rows[pair] < 0 || static_cast<std::size_t>(rows[pair]) >= tokens) {
                throw std::invalid_argument("rows[" + std::to_string(pair) + "] is " + std::to_string(rows[pair]) +
                                            ", there are " + std::to_string(tokens) + " tokens");
            }
            const double weight = std::fabs(static_cast<double>(weights[pair]));
            const double floor = weight * low[experts[i]];
            most[static_cast<std::size_t>(rows[pair])] += weight * high[experts[i]];
            least[static_cast<std::size_t>(rows[pair])] += floor * floor;
        }
    }
    if (pair != pairs) throw std::invalid_argument("counts must add up to the " + std::to_string(pairs) + " rows");
    OddRow found{Oddity::none, 0};
    for (std::size_t t = 0; t < tokens; ++t) {
        const double squares = sum_of_squares(partial + t * hidden, hidden);
        if (!std::isfinite(squares)) return {Oddity::not_finite, t};
        if (found.kind != Oddity::none) continue;
        const double norm = std::sqrt(squares);
        if (norm > most[t]) {
            found = {Oddity::too_large, t};
        } else if (norm < least_share * std::sqrt(least[t])) {
            found = {Oddity::too_small, t};
        }
    }
    return found;
}

}  // namespace wdmoe
