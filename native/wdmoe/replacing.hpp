// Experts that are far away replaced by similar ones that are near. Knows nothing of Python.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace wdmoe {

struct ReplaceTask {
    std::size_t tokens, top_k, n_experts;
    const double* weight;      // (tokens, top_k)
    const double* similarity;  // (n_experts, n_experts) how well the column stands in for the row
    const double* seconds;     // (n_experts,) of one token; infinite where nobody serves the expert
    double least_similarity, times_faster, most_share;
};

// In place. experts (tokens, top_k), checked by the caller. wdmoe/solver/substitution.py says what it does.
inline void replace_far(const ReplaceTask& task, std::int32_t* experts) {
    std::vector<std::vector<std::int32_t>> substitutes(task.n_experts);  // best first
    for (std::size_t e = 0; e < task.n_experts; ++e) {
        const double* alike = task.similarity + e * task.n_experts;
        for (std::size_t f = 0; f < task.n_experts; ++f) {
            if (f == e || !(alike[f] >= task.least_similarity)) continue;
            if (task.seconds[f] * task.times_faster <= task.seconds[e] && task.seconds[f] < task.seconds[e]) {
                substitutes[e].push_back(static_cast<std::int32_t>(f));
            }
        }
        std::stable_sort(substitutes[e].begin(), substitutes[e].end(),
                         [alike](std::int32_t a, std::int32_t b) { return alike[a] > alike[b]; });
    }
    std::vector<std::int32_t> used;  // the token's experts, those that were replaced too
    std::vector<std::size_t> order(task.top_k);
    for (std::size_t t = 0; t < task.tokens; ++t) {
        std::int32_t* mine = experts + t * task.top_k;
        const double* weight = task.weight + t * task.top_k;
        double sum = 0.0;
        bool far = false;
        for (std::size_t j = 0; j < task.top_k; ++j) {
            order[j] = j;
            if (mine[j] < 0) continue;
            sum += weight[j];
            far = far || !substitutes[mine[j]].empty();
        }
        if (!far) continue;
        std::stable_sort(order.begin(), order.end(), [weight](auto a, auto b) { return weight[a] > weight[b]; });
        used.assign(mine, mine + task.top_k);
        for (const std::size_t j : order) {
            if (mine[j] < 0 || weight[j] > task.most_share * sum) continue;
            for (const std::int32_t f : substitutes[mine[j]]) {
                if (std::find(used.begin(), used.end(), f) != used.end()) continue;
                mine[j] = f;
                used.push_back(f);
                break;
            }
        }
    }
}

}  // namespace wdmoe
